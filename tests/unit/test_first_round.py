"""The first round of target auto: what is validated, in which order, what is left out and why."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from compileflow import catalog
from compileflow.selection.candidates import Candidate
from compileflow.selection.choice import choose
from compileflow.selection.comparison_file import export_comparison, read_comparison
from compileflow.selection.first_round import next_to_validate, unpromising
from compileflow.selection.run import run_any_target
from compileflow.spec import HfTask, Objective
from compileflow.steps import validate as validate_step
from tests.conftest import ModelFactory
from tests.steps import Pipeline
from tests.unit.test_choice import candidate

LATENCY = Objective()
_PLANTED = '''
import time

from compileflow.targets.torchscript import TorchScriptTarget


class Planted:
    def __init__(self, runner):
        self.runner = runner

    def close(self):
        self.runner.close()


class Hasty(Planted):
    """Answers every call of a shape like the first one: fast, and wrong."""

    def __init__(self, runner):
        super().__init__(runner)
        self.answers = {}

    def run(self, inputs):
        shape = next(iter(inputs.values())).shape
        if shape not in self.answers:
            self.answers[shape] = self.runner.run(inputs)
        return {name: value.copy() for name, value in self.answers[shape].items()}


class Slow(Planted):
    """Answers rightly, and late."""

    def run(self, inputs):
        time.sleep(0.1)
        return self.runner.run(inputs)


class HastyTarget(TorchScriptTarget):
    name = "hasty"

    def load(self, *args, **settings):
        return Hasty(super().load(*args, **settings))


class SlowTarget(TorchScriptTarget):
    name = "slow"

    def load(self, *args, **settings):
        return Slow(super().load(*args, **settings))
'''


def tried(*candidates: Candidate) -> list[Candidate]:
    """Return candidates after the first round; their reason is a verdict that is certain already."""
    return [
        rival.model_copy(
            update={"outcome": "unvalidated", "reason": "" if rival.outcome == "pass" else rival.reason}
        )
        for rival in candidates
    ]


def searched(
    first_round: Sequence[Candidate],
    verdicts: Sequence[Candidate],
    objective: Objective = LATENCY,
    *,
    allow_warn: bool = False,
) -> tuple[list[int], dict[int, str], int | None]:
    """Validate until no other candidate can win; return the order, what is left out, and the winner."""
    validated: dict[int, Candidate] = {}
    while (place := next_to_validate(first_round, validated, objective, allow_warn=allow_warn)) is not None:
        validated[place] = verdicts[place]
    left_out = unpromising(first_round, validated, objective, allow_warn=allow_warn)
    final = [validated.get(place, rival) for place, rival in enumerate(first_round)]
    return list(validated), left_out, choose(final, objective, allow_warn=allow_warn)[0]


def test_candidates_are_validated_in_the_order_of_their_speed_until_the_rest_is_too_slow() -> None:
    rivals = (candidate("slow", 0.9), candidate("close", 0.44), candidate("fast", 0.4), candidate("slower", 0.53))
    order, left_out, winner = searched(tried(*rivals), rivals)
    assert order == [2, 1]
    assert winner == 2
    assert left_out == {
        0: "it cannot win: 0.90 of eager's latency in the first round, and fast fp32, which can be chosen, has "
        "0.40 of eager's latency",
        3: "it cannot win: 0.53 of eager's latency in the first round, and fast fp32, which can be chosen, has "
        "0.40 of eager's latency",
    }


def test_close_pair_is_validated_and_the_better_report_wins() -> None:
    first_round = tried(candidate("a", 0.40), candidate("b", 0.45))
    order, left_out, winner = searched(first_round, (candidate("a", 0.46), candidate("b", 0.42)))
    assert (order, left_out, winner) == ([0, 1], {}, 1)


def test_race_tells_close_candidates_apart() -> None:
    rivals = (candidate("a", 0.40), candidate("slower", 0.43), candidate("equal", 0.41), candidate("c", 0.50))
    validated = {0: rivals[0]}
    assert unpromising(tried(*rivals), validated, LATENCY, allow_warn=False) == {}
    left_out = unpromising(tried(*rivals), validated, LATENCY, allow_warn=False, raced={0, 1, 2})
    assert left_out == {
        1: "it cannot win: 0.43 of eager's latency in a race, and a fp32, which can be chosen, has 0.40 of "
        "eager's latency"
    }


def test_candidate_that_fails_makes_room_for_slower_ones() -> None:
    rivals = (candidate("fast", 0.2, outcome="fail", reason="fail: r"), candidate("b", 0.5), candidate("c", 0.9))
    first_round = tried(candidate("fast", 0.2), *rivals[1:])
    order, left_out, winner = searched(first_round, rivals)
    assert (order, list(left_out), winner) == ([0, 1], [2], 1)


def test_candidate_that_is_sure_to_fail_is_left_out_once_another_can_be_chosen() -> None:
    wrong = candidate("wrong", 0.1, 0.8, outcome="fail", reason="fail: label_agreement measured 0.2")
    rivals = (wrong, candidate("right", 0.9))
    order, left_out, winner = searched(tried(*rivals), rivals)
    assert (order, winner) == ([1], 1)
    assert left_out == {0: "it cannot win: the first round shows the verdict fail: label_agreement measured 0.2"}
    # Without another one, the whole verdict is worth its time: its report says what is wrong.
    assert searched(tried(wrong), [wrong]) == ([0], {}, None)


@pytest.mark.parametrize("goal", ["latency", "throughput", "size"])
def test_winner_is_that_of_validating_everything(goal: str) -> None:
    draw = np.random.default_rng(7)
    for _ in range(200):
        verdicts = [
            candidate(
                f"t{number}",
                tuple(draw.uniform(0.2, 1.5) for _ in range(2)),
                float(draw.choice((0.0, 0.01, 0.3))),
                outcome=str(draw.choice(("pass", "pass", "warn", "fail", "error"))),
                size_bytes=int(draw.choice((20, 40, 80))),
            )
            for number in range(8)
        ]
        # The few calls of the first round measure up to 10 % more or less.
        first_round = tried(
            *(
                candidate(
                    verdict.target,
                    tuple(timing.ratio * draw.uniform(0.9, 1.1) for timing in verdict.latencies),
                    verdict.accuracy_loss,
                    size_bytes=verdict.size_bytes,
                )
                for verdict in verdicts
            )
        )
        objective = Objective(goal=goal, max_accuracy_loss=(None, 0.1)[draw.integers(2)])
        allow_warn = draw.random() < 0.5
        winner = searched(first_round, verdicts, objective, allow_warn=allow_warn)[2]
        assert winner == choose(verdicts, objective, allow_warn=allow_warn)[0]


def test_budgets_need_no_validation_where_the_number_is_known() -> None:
    rivals = (candidate("lossy", 0.1, 0.2), candidate("large", 0.2, size_bytes=10**9), candidate("fits", 0.9))
    objective = Objective(max_accuracy_loss=0.1, max_size_bytes=10**8)
    order, left_out, winner = searched(tried(*rivals), rivals, objective)
    assert (order, winner) == ([2], 2)
    assert left_out == {
        0: "accuracy loss 20 %, at most 10 % is allowed",
        1: "size 1000.0 MB, at most 100.0 MB is allowed",
    }


def test_size_is_known_exactly_and_speed_decides_between_equals() -> None:
    rivals = (
        candidate("large", 0.1, size_bytes=41),
        candidate("small", 0.9, size_bytes=40),
        candidate("small and fast", 0.5, size_bytes=40),
    )
    order, left_out, winner = searched(tried(*rivals), rivals, Objective(goal="size"))
    assert (order, list(left_out), winner) == ([2], [0, 1], 2)
    assert "0.90 of eager's latency" in left_out[1]


def test_candidate_that_was_not_timed_is_validated_last() -> None:
    rivals = (candidate("unknown", None, None), candidate("a", 0.5))
    order, left_out, _ = searched(tried(*rivals), rivals)
    assert (order, left_out) == ([1, 0], {})


def test_processor_time_counts_where_a_trial_was_disturbed() -> None:
    def disturbed(rival: Candidate, cpu_ratio: float) -> Candidate:
        latencies = [
            timing.model_copy(update={"cpu_ratio": cpu_ratio, "busy": "others"}) for timing in rival.latencies
        ]
        return rival.model_copy(update={"latencies": tuple(latencies)})

    # The disturbed latencies say the opposite.
    rivals = [
        disturbed(candidate("a", 0.9), 0.3),
        disturbed(candidate("b", 0.1), 0.8),
        disturbed(candidate("close", 0.1), 0.44),
    ]
    order, left_out, _ = searched(tried(*rivals), rivals)
    assert order == [0, 2]
    assert left_out[1].startswith("it cannot win: 0.80 of eager's processor time in the first round, and a fp32")


@pytest.fixture
def planted_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sequence[str]]:
    """Install two targets of a third party: a fast one that answers wrongly, and a right one that is slow."""
    info = tmp_path / "plugins" / "planted-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[compileflow.targets]\nhasty = planted_targets:HastyTarget\nslow = planted_targets:SlowTarget\n"
    )
    (tmp_path / "plugins" / "planted_targets.py").write_text(_PLANTED)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    catalog._with_entry_points.cache_clear()
    yield ("hasty", "slow")
    catalog._with_entry_points.cache_clear()
    sys.modules.pop("planted_targets", None)


@pytest.mark.slow
def test_interrupted_search_goes_on_and_leaves_out_what_is_wrong_or_slow(
    pipeline: Pipeline, tiny_model: ModelFactory, planted_targets: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pipeline.request(
        tiny_model(HfTask.FEATURE_EXTRACTION),
        target="auto",
        auto={"targets": [*planted_targets, "torchscript"], "precisions": ["fp32"]},
        shape_buckets=[{"batch_size": 1, "sequence_length": 16}],
        validation={"latency_pairs": 5, "max_examples": 40},
    )

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(validate_step, "run_in_child", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_any_target(request, pipeline.settings)
    assert pipeline.counts == {"compile": 3, "validate": 0}
    result = run_any_target(request, pipeline.settings)
    assert pipeline.counts == {"compile": 3, "validate": 1}
    assert (result.target, result.version.verdict) == ("torchscript", "pass")
    comparison = read_comparison(result.comparison_uri)
    outcomes: Mapping[str, str] = {rival.target: rival.outcome for rival in comparison.candidates}
    assert outcomes == {"hasty": "unvalidated", "slow": "unvalidated", "torchscript": "pass"}
    hasty, slow = comparison.candidates[:2]
    assert hasty.accuracy_loss > 0.1 > slow.accuracy_loss == 0.0
    assert slow.latency_ratio > 2
    assert all(rival.report_uri is None and rival.artifact_uri for rival in (hasty, slow))
    first, second = comparison.comparison_notes()
    assert first.startswith("dropped: hasty fp32: it cannot win: the first round shows the verdict fail: ")
    assert second.startswith("dropped: slow fp32: it cannot win: ")
    page = export_comparison(result.comparison_uri, pipeline.settings).read_text("utf-8")
    assert "the first round shows the verdict fail: " in page
    assert "unvalidated" in page

    again = run_any_target(request, pipeline.settings)
    assert again.version == result.version
    assert pipeline.counts == {"compile": 3, "validate": 1}
    assert read_comparison(again.comparison_uri).marks() == comparison.marks()
