"""Example calls of a component, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from compileflow._process.state import torch_threads
from compileflow.artifact.open import OpenArtifact
from compileflow.catalog import get_target
from compileflow.contracts import Arrays, ComponentRecord
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, load_tokenizer
from compileflow.source_model.processor import LONGEST_S, image_inputs, load_processor, longest_signal
from compileflow.source_model.token_rows import token_rows
from compileflow.steps.source_variants import source_function
from compileflow.validation.evidence import timed_shapes
from compileflow.validation.measure import Model, OneThread
from compileflow.validation.settings import ValidationSettings
from compileflow.validation.writing import timed_tokens, writers


def component_examples(
    artifact: OpenArtifact, record: ComponentRecord, source_dir: Path
) -> Callable[[int, int], Arrays]:
    """Return a function from a batch size and a length to example inputs."""
    spec, trust = artifact.manifest.spec, artifact.trust_remote_code
    if spec.hf_task.modality == "image":
        processor = load_processor(source_dir, "image", trust_remote_code=trust)
        return lambda rows, _: image_inputs(processor, record.inputs, rows)
    tokens = None
    if spec.hf_task.takes_text:
        tokenizer = load_tokenizer(source_dir, trust_remote_code=trust)
        tokens = token_rows(tokenizer, artifact_config(source_dir, artifact), record.vocab_size, spec.hf_task)
    return partial(example_inputs, record.inputs, tokens=tokens, pad_left=record.padding == "left")


def artifact_config(folder: Path, artifact: OpenArtifact) -> Any:
    """Read the configuration in a folder; its code runs only if the artifact's may."""
    return load_config(folder, trust_remote_code=artifact.trust_remote_code)


def component_shapes(
    artifact: OpenArtifact, record: ComponentRecord, source_dir: Path, validation: ValidationSettings
) -> tuple[tuple[int, int], ...]:
    """Return the shapes at which a component is timed, each as (batch size, length)."""
    spec = artifact.manifest.spec
    if spec.hf_task.modality != "audio":
        return timed_shapes(spec.hf_task, record, validation, second=1)
    processor = load_processor(source_dir, "audio", trust_remote_code=artifact.trust_remote_code)
    return timed_shapes(spec.hf_task, record, validation, second=max(1, longest_signal(processor) // LONGEST_S))


def timed_models(source_model: SourceModel, component: LoadedComponent) -> tuple[Model, Model]:
    """Return both models as functions of inputs to time: decoders write, and all others answer."""
    if not component.artifact.manifest.hf_task.generates:
        return source_function(source_model), component.run
    longest = component.record.max_sequence_length
    before, after = (writer.timed(longest) for writer in writers(source_model, component))
    return before, after


def written_tokens(component: LoadedComponent) -> int:
    """Return how many tokens a timed call writes after each row; 0 if the component is not a decoder."""
    generates = component.artifact.manifest.hf_task.generates
    return timed_tokens(component.record.max_sequence_length) if generates else 0


def one_thread_models(source_model: SourceModel, component: LoadedComponent) -> OneThread | None:
    """Return what gives both models with one thread; None if the compiled model runs on a device."""
    if get_target(component.artifact.manifest.spec.target).capabilities.devices[0] != "cpu":
        return None

    @contextmanager
    def models() -> Iterator[tuple[Model, Model]]:
        alone = LoadedComponent.load(component.artifact, component=component.component, threads=1)
        try:
            with torch_threads(1):
                yield timed_models(source_model, alone)
        finally:
            alone.close()

    return models
