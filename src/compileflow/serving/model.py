"""CompiledModel: called like the source model, answers with the source model's output class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.artifact.attestations.required import RequireSignature
from compileflow.artifact.open import OpenArtifact, copy_artifact, open_artifact
from compileflow.contracts import Arrays, Device
from compileflow.errors import InputError, LoadError
from compileflow.serving.component import LoadedComponent
from compileflow.serving.from_memory import in_memory
from compileflow.spec import ShapeBucket

# What a transformers model takes besides tensors; True would need outputs that the graph does not have.
_FLAGS = ("output_attentions", "output_hidden_states", "use_cache")


class CompiledModel:
    """A compiled graph behind a transformers model's interface.

    `config` is the source model's; every attribute of it is available on this object, too. Calls are safe
    from several threads.
    """

    base_model_prefix = "model"
    generation_config = None

    def __init__(self, graph: LoadedComponent, config: Any):
        import torch

        self.graph = graph
        self.artifact = graph.artifact
        self.manifest = graph.artifact.manifest
        self.component = graph.component
        self.config = config
        # Whatever computes, tensors go in and come out in host memory.
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.name_or_path = str(graph.artifact.folder)
        self.main_input_name = graph.record.inputs[0].name
        self.input_modalities = (self.manifest.hf_task.modality,)
        self._output_class = _output_class(graph.record.output_class)

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
        buckets: Sequence[ShapeBucket] | None = None,
        digest: str | None = None,
        trust: bool = False,
        require_signature: RequireSignature = None,
    ) -> CompiledModel:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, or STORE/manifests/sha256/DIGEST.json.
            component: Which compiled graph of the artifact.
            device: Where it runs; the target must know it. None: where the target runs first of all.
            threads: Threads of one call; None leaves it to the runtime.
            buckets: Which of the compiled shape buckets to load; None loads all.
            digest: The artifact's own, or its first 12 digits and more; any other is refused.
            trust: Load although files were altered or added, with a warning in the log. Compiled files are native
                code, which then runs with your rights.
            require_signature: True refuses an artifact whose provenance and verdict no trusted key signed; so do
                public keys' PEM files, which are trusted instead. None: as COMPILEFLOW_REQUIRE_SIGNATURE says.

        Raises:
            ManifestError, IntegrityError, SignatureError: refused before anything is deserialised.
            LoadError: it cannot run here; the hint says what is missing.
        """
        return cls.from_artifact(
            open_artifact(location, digest=digest, trust=trust, require_signature=require_signature),
            component=component,
            device=device,
            threads=threads,
            buckets=buckets,
        )

    @classmethod
    def from_artifact(
        cls,
        artifact: OpenArtifact,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
        buckets: Sequence[ShapeBucket] | None = None,
    ) -> CompiledModel:
        """Load from an artifact that is open already."""
        _output_module(artifact.component(component).output_class)
        graph = LoadedComponent.load(
            artifact, component=component, device=device, threads=threads, buckets=buckets
        )
        # After the checks: what is refused imports nothing.
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            artifact.folder,
            local_files_only=True,
            trust_remote_code=artifact.manifest.spec.trust_remote_code,
        )
        # transformers' pipelines look at the class's name; a subclass borrows it.
        kind = type(artifact.manifest.source.architecture, (cls,), {"__module__": cls.__module__})
        model: CompiledModel = kind(graph, config)
        return model

    @classmethod
    def from_model(
        cls,
        model: Any,
        batch_size: int = 1,
        max_length: int = -1,
        neuron: bool = True,
        validate_compilation: bool = True,
        validation_rtol: float = 1e-2,
        validation_atol: float = 1e-2,
        *,
        target: str | None = None,
        **tracing_kwargs: Any,
    ) -> CompiledModel:
        """Compile a model that is in memory; the model stays as it is.

        Args:
            model: A transformers model.
            batch_size: Rows of the compiled shape; calls of any number of rows are padded or split to it.
            max_length: Tokens of the compiled shape; -1 is the model's own maximum.
            neuron: True compiles for AWS Neuron, False for torchscript, where no `target` is named.
            validate_compilation: Compare every output with the source model's before returning.
            validation_rtol: Relative tolerance of that, a fraction.
            validation_atol: Absolute tolerance of that, in the outputs' own units.
            target: Any target's name; `compileflow targets` lists them.
            **tracing_kwargs: The target's options.

        Raises:
            SpecError: a shape, a target or an option that there is not.
            TargetUnavailableError: the target's toolchain is missing here.
            CompileError: the toolchain refused the model.
            VerdictError: an output differs by more than the tolerance; nothing is left behind.
        """
        local = in_memory()

        artifact = local.compile_in_memory(
            model,
            target=local.older_target(target, neuron=neuron),
            batch_size=batch_size,
            max_length=max_length,
            options=tracing_kwargs,
            tolerance=local.Tolerance(validation_rtol, validation_atol) if validate_compilation else None,
        )
        return cls.from_artifact(artifact)

    @property
    def compilation_specs(self) -> dict[str, Any]:
        """What it was compiled with: batch_size, max_length (tokens), target, and the target's options by name."""
        spec, record = self.manifest.spec, self.graph.record
        buckets = record.shape_buckets or spec.components[0].shape_buckets
        return {
            "batch_size": max((bucket.batch_size for bucket in buckets), default=1),
            "max_length": record.max_sequence_length,
            "target": spec.target,
            **spec.target_options,
        }

    def __call__(self, main_input: Any = None, *, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Run the compiled graph.

        Args:
            main_input: `input_ids`, `pixel_values` or `input_values`, which may be given by its name, too: tensor,
                array or lists, of the axes that `manifest` names.
            return_dict: False gives a plain tuple, as in transformers.
            **kwargs: The source model's inputs by their names.

        Returns:
            The source model's output class, with torch tensors.

        Raises:
            InputError: an input that the graph lacks, wrong shapes, or more tokens than compiled for.
        """
        import torch

        for flag in _FLAGS:
            if kwargs.pop(flag, None):
                raise InputError(
                    f"A compiled graph has a fixed set of outputs; {flag}=True would need others.",
                    hint="Use the source model for that.",
                )
        if main_input is not None:
            if self.main_input_name in kwargs:
                raise InputError(f"{self.main_input_name} was given twice.", hint="Give it once.")
            kwargs[self.main_input_name] = main_input
        arrays = self.run(kwargs)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        if return_dict is False:
            return tuple(tensors.values())
        return _filled(self._output_class, tensors)

    forward = __call__
    # transformers' classifiers ask for it in every call, and working it out takes as long as the checks of inputs.
    forward.__signature__ = signature(forward)  # type: ignore[attr-defined]

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the compiled graph on named inputs and return named NumPy arrays."""
        return self.graph.run({name: _as_array(value) for name, value in inputs.items()})

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        return copy_artifact(self.artifact, dest)

    def close(self) -> None:
        """Release the graph. Closing twice does nothing."""
        self.graph.close()

    def can_generate(self) -> bool:
        """Return False: none of the tasks compiled so far generates."""
        return False

    def eval(self) -> CompiledModel:
        """Return itself: a compiled graph is always in evaluation mode."""
        return self

    def to(self, device: Any) -> CompiledModel:
        """Return itself if it runs on that device already.

        Raises:
            LoadError: a loaded graph cannot be moved.
        """
        import torch

        if isinstance(device, torch.dtype) or torch.device(device).type == self.device.type:
            return self
        raise LoadError(
            f"The compiled graph runs on {self.device}, and cannot be moved to {device}.",
            hint=f"Load it there: CompiledModel.from_pretrained(..., device={str(device)!r}).",
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "graph"):
            raise AttributeError(name)
        return getattr(self.config, name)

    def __repr__(self) -> str:
        target = self.manifest.target.name
        return f"CompiledModel({type(self).__name__}, target={target!r}, component={self.component!r})"


def _as_array(value: Any) -> Any:
    if value is None or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        if value.device.type == "meta":
            raise InputError("A tensor on the meta device holds no data.", hint="Give it on the CPU.")
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(
            "Rows of different lengths do not make a batch.", hint="Call the tokenizer with padding=True."
        ) from error


def _filled(kind: Any, tensors: Mapping[str, Any]) -> Any:
    """Make an output as the constructors of transformers do, which look at each field several times."""
    if kind.__module__.partition(".")[0] != "transformers":
        return kind(**tensors)
    output = kind.__new__(kind)
    for name in kind.__dataclass_fields__:
        output.__dict__[name] = value = tensors.get(name)
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


def _output_class(path: str) -> Any:
    return getattr(import_module(_output_module(path)), path.partition(":")[2])


def _output_module(path: str) -> str:
    module = path.partition(":")[0]
    # The path comes from a file: only transformers' own output classes are looked up.
    if module.partition(".")[0] not in ("transformers", "transformers_modules"):
        raise LoadError(f"{path!r} is no transformers output class.", hint="Compile the model again.")
    return module
