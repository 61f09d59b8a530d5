"""CompiledModel: a compiled component behind the interface of its source model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.artifact.attestations.require_signature import RequireSignature
from compileflow.artifact.open import OpenArtifact, copy_artifact
from compileflow.contracts import Arrays, Device
from compileflow.errors import InputError, LoadError
from compileflow.serving.choices import run_choices
from compileflow.serving.component import LoadedComponent, named_inputs
from compileflow.serving.from_memory import in_memory
from compileflow.serving.full_interface import check_full_interface
from compileflow.serving.interface_files import check_answers, check_output_class, load_part, output_class
from compileflow.serving.older_folder import open_any
from compileflow.spec import NEURON_TARGETS, HfTask, ShapeBucket

# Arguments of transformers models besides tensors; True asks for outputs that a compiled model does not have.
FLAGS = ("output_attentions", "output_hidden_states", "use_cache")


class FixedModule:
    """Methods of a model whose device, data type and weights are fixed, because it is compiled."""

    def train(self: Any, mode: bool = True) -> Any:
        """Return this object for mode False.

        Raises:
            InputError: The mode is True; a compiled model cannot be trained.
        """
        if mode:
            raise InputError(
                "A compiled model has no parameters and cannot be trained.", hint="Train the source model."
            )
        return self

    def eval(self: Any) -> Any:
        """Return this object: a compiled model is always in evaluation mode."""
        return self

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return this object if it already has that device and data type.

        Raises:
            LoadError: A compiled model cannot be moved or converted.
        """
        import torch

        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.dtype):
                if argument is not self.dtype:
                    raise LoadError(
                        f"The compiled model returns {self.dtype} and cannot be converted to {argument}.",
                        hint="Compile with another precision.",
                    )
            elif (
                isinstance(argument, str | int | torch.device)
                and not isinstance(argument, bool)
                and torch.device(argument).type != self.device.type
            ):
                raise LoadError(
                    f"The compiled model takes tensors on {self.device} and cannot be moved to {argument}.",
                    hint=f"Load it for that device: CompiledModel.from_pretrained(..., device={str(argument)!r}).",
                )
        return self

    def cuda(self: Any, device: Any = None) -> Any:
        """Raise LoadError, because tensors enter and leave in host memory."""
        return self.to("cuda" if device is None else device)

    def half(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.float16)

    def bfloat16(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.bfloat16)

    def double(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.float64)


