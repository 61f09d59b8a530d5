"""The page of architectures is as new as transformers, and classes of families that once failed work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.architectures.classes import DECODER_TASKS, decoder_classes, list_digest
from benchmarks.architectures.decoder_page import decoder_page
from benchmarks.architectures.sweep import key_of
from benchmarks.forked_checks import read_results

ROOT = Path(__file__).parents[2]
# One class of each family that once failed: without sdpa, with padding on the left, with a required last token,
# with convolutions between tokens, with hashed tokens, with positions after the padding, with decoders, with
# positions of images, with states that are read in parts, rows that are read in steps, and processors that fix or
# keep a size.
SAMPLE = (
    "audio-classification/whisper",
    "automatic-speech-recognition/wav2vec2-conformer",
    "feature-extraction/canine",
    "feature-extraction/ernie4_5_vl_moe",
    "feature-extraction/led",
    "feature-extraction/mamba2",
    "feature-extraction/mpnet",
    "feature-extraction/t5",
    "fill-mask/esm",
    "image-classification/mobilevit",
    "question-answering/bart",
    "question-answering/mobilebert",
    "question-answering/xlnet",
    "text-classification/nystromformer",
    "text-classification/qwen3_5_text",
    "text-classification/deberta-v2",
    "text-classification/perceiver",
    "token-classification/bloom",
)

# Families without one graph for all lengths.
REFUSED = ("feature-extraction/rwkv", "text-classification/funnel")


def test_page_is_as_new_as_the_list_of_classes() -> None:
    page = (ROOT / "docs" / "reference" / "architectures.md").read_text("utf-8")
    assert f"<!-- classes: {list_digest()} -->" in page, "the list of classes has changed: run make architectures"


def test_page_of_decoders_is_as_new_as_the_list_of_classes() -> None:
    page = (ROOT / "docs" / "reference" / "decoders.md").read_text("utf-8")
    assert f"<!-- classes: {list_digest(DECODER_TASKS)} -->" in page, (
        "the list has changed: run make architectures"
    )


def test_page_of_decoders_says_what_happened_to_each() -> None:
    exact, refused, wrong, crashed, unknown = decoder_classes()[:5]
    outcomes = {
        (exact, "openvino"): ("works", "done", ""),
        (exact, "onnx-runtime"): ("works", "done", ""),
        (refused, "openvino"): ("refused", "compile", "It loops."),
        (refused, "onnx-runtime"): ("refused", "compile", "It loops."),
        (wrong, "openvino"): ("fails", "batch", "2 of 3 texts differ"),
        (crashed, "openvino"): ("fails", "compile", "SIGSEGV"),
        (unknown, "openvino"): ("transformers", "reference", "It takes images."),
    }
    results = {
        key_of(model_class, target): {
            "outcome": outcome, "stage": stage, "reason": reason, "versions": "torch 1.0", "processor": "a chip",
        }
        for (model_class, target), (outcome, stage, reason) in outcomes.items()
    }  # fmt: skip
    page = decoder_page(decoder_classes(), results)
    assert "1 of 169 model types write the same tokens on both `openvino` and `onnx-runtime`." in page
    assert "Processor: a chip. Versions: torch 1.0." in page
    for words in (
        f"| `{exact.model_type}` | {exact.name} | yes | yes |",
        f"| `{refused.model_type}` | {refused.name} | refused | refused |",
        f"| `{refused.model_type}` | openvino, onnx-runtime | It loops. |",
        f"| `{wrong.model_type}` | {wrong.name} | wrong | not run |",
        f"| `{wrong.model_type}` | openvino | 2 of 3 texts differ |",
        f"| `{crashed.model_type}` | {crashed.name} | fails | not run |",
        f"| `{unknown.model_type}` | {unknown.name} | not built | not run |",
    ):
        assert words in page


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-runtime", "openvino"])
def test_classes_of_families_that_once_failed_work_or_are_refused(tmp_path: Path, target: str) -> None:
    results = tmp_path / "results.jsonl"
    classes = [argument for name in (*SAMPLE, *REFUSED) for argument in ("--class", name)]
    command = [sys.executable, "-m", "benchmarks.architectures", "--results", str(results), "--target", target]
    process = subprocess.run([*command, *classes], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    outcomes = {f"{line['task']}/{line['model_type']}": line for line in read_results(results).values()}
    expected = dict.fromkeys(SAMPLE, "works") | dict.fromkeys(REFUSED, "refused")
    wrong = {name: line for name, line in outcomes.items() if line["outcome"] != expected[name]}
    assert not wrong
    assert outcomes.keys() == expected.keys()
