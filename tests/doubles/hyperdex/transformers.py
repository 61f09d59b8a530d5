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

    _ending: str | tuple[str, ...]

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
        if device_map.get("gpu") and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            raise ValueError("the GPUs need the weights of the checkpoint")
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
        return SimpleNamespace(
            **dict(zip(self._interface["outputs"], (value.copy() for value in cut), strict=True))
        )


class AutoModelForCausalLM(_CompiledModel):
    _ending = ("ForCausalLM", "LMHeadModel")

    def generate(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        top_p: float = 0.7,
        top_k: int = 1,
        temperature: float = 1.0,
        repetition_penalty: float = 1.2,
        stop: int | None = None,
        seed: int | None = None,
        streamer: Any = None,
    ) -> list[int]:
        """Write on from one row with the documented defaults; the answer begins with the prompt."""
        CALLS.append(
            {
                "call": "generate",
                "max_new_tokens": max_new_tokens,
                "do_sample": do_sample,
                "top_p": top_p,
                "top_k": top_k,
                "temperature": temperature,
                "repetition_penalty": repetition_penalty,
                "stop": stop,
            }
        )
        ids = np.asarray(input_ids, np.int64).reshape(1, -1)
        longest = ids.shape[1] + max_new_tokens if max_new_tokens is not None else max_length
        stop = self._interface["eos_token_id"] if stop is None else stop
        while ids.shape[1] < longest:
            mask = np.ones_like(ids)
            scores = self(input_ids=ids, attention_mask=mask).logits[0, -1]
            seen = np.unique(ids)
            scores[seen] = np.where(
                scores[seen] > 0, scores[seen] / repetition_penalty, scores[seen] * repetition_penalty
            )
            if do_sample:
                raise NotImplementedError("the double takes the likeliest token")
            ids = np.append(ids, [[scores.argmax()]], axis=1)
            if ids[0, -1] == stop:
                break
        return ids[0].tolist()


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
