"""Calibration examples of a static int8 compile: reading, refusals, batches, and their place in the cache key."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from compileflow.artifact.open import open_artifact
from compileflow.contracts.digests import file_digest
from compileflow.errors import CompileError
from compileflow.spec import TEXT_TASKS, HfTask, Precision
from compileflow.steps.calibration import (
    Calibration,
    CalibrationSettings,
    calibration_batches,
    load_calibration,
)
from compileflow.targets.onnx_runtime import OnnxRuntimeOptions
from compileflow.targets.open_vino import OpenVinoOptions
from compileflow.validation.cases import load_examples
from tests.conftest import ModelFactory
from tests.models import MAX_TOKENS, sentences
from tests.steps import Pipeline

QUESTIONS = HfTask.QUESTION_ANSWERING
STATIC = {"precision": "int8", "target_options": {"quantization": "static"}}
LINES = tuple(sentences()[:24])


def words_of(example: dict[str, str]) -> set[str]:
    return set(example.values())


def write_examples(path: Path, task: HfTask, texts: tuple[str, ...] = LINES) -> Path:
    lines: tuple[str, ...] = texts
    if task.reads_pairs:
        lines = tuple(json.dumps({"question": text, "context": text[::-1]}) for text in texts)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


class TestReading:
    @pytest.mark.parametrize("task", TEXT_TASKS)
    def test_without_a_file_the_examples_are_built_in(self, task: HfTask) -> None:
        calibration = load_calibration(task, CalibrationSettings())
        assert len(calibration.examples) == calibration.record.examples == 256
        form = {"question", "context"} if task.reads_pairs else {"text"}
        assert all(set(example) == form and all(example.values()) for example in calibration.examples)
        assert calibration.record.origin.startswith("compileflow's own ")

    @pytest.mark.parametrize("task", TEXT_TASKS)
    def test_no_model_is_judged_on_text_that_it_was_calibrated_on(self, task: HfTask) -> None:
        calibration = load_calibration(task, CalibrationSettings(max_examples=10_000))
        judged, origin, digest = load_examples(task, None, 10_000)
        assert calibration.record.origin != origin
        assert calibration.record.digest != digest
        calibration_texts = set().union(*map(words_of, calibration.examples))
        assert calibration_texts.isdisjoint(set().union(*map(words_of, judged)))

    @pytest.mark.parametrize("task", TEXT_TASKS)
    def test_user_file_is_read_in_its_order(self, task: HfTask, tmp_path: Path) -> None:
        path = write_examples(tmp_path / "own.txt", task)
        calibration = load_calibration(task, CalibrationSettings(examples_path=str(path), max_examples=5))
        first = "question" if task.reads_pairs else "text"
        assert [example[first] for example in calibration.examples] == list(LINES[:5])
        assert calibration.record.model_dump() == {
            "origin": "own.txt",
            "digest": file_digest(path),
            "examples": 5,
        }

    @pytest.mark.parametrize("task", [HfTask.TEXT_CLASSIFICATION, QUESTIONS])
    @pytest.mark.parametrize("count", [1, 2, 255])
    def test_no_more_examples_than_requested(self, task: HfTask, count: int) -> None:
        calibration = load_calibration(task, CalibrationSettings(max_examples=count))
        assert len(calibration.examples) == calibration.record.examples == count

    def test_calibration_survives_json(self) -> None:
        calibration = load_calibration(QUESTIONS, CalibrationSettings(max_examples=3))
        assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


class TestRefusals:
    @pytest.mark.parametrize(
        ("task", "content", "says"),
        [
            (HfTask.TEXT_CLASSIFICATION, b"", "holds no example"),
            (HfTask.TEXT_CLASSIFICATION, b"\n  \n", "holds no example"),
            (HfTask.TEXT_CLASSIFICATION, b'{"txt": "a"}\n', "text is missing in line 1"),
            (HfTask.TEXT_CLASSIFICATION, b"\xff\xfe\x00", "cannot be used"),
            (QUESTIONS, b"just a sentence\n", "not JSON with question and context"),
            (QUESTIONS, b'{"question": "who?"}\n', "context is missing in line 1"),
        ],
    )
    def test_unusable_file_is_a_compile_error_in_one_line(
        self, tmp_path: Path, task: HfTask, content: bytes, says: str
    ) -> None:
        path = tmp_path / "own.txt"
        path.write_bytes(content)
        with pytest.raises(CompileError, match=says) as caught:
            load_calibration(task, CalibrationSettings(examples_path=str(path)))
        assert caught.value.message.startswith("Calibration for int8: ")
        assert caught.value.hint.startswith(("Give ", "Save the file as UTF-8"))
        assert len(str(caught.value).splitlines()) == 1

    def test_missing_file_is_a_compile_error_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(CompileError, match=r"Calibration for int8: .*No such file.*nothing\.txt"):
            load_calibration(HfTask.FILL_MASK, CalibrationSettings(examples_path=str(tmp_path / "nothing.txt")))

    @pytest.mark.parametrize("texts", [["東京は日本の首都です", "これは本です"], ["", "   "]])
    def test_examples_that_the_tokenizer_does_not_know_are_refused(
        self, tiny_model: ModelFactory, texts: list[str]
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(HfTask.TEXT_CLASSIFICATION))
        with pytest.raises(CompileError, match="do not fit the model: its tokenizer knows only 0 of") as caught:
            calibration_batches(
                [{"text": text} for text in texts],
                tokenizer,
                task=HfTask.TEXT_CLASSIFICATION,
                max_length=MAX_TOKENS,
                pad_token_id=0,
            )
        assert "natural examples" in caught.value.hint


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_batches_are_ragged_int64_and_as_long_as_the_model_allows(tiny_model: ModelFactory, task: HfTask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(task))
    examples = load_calibration(task, CalibrationSettings(max_examples=20)).examples
    batches = calibration_batches(examples, tokenizer, task=task, max_length=32, pad_token_id=0)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert lengths[-1] <= 32
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        assert {array.dtype for array in batch.values()} == {np.dtype("int64")}
        assert not (batch["input_ids"] * (1 - batch["attention_mask"])).any()
    masked = sum(int((batch["input_ids"] == tokenizer.mask_token_id).sum()) for batch in batches)
    assert masked == (20 if task is HfTask.FILL_MASK else 0)


@pytest.mark.parametrize("options", [OnnxRuntimeOptions, OpenVinoOptions])
def test_only_static_int8_looks_at_examples(options: Any) -> None:
    static = options(quantization="static")
    assert [precision for precision in Precision if static.needs_calibration(precision)] == [Precision.INT8]
    assert not any(options().needs_calibration(precision) for precision in Precision)


class TestKey:
    """Each test compiles with onnx-runtime, which takes seconds."""

    @pytest.fixture
    def model(self, tiny_model: ModelFactory, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), tmp_path / "model"))

    @pytest.fixture
    def examples_file(self, tmp_path: Path) -> Path:
        return write_examples(tmp_path / "own.txt", HfTask.TEXT_CLASSIFICATION)

    @pytest.mark.slow
    def test_changed_examples_miss_touched_examples_hit_and_the_manifest_names_them(
        self, pipeline: Pipeline, model: Path, examples_file: Path, tmp_path: Path
    ) -> None:
        def compile_with(path: Path, count: int = 16) -> Any:
            calibration = {"examples_path": str(path), "max_examples": count}
            return pipeline.compile(
                pipeline.request(model, target="onnx-runtime", calibration=calibration, **STATIC)
            )

        first = compile_with(examples_file)
        manifest = open_artifact(first.uri, settings=pipeline.settings).manifest
        assert manifest.calibration is not None
        assert manifest.calibration.model_dump() == {
            "origin": "own.txt",
            "digest": file_digest(examples_file),
            "examples": 16,
        }
        assert manifest.components["default"].precision is Precision.INT8

        os.utime(examples_file, (0, 0))
        assert compile_with(examples_file).cached
        assert compile_with(Path(examples_file.rename(tmp_path / "other-name.txt"))).cached
        assert pipeline.counts["compile"] == 1

        write_examples(examples_file, HfTask.TEXT_CLASSIFICATION, LINES[::-1])
        changed = compile_with(examples_file)
        assert not changed.cached
        assert changed.why.startswith("changed: calibration examples")
        assert changed.digest != first.digest
        assert compile_with(examples_file, 15).why == "changed: calibration examples at most (16 -> 15)"

    def test_compile_without_calibration_neither_reads_nor_records_examples(
        self, pipeline: Pipeline, model: Path, examples_file: Path, tmp_path: Path
    ) -> None:
        for path in (examples_file, tmp_path / "nothing.txt"):
            artifact = pipeline.compile(pipeline.request(model, calibration={"examples_path": str(path)}))
        assert artifact.cached
        assert pipeline.counts["compile"] == 1
        assert open_artifact(artifact.uri, settings=pipeline.settings).manifest.calibration is None
