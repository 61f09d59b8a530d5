"""Double of hyperdex.transformers: classes that load what AutoCompiler wrote.

HyperAccel documents AutoModelForCausalLM. The classes of encoders are an assumption, modelled on transformers.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from double_graphs import register_operator

# Arguments of each call, for the tests; the real module has no such list.
CALLS: list[dict[str, Any]] = []

register_operator("lpu")


class _CompiledModel:
    """Takes one row of NumPy arrays in a call, of up to max_length tokens."""

    _ending: str

    def __init__(self, graph: Any, interface: dict[str, Any]):
        self._graph = graph
        self._interface = interface

    @classmethod
    def from_pretrained(cls, model_id: str, device_map: dict[str, int]) -> _CompiledModel:
        """Load onto `device_map["lpu"]` LPUs."""
        CALLS.append({"class": cls.__name__, "device_map": device_map})
        folder = Path(model_id)
        interface = json.loads((folder / "param" / "interface.json").read_text())
        if set(device_map) - {"lpu", "gpu"} or device_map.get("lpu") != interface["num_device"]:
            raise ValueError(f"compiled for {interface['num_device']} LPUs, got {device_map}")
        if not interface["architecture"].endswith(cls._ending):
            raise ValueError(f"{cls.__name__} does not load {interface['architecture']}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(torch.jit.load(str(folder / "inst" / "model.pt")), interface)

    def __call__(self, **inputs: np.ndarray[Any, Any]) -> SimpleNamespace:
        """Pad to max_length, run, and cut back."""
        names, longest = self._interface["inputs"], self._interface["max_length"]
        if sorted(inputs) != sorted(names):
            raise TypeError(f"expected inputs {names}, got {sorted(inputs)}")
        rows, length = inputs["input_ids"].shape
        if rows != 1 or length > longest:
            raise ValueError(f"expected one row of at most {longest} tokens, got {(rows, length)}")
        fill = {"input_ids": self._interface["pad_token_id"]}
        padded = [
            np.pad(inputs[name], ((0, 0), (0, longest - length)), constant_values=fill.get(name, 0))
            for name in names
        ]
        with torch.inference_mode():
            answers = self._graph(*(torch.as_tensor(array) for array in padded))
        arrays = [answer.numpy() for answer in answers]
        cut = [value[:, :length] if value.ndim > 1 and value.shape[1] == longest else value for value in arrays]
        return SimpleNamespace(**dict(zip(self._interface["outputs"], cut, strict=True)))


class AutoModelForCausalLM(_CompiledModel):
    _ending = "ForCausalLM"


class AutoModel(_CompiledModel):
    _ending = "Model"


class AutoModelForSequenceClassification(_CompiledModel):
    _ending = "ForSequenceClassification"


class AutoModelForTokenClassification(_CompiledModel):
    _ending = "ForTokenClassification"


class AutoModelForMaskedLM(_CompiledModel):
    _ending = "ForMaskedLM"


class AutoModelForQuestionAnswering(_CompiledModel):
    _ending = "ForQuestionAnswering"
