"""CompiledModel: called like the source model, answers with the source model's output class."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, Device, Runner
from compileflow.errors import InputError, LoadError
from compileflow.serving.artifacts import OpenArtifact, copy_artifact, open_artifact
from compileflow.serving.batching import complete_inputs, run_fitted

# What a transformers model takes besides tensors; True would need outputs that the graph does not have.
_FLAGS = ("output_attentions", "output_hidden_states", "use_cache")


class CompiledModel:
    """A compiled graph behind a transformers model's interface.

    `config` is the source model's; every attribute of it is available on this object, too. Calls are safe
    from several threads.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    generation_config = None

    def __init__(self, artifact: OpenArtifact, component: str, runner: Runner, config: Any):
        import torch

        self.artifact = artifact
        self.manifest = artifact.manifest
        self.component = component
        self.config = config
        # Whatever computes, tensors go in and come out in host memory.
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.name_or_path = str(artifact.folder)
        self._runner = runner
        self._record = artifact.manifest.components[component]
        self._output_class = _output_class(self._record.output_class)

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
    ) -> CompiledModel:
        """Load from an artifact's folder or URI, after checking every digest.

        Args:
            location: Folder, or STORE/manifests/sha256/DIGEST.json.
            component: Which compiled graph of the artifact.
            device: Where it runs; the target must know it. None: where the target runs first of all.
            threads: Threads of one call; None leaves it to the runtime.

        Raises:
            ManifestError, IntegrityError: refused before anything is deserialised.
            LoadError: it cannot run here; the hint says what is missing.
        """
        return cls.from_artifact(open_artifact(location), component=component, device=device, threads=threads)

    @classmethod
    def from_artifact(
        cls,
        artifact: OpenArtifact,
        *,
        component: str = "default",
        device: Device | None = None,
        threads: int | None = None,
    ) -> CompiledModel:
        """Load from an artifact that is open already."""
        from transformers import AutoConfig

        runner = artifact.load(component, device=device, threads=threads)
        config = AutoConfig.from_pretrained(
            artifact.folder,
            local_files_only=True,
            trust_remote_code=artifact.manifest.spec.trust_remote_code,
        )
        # transformers' pipelines look at the class's name; a subclass borrows it.
        kind = type(artifact.manifest.source.architecture, (cls,), {"__module__": cls.__module__})
        model: CompiledModel = kind(artifact, component, runner, config)
        return model

    def __call__(self, input_ids: Any = None, *, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Run the compiled graph.

        Args:
            input_ids: Token ids, shape (batch, sequence): tensor, array or lists.
            return_dict: False gives a plain tuple, as in transformers.
            **kwargs: The source model's other inputs, `attention_mask` and `token_type_ids`.

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
        arrays = self.run({"input_ids": input_ids} | kwargs)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        if return_dict is False:
            return tuple(tensors.values())
        return self._output_class(**tensors)

    forward = __call__

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the compiled graph on named inputs and return named NumPy arrays."""
        given = {name: _as_array(value) for name, value in inputs.items()}
        return run_fitted(self._runner, self._record, complete_inputs(self._record, given))

    def save_pretrained(self, dest: str | Path) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        return copy_artifact(self.artifact, dest)

    def close(self) -> None:
        """Release the graph. Closing twice does nothing."""
        self._runner.close()

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
        if name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    def __repr__(self) -> str:
        target = self.manifest.target.name
        return f"CompiledModel({type(self).__name__}, target={target!r}, component={self.component!r})"


def _as_array(value: Any) -> Any:
    if value is None or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(
            "Rows of different lengths do not make a batch.", hint="Call the tokenizer with padding=True."
        ) from error


def _output_class(path: str) -> Any:
    module, _, name = path.partition(":")
    # The path comes from a file: only transformers' own output classes are looked up.
    if module.partition(".")[0] not in ("transformers", "transformers_modules"):
        raise LoadError(f"{path!r} is no transformers output class.", hint="Compile the model again.")
    return getattr(import_module(module), name)
