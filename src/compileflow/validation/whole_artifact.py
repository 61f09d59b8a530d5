"""The whole artifact, as a service loads it: files, tokenizer, processor and pipeline against the source model's.

The pipelines of both sides get their raw outputs from one graph, the compiled one. So a difference between their
answers is a fault of the interface, at every precision; differences of the graph's numbers are measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays
from compileflow.errors import LoadError, first_line
from compileflow.serving.component import LoadedComponent
from compileflow.serving.interface_files import load_part
from compileflow.serving.light.image_processor import load_image_processor
from compileflow.serving.light.pipeline import LightPipeline, has_light_pipeline
from compileflow.serving.light.tokenizer_files import TOKENIZER_FILE, load_tokenizer
from compileflow.serving.model import CompiledModel
from compileflow.serving.padding import complete_inputs
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.serving.tokenizer import SETTINGS_FILE, CompiledTokenizer
from compileflow.source_model.load import tokenizer_or_none
from compileflow.source_model.processor import Processor, load_processor
from compileflow.spec import HfTask, Modality
from compileflow.validation.cases.examples import load_examples
from compileflow.validation.cases.raw import (
    CALL_SETTINGS,
    TRUNCATION,
    processor_signals,
    raw_signals,
    raw_texts,
    token_texts,
)
from compileflow.validation.measure.interface import (
    Claims,
    measure_answers,
    measure_claims,
    measure_fields,
    measure_files,
    measure_processor,
    measure_token_ids,
    record_refusal,
)
from compileflow.validation.measure.measurements import Measurements


class _RecordedComponent(LoadedComponent):
    """Calls a loaded component, and gives the same outputs to the same inputs, even if the component does not."""

    def __init__(self, component: LoadedComponent, artifact: OpenArtifact, outputs: dict[Any, Arrays]):
        super().__init__(artifact, component.component, component.record, component)
        self._outputs = outputs

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        arrays = complete_inputs(self.record, inputs)
        key = tuple((name, array.shape, array.tobytes()) for name, array in arrays.items())
        if key not in self._outputs:
            self._outputs[key] = self._runner.run(arrays)
        # Copies, because a pipeline may change what it gets.
        return {name: value.copy() for name, value in self._outputs[key].items()}


@dataclass(frozen=True)
class WholeArtifact:
    """An artifact beside the files of its source model.

    Attributes:
        artifact: The artifact.
        source_dir: Folder of the source model.
        examples_path: File of natural examples; None for those of compileflow.
    """

    artifact: OpenArtifact
    source_dir: Path
    examples_path: str | None = None

    def measure_shared(self, measurements: Measurements, *, max_length: int) -> None:
        """Compare what all components share: files, tokens, and outputs of the processor.

        Args:
            measurements: Gets `interface_files`, `token_ids`, `light_token_ids` and `processor_outputs`.
            max_length: Longest row of the artifact in tokens.
        """
        measure_files(measurements, self.source_dir, self.artifact, is_imported=self._is_imported)
        if self._lacks_tokenizer:
            measurements.notes.append(
                "The source model has no tokenizer, so tokens and answers were not compared."
            )
        elif self._has_tokens:
            self._measure_tokens(measurements, max_length)
        if self._processor_modality is not None:
            self._measure_processor(measurements, self._processor_modality)

    def measure_component(
        self, measurements: Measurements, component: LoadedComponent, claims: Claims, *, max_length: int
    ) -> None:
        """Compare the manifest's claims about a component, and its answers to raw inputs.

        Args:
            measurements: Gets `manifest_claims`, `pipeline_answers` and `light_answers`.
            component: The loaded component.
            claims: Name of each claim, with the expected value and that of the manifest.
            max_length: Longest row that the component must take.
        """
        measure_claims(measurements, claims)
        outputs: dict[Any, Arrays] = {}
        candidate = reference = None
        if self._task.pipeline_owner is not None and not self._lacks_tokenizer:
            candidate, error = _attempted(lambda: self._candidate(component, outputs))
            reference, source_error = _attempted(lambda: self._reference(component, outputs, max_length))
            if source_error is not None:
                measurements.notes.append(
                    "pipeline_answers compared the configurations alone, because no pipeline serves the source "
                    f"model: {first_line(source_error)}"
                )
            elif error is not None:
                record_refusal(measurements, "pipeline_answers", error)
                return
        if candidate is None or reference is None:
            self._measure_configuration(measurements)
            return
        settings = CALL_SETTINGS.get(self._task, {})
        source_settings = {**settings, **TRUNCATION.get(self._task, {})}
        measure_answers(
            measurements,
            lambda item: reference(item, **source_settings),
            lambda item: candidate(item, **settings),
            self._raw_inputs(max_length),
            before_each=outputs.clear,
        )
        if self._has_light_path:
            self._measure_light_answers(measurements, component, candidate, max_length)

    def _measure_light_answers(
        self, measurements: Measurements, component: LoadedComponent, full: CompiledPipeline, max_length: int
    ) -> None:
        """Compare the answers of the light pipeline with those of the full one, which have been compared."""
        outputs: dict[Any, Arrays] = {}
        recorded = _RecordedComponent(component, self.artifact, outputs)
        light, error = _attempted(lambda: LightPipeline.from_component(recorded))
        if error is not None:
            record_refusal(measurements, "light_answers", error)
            return
        settings = dict(CALL_SETTINGS.get(self._task, {}))
        # A light pipeline has no tensors, and the comparison of nested lists is slow.
        in_arrays = settings.pop("return_tensors", False)

        def answer(pipeline: Any, item: Any) -> Any:
            answer = pipeline(item, **settings)
            return np.asarray(answer) if in_arrays else answer

        measure_answers(
            measurements,
            partial(answer, full),
            partial(answer, light),
            self._raw_inputs(max_length),
            before_each=outputs.clear,
            metric="light_answers",
        )

    def _measure_configuration(self, measurements: Measurements) -> None:
        """Compare the fields of the configuration, where no pipeline processes the outputs of the graph."""
        try:
            candidate = load_part(self.artifact, "AutoConfig")
        except LoadError as error:
            record_refusal(measurements, "pipeline_answers", error)
            return
        measure_fields(measurements, load_part(self._source_artifact, "AutoConfig"), candidate)

    @property
    def _task(self) -> HfTask:
        return self.artifact.manifest.hf_task

    @property
    def _seed(self) -> int:
        return int(self.artifact.digest[:16], 16)

    @property
    def _source_artifact(self) -> OpenArtifact:
        """The artifact with the files of the source model in place of its own."""
        return replace(self.artifact, folder=self.source_dir)

    @cached_property
    def _source_tokenizer(self) -> Any:
        return tokenizer_or_none(self.source_dir, trust_remote_code=self.artifact.trust_remote_code)

    @cached_property
    def _source_processor(self) -> Processor:
        assert self._processor_modality is not None  # noqa: S101 - callers check it
        trust = self.artifact.trust_remote_code
        return load_processor(self.source_dir, self._processor_modality, trust_remote_code=trust)

    @property
    def _has_tokens(self) -> bool:
        return self._task.takes_text or self._task is HfTask.SPEECH_RECOGNITION

    @property
    def _lacks_tokenizer(self) -> bool:
        """Whether the model was in memory, without a tokenizer."""
        return self._has_tokens and self._source_tokenizer is None

    @property
    def _processor_modality(self) -> Modality | None:
        modalities: dict[Modality, Modality] = {"image": "image", "image-text": "image", "audio": "audio"}
        return modalities.get(self._task.modality)

    @property
    def _is_imported(self) -> bool:
        """Whether the artifact comes from a folder of the older library, which adds the tokenizer's settings."""
        is_unknown = all(not record.attention for record in self.artifact.manifest.components.values())
        has_settings = [(folder / SETTINGS_FILE).is_file() for folder in (self.source_dir, self.artifact.folder)]
        return is_unknown and has_settings == [False, True]

    def _measure_tokens(self, measurements: Measurements, max_length: int) -> None:
        reference = self._source_tokenizer
        sentences, _, _ = load_examples(HfTask.FEATURE_EXTRACTION, None, 1000)
        texts = token_texts(reference, [sentence["text"] for sentence in sentences], self._seed)
        if not reference.is_fast:
            measurements.notes.append(
                f"The tokens of {len(texts)} texts were compared: the tokenizer is a slow one."
            )
        try:
            candidate = self._compiled_tokenizer(self.artifact)
        except LoadError as error:
            record_refusal(measurements, "token_ids", error)
            return
        if self._has_light_path:
            self._measure_light_tokens(measurements, candidate, texts)
        # Prompts are never cut.
        settings: dict[str, Any] = {} if self._task.generates else {"truncation": True, "max_length": max_length}
        if (self.source_dir / SETTINGS_FILE).is_file():
            settings = self._compiled_tokenizer(self._source_artifact).tokenization_settings
        measure_token_ids(
            measurements,
            partial(reference, **_ragged(settings)),
            partial(candidate.encoded, **_ragged(candidate.tokenization_settings)),
            texts,
        )

    def _measure_light_tokens(
        self, measurements: Measurements, full: CompiledTokenizer, texts: Sequence[str]
    ) -> None:
        """Compare the light tokenizer with the full one, which is compared with the source model's."""
        light, error = _attempted(lambda: load_tokenizer(self.artifact, component=self._longest_component))
        if error is not None:
            record_refusal(measurements, "light_token_ids", error)
            return
        settings = full.tokenization_settings | {"padding": False}
        measure_token_ids(
            measurements,
            partial(full.encoded, **_ragged(settings)),
            partial(light.encoded, **settings),
            texts,
            metric="light_token_ids",
        )

    @property
    def _has_light_path(self) -> bool:
        """Whether a service can load the artifact without transformers."""
        if not has_light_pipeline(self._task) or self.artifact.manifest.spec.trust_remote_code:
            return False
        if self._processor_modality is None:
            return (self.artifact.tokenizer_folder / TOKENIZER_FILE).is_file()
        return _attempted(lambda: load_image_processor(self.artifact.folder))[1] is None

    @property
    def _longest_component(self) -> str:
        components = self.artifact.manifest.components
        return max(components, key=lambda name: components[name].max_sequence_length)

    def _compiled_tokenizer(self, artifact: OpenArtifact) -> CompiledTokenizer:
        """Load the tokenizer as the pipelines do, for the component with the longest rows."""
        longest = self._longest_component
        if self._task.modality == "text":
            return CompiledTokenizer.from_artifact(artifact, component=longest)
        tokenizer = load_part(artifact, "AutoTokenizer")
        max_length = artifact.manifest.components[longest].max_sequence_length
        return CompiledTokenizer(tokenizer, {"truncation": True, "max_length": max_length})

    def _measure_processor(self, measurements: Measurements, modality: Modality) -> None:
        reference = self._source_processor
        name = "AutoImageProcessor" if modality == "image" else "AutoFeatureExtractor"
        try:
            candidate = Processor(load_part(self.artifact, name), modality)
        except LoadError as error:
            record_refusal(measurements, "processor_outputs", error)
            return
        measure_processor(measurements, reference, candidate, processor_signals(reference, self._seed))

    def _raw_inputs(self, max_length: int) -> list[Any]:
        if self._processor_modality is not None:
            return raw_signals(self._source_processor, self._seed)
        examples, _, _ = load_examples(self._task, self.examples_path, 1000)
        return raw_texts(self._task, examples, self._source_tokenizer, max_length, self._seed)

    def _candidate(self, component: LoadedComponent, outputs: dict[Any, Arrays]) -> Any:
        """Return the pipeline that a service gets."""
        model = CompiledModel.from_component(_RecordedComponent(component, self.artifact, outputs))
        return CompiledPipeline.from_model(model)

    def _reference(self, component: LoadedComponent, outputs: dict[Any, Arrays], max_length: int) -> Any:
        """Return the pipeline on the source model's files: that of transformers, where it has one for the task."""
        artifact = self._source_artifact
        model = CompiledModel.from_component(_RecordedComponent(component, artifact, outputs))
        if self._task.pipeline_owner == "compileflow":
            return CompiledPipeline.from_model(model)
        from transformers import pipeline

        return pipeline(
            self._task.value,
            model=model,
            device=model.device,
            trust_remote_code=artifact.trust_remote_code,
            **self._source_parts(max_length),
        )

    def _source_parts(self, max_length: int) -> dict[str, Any]:
        """Return the source model's tokenizer and processor, as arguments of transformers' pipeline."""
        parts: dict[str, Any] = {}
        if self._has_tokens:
            parts["tokenizer"] = self._source_tokenizer
        if self._processor_modality is not None:
            name = "image_processor" if self._processor_modality == "image" else "feature_extractor"
            return parts | {name: self._source_processor.inner}
        parts["tokenizer"].model_max_length = max_length
        artifact = self.artifact if self._is_imported else self._source_artifact
        if (artifact.folder / SETTINGS_FILE).is_file():
            # Settings of the service, such as padding to the compiled shape, which answers of tokens show.
            settings = self._compiled_tokenizer(artifact).tokenization_settings | {"max_length": max_length}
            parts["tokenizer"] = CompiledTokenizer(parts["tokenizer"], settings, fixed=True)
        return parts


def _attempted(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what a function makes, or None and its error."""
    try:
        return make(), None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - what a service would see, whatever it is
        return None, error


def _ragged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a tokenizer without padding, as lists."""
    return {**settings, "padding": False, "return_tensors": None}
