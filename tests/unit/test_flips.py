"""Which examples flipped: found, put into words and sorted, for every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow.contracts import Arrays
from compileflow.spec import HfTask, Precision
from compileflow.validation.cases import Case, load_examples
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.flips import Flip
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import build_model
from tests.unit.proving import validate_here

CLASSIFY, TAG, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION, HfTask.FEATURE_EXTRACTION
MASK, ASK = HfTask.FILL_MASK, HfTask.QUESTION_ANSWERING
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
WORDS = ("[CLS]", "anna", "lives", "in", "paris", "[SEP]")
NAN = float("nan")


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids)


def case(texts: Sequence[str], length: int = len(WORDS), positions: tuple[int, ...] = ()) -> Case:
    """Return rows of the tokens 0, 1, 2, ..., none of them padding."""
    ids = np.tile(np.arange(length, dtype=np.int64), (len(texts), 1))
    return Case("natural", "agreement", tuple(texts), {"input_ids": ids}, np.ones_like(ids), positions)


def logits(*probabilities: float) -> list[float]:
    return [float(value) for value in np.log(probabilities)]


def one_row(decisions: Decisions, text: str, before: Arrays, after: Arrays, **how: Any) -> tuple[Flip, ...]:
    sides = ({name: np.asarray(value)[None] for name, value in side.items()} for side in (before, after))
    decisions.add(case([text], **how), *sides)
    return decisions.flips(decode)


def test_a_label_that_changes_is_a_flip_with_both_labels_and_the_margin() -> None:
    decisions = Decisions(CLASSIFY, LABELS)
    before, after = {"logits": logits(0.7, 0.2, 0.1)}, {"logits": logits(0.3, 0.6, 0.1)}
    (flip,) = one_row(decisions, "x" * 300, before, after)
    assert flip.margin == pytest.approx(0.5)
    assert flip.model_dump(exclude={"margin"}) == {
        "metric": "label_agreement",
        "text": "x" * 200,
        "before": "negative",
        "after": "neutral",
        "sure": True,
    }
    assert decisions.flips_count() == 1


def test_an_equal_label_is_not_a_flip_whatever_the_numbers() -> None:
    before, after = {"logits": logits(0.7, 0.2, 0.1)}, {"logits": logits(0.4, 0.3, 0.3)}
    assert one_row(Decisions(CLASSIFY, LABELS), "a", before, after) == ()


def test_a_tie_of_the_source_model_is_not_a_flip() -> None:
    decisions = Decisions(CLASSIFY, LABELS)
    before, after = {"logits": logits(0.4502, 0.4498, 0.1)}, {"logits": logits(0.1, 0.8, 0.1)}
    assert one_row(decisions, "a", before, after) == ()
    assert decisions.flips_count() == 0
    assert [row["hits"] for row in decisions.rates()] == [1]


def test_a_flip_within_noise_is_not_sure() -> None:
    before, after = {"logits": logits(0.45, 0.40, 0.15)}, {"logits": logits(0.40, 0.45, 0.15)}
    (flip,) = one_row(Decisions(CLASSIFY, LABELS), "a", before, after)
    assert flip.margin == pytest.approx(0.05)
    assert not flip.sure


def test_an_answer_that_is_not_a_number_is_named_so() -> None:
    (flip,) = one_row(
        Decisions(CLASSIFY, LABELS), "a", {"logits": logits(0.1, 0.2, 0.7)}, {"logits": [NAN, 0.0, 1.0]}
    )
    assert (flip.before, flip.after) == ("positive", "no number")


def test_labels_decided_alone_name_those_that_changed() -> None:
    decisions = Decisions(CLASSIFY, LABELS, multi_label=True)
    before, after = {"logits": [4.0, -3.0, 2.0]}, {"logits": [4.0, 1.0, -1.0]}
    (flip,) = one_row(decisions, "a", before, after)
    assert flip.before == "neutral: no, positive: yes"
    assert flip.after == "neutral: yes, positive: no"
    # The surer of the two: sigmoid(3) - sigmoid(-3).
    assert flip.margin == pytest.approx(np.tanh(1.5))


def test_a_single_logit_is_yes_or_no() -> None:
    (flip,) = one_row(Decisions(CLASSIFY, {0: "spam"}), "a", {"logits": [2.0]}, {"logits": [-2.0]})
    assert (flip.before, flip.after) == ("spam: yes", "spam: no")


def test_tokens_are_one_row_an_example_with_the_positions_that_changed() -> None:
    before = np.tile(logits(0.8, 0.1, 0.1), (6, 1))
    after = before.copy()
    after[[1, 4]] = logits(0.1, 0.8, 0.1)
    decisions = Decisions(TAG, {0: "O", 1: "B-PER", 2: "B-LOC"})
    (flip,) = one_row(decisions, "anna lives in paris", {"logits": before}, {"logits": after})
    assert flip.before == "token 1 anna: O, token 4 paris: O"
    assert flip.after == "token 1 anna: B-PER, token 4 paris: B-PER"
    assert decisions.flips_count() == 1
    assert [(row["hits"], row["trials"]) for row in decisions.rates()] == [(4, 6)]


def test_at_most_five_tokens_are_named() -> None:
    before = np.tile(logits(0.8, 0.1, 0.1), (6, 1))
    (flip,) = one_row(Decisions(TAG, LABELS), "a", {"logits": before}, {"logits": before[:, ::-1]})
    assert flip.before.count("negative") == 5
    assert flip.before.endswith(" and 1 more")


def test_padding_never_flips() -> None:
    before = np.tile(logits(0.8, 0.1, 0.1), (1, 6, 1))
    after = before.copy()
    after[0, 4:] = logits(0.1, 0.8, 0.1)
    padded = case(["a"])
    padded.mask[0, 4:] = 0
    decisions = Decisions(TAG, LABELS)
    decisions.add(padded, {"logits": before}, {"logits": after})
    assert decisions.flips_count() == 0


def test_a_masked_word_is_named_by_the_tokenizer() -> None:
    before, after = np.zeros((6, 6)), np.zeros((6, 6))
    before[3, 4], after[3, 1] = 5.0, 5.0
    (flip,) = one_row(Decisions(MASK), "a", {"logits": before}, {"logits": after}, positions=(3,))
    assert (flip.metric, flip.before, flip.after) == ("label_agreement", "paris", "anna")


def _span(start: int, end: int, height: float = 9.0) -> Arrays:
    places = np.eye(6) * height
    return {"start_logits": places[start], "end_logits": places[end]}


def test_a_span_is_its_tokens_and_their_text() -> None:
    decisions = Decisions(ASK)
    (flip,) = one_row(decisions, "where | anna lives in paris", _span(4, 4), _span(3, 4))
    assert (flip.metric, flip.before, flip.after) == (
        "exact_span",
        "tokens 4 to 4: paris",
        "tokens 3 to 4: in paris",
    )
    assert flip.sure
    assert [row["hits"] for row in decisions.rates()] == [0]
    (flip,) = one_row(Decisions(ASK), "a", _span(1, 2), _span(4, 2))
    assert flip.after == "no span: start 4, end 2"


def test_an_end_where_the_source_model_wavers_does_not_flip_a_span() -> None:
    decisions = Decisions(ASK)
    before = _span(4, 4) | {"end_logits": _span(4, 4, height=1e-4)["end_logits"]}
    assert one_row(decisions, "a", before, _span(4, 2)) == ()
    assert [row["hits"] for row in decisions.rates()] == [1]


def _embeddings(degrees: Sequence[float]) -> Arrays:
    angles = np.radians(degrees)
    return {"last_hidden_state": np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None].repeat(2, axis=1)}


def _moved(after: Sequence[float]) -> Decisions:
    """Compare embeddings on a line, 0 to 23, with their places afterwards."""
    decisions = Decisions(EMBED)
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        texts = [f"text {number}" for number in range(24)[part]]
        decisions.add(case(texts, length=2), _embeddings(range(24)[part]), _embeddings(after[part]))
    return decisions


def test_embeddings_list_those_that_lost_most_neighbours() -> None:
    # From one end of the line to the other: all ten neighbours are others.
    decisions = _moved([30.0, *range(1, 24)])
    flips = decisions.flips(decode)
    assert (flips[0].text, flips[0].before, flips[0].after) == ("text 0", "10 nearest examples", "10 of them lost")
    assert (flips[0].margin, flips[0].sure) == (None, False)
    lost = [int(flip.after.split()[0]) for flip in flips]
    assert lost == sorted(lost, reverse=True)
    assert decisions.flips_count() == len(flips) == sum(row["hits"] < row["trials"] for row in decisions.rates())


def test_of_many_moved_embeddings_ten_are_listed_and_all_are_counted() -> None:
    decisions = _moved([number * 7 % 24 for number in range(24)])
    assert len(decisions.flips(decode)) == 10
    assert decisions.flips_count() == 24
    assert _moved(list(range(24))).flips_count() == 0


def test_the_surest_come_first_and_the_rest_is_counted() -> None:
    decisions = Decisions(CLASSIFY, LABELS)
    for number in range(60):
        gap = 0.002 + number * 0.005
        before, after = logits(0.5 + gap / 2, 0.5 - gap / 2, 1e-9), logits(0.2, 0.7, 0.1)
        one_row(decisions, f"text {number}", {"logits": before}, {"logits": after})
    flips = decisions.flips(decode)
    assert len(flips) == 50
    assert decisions.flips_count() == 60
    assert flips[0].text == "text 59"
    margins = [flip.margin for flip in flips]
    assert margins == sorted(margins, reverse=True)


def test_outputs_of_the_wrong_shape_are_left_to_the_shape_gate() -> None:
    decisions = Decisions(CLASSIFY, LABELS)
    assert one_row(decisions, "a", {"logits": logits(0.7, 0.2, 0.1)}, {"logits": [0.0, 1.0]}) == ()


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")
@pytest.mark.parametrize("hf_task", [CLASSIFY, MASK])
def test_report_of_a_refused_artifact_names_the_examples(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, hf_task: HfTask
) -> None:
    # Another model stands for a wrong compile.
    other_model = build_model(tmp_path / "other", hf_task, seed=1)
    artifact_dir = in_process.compile(other_model, tmp_path / "artifact", target="torchscript", hf_task=hf_task)
    proof = validate_here(tiny_model(hf_task), artifact_dir, tmp_path / "report")
    assert proof.outcome == "fail"
    flips, count = proof.report["flips"], proof.report["flips_count"]
    agreement = proof.report["figures"]["label_agreement"]
    assert count == round((1 - agreement) * proof.report["examples_count"]) > 0
    assert len(flips) == min(count, 50)
    assert all(flip["text"] and flip["before"] != flip["after"] for flip in flips)
    if hf_task is CLASSIFY:
        assert {flip["before"] for flip in flips} <= {"negative", "neutral", "positive"}
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert f"{count} of 40 examples lead to another decision" in page


def test_labels_of_the_examples_tell_changes_for_the_worse_from_those_for_the_better() -> None:
    decisions = Decisions(CLASSIFY, LABELS)
    before = np.array([logits(0.7, 0.2, 0.1), logits(0.7, 0.2, 0.1), logits(0.7, 0.2, 0.1), logits(0.7, 0.2, 0.1)])
    after = before[:, ::-1]
    named = case(["a", "b", "c", "d"])
    # The compiled model says positive (2) instead of negative (0).
    truths = replace(named, truths=("negative", "2", "neutral", None))
    decisions.add(truths, {"logits": before}, {"logits": after})
    changes = [(row.get("right_to_wrong"), row.get("wrong_to_right")) for row in decisions.rates()]
    assert changes == [(1, 0), (0, 1), (0, 0), (None, None)]


def test_a_label_stands_beside_its_text_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(
        '{"text": "good", "label": "positive"}\n{"text": "bad", "label": 0}\n{"text": "so"}\n', "utf-8"
    )
    examples, _, _ = load_examples(CLASSIFY, str(path), 10)
    assert [example.get("label") for example in examples] == ["positive", "0", None]


@pytest.mark.parametrize(
    ("precision", "gap", "is_tie"),
    [
        # Two steps of the grid, as a share of half a range of 2000: 0.2, 1.95, 15.6 and 15.7.
        (Precision.FP32, 0.19, True),
        (Precision.FP32, 0.21, False),
        (Precision.FP16, 1.9, True),
        (Precision.FP16, 2.1, False),
        (Precision.BF16, 15.0, True),
        (Precision.BF16, 16.0, False),
        (Precision.INT8, 15.0, True),
        (Precision.INT8, 16.0, False),
    ],
)
def test_two_logits_closer_than_the_grid_of_the_format_are_a_tie(
    precision: Precision, gap: float, is_tie: bool
) -> None:
    decisions = Decisions(CLASSIFY, LABELS, precision=precision)
    before, after = ({"logits": [1000.0, 1000.0 + change, -1000.0]} for change in (-gap, gap))
    flips = one_row(decisions, "a", before, after)
    (row,) = decisions.rates()
    assert (row["hits"], row["ties"], bool(flips)) == (int(is_tie), int(is_tie), not is_tie)
    assert decisions.scalars()["confident_flips"] == (0 if is_tie or gap < 0.2 else 1)


def test_hundreds_of_labels_are_not_all_ties() -> None:
    # Each of 500 probabilities is near 0.002, and so is the margin, but one logit is clearly the largest.
    before, after = np.zeros(500), np.zeros(500)
    before[3], after[4] = 0.5, 0.5
    decisions = Decisions(CLASSIFY, {})
    (flip,) = one_row(decisions, "a", {"logits": before}, {"logits": after})
    assert (flip.before, flip.after) == ("3", "4")
    assert flip.margin is not None
    assert flip.margin < 2e-3


def test_a_single_logit_near_zero_is_a_tie_by_the_size_of_the_others() -> None:
    decisions = Decisions(CLASSIFY, {0: "spam"}, precision=Precision.BF16)
    for number, (before, after) in enumerate([(1000.0, 1000.0), (4.0, -4.0), (40.0, -40.0)]):
        one_row(decisions, f"text {number}", {"logits": [before]}, {"logits": [after]})
    rows = [row for row in decisions.rates() if row["metric"] == "label_agreement"]
    # 2^-6 of 1000 is 15.6.
    assert [row["hits"] for row in rows] == [1, 1, 0]


@pytest.mark.parametrize(("precision", "flips"), [(Precision.INT8, 1), (Precision.BF16, 3)])
def test_at_int8_one_of_a_thousand_sure_decisions_may_flip(precision: Precision, flips: int) -> None:
    decisions = Decisions(TAG, LABELS, precision=precision)
    # 334 texts of 6 tokens are 2004 decisions, of which two may flip.
    before = np.tile(logits(0.8, 0.1, 0.1), (334, 6, 1))
    after = before.copy()
    after[[1, 2, 3], 4] = logits(0.1, 0.8, 0.1)
    decisions.add(case(["a"] * 334), {"logits": before}, {"logits": after})
    assert decisions.scalars()["confident_flips"] == flips
