"""A decoder in transformers behind the interface of a compiled one, with and without planted faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compileflow.artifact.manifest import ArtifactManifest, SourceRecord, TargetRecord
from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord
from compileflow.serving.component import LoadedComponent
from compileflow.source_model import SourceModel
from compileflow.spec import CompileSpec, HfTask
from compileflow.validation.measure.generation import Settings, Written
from compileflow.validation.writing import ModelWriter
from tests.models import MAX_TOKENS

TASK = HfTask.TEXT_GENERATION
TEXTS = ["the train was late and", "it arrived", "where is my order today because it is late"]
CHAT = [{"role": "user", "content": "where is my order"}]
GREEDY = {"max_new_tokens": 16, "do_sample": False}


class EagerContinuation:
    """Rows whose cache is that of transformers."""

    def __init__(self, model: Any):
        import transformers

        self.length = 0
        self.cache = transformers.DynamicCache(config=model.config)
        self._model = model

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        """Read the next tokens of each row."""
        import torch

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        with torch.inference_mode():
            answer = self._model(
                **{name: torch.as_tensor(value) for name, value in inputs.items()},
                past_key_values=self.cache,
                use_cache=True,
            )
        self.length += input_ids.shape[1]
        logits = answer.logits.numpy()
        return logits[:, -1:] if last else logits

    def reorder(self, rows: NDArray[Any]) -> None:
        """Replace the rows by copies of some of them."""
        import torch

        self.cache.reorder_cache(torch.as_tensor(rows))

    def close(self) -> None:
        """Do nothing: the cache goes with this object."""


class PositionsOffByOne(EagerContinuation):
    """Numbers the tokens after the prompt from one too many."""

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        """Read the next tokens of each row."""
        return super().read(input_ids, attention_mask, position_ids + (self.length > 0), last=last)


class MaskIgnored(EagerContinuation):
    """Reads the padding as text."""

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        """Read the next tokens of each row."""
        return super().read(input_ids, np.ones_like(attention_mask), position_ids, last=last)


class ReorderDropped(EagerContinuation):
    """Leaves the rows of a beam search in their places."""

    def reorder(self, rows: NDArray[Any]) -> None:
        """Do nothing."""


class RowsExchanged(EagerContinuation):
    """Exchanges the first two rows of the cache before each token after the prompt."""

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        """Read the next tokens of each row."""
        if self.length > 0 and len(input_ids) > 1:
            self.reorder(np.array([1, 0, *range(2, len(input_ids))]))
        return super().read(input_ids, attention_mask, position_ids, last=last)


class StaleCache(EagerContinuation):
    """Goes on from the cache of an earlier request with equally many rows."""

    earlier: ClassVar[dict[int, Any]] = {}

    def read(self, input_ids: Any, attention_mask: Any, position_ids: Any, *, last: bool = False) -> Any:
        """Read the next tokens of each row."""
        rows = len(input_ids)
        if self.length == 0:
            self.cache = self.earlier.setdefault(rows, self.cache)
        stale = np.ones((rows, self.cache.get_seq_length() - self.length), np.int64)
        return super().read(input_ids, np.concatenate([stale, attention_mask], axis=1), position_ids, last=last)


class EndIgnored(ModelWriter):
    """Writes on after the token that ends a text."""

    def write(self, prompts: Mapping[str, NDArray[Any]], settings: Settings) -> Written:
        """Write on from prompts."""
        return super().write(prompts, replace(settings, end_id=None))


class EagerRunner:
    """Runs a source model as a target's runner does."""

    def __init__(self, source: SourceModel, kind: type[EagerContinuation] = EagerContinuation):
        self._source = source
        self._kind = kind

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Read whole rows."""
        return self._source.run(inputs)

    def start(self) -> EagerContinuation:
        """Begin to read new rows."""
        return self._kind(self._source.model)

    def close(self) -> None:
        """Do nothing."""


def eager_component(
    folder: Path, source: SourceModel, kind: type[EagerContinuation] = EagerContinuation
) -> LoadedComponent:
    """Return a component that nothing compiled: the files of the source model, and the model itself.

    Args:
        folder: Folder of the source model.
        source: The source model.
        kind: Class of its continuations.
    """
    record = ComponentRecord(
        folder="components/default",
        inputs=source.inputs,
        outputs=source.outputs,
        output_class=source.output_class,
        max_sequence_length=MAX_TOKENS,
        dynamic_axes=True,
        pad_token_id=source.pad_token_id,
        vocab_size=source.vocab_size,
    )
    manifest = ArtifactManifest(
        spec=CompileSpec(target="openvino", hf_task=TASK),
        source=SourceRecord(
            uri=folder.as_uri(), revision="0" * 64, digest="0" * 64, architecture="LlamaForCausalLM"
        ),
        target=TargetRecord(name="openvino", version=1, toolchain={}),
        components={"default": record},
        files=(),
    )
    artifact = OpenArtifact(folder, manifest, "0" * 64, verified=True)
    return LoadedComponent(artifact, "default", record, EagerRunner(source, kind))
