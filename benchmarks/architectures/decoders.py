"""check_decoder: compile a small decoder for one target, and compare what it writes with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.architectures.check import Result, compile_model, first_line
from benchmarks.architectures.shrink import POSITIONS
from benchmarks.architectures.tiny_models import TEXTS, ModelClass, write_model
from compileflow.errors import CompileflowError
from compileflow.serving.model import CompiledModel
from compileflow.source_model.tasks import model_class_of
from compileflow.spec import HfTask
from compileflow.validation.measure.generation import Settings, Written, part
from compileflow.validation.writing import ModelWriter

NEW_TOKENS = 24
_SETTINGS = Settings(NEW_TOKENS)
# Different tokens in each text: enough, and so few that equal texts show nothing.
_ENOUGH_TOKENS, _FEWEST_TOKENS, _SEEDS = 6, 2, 8
_PROMPTS = TEXTS[:3]
# Larger than every vocabulary.
_NO_TOKEN = 1_000_000


def check_decoder(model_class: ModelClass, target: str, folder: Path) -> Result:
    """Build and compile one decoder, and let it and transformers write on from the same prompts.

    The prompts are a batch that is padded on the left, and one of its rows alone. The compiled model reads the
    batch twice.

    Args:
        model_class: The class.
        target: Name of the target.
        folder: Empty folder for the model and the artifact.
    """
    source_dir, out_dir = folder / "model", folder / "artifact"
    try:
        reference = _write_lively_model(model_class, folder)
    except Exception as error:  # noqa: BLE001 - the error is the result
        return Result("transformers", "reference", first_line(error))
    if reference.variety() < _FEWEST_TOKENS:
        return Result("transformers", "reference", "Small models of this class write one token again and again.")
    stage = "compile"
    try:
        compile_model(model_class, target, source_dir, out_dir, longest=POSITIONS)
        stage = "load"
        compiled_model = CompiledModel.from_pretrained(out_dir, threads=1)
        near_ties = 0
        for stage, inputs, expected in (
            ("batch", reference.batch, reference.texts),
            ("second request", reference.batch, reference.texts),
            ("row alone", reference.row, reference.text),
        ):
            partings = part(expected, _write(compiled_model, inputs))
            if "real" in partings:
                return Result("fails", stage, f"{partings.count('real')} of {len(partings)} texts differ")
            near_ties += partings.count("near tie")
    except CompileflowError as error:
        return Result("refused" if stage == "compile" else "fails", stage, first_line(error))
    except Exception as error:  # noqa: BLE001
        return Result("fails", stage, first_line(error))
    return Result("works", "done", f"{near_ties} near ties" if near_ties else "")


class _Reference:
    """What transformers writes after a batch of prompts, and after the last of them alone."""

    def __init__(self, hf_task: HfTask, source_dir: Path):
        import transformers

        config = transformers.AutoConfig.from_pretrained(source_dir)
        model = model_class_of(config, hf_task).from_pretrained(source_dir).eval().float()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_dir)
        self.batch, self.row = (_tokens(tokenizer, prompts) for prompts in (_PROMPTS, _PROMPTS[-1:]))
        self.texts, self.text = _write(model, self.batch), _write(model, self.row)

    def variety(self) -> int:
        """Return the number of different tokens in the most monotonous text."""
        return min(len(np.unique(row)) for row in self.texts.ids)


def _write_lively_model(model_class: ModelClass, folder: Path) -> _Reference:
    """Write a model whose texts have many different tokens, which depends on the seed.

    Raises:
        Exception: transformers cannot build or run the class.
    """
    references = []
    for seed in range(_SEEDS):
        write_model(model_class, folder / f"model-{seed}", seed=seed)
        references.append(_Reference(model_class.hf_task, folder / f"model-{seed}"))
        if references[-1].variety() >= _ENOUGH_TOKENS:
            break
    best = max(range(len(references)), key=lambda number: references[number].variety())
    (folder / f"model-{best}").rename(folder / "model")
    return references[best]


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Return prompts as a batch, padded on the left."""
    encoded = tokenizer(list(prompts), padding=True, return_tensors="np")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _write(model: Any, prompts: dict[str, NDArray[np.int64]]) -> Written:
    return ModelWriter(model, model.generation_config.pad_token_id or 0, _NO_TOKEN).write(prompts, _SETTINGS)
