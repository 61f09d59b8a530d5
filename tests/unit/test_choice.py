"""Choosing among candidates: goals, budgets, warnings, near ties, and the Pareto front."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
from pydantic import ValidationError

from compileflow.errors import MeasurementError
from compileflow.selection.candidates import Candidate, CandidateLatency, accuracy_loss_of
from compileflow.selection.choice import choose, pareto_front
from compileflow.spec import Objective
from compileflow.validation.measure import Latency


def candidate(
    target: str, ratio: float | tuple[float, ...] | None = 0.5, loss: float | None = 0.0, **fields: Any
) -> Candidate:
    """Return a candidate that was timed at 1 x 16, 8 x 16 and 32 x 16; eager takes 10 ms per row."""
    ratios = () if ratio is None else (ratio,) if isinstance(ratio, float) else ratio
    sizes = (1, 8, 32)
    latencies = tuple(
        CandidateLatency(
            shape=f"{rows} x 16",
            batch_size=rows,
            latency_p50_ms=10.0 * rows * fraction,
            reference_p50_ms=10.0 * rows,
            ratio=fraction,
            ratio_low=fraction,
            ratio_high=fraction,
        )
        for rows, fraction in zip(sizes, ratios, strict=False)
    )
    common = {"precision": "fp32", "outcome": "pass", "reason": "pass: all gates hold", "size_bytes": 80_000_000}
    return Candidate.model_validate(
        common | {"target": target, "latencies": latencies, "accuracy_loss": loss} | fields
    )


def chosen(*candidates: Candidate, allow_warn: bool = False, **objective: Any) -> tuple[int | None, str]:
    return choose(candidates, Objective(**objective), allow_warn=allow_warn)


def test_label_names_target_precision_and_options() -> None:
    options = {"quantization": "static", "streams": 2, "fused": True}
    openvino = candidate("openvino", precision="int8", options=options)
    assert openvino.label == "openvino int8 fused=true quantization=static streams=2"
    assert candidate("torchscript").label == "torchscript fp32"


def test_speeds_of_a_candidate() -> None:
    timed = candidate("a", (0.2, 0.8))
    assert timed.latency_ratio == pytest.approx(0.4)
    # 1 row in 2 ms, 8 rows in 64 ms.
    assert timed.throughput_per_s == pytest.approx(500)
    assert candidate("a", None).latency_ratio is None
    assert candidate("a", None).throughput_per_s is None


def test_latency_comes_from_a_report() -> None:
    latency = CandidateLatency.of(Latency("8 x 128", 12.0, 6.0, 0.5, 0.45, 0.55, 30))
    assert latency.model_dump() == {
        "shape": "8 x 128",
        "batch_size": 8,
        "latency_p50_ms": 6.0,
        "reference_p50_ms": 12.0,
        "ratio": 0.5,
        "ratio_low": 0.45,
        "ratio_high": 0.55,
        "cpu_ratio": None,
        "busy": "",
        "written_tokens": 0,
    }


def test_throughput_of_a_decoder_counts_the_tokens_that_it_writes() -> None:
    timed = Latency("8 x 128", 120.0, 64.0, 0.53, 0.5, 0.56, 30, written_tokens=16)
    decoder = candidate("a", (0.5,)).model_copy(update={"latencies": (CandidateLatency.of(timed),)})
    # 8 rows x 16 tokens in 64 ms.
    assert decoder.throughput_per_s == pytest.approx(2000)
    assert chosen(decoder, goal="throughput")[1].startswith("a fp32: 2000 tokens per second")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        candidate("a", rel_l2=bad)


def test_accuracy_loss_is_one_less_the_worst_agreement() -> None:
    assert accuracy_loss_of({"label_agreement": 0.99, "latency_ratio": 0.1}) == 0.01
    assert accuracy_loss_of({"label_agreement": 0.99, "entity_f1": 0.9}) == pytest.approx(0.1)
    assert accuracy_loss_of({"exact_span": 1.0}) == 0.0
    assert accuracy_loss_of({"neighbour_overlap": 0.75, "top5_overlap": 0.1}) == 0.25


def test_without_an_agreement_there_is_no_accuracy_loss() -> None:
    with pytest.raises(MeasurementError, match="only rel_l2, top5_overlap") as caught:
        accuracy_loss_of({"top5_overlap": 0.9, "rel_l2": 0.1})
    assert "label_agreement" in caught.value.hint


def test_latency_goal_takes_the_lowest_mean_ratio() -> None:
    winner, reason = chosen(
        candidate("a", (0.2, 0.9)), candidate("b", (0.4, 0.4)), candidate("c", (0.1, 0.1), outcome="fail")
    )
    assert winner == 1
    assert reason == "b fp32: 0.40 of eager's latency, the lowest of 2 that passed their gates (1 dropped)"


def _timed_beside_others(timed: Candidate, cpu_ratio: float | None, busy: str = "others used 1.9") -> Candidate:
    latencies = tuple(
        latency.model_copy(update={"cpu_ratio": cpu_ratio, "busy": busy}) for latency in timed.latencies
    )
    return timed.model_copy(update={"latencies": latencies})


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_processor_time_decides_if_one_latency_was_measured_on_a_busy_machine(goal: str) -> None:
    # Eager collapsed while the first was timed, so its latency looks 20 times as low.
    candidates = (
        _timed_beside_others(candidate("a", (0.01, 0.02)), 0.6),
        _timed_beside_others(candidate("b", (0.4, 0.4)), 0.5, busy=""),
        candidate("c", (0.3, 0.3)),
    )
    winner, reason = chosen(*candidates, goal=goal)
    assert winner == 1
    assert reason == (
        "b fp32: 0.50 of eager's processor time (latency was measured on a busy machine), the lowest of 2 that "
        "passed their gates (1 dropped)"
    )
    assert candidates[0].latency_ratio is None
    assert candidates[0].throughput_per_s is None
    # It is not on the front either.
    assert pareto_front(candidates) == {2}


def test_nothing_is_chosen_by_a_latency_of_a_busy_machine_alone() -> None:
    candidates = [_timed_beside_others(candidate(name), None) for name in "ab"]
    winner, reason = chosen(*candidates)
    assert winner is None
    assert reason == (
        "None of 2 candidates can be chosen: 2 lacked a timing: processor time was not measured, and a latency "
        "was measured on a busy machine"
    )


def test_throughput_goal_takes_the_most_rows_a_second() -> None:
    # The mean of the first is lower; the second does more rows per second at its best shape.
    winner, reason = chosen(candidate("a", (0.4, 0.4)), candidate("b", (0.9, 0.2)), goal="throughput")
    assert winner == 1
    assert reason == "b fp32: 500 rows per second, the most of 2 that passed their gates"


def test_size_goal_takes_the_smallest_and_latency_breaks_ties() -> None:
    candidates = (
        candidate("a", 0.1, size_bytes=90_000_000),
        candidate("b", 0.7, size_bytes=22_000_000),
        candidate("c", 0.5, size_bytes=22_000_000),
    )
    winner, reason = chosen(*candidates, goal="size")
    assert winner == 2
    assert reason == "c fp32: 22.0 MB, the smallest of 3 that passed their gates"


def test_size_goal_needs_no_timing() -> None:
    ten_bytes, nine_bytes = candidate("a", None, size_bytes=10), candidate("b", None, size_bytes=9)
    assert chosen(ten_bytes, nine_bytes, goal="size")[0] == 1
    assert chosen(candidate("a", size_bytes=None), nine_bytes, goal="size")[0] == 1


@pytest.mark.parametrize(("ratio", "winner"), [(0.509, 1), (0.511, 0)])
def test_within_two_percent_the_more_accurate_wins(ratio: float, winner: int) -> None:
    position, reason = chosen(candidate("a", 0.5, 0.01), candidate("b", ratio, 0.0), candidate("c", 0.9))
    assert position == winner
    if winner:
        assert reason == (
            "b fp32: 0.51 of eager's latency, within 2 % of the lowest of 3 that passed their gates, "
            "and the most accurate of those"
        )


def test_near_ties_do_not_add_up() -> None:
    # c is within 2 % of b, which is within 2 % of a; c is not within 2 % of a.
    candidates = candidate("a", 0.5, 0.02), candidate("b", 0.508, 0.01), candidate("c", 0.516, 0.0)
    for order in permutations(candidates):
        winner, _ = chosen(*order)
        assert winner is not None
        assert order[winner].target == "b"


def test_between_equal_candidates_the_label_decides_in_any_order() -> None:
    for order in permutations((candidate("c"), candidate("a"), candidate("b"))):
        winner, _ = chosen(*order)
        assert winner is not None
        assert order[winner].target == "a"


def test_an_unknown_accuracy_loss_never_wins_a_near_tie() -> None:
    assert chosen(candidate("a", 0.5, None), candidate("b", 0.505, 0.3))[0] == 1


def test_a_warning_wins_only_where_it_is_allowed() -> None:
    warned, passed = candidate("a", 0.2, outcome="warn"), candidate("b", 0.4)
    assert chosen(warned, passed)[0] == 1
    winner, reason = chosen(warned, passed, allow_warn=True)
    assert winner == 0
    assert "of 2 that passed or only warned" in reason


@pytest.mark.parametrize(
    ("budget", "within", "beyond"),
    [
        ({"max_accuracy_loss": 0.01}, {"loss": accuracy_loss_of({"exact_span": 0.99})}, {"loss": 0.0101}),
        ({"max_size_bytes": 100}, {"size_bytes": 100}, {"size_bytes": 101}),
        ({"max_serving_memory_bytes": 100}, {"serving_memory_bytes": 100}, {"serving_memory_bytes": 101}),
    ],
)
def test_a_budget_drops_candidates_that_exceed_it_or_were_not_measured(
    budget: dict[str, Any], within: dict[str, Any], beyond: dict[str, Any]
) -> None:
    name = next(iter(within))
    candidates = candidate("a", 0.1, **beyond), candidate("b", 0.2, **{name: None}), candidate("c", 0.3, **within)
    winner, reason = chosen(*candidates, **budget)
    assert winner == 2
    assert reason == (
        "c fp32: 0.30 of eager's latency, the only candidate that passed its gates and kept to the budget "
        "(2 dropped)"
    )
    winner, reason = chosen(*candidates[:2], **budget)
    assert winner is None
    assert "2 exceeded the" in reason


def test_speed_is_compared_only_where_all_were_timed() -> None:
    # The second answered at the small shape only, where it is fast.
    winner, _ = chosen(candidate("a", (0.5, 0.5)), candidate("b", (0.1,)))
    assert winner == 0
    winner, reason = chosen(candidate("a", None), candidate("b", None))
    assert (winner, reason) == (
        None,
        "None of 2 candidates can be chosen: 2 lacked a timing: not timed at any shape",
    )


def test_when_none_can_be_chosen_the_reason_counts_why() -> None:
    winner, reason = chosen(
        candidate("a", outcome="fail"),
        candidate("b", outcome="fail"),
        candidate("c", outcome="warn"),
        candidate("d", None, None, outcome="error"),
        candidate("e", None, None, outcome="unavailable"),
        candidate("f", size_bytes=9_000_000),
        max_size_bytes=1_000_000,
    )
    assert winner is None
    assert reason == (
        "None of 6 candidates can be chosen: 2 failed their gates, 1 got a warning, which is not allowed, "
        "1 ended in an error, 1 cannot be compiled here, 1 exceeded the size budget."
    )


def test_without_candidates_none_is_chosen() -> None:
    assert chosen() == (None, "No candidate was given.")


def test_objective_has_titles_for_a_form_and_refuses_nonsense() -> None:
    for name, field in Objective.model_json_schema()["properties"].items():
        assert field["title"], name
        assert field["description"], name
    for bad in ({"max_accuracy_loss": 1.1}, {"max_size_bytes": 0}, {"goal": "fun"}, {"cost": 1}):
        with pytest.raises(ValidationError):
            Objective.model_validate(bad)


def test_front_holds_the_candidates_that_no_other_beats_in_all_three_numbers() -> None:
    candidates = (
        candidate("fast", 0.2, 0.02, size_bytes=50),
        candidate("exact", 0.8, 0.0, size_bytes=90),
        candidate("small", 0.9, 0.05, size_bytes=20),
        candidate("beaten by fast", 0.3, 0.02, size_bytes=50),
        candidate("as good as fast", 0.2, 0.02, size_bytes=50),
        candidate("failed", 0.1, 0.0, size_bytes=1, outcome="fail"),
        candidate("warned", 0.15, 0.04, size_bytes=60, outcome="warn"),
        candidate("not timed", None, 0.0, size_bytes=1),
        candidate("not measured", 0.1, None, size_bytes=1),
        candidate("without size", 0.1, 0.0, size_bytes=None),
    )
    assert pareto_front(candidates) == {0, 1, 2, 4, 6}
    assert pareto_front(()) == set()