class CompiledModel(FixedModule):
    """A compiled component that is called like a transformers model and returns the source model's output class.

    A loaded model is also an instance of transformers' PreTrainedModel. Calls are safe from several threads.

    Attributes:
        graph: The loaded component.
        config: Configuration of the source model. All its attributes are available on this object.
        artifact: Artifact that the component belongs to.
        manifest: Manifest of the artifact.
        component: Name of the component.
    """

    base_model_prefix = "model"
    generation_config = None

    def __init__(self, graph: LoadedComponent, config: Any):
        import torch

        if isinstance(self, torch.nn.Module):
            torch.nn.Module.__init__(self)
            self.training = False
        self.graph = graph
        self.artifact = graph.artifact
        self.manifest = graph.artifact.manifest
        self.component = graph.component
        self.config = config
        self.name_or_path = str(graph.artifact.folder)
        self.main_input_name = graph.record.inputs[0].name
        self.input_modalities = (self.manifest.hf_task.modality,)
        self._output_class = output_class(graph.artifact, graph.record.output_class)
        check_answers(graph.artifact, graph.record, config, self._output_class)

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
        trust_remote_code: bool = False,
    ) -> CompiledModel:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, registered name, or URI such as STORE/manifests/sha256/DIGEST.json.
            component: Name of the component to load.
            device: Device to run on. None: the first device of the target.
            threads: Threads per call. None: the runtime decides.
            buckets: Compiled shape buckets to load. None: all.
            digest: Expected digest of the artifact, or at least its first 12 digits.
            trust: Load the artifact even if files were altered or added, with a warning in the log. Compiled files
                are native code, which then runs with your rights.
            require_signature: True accepts only artifacts whose provenance and verdict a trusted key signed. PEM
                files of public keys replace the trusted keys. None: the setting COMPILEFLOW_REQUIRE_SIGNATURE.
            trust_remote_code: Run the Python files that the artifact brings. Read them first: they run with your
                rights. The artifact itself never decides this.

        Raises:
            ManifestError, IntegrityError, SignatureError: The artifact fails a check. Nothing was deserialized.
            LoadError: The artifact cannot run here; the hint says what is missing.
        """
        return cls.from_artifact(
            open_any(
                location,
                digest=digest,
                trust=trust,
                require_signature=require_signature,
                trust_remote_code=trust_remote_code,
            ),
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
        """Load from an artifact that is already open."""
        check_full_interface("CompiledModel")
        artifact.check_code()
        check_output_class(artifact, artifact.component(component).output_class)
        graph = LoadedComponent.load(
            artifact, component=component, device=device, threads=threads, buckets=buckets
        )
        return cls.from_component(graph)

    @classmethod
    def from_component(cls, graph: LoadedComponent) -> CompiledModel:
        """Give a component that is loaded the interface of its source model.

        Raises:
            LoadError: transformers cannot use the artifact's config.json, or the output class does not fit.
        """
        artifact = graph.artifact
        config = load_part(artifact, "AutoConfig")
        from transformers import PreTrainedModel

        # transformers' pipelines read the name of the class, so a subclass takes the source model's. Only the
        # subclass is a PreTrainedModel, because importing that class imports torch.
        bases: tuple[type, ...] = (cls, PreTrainedModel)
        if artifact.manifest.hf_task.generates:
            # The class for decoders extends this one.
            from compileflow.serving.generation import generating_bases

            bases = generating_bases(cls)
        kind: Any = type(artifact.manifest.source.architecture, bases, {"__module__": cls.__module__})
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
        """Compile a model that is in memory. The model itself stays unchanged.

        Args:
            model: A transformers model.
            batch_size: Rows of the compiled shape. Calls with any number of rows are padded or split to it.
            max_length: Tokens of the compiled shape; -1 is the maximum of the model.
            neuron: Without `target`, True compiles for AWS Neuron and False for torchscript.
            validate_compilation: Compare every output with the source model's before returning.
            validation_rtol: Relative tolerance of the comparison, a fraction.
            validation_atol: Absolute tolerance of the comparison, in the units of the outputs.
            target: Name of a target; `compileflow targets` lists them.
            **tracing_kwargs: Options of the target.

        Raises:
            SpecError: The shape, the target or an option is invalid.
            TargetUnavailableError: The target's toolchain is not installed.
            CompileError: The toolchain cannot compile the model.
            VerdictError: An output differs by more than the tolerance. No artifact remains.
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
    def device(self) -> Any:
        """Device of the inputs and outputs: host memory, whatever device computes."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> Any:
        """Data type of the outputs."""
        import torch

        return torch.float32

    @property
    def model(self) -> LoadedComponent:
        """The loaded component, under its name in the older library. It takes tensors by position."""
        return self.graph

    @property
    def compilation_specs(self) -> dict[str, Any]:
        """Settings of the compile: batch_size, max_length (tokens), target, and the target's options by name.

        The older library's names are there as well: tracing_kwargs, tracing__batch_size, tracing__max_length and
        tracing__neuron.
        """
        spec, record = self.manifest.spec, self.graph.record
        buckets = record.shape_buckets or spec.components[0].shape_buckets
        batch_size = max((bucket.batch_size for bucket in buckets), default=1)
        return {
            "batch_size": batch_size,
            "max_length": record.max_sequence_length,
            "target": spec.target,
            **spec.target_options,
            "tracing_kwargs": dict(spec.target_options),
            "tracing__batch_size": batch_size,
            "tracing__max_length": record.max_sequence_length,
            "tracing__neuron": spec.target in NEURON_TARGETS,
        }

    def __call__(self, *inputs: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Run the compiled component.

        Args:
            *inputs: Tensors, arrays or lists in the order and with the axes of the manifest, for example
                `input_ids` and `attention_mask`.
            return_dict: False returns a plain tuple, as in transformers.
            **kwargs: Inputs of the source model by name.

        Returns:
            Outputs in the source model's output class, with torch tensors.

        Raises:
            InputError: The component does not have an input, shapes do not match, or there are more tokens than
                the component was compiled for.
        """
        for flag in FLAGS:
            if kwargs.pop(flag, None):
                raise InputError(
                    f"{flag}=True asks for outputs that the compiled model does not have.",
                    hint="Use the source model for these outputs.",
                )
        by_position = named_inputs(self.graph.record, inputs)
        for name in by_position:
            if name in kwargs:
                raise InputError(f"{name} was passed twice.", hint="Pass it once.")
        outputs = self.as_output(self.run(kwargs | by_position))
        return outputs if return_dict is not False else tuple(outputs.values())

    forward = __call__
    # transformers' classifiers read the signature in every call; computing it takes as long as checking inputs.
    forward.__signature__ = signature(forward)  # type: ignore[attr-defined]

    def as_output(self, arrays: Arrays) -> Any:
        """Put named arrays into the source model's output class, as tensors that share their memory."""
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        return _filled(self._output_class, tensors)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the compiled component on named inputs and return named NumPy arrays."""
        is_choice = self.manifest.hf_task is HfTask.MULTIPLE_CHOICE
        return run_choices(self.graph, inputs) if is_choice else self.graph.run(inputs)

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`: an empty or absent folder, or one that holds another artifact."""
        return copy_artifact(self.artifact, dest, replace=True)

    def close(self) -> None:
        """Release the component. A second call does nothing."""
        self.graph.close()

    def can_generate(self) -> bool:
        """Return False: only a model that was compiled for text-generation generates."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "graph"):
            raise AttributeError(name)
        return getattr(self.config, name)

    def __copy__(self) -> CompiledModel:
        model_copy = type(self).__new__(type(self))
        vars(model_copy).update(vars(self))
        return model_copy

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle would look for the subclass by its name.
        base: Any = type(self).__bases__[0]
        return base.from_component, (self.graph,)

    def __repr__(self) -> str:
        target = self.manifest.target.name
        return f"CompiledModel({type(self).__name__}, target={target!r}, component={self.component!r})"


def _filled(kind: Any, tensors: Mapping[str, Any]) -> Any:
    """Create an output as transformers' constructors do, but without their repeated checks of each field."""
    if kind.__module__.partition(".")[0] != "transformers":
        return kind(**tensors)
    output = kind.__new__(kind)
    for name in kind.__dataclass_fields__:
        output.__dict__[name] = value = tensors.get(name)
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output
