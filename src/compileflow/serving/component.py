"""LoadedComponent: one component of a verified artifact, called with named arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays, ComponentRecord, Device, Runner
from compileflow.errors import LoadError
from compileflow.serving.padding import complete_inputs, run_fitted
from compileflow.spec import ShapeBucket


class LoadedComponent:
    """A compiled component that is ready to run. Calls are safe from several threads.

    Attributes:
        artifact: Artifact that the component belongs to.
        component: Name of the component in the artifact.
        record: Inputs, outputs and shapes of the component.
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
        """Load one component of an artifact.

        Args:
            artifact: An open artifact.
            component: Name of the component.
            device: Device to run on. None: the first device of the target.
            threads: Threads per call. None: the runtime decides.
            buckets: Compiled shape buckets to load. None: all.

        Raises:
            LoadError: The component cannot run here, or a bucket was not compiled.
        """
        record = artifact.component(component)
        if buckets is not None:
            record = _with_buckets(record, buckets)
        return cls(artifact, component, record, artifact.load(record, device=device, threads=threads))

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the component on named arrays, checked by `complete_inputs`, and return named arrays."""
        return run_fitted(self._runner, self.record, complete_inputs(self.record, inputs))

    def close(self) -> None:
        """Release the component. A second call does nothing."""
        self._runner.close()


def _with_buckets(record: ComponentRecord, buckets: Sequence[ShapeBucket]) -> ComponentRecord:
    if record.dynamic_axes:
        raise LoadError("The component takes any shape and has no shape buckets.", hint="Leave buckets out.")
    unknown_buckets = [str(bucket) for bucket in buckets if bucket not in record.shape_buckets]
    if unknown_buckets or not buckets:
        problem = (
            f"The component has no shape bucket {', '.join(unknown_buckets)}."
            if unknown_buckets
            else "buckets is empty."
        )
        raise LoadError(problem, hint=f"Its shape buckets are: {', '.join(map(str, record.shape_buckets))}.")
    longest = max(bucket.sequence_length for bucket in buckets)
    return record.model_copy(update={"shape_buckets": tuple(buckets), "max_sequence_length": longest})
