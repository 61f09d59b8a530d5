"""Double of hyperdex.tools: AutoCompiler, with the keywords of HyperAccel's examples.

As documented, `low_memory_usage` removes the weights of the checkpoint after they were converted.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from double_graphs import fixed_shape, register_operator, trace

# Arguments of each call, for the tests; the real module has no such list.
CALLS: list[dict[str, Any]] = []

register_operator("lpu")


class AutoCompiler:
    """Compiles the model in a folder, with the architecture that config.json names."""

    def compile(
        self,
        *,
        model_id: str,
        num_device: int,
        max_length: int,
        low_memory_usage: bool,
        fast_compile: bool = False,
    ) -> None:
        """Write instructions (inst) and parameters (param) into the model's folder."""
        CALLS.append(
            {
                "num_device": num_device,
                "max_length": max_length,
                "low_memory_usage": low_memory_usage,
                "fast_compile": fast_compile,
                "threads": torch.get_num_threads(),
            }
        )
        folder = Path(model_id)
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(folder, local_files_only=True).eval()
        # A decoder's answer also holds its cache.
        settings = {"use_cache": False} if architecture.endswith(("ForCausalLM", "LMHeadModel")) else {}
        inputs = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs.append("token_type_ids")
        tensors = [torch.ones(1, max_length, dtype=torch.int64) for _ in inputs]
        tensors[1][0, -1] = 0
        with torch.no_grad():
            outputs = list(model(**dict(zip(inputs, tensors, strict=True)), **settings).keys())

        class Positional(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                answer = self.model(**dict(zip(inputs, tensors, strict=True)), **settings)
                return tuple(answer[name] for name in outputs)

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = fixed_shape(trace(Positional().eval(), tensors, "lpu"), tensors)
            (folder / "inst").mkdir()
            torch.jit.save(graph, str(folder / "inst" / "model.pt"))
        (folder / "param").mkdir()
        interface = {
            "architecture": architecture,
            "inputs": inputs,
            "outputs": outputs,
            "num_device": num_device,
            "max_length": max_length,
            "pad_token_id": model.config.pad_token_id or 0,
            "eos_token_id": model.config.eos_token_id,
        }
        (folder / "param" / "interface.json").write_text(json.dumps(interface))
        if low_memory_usage:
            for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
                path.unlink()
