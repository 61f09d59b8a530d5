"""LoadedComponent: one component of a verified artifact, called with named arrays."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from compileflow._process.failures import raise_if_out_of_memory
from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import (
    Arrays,
    ComponentRecord,
    Continuation,
    Device,
    GeneratingRunner,
    Runner,
    WritingRunner,
)
from compileflow.contracts.toolkit import require_open
from compileflow.errors import CompileflowError, InputError, LoadError, first_line
from compileflow.serving.padding import complete_inputs, run_fitted
from compileflow.serving.shared_calls import SharedCalls
from compileflow.spec import ShapeBucket

Result = TypeVar("Result")

_MOST_THREADS = 1024
# Of a forked process whose threads use their components for the first time.
_FORK_LOCK = threading.Lock()


class LoadedComponent:
    """A compiled component that is ready to run. Calls are safe from several threads.

    A process that was forked after the load loads the component again at its first call. A deep copy and an
    unpickled component are loaded again as well.

    Attributes:
        artifact: Artifact that the component belongs to.
        component: Name of the component in the artifact.
        record: Inputs, outputs and shapes of the component.
    """

    def __init__(
        self,
        artifact: OpenArtifact,
        component: str,
        record: ComponentRecord,
        runner: Runner,
        *,
        device: Device | None = None,
        threads: int | None = None,
        buckets: Sequence[ShapeBucket] | None = None,
        calls_at_once: int | None = None,
    ):
        self.artifact = artifact
        self.component = component
        self.record = record
        self._runner = runner
        self._device: Device | None = device
        self._threads = threads
        self._buckets = buckets
        self._process_id = os.getpid()
        self._is_closed = False
        self._calls_at_once = calls_at_once
        self._shared_calls = self._new_shared_calls()
        # Per output: its name, and the sizes of its fixed axes by position.
        self._output_sizes = [
            (
                tensor.name,
                len(tensor.axes),
                [(position, axis) for position, axis in enumerate(tensor.axes) if isinstance(axis, int)],
            )
            for tensor in record.outputs
        ]

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
            InputError: `threads` is not a number of threads.
            LoadError: The component cannot run here, or a bucket was not compiled.
        """
        # Runtimes hang on very many threads and read a number that is not positive in different ways.
        is_number = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and not (is_number and 1 <= threads <= _MOST_THREADS):
            raise InputError(
                f"Expected threads as a whole number from 1 to {_MOST_THREADS}, got {threads!r}.",
                hint="Leave threads out, and the runtime decides.",
            )
        record = artifact.component(component)
        if buckets is not None:
            record = _with_buckets(record, buckets)
        runner = artifact.load(record, device=device, threads=threads)
        _, used_device = artifact.target_for(record, device)
        return cls(
            artifact,
            component,
            record,
            runner,
            device=device,
            threads=threads,
            buckets=buckets,
            calls_at_once=_calls_at_once(runner, threads) if used_device == "cpu" else None,
        )

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the component on named arrays, checked by `complete_inputs`, and return named arrays.

        Raises:
            InputError: The inputs do not suit the component, or its graph fails on them.
            MemoryError: The call needs more memory than the machine has.
        """
        return self.run_completed(complete_inputs(self.record, inputs))

    def run_completed(self, arrays: Arrays) -> Arrays:
        """Run the component on arrays that `complete_inputs` or `token_row` returned; see `run`.

        While the component is busy, single rows of several threads wait and then share a call.
        """
        if os.getpid() != self._process_id:
            self._load_after_fork()
        if self._shared_calls is not None and len(arrays[self.record.inputs[0].name]) == 1:
            return self._shared_calls.run(arrays)
        return self._run(arrays)

    def _run(self, arrays: Arrays) -> Arrays:
        with GraphErrors(arrays):
            outputs = run_fitted(self._runner, self.record, arrays)
        for name, rank, sizes in self._output_sizes:
            shape = outputs[name].shape
            # Answers are cut and read by the axes of the record.
            if len(shape) != rank or any(shape[position] != size for position, size in sizes):
                axes = next(tensor.axes for tensor in self.record.outputs if tensor.name == name)
                raise InputError(
                    f"The compiled graph returned {name} of shape {shape}, but the manifest gives the axes "
                    f"{', '.join(map(str, axes))}.",
                    hint="Compile the model again.",
                )
        return outputs

    def start(self) -> Continuation:
        """Begin to read new rows with a component of text generation.

        Raises:
            InputError: The component reads whole rows only.
        """
        if os.getpid() != self._process_id:
            self._load_after_fork()
        if not hasattr(self._runner, "start"):
            raise InputError(
                "The component reads whole rows only, so it cannot continue one.",
                hint="Compile the model for text-generation with a target that keeps a cache.",
            )
        return cast("GeneratingRunner", self._runner).start()

    @property
    def writer(self) -> WritingRunner | None:
        """The runner, if its runtime writes whole texts by itself."""
        return self._runner if isinstance(self._runner, WritingRunner) else None

    def _new_shared_calls(self) -> SharedCalls | None:
        """Return what shares calls; None where padding changes answers, or a call takes one row only."""
        takes_rows = self.record.dynamic_axes or any(bucket.batch_size > 1 for bucket in self.record.shape_buckets)
        if self._calls_at_once is None or self.record.padding not in ("right", "left") or not takes_rows:
            return None
        return SharedCalls(self.record, self._run, self._calls_at_once)

    def __call__(self, *inputs: Any) -> dict[str, Any]:
        """Run the component on inputs by position and return named tensors, as a traced model does."""
        import torch

        outputs = self.run(named_inputs(self.record, inputs))
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in outputs.items()}

    def close(self) -> None:
        """Release the component. A second call does nothing."""
        self._is_closed = True
        if os.getpid() == self._process_id:
            self._runner.close()

    def _load_after_fork(self) -> None:
        """Load the component again, because the threads of its runtime exist only in the process that loaded it.

        Raises:
            InputError: The component was closed, or it runs on a device, which a forked process cannot use.
        """
        with _FORK_LOCK:
            if os.getpid() == self._process_id:
                return
            require_open(None if self._is_closed else self._runner)
            target, device = self.artifact.target_for(self.record, self._device)
            if device != "cpu":
                raise InputError(
                    f"The compiled model was loaded in another process, {self._process_id}, and {target.name} "
                    "cannot be used in a process that was forked from it.",
                    hint="Load it after the fork, in each process.",
                )
            # Its destructor would wait for threads that this process does not have.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._runner))
            load = partial(self.artifact.load, self.record, device=device, threads=self._threads)
            if "torch" in target.capabilities.runtime:
                import torch

                # As in the workers of torch's DataLoader: other operators of this thread would wait for OpenMP.
                torch.set_num_threads(1)
                self._runner = _RunnerInThreads(_in_new_thread(load))
            else:
                self._runner = load()
            # Rows of threads that this process does not have may wait in the other one.
            self._shared_calls = self._new_shared_calls()
            self._process_id = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.artifact, self.component, self._device, self._threads, self._buckets)


def _calls_at_once(runner: Runner, threads: int | None) -> int:
    """Return how many calls keep the machine busy: one that uses all cores, or one for each group of threads."""
    streams = getattr(runner, "streams", 1)
    if threads is None:
        return int(streams)
    # A container may have fewer cores than its machine; not every system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(streams), cores // threads)


class GraphErrors:
    """Turns what a runtime raises on these inputs, inside the block, into an error of one line.

    Raises:
        InputError: The graph fails.
        MemoryError: The call needs more memory than the machine has.
    """

    # A class, because a generator's context manager costs more than all checks of a short text.
    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self._arrays = arrays

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, CompileflowError | MemoryError):
            return
        raise_if_out_of_memory(error)
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self._arrays.items())
        raise InputError(
            f"The compiled graph failed on inputs of the shapes {shapes}: {type(error).__name__}: "
            f"{first_line(error)}.",
            hint="If it fails on every input, compile the model again.",
        ) from error


class _RunnerInThreads:
    """Runs each call in a new thread, where OpenMP starts its threads again.

    The thread that forked would wait forever for those that it had before the fork.
    """

    def __init__(self, runner: Runner):
        self._runner = runner

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return _in_new_thread(self._runner.run, inputs)

    def close(self) -> None:
        self._runner.close()


def _in_new_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result()


def _load(
    artifact: OpenArtifact,
    component: str,
    device: Device | None,
    threads: int | None,
    buckets: Sequence[ShapeBucket] | None,
) -> LoadedComponent:
    return LoadedComponent.load(artifact, component=component, device=device, threads=threads, buckets=buckets)


def named_inputs(record: ComponentRecord, inputs: Sequence[Any]) -> dict[str, Any]:
    """Name inputs by their position; None stands for an input that is left out.

    Raises:
        InputError: There are more inputs than the component has.
    """
    names = [tensor.name for tensor in record.inputs]
    if len(inputs) > len(names):
        raise InputError(
            f"Expected at most {len(names)} inputs, got {len(inputs)}.",
            hint=f"The inputs are, in this order: {', '.join(names)}.",
        )
    return {name: value for name, value in zip(names, inputs, strict=False) if value is not None}


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
