"""check: compile one model for one target, and compare its answers with transformers, alone and in batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.architectures.tiny_models import TEXTS, ModelClass, pictures, write_model
from compileflow.catalog import get_target
from compileflow.errors import CompileflowError, InputError, SourceError, SpecError
from compileflow.serving.model import CompiledModel
from compileflow.serving.padding import complete_inputs
from compileflow.serving.rows import PreparedItem, run_rows
from compileflow.source_model.tasks import model_class_of
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, ShapeBucket
from compileflow.steps.build import build_artifact

# Largest difference of two fp32 answers, relative to the largest element of the source model's answer, or to 1 if
# that is smaller.
TOLERANCE = 2e-4
# A deep model with random weights may amplify rounding. Its answers may differ by this many times the rounding of
# transformers' own answers, up to the largest tolerance.
ROUNDINGS = 4
LARGEST_TOLERANCE = 1e-3
Outcome = Literal["works", "refused", "fails", "transformers"]


@dataclass(frozen=True)
class Result:
    """What happened to one class on one target.

    Attributes:
        outcome: works; refused, in one line and before anything was compiled; fails; or transformers, where
            transformers itself cannot build or run the class.
        stage: Where it ended: build, reference, compile, load, rows, list, batch or done.
        reason: First line of the error, or the difference.
        worst: Largest relative difference of all answers that were compared.
    """

    outcome: Outcome
    stage: str
    reason: str = ""
    worst: float = 0.0


def check(model_class: ModelClass, target: str, folder: Path) -> Result:
    """Build, compile and compare one class.

    Args:
        model_class: The class.
        target: Name of the target.
        folder: Empty folder for the model and the artifact.
    """
    source_dir, out_dir = folder / "model", folder / "artifact"
    try:
        write_model(model_class, source_dir)
    except Exception as error:  # noqa: BLE001 - the error is the result
        return Result("transformers", "build", first_line(error))
    try:
        reference = _Reference(model_class, source_dir)
    except Exception as error:  # noqa: BLE001
        return Result("transformers", "reference", first_line(error))
    stage = "compile"
    try:
        longest = max(row["input_ids"].shape[-1] if "input_ids" in row else 0 for row in reference.rows)
        compile_model(model_class, target, source_dir, out_dir, longest=longest)
        stage = "load"
        model = CompiledModel.from_pretrained(out_dir, threads=1)
        worst = 0.0
        for stage, compare in (("rows", _rows), ("list", _list), ("batch", _batch)):
            difference = compare(model, reference)
            if not difference <= TOLERANCE and not difference <= reference.limit():
                return Result("fails", stage, f"the answers differ by {difference:.1e}", difference)
            worst = max(worst, difference)
    except CompileflowError as error:
        refused = isinstance(error, (SpecError, SourceError)) and stage == "compile"
        return Result("refused" if refused else "fails", stage, first_line(error))
    except Exception as error:  # noqa: BLE001
        return Result("fails", stage, first_line(error))
    return Result("works", "done", worst=worst)


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {' '.join(text.splitlines()[0].split())[:300]}"


class _Reference:
    """Answers of transformers for a few items, one item at a time and in one batch.

    Attributes:
        rows: Inputs of each item.
        answers: Outputs of each item by name.
        batch: Inputs of all items, padded as the tokenizer or processor pads; None if it cannot.
        batch_answers: Outputs of the batch by name; None if the model cannot run it.
        has_lists: Whether compileflow's pipelines form batches of single items.
    """

    def __init__(self, model_class: ModelClass, source_dir: Path):
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(source_dir)
        model: Any = model_class_of(config, model_class.hf_task).from_pretrained(source_dir).eval().float()
        self._model = model
        self.names = set(inspect.signature(model.forward).parameters)
        encode = _encoder(model_class, source_dir)
        items = _items(model_class)

        def run(encoded: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
            with torch.inference_mode():
                answer = model(**{name: torch.as_tensor(value) for name, value in encoded.items()})
            return {
                name: value.float().numpy() for name, value in answer.items() if isinstance(value, torch.Tensor)
            }

        self.rows: list[dict[str, Any]] = []
        self.answers: list[dict[str, NDArray[Any]]] = []
        errors = []
        for item in list(items):
            row = self._select(encode([item]))
            try:
                self.answers.append(run(row))
                self.rows.append(row)
            except Exception as error:  # noqa: BLE001 - some models cannot run very short rows
                items.remove(item)
                errors.append(error)
        if len(items) < 2:
            raise errors[0]
        if not all(self.answers):
            raise ValueError("The model returns no tensor, and no pipeline of transformers takes its answers.")
        if any(not np.isfinite(value).all() for answer in self.answers for value in answer.values()):
            raise ValueError("The small model's answers are not finite.")
        self.has_lists = model_class.hf_task not in (HfTask.MULTIPLE_CHOICE, HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION)
        try:
            self.batch: dict[str, Any] | None = self._select(encode(items))
            self.batch_answers: dict[str, Any] | None = run(self.batch)
            if model_class.hf_task.modality == "image-text":
                # The graph takes one image and any number of texts.
                self.batch = None
        except Exception:  # noqa: BLE001 - some processors and models take one item at a time
            self.batch = self.batch_answers = None

    def limit(self) -> float:
        """Return the largest difference that counts as rounding, measured on transformers' own answers in fp64."""
        import torch

        model, worst = self._model.double(), 0.0
        try:
            for row, answer in zip(self.rows, self.answers, strict=True):
                wide = {
                    name: value.astype(np.float64) if value.dtype.kind == "f" else value
                    for name, value in row.items()
                }
                with torch.inference_mode():
                    exact = model(**{name: torch.as_tensor(value) for name, value in wide.items()})
                worst = max(worst, _difference(answer, {name: exact[name].numpy() for name in answer}))
        except RuntimeError:
            # The model computes a part in fp32, whatever its weights.
            return TOLERANCE
        return max(TOLERANCE, min(LARGEST_TOLERANCE, ROUNDINGS * worst))

    def _select(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        return {name: np.asarray(value) for name, value in encoded.items() if name in self.names}

    def row_of_batch(self, batch_output: NDArray[Any], number: int, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """Cut one item's output from that of a batch to the shape that it has alone; None if it has another."""
        row = batch_output[number : number + 1]
        mask = (self.batch or {}).get("attention_mask")
        for axis in range(1, row.ndim):
            if row.shape[axis] == shape[axis]:
                continue
            if mask is not None and mask.ndim == 2 and row.shape[axis] == mask.shape[1]:
                row = np.compress(mask[number] == 1, row, axis=axis)
            else:
                row = row.take(range(min(shape[axis], row.shape[axis])), axis=axis)
        return row if row.shape == shape else None


def _encoder(model_class: ModelClass, source_dir: Path) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Return a function that prepares items as transformers' pipelines do."""
    import transformers

    modality = model_class.hf_task.modality
    if model_class.hf_task.takes_text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_dir)
    if model_class.hf_task is HfTask.MULTIPLE_CHOICE:
        return lambda items: _choices(tokenizer, items)
    if modality == "text":
        return lambda items: tokenizer(items, padding=len(items) > 1, truncation=True, return_tensors="np")
    if modality == "audio":
        return _sound_encoder(transformers.AutoFeatureExtractor.from_pretrained(source_dir))
    image_processor = transformers.AutoImageProcessor.from_pretrained(source_dir)
    if modality == "image":
        return lambda items: image_processor(images=items, return_tensors="np")
    padding = "max_length" if model_class.model_type.startswith("siglip") else True
    labels = tokenizer(list(TEXTS[:3]), padding=padding, truncation=True, return_tensors="np")
    return lambda items: {**labels, **image_processor(images=items, return_tensors="np")}


def _choices(tokenizer: Any, items: list[str]) -> dict[str, Any]:
    """Return a batch of questions with two choices each, of shape (batch, 2, sequence)."""
    texts = [text for text in items for _ in range(2)]
    encoded = tokenizer(
        texts, ["no", "it was on time"] * len(items), padding=True, truncation=True, return_tensors="np"
    )
    return {name: value.reshape(len(items), 2, -1) for name, value in encoded.items()}


def _sound_encoder(extractor: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    arguments = {"sampling_rate": extractor.sampling_rate, "return_tensors": "np"}

    def extract(items: list[Any]) -> Mapping[str, Any]:
        try:
            return dict(extractor(items, **arguments))
        except ValueError:
            # It does not pad to a length of its own.
            return dict(extractor(items, padding=True, **arguments))

    return extract


def _items(model_class: ModelClass) -> list[Any]:
    random = np.random.default_rng(0)
    if model_class.hf_task.modality == "text":
        return list(TEXTS)
    if model_class.hf_task.modality == "audio":
        return [random.standard_normal(length, dtype=np.float32) for length in (16_000, 24_000, 9_000)]
    return pictures()


def compile_model(model_class: ModelClass, target: str, source_dir: Path, out_dir: Path, *, longest: int) -> None:
    """Compile a small model.

    Args:
        model_class: Its class.
        target: Name of the target.
        source_dir: Folder of the model.
        out_dir: New folder for the artifact.
        longest: Longest row, in tokens, that a target with fixed shapes must take.

    Raises:
        CompileflowError: The library refused the model.
    """
    buckets = ((1, 32), (4, longest)) if model_class.hf_task.modality == "text" else ()
    if get_target(target).capabilities.dynamic_axes:
        buckets = ()
    component = ComponentSpec(
        shape_buckets=tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in buckets)
    )
    spec = CompileSpec(target=target, hf_task=model_class.hf_task, components=(component,))
    out_dir.mkdir()
    build_artifact(
        {
            "source_dir": str(source_dir),
            "out_dir": str(out_dir),
            "spec": spec.model_dump(mode="json"),
            "source": {"uri": source_dir.as_uri(), "revision": "0" * 64, "digest": "0" * 64},
            "threads": 1,
            "calibration": None,
        }
    )


def _inputs(model: CompiledModel, encoded: Mapping[str, Any]) -> dict[str, Any]:
    names = {record.name for record in model.graph.record.inputs} | {"attention_mask"}
    return {name: value for name, value in encoded.items() if name in names}


def _rows(model: CompiledModel, reference: _Reference) -> float:
    """Compare each item alone."""
    return max(
        _difference(answer, model.run(_inputs(model, row)))
        for row, answer in zip(reference.rows, reference.answers, strict=True)
    )


def _list(model: CompiledModel, reference: _Reference) -> float:
    """Compare all items as one list, in the batches that compileflow's pipelines form."""
    if not reference.has_lists:
        return 0.0
    items = [
        PreparedItem([complete_inputs(model.graph.record, _inputs(model, row))], None) for row in reference.rows
    ]
    outputs = run_rows(model, items, lambda _, row_outputs: row_outputs[0])
    return max(_difference(answer, output) for answer, output in zip(reference.answers, outputs, strict=True))


def _batch(model: CompiledModel, reference: _Reference) -> float:
    """Compare a batch that the tokenizer or processor has padded, on its own side, with the rows alone.

    Where transformers' answers depend on the padding, its answers to the same batch are as right. A model without
    a mask may refuse the batch.
    """
    if reference.batch is None or reference.batch_answers is None or model.main_input_name not in reference.batch:
        return 0.0
    try:
        outputs = model.run(_inputs(model, reference.batch))
    except InputError:
        if "attention_mask" in {record.name for record in model.graph.record.inputs}:
            raise
        return 0.0
    worst = 0.0
    for name, output in outputs.items():
        same_batch = _worst(reference.batch_answers[name], output)
        for number, answer in enumerate(reference.answers):
            row = reference.row_of_batch(output, number, answer[name].shape)
            alone = np.inf if row is None else _worst(answer[name], row)
            worst = max(worst, min(alone, same_batch))
    return worst


def _difference(answer: Mapping[str, NDArray[Any]], output: Mapping[str, NDArray[Any]]) -> float:
    return max(_worst(answer[name], value) for name, value in output.items())


def _worst(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return float("inf")
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(np.abs(expected.astype(np.float64) - actual).max(initial=0.0)) / scale
