"""LoadedComponent: one component of a verified artifact, called with named arrays of any size it supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, Device, Runner
from compileflow.errors import LoadError
from compileflow.serving.padding import complete_inputs, run_fitted
from compileflow.spec import ShapeBucket


class LoadedComponent:
    """A compiled graph and its record. Calls are safe from several threads.

    Attributes:
        artifact: Where it came from.
        component: Its name there.
        record: Its interface and shapes.
    """

    def __init__(self, artifact: OpenArtifact, component: str, record: ComponentRecord, runner: Runner):
        self.artifact = artifact
        self.component = component
        self.record = record
        self._runner = runner

    @classmethod
    def load(
        cls,
        artifact: OpenArtifact,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
        buckets: Sequence[ShapeBucket] | None = None,
    ) -> LoadedComponent:
        """Load one component, all its shape buckets or some; see `OpenArtifact.load`.

        Raises:
            LoadError: see there, or a bucket that was not compiled.
        """
        record = artifact.component(component)
        if buckets is not None:
            record = _only(record, buckets)
        return cls(artifact, component, record, artifact.load(record, device=device, threads=threads))

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the graph on named arrays and return named arrays; see `complete_inputs` for what is refused."""
        return run_fitted(self._runner, self.record, complete_inputs(self.record, inputs))

    def close(self) -> None:
        """Release the graph. Closing twice does nothing."""
        self._runner.close()


def _only(record: ComponentRecord, buckets: Sequence[ShapeBucket]) -> ComponentRecord:
    if record.dynamic_axes:
        raise LoadError("Shape buckets were chosen, and this graph takes any shape.", hint="Leave buckets out.")
    strange = [str(bucket) for bucket in buckets if bucket not in record.shape_buckets]
    if strange or not buckets:
        raise LoadError(
            f"No such shape bucket was compiled: {', '.join(strange) or 'none was named'}.",
            hint=f"There are: {', '.join(map(str, record.shape_buckets))}.",
        )
    longest = max(bucket.sequence_length for bucket in buckets)
    return record.model_copy(update={"shape_buckets": tuple(buckets), "max_sequence_length": longest})
