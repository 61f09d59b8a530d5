"""A graph is compiled another way if the first one fails, and compared with its source model before it is kept."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
from numpy.typing import NDArray
from pydantic import JsonValue

from compileflow.contracts import (
    Arrays,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Device,
    Runner,
    Target,
)
from compileflow.errors import CompileError
from compileflow.source_model import load
from compileflow.source_model.load import load_source_model, loaded_once
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, ShapeBucket
from compileflow.steps import graph
from compileflow.steps.graph import compile_graph
from compileflow.targets.open_vino import OpenVinoTarget
from compileflow.targets.torchscript import TorchScriptTarget
from tests.conftest import ModelFactory
from tests.decoders import EagerContinuation, EagerRunner

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")
TASK = HfTask.TEXT_CLASSIFICATION


class PickyTarget(TorchScriptTarget):
    """Refuses what `refused` says of a plan, and remembers the plans."""

    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self.attempts: list[tuple[str, Mapping[str, JsonValue]]] = []

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        self.attempts.append((component.attention, component.options))
        way = str(component.options.get("way", component.attention))
        if way in self.refused:
            raise CompileError(self.refused[way])
        return super().compile(source_dir, component, out_dir)


class ShiftedRunner:
    """Adds a number to each output of another runner."""

    def __init__(self, runner: Runner, shift: float):
        self._runner, self._shift = runner, shift

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return {name: value + self._shift for name, value in self._runner.run(inputs).items()}

    def close(self) -> None:
        self._runner.close()


class ShiftingTarget(PickyTarget):
    """Answers wrongly, unless its graph was made with eager attention."""

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        runner = super().load(component_dir, component, device=device, threads=threads)
        return runner if component.attention == "eager" else ShiftedRunner(runner, 0.5)


def compiled(target: Target, source_dir: Path, folder: Path) -> CompiledComponent:
    component = ComponentSpec(
        max_sequence_length=16, shape_buckets=(ShapeBucket(batch_size=1, sequence_length=16),)
    )
    spec = CompileSpec(target="torchscript", hf_task=TASK, components=(component,))
    with loaded_once(source_dir, TASK) as source_model:
        plan = ComponentPlan(spec=spec, component=component)
        return compile_graph(target, source_dir, source_model, plan, folder)


def test_eager_attention_is_tried_if_sdpa_fails(tiny_model: ModelFactory, tmp_path: Path) -> None:
    class WithoutSdpa(PickyTarget):
        refused: ClassVar[Mapping[str, str]] = {"sdpa": "no such operator"}

    target = WithoutSdpa()

    component = compiled(target, tiny_model(TASK), tmp_path / "out")

    assert component.attention == "eager"
    assert target.attempts == [("sdpa", {}), ("eager", {})]
    assert [path.name for path in (tmp_path / "out").iterdir()] == list(component.files)


def test_fallback_options_are_tried_last(tiny_model: ModelFactory, tmp_path: Path) -> None:
    class Plain(PickyTarget):
        refused: ClassVar[Mapping[str, str]] = {"sdpa": "first reason", "eager": "second reason"}
        fallback_options: ClassVar[Mapping[str, JsonValue]] = {"way": "plain"}

    target = Plain()

    assert compiled(target, tiny_model(TASK), tmp_path / "out").attention == "eager"
    assert target.attempts == [("sdpa", {}), ("eager", {}), ("eager", {"way": "plain"})]


def test_first_reason_is_given_if_every_way_fails(tiny_model: ModelFactory, tmp_path: Path) -> None:
    class Refusing(PickyTarget):
        refused: ClassVar[Mapping[str, str]] = {"sdpa": "first reason", "eager": "second reason"}

    with pytest.raises(CompileError, match="first reason"):
        compiled(Refusing(), tiny_model(TASK), tmp_path / "out")


def test_graph_that_answers_wrongly_is_compiled_with_eager_attention(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    target = ShiftingTarget()

    assert compiled(target, tiny_model(TASK), tmp_path / "out").attention == "eager"
    assert [attention for attention, _ in target.attempts] == ["sdpa", "eager"]


def test_graph_that_always_answers_wrongly_is_refused(tiny_model: ModelFactory, tmp_path: Path) -> None:
    class AlwaysShifting(PickyTarget):
        def load(
            self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
        ) -> Runner:
            runner = super().load(component_dir, component, device=device, threads=threads)
            return ShiftedRunner(runner, 0.5)

    with pytest.raises(CompileError, match=r"BertForSequenceClassification to a model that answers a batch of 1 "):
        compiled(AlwaysShifting(), tiny_model(TASK), tmp_path / "out")


def test_exception_of_a_target_names_target_and_architecture(tiny_model: ModelFactory, tmp_path: Path) -> None:
    class Raising(PickyTarget):
        def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
            raise KeyError("an operator")

    with pytest.raises(CompileError, match="torchscript failed on BertForSequenceClassification: KeyError"):
        compiled(Raising(), tiny_model(TASK), tmp_path / "out")


def test_weights_leave_the_memory_before_the_graph_is_loaded(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watching(PickyTarget):
        def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
            model = load_source_model(source_dir, component.hf_task).model
            self.weights = weakref.ref(model.classifier.weight.untyped_storage())
            return super().compile(source_dir, component, out_dir)

        def load(
            self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
        ) -> Runner:
            assert self.weights() is None
            return super().load(component_dir, component, device=device, threads=threads)

    monkeypatch.setattr(load, "_LARGE", 0)
    target = Watching()

    assert compiled(target, tiny_model(TASK), tmp_path / "out").attention == "sdpa"


def test_source_model_without_weights_is_loaded_again_for_the_next_way(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PlainAnswersRightly(PickyTarget):
        fallback_options: ClassVar[Mapping[str, JsonValue]] = {"way": "plain"}

        def load(
            self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
        ) -> Runner:
            runner = super().load(component_dir, component, device=device, threads=threads)
            return runner if self.attempts[-1][1] else ShiftedRunner(runner, 0.5)

    monkeypatch.setattr(load, "_LARGE", 0)
    target = PlainAnswersRightly()

    compiled(target, tiny_model(TASK), tmp_path / "out")
    assert target.attempts == [("sdpa", {}), ("eager", {}), ("eager", {"way": "plain"})]


class LastTokenShifted(EagerContinuation):
    """Adds a number to some logits of the last token."""

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        logits = super().read(input_ids, attention_mask, position_ids, last=last)
        logits[:, -1, ::2] += 9
        return logits


@pytest.mark.parametrize("kind", [EagerContinuation, LastTokenShifted])
def test_last_logits_of_a_decoder_stand_for_those_of_a_large_answer(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[EagerContinuation]
) -> None:
    class Eager(OpenVinoTarget):
        def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
            return load_source_model(source_dir, component.hf_task).compiled_to(())

        def load(
            self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
        ) -> Runner:
            return EagerRunner(source, kind)

    source_dir, hf_task = tiny_model(HfTask.TEXT_GENERATION), HfTask.TEXT_GENERATION
    source = load_source_model(source_dir, hf_task)
    component = ComponentSpec(max_sequence_length=16)
    plan = ComponentPlan(
        spec=CompileSpec(target="openvino", hf_task=hf_task, components=(component,)), component=component
    )
    monkeypatch.setattr(graph, "_MOST_COMPARED", 0)
    outcome = (
        pytest.raises(CompileError, match="answers a batch of 2") if kind is LastTokenShifted else nullcontext()
    )
    with outcome:
        compile_graph(Eager(), source_dir, source, plan, tmp_path / "out")
