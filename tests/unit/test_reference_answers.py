"""The source model's answers: computed once, shared by later validations, and never trusted when damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compileflow.contracts import Arrays
from compileflow.source_model.interface import SourceModel
from compileflow.spec import HfTask
from compileflow.validation import reference_answers
from compileflow.validation.reference_answers import ReferenceAnswers
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

KEY = {"source model": "ab", "torch": "2.13.0"}
CALL = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}


class Counted:
    """A source model that doubles its tokens, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        return {"logits": inputs["input_ids"].astype(np.float32) * 2, "empty": np.empty((0, 2), np.float32)}


@pytest.fixture
def model() -> Counted:
    return Counted()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, lines: list[str]) -> Callable[..., ReferenceAnswers]:
    """Open the folder as a later validation does."""
    return lambda **changes: ReferenceAnswers(tmp_path, KEY | changes, report=lines.append)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_a_later_validation_gets_the_same_answer_without_a_call(
    model: Counted, opened: Callable[..., ReferenceAnswers], lines: list[str]
) -> None:
    first = opened().remembered(model.run)(CALL)
    second = opened().remembered(model.run)(CALL)
    assert model.calls == 1
    assert list(second) == list(first) == ["logits", "empty"]
    np.testing.assert_array_equal(second["logits"], [[2.0, 4.0, 6.0]])
    assert second["logits"].dtype == np.float32
    assert second["empty"].shape == (0, 2)
    assert not lines


@pytest.mark.parametrize(
    "other",
    [
        CALL | {"input_ids": np.array([[1, 2, 4]])},
        CALL | {"input_ids": np.array([[1], [2], [3]])},
        CALL | {"input_ids": np.array([[1, 2, 3]], np.int32)},
        {"input_ids": CALL["input_ids"], "token_type_ids": CALL["attention_mask"]},
    ],
    ids=["value", "shape", "type", "name"],
)
def test_another_input_is_another_answer(
    model: Counted, opened: Callable[..., ReferenceAnswers], other: Arrays
) -> None:
    run = opened().remembered(model.run)
    run(CALL)
    run(other)
    assert model.calls == 2


def test_another_way_or_another_key_is_another_answer(
    model: Counted, opened: Callable[..., ReferenceAnswers]
) -> None:
    opened().remembered(model.run)(CALL)
    opened().remembered(model.run, "float64")(CALL)
    opened(torch="2.13.1").remembered(model.run)(CALL)
    assert model.calls == 3


def test_drawn_inputs_are_not_kept(
    model: Counted, opened: Callable[..., ReferenceAnswers], tmp_path: Path
) -> None:
    answers = opened()
    answers.leave_out([CALL])
    answers.remembered(model.run)(CALL)
    assert not _files(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another answer's file"])
def test_a_damaged_file_is_reported_and_replaced(
    model: Counted, opened: Callable[..., ReferenceAnswers], tmp_path: Path, lines: list[str], damage: str
) -> None:
    opened().remembered(model.run)(CALL)
    (file,) = _files(tmp_path)
    body = file.read_bytes()
    other = CALL | {"input_ids": np.array([[7, 8, 9]])}
    opened().remembered(model.run)(other)
    (other_file,) = set(_files(tmp_path)) - {file}
    bodies = {
        "cut": body[:-4],
        "changed": body.replace(np.float32(4).tobytes(), np.float32(5).tobytes()),
        "empty": b"",
        "another answer's file": other_file.read_bytes(),
    }
    assert bodies[damage] != body
    file.write_bytes(bodies[damage])
    model.calls = 0
    for _ in range(2):
        answer = opened().remembered(model.run)(CALL)
        np.testing.assert_array_equal(answer["logits"], [[2.0, 4.0, 6.0]])
    assert model.calls == 1
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert str(file) in lines[0]


def test_a_folder_that_cannot_be_written_is_reported_once(
    model: Counted, tmp_path: Path, lines: list[str]
) -> None:
    (tmp_path / "reference").write_text("a file")
    run = ReferenceAnswers(tmp_path / "reference", KEY, report=lines.append).remembered(model.run)
    for first in range(3):
        answer = run(CALL | {"input_ids": np.array([[first, 2, 3]])})
        np.testing.assert_array_equal(answer["logits"], [[2.0 * first, 4.0, 6.0]])
    assert len(lines) == 1


def test_answers_beyond_the_limit_are_computed_again(
    model: Counted,
    opened: Callable[..., ReferenceAnswers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference_answers, "_MOST_BYTES", 20)
    run = opened().remembered(model.run)
    run(CALL)
    for _ in range(2):
        run(CALL | {"input_ids": np.array([[7, 8, 9]])})
    assert model.calls == 3
    assert len(_files(tmp_path)) == 1
    # The limit counts what earlier validations have kept.
    opened().remembered(model.run)(CALL | {"input_ids": np.array([[0, 0, 0]])})
    assert len(_files(tmp_path)) == 1


def test_the_models_that_were_used_last_stay(
    model: Counted,
    opened: Callable[..., ReferenceAnswers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference_answers, "_MOST_MODELS", 2)
    for age, torch in enumerate(["c", "b", "a"]):
        opened(torch=torch).remembered(model.run)(CALL)
        folder = max(tmp_path.iterdir(), key=lambda path: path.stat().st_ctime_ns)
        os.utime(folder, (1000 + age, 1000 + age))
    assert model.calls == 3
    assert len(list(tmp_path.iterdir())) == 2
    opened(torch="a").remembered(model.run)(CALL)
    opened(torch="b").remembered(model.run)(CALL)
    assert model.calls == 3
    opened(torch="c").remembered(model.run)(CALL)
    assert model.calls == 4


def test_a_second_validation_judges_alike_and_hardly_runs_the_source_model(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = HfTask.TEXT_CLASSIFICATION
    source_dir = tiny_model(task)
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target="torchscript", hf_task=task)
    names: list[tuple[int, ...]] = []
    run = SourceModel.run

    def counted(self: SourceModel, inputs: Arrays) -> Arrays:
        names.append(inputs["input_ids"].shape)
        return run(self, inputs)

    monkeypatch.setattr(SourceModel, "run", counted)
    # Timing calls the source model, whether or not its answer is known.
    monkeypatch.setattr("compileflow.validation.measure.measure_latency", lambda *_, **__: None)
    proofs, calls = [], []
    for number in range(2):
        names.clear()
        report_dir = tmp_path / f"report {number}"
        proofs.append(
            validate_here(
                source_dir, artifact_dir, report_dir, max_examples=16, reference_dir=tmp_path / "reference"
            )
        )
        calls.append(len(names))
    first, second = (proof.report for proof in proofs)
    for part in ("worst", "noise", "floors", "families", "coverage", "flips"):
        assert second[part] == first[part]
    assert [gate["measured"] for gate in second["verdict"]["gates"]] == [
        gate["measured"] for gate in first["verdict"]["gates"]
    ]
    # The calls that learn its interface, and those on drawn inputs.
    assert calls[0] > 50
    assert calls[1] <= 12
