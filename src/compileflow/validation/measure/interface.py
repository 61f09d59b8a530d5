"""Measure what stands around the graph: files, claims of the manifest, tokens, processors, answers to raw inputs.

Each measure is the number of items that differ from the source model's, with the first of them in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays
from compileflow.errors import LoadError, first_line
from compileflow.source_model.sentence_files import MODULE_WEIGHTS, module_list
from compileflow.source_model.sentence_modules import module_weights
from compileflow.sources.files import is_interface_file, kind_of
from compileflow.validation.cases.generated_signals import NamedSignal
from compileflow.validation.differences import first_difference
from compileflow.validation.measure.measurements import Measurements

# Absolute and relative. Both sides compute on equal numbers, so only the order of operations may differ.
_TOLERANCE = (1e-6, 1e-5)
_TEXTS_PER_CALL = 1000
_LONGEST_DETAIL, _LONGEST_NAME = 240, 60
_SETTINGS = "generation_config.json"
# Entries of config.json that transformers writes and no class reads.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")

Tokenize = Callable[..., Mapping[str, Any]]
Pipeline = Callable[[Any], Any]
# Name of each claim, with the expected value and that of the manifest.
Claims = Mapping[str, tuple[Any, Any]]


def measure_files(
    measurements: Measurements, source_dir: Path, artifact: OpenArtifact, *, is_imported: bool = False
) -> None:
    """Compare the files that the Hugging Face classes read, byte for byte, and the weights of further modules.

    Args:
        measurements: Gets `interface_files`, the number of files that differ.
        source_dir: Folder of the source model.
        artifact: The artifact.
        is_imported: The artifact was imported from a folder of the older library, which wrote the tokenizer again.
            Only the contents of config.json are compared then.
    """
    changes = []
    if is_imported:
        measurements.notes.append(
            "The files of the tokenizer were not compared, because the older library wrote them again. Its tokens "
            "were compared."
        )
        contents = [_without_bookkeeping(folder / "config.json") for folder in (source_dir, artifact.folder)]
        if contents[0] != contents[1]:
            changes.append(f"config.json differs at {_changed_place(*contents)}")
    else:
        changes += _changed_files(source_dir, artifact)
    changes += _changed_weights(source_dir, artifact.folder)
    _record(measurements, "interface_files", changes)


def measure_claims(measurements: Measurements, claims: Claims) -> None:
    """Compare what the manifest says with what the source model and the specification say.

    Args:
        measurements: Gets `manifest_claims`, the number of claims that differ.
        claims: Name of each claim, with the expected value and that of the manifest.
    """
    changes = [
        f"{name}: expected {expected}, the manifest says {actual}"
        for name, (expected, actual) in claims.items()
        if expected != actual
    ]
    _record(measurements, "manifest_claims", changes)


def measure_token_ids(
    measurements: Measurements,
    reference: Tokenize,
    candidate: Tokenize,
    texts: Sequence[str],
    *,
    metric: str = "token_ids",
) -> None:
    """Compare the tokens of two tokenizers: what they return for texts, and for some pairs.

    Args:
        measurements: Gets the metric, the number of texts with other tokens.
        reference: The source model's tokenizer. It takes a list of texts, and a list of second texts.
        candidate: The artifact's tokenizer.
        texts: Texts.
        metric: Name of the metric.
    """
    half = min(len(texts), _TEXTS_PER_CALL) // 2
    calls: list[tuple[Sequence[str], ...]] = [(texts[:half], texts[half : 2 * half])]
    calls += [(texts[start : start + _TEXTS_PER_CALL],) for start in range(0, len(texts), _TEXTS_PER_CALL)]
    changes: list[str] = []
    for call in calls:
        expected = _tokens(reference, call)
        actual, error_text = _answer(partial(_tokens, candidate), call)
        if error_text:
            changes += [f"{text!r:.80}: {error_text}" for text in call[0]]
        elif expected != actual:
            changes += _changed_rows(call[0], expected, actual)
    _record(measurements, metric, changes)


def measure_processor(
    measurements: Measurements,
    reference: Callable[[Sequence[NDArray[Any]]], Arrays],
    candidate: Callable[[Sequence[NDArray[Any]]], Arrays],
    signals: Sequence[NamedSignal],
) -> None:
    """Compare what two processors make of pictures or sounds, each alone.

    Args:
        measurements: Gets `processor_outputs`, the number of signals with other outputs.
        reference: The source model's processor.
        candidate: The artifact's processor.
        signals: Pictures or sounds.
    """
    changes = []
    for signal in signals:
        # A processor may refuse an odd picture.
        expected, actual = (_answer(processor, [signal.values]) for processor in (reference, candidate))
        change = _changed_answer(expected, actual, tolerance=(0.0, 0.0))
        if change:
            changes.append(f"{signal.name}: {change}")
    _record(measurements, "processor_outputs", changes)


def measure_answers(
    measurements: Measurements,
    reference: Pipeline,
    candidate: Pipeline,
    inputs: Sequence[Any],
    *,
    before_each: Callable[[], None],
    metric: str = "pipeline_answers",
) -> None:
    """Compare the answers of two pipelines to raw inputs, each alone.

    Args:
        measurements: Gets the metric, the number of inputs with another answer. An input that both refuse is not
            counted; if they refuse all, nothing is measured.
        reference: Pipeline on the files of the source model.
        candidate: Pipeline of the artifact.
        inputs: Raw inputs.
        before_each: Called before each input.
        metric: Name of the metric.
    """
    changes, refusals = [], []
    for item in inputs:
        before_each()
        actual, expected = _answer(candidate, item), _answer(reference, item)
        if actual[1] and expected[1]:
            refusals.append(expected[1])
            continue
        change = _changed_answer(expected, actual, tolerance=_TOLERANCE)
        if change:
            changes.append(f"{_named(item)}: {change}")
    if refusals:
        measurements.notes.append(
            f"Both pipelines refuse {len(refusals)} of {len(inputs)} raw inputs, the first with {refusals[0]}"
        )
    if len(refusals) < len(inputs):
        _record(measurements, metric, changes)


def measure_fields(measurements: Measurements, reference: Any, candidate: Any) -> None:
    """Compare two configurations, for a task whose outputs no pipeline processes.

    Args:
        measurements: Gets `pipeline_answers`, the number of fields that differ.
        reference: Configuration of the source model.
        candidate: Configuration of the artifact.
    """
    before, after = (
        {name: value for name, value in config.to_dict().items() if name not in _BOOKKEEPING}
        for config in (reference, candidate)
    )
    changes = [
        f"{name} of the configuration: expected {before.get(name)!r}, got {after.get(name)!r}"
        for name in before | after
        if before.get(name) != after.get(name)
    ]
    _record(measurements, "pipeline_answers", changes)


def record_refusal(measurements: Measurements, metric: str, error: Exception) -> None:
    """Record that a part of the artifact cannot be loaded, although that of the source model can."""
    _record(
        measurements, metric, [f"the artifact's cannot be loaded: {type(error).__name__}: {first_line(error)}"]
    )


def _record(measurements: Measurements, metric: str, changes: Sequence[str]) -> None:
    measurements.scalars[metric] = float(len(changes))
    if changes:
        text = changes[0]
        measurements.details[metric] = text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]}..."


def _changed_files(source_dir: Path, artifact: OpenArtifact) -> list[str]:
    folders = tuple(f"{record.folder}/" for record in artifact.manifest.components.values())
    listed_names = {record.path for record in artifact.manifest.files}
    # A compile converts the weights of modules to safetensors. They are compared number by number.
    rewritten_names = {f"{path}/{MODULE_WEIGHTS[0]}" for _, path in module_list(source_dir)}
    names = {name for name in listed_names if not name.startswith(folders) and name not in rewritten_names}
    source_names = {path.relative_to(source_dir).as_posix() for path in source_dir.rglob("*") if path.is_file()}
    source_names = {name for name in source_names if is_interface_file(name)}
    changes = []
    for name in sorted(names | source_names):
        if name not in names:
            changes.append(f"{name} is missing")
        elif kind_of(name) == "weights":
            changes.append(f"{name} holds weights that no module reads")
        elif name not in source_names:
            changes.append(f"the source model has no {name}")
        elif (source_dir / name).read_bytes() != (artifact.folder / name).read_bytes():
            contents = [_json(folder / name) for folder in (source_dir, artifact.folder)]
            place = _changed_place(*contents)
            changes.append(f"{name} differs" + (f" at {place}" if place else ""))
    # openvino_genai reads this copy beside the graph.
    for name in sorted(listed_names & {f"{folder}{_SETTINGS}" for folder in folders}):
        if _json(artifact.folder / name) != _json(source_dir / _SETTINGS):
            changes.append(f"{name} differs")
    return changes


def _changed_weights(source_dir: Path, folder: Path) -> list[str]:
    """Compare the weights of modules behind the transformer, which a compile stores as safetensors."""
    expected = module_weights(source_dir)
    try:
        actual = module_weights(folder)
    except (LoadError, OSError, ValueError) as error:
        return [f"the modules cannot be read: {first_line(error)}"]
    return [
        f"{path}: the weights differ"
        for path, weights in expected.items()
        if weights.keys() != actual.get(path, {}).keys()
        or any(not np.array_equal(values, actual[path][name], equal_nan=True) for name, values in weights.items())
    ]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _without_bookkeeping(path: Path) -> Any:
    content = _json(path)
    return {name: value for name, value in content.items() if name not in _BOOKKEEPING} if content else content


def _changed_place(expected: Any, actual: Any) -> str:
    """Return the first entry of two JSON objects that differs, with dots between the levels; "" without one."""
    place = []
    while isinstance(expected, dict) and isinstance(actual, dict):
        names = [
            name
            for name in expected | actual
            if (name in expected, expected.get(name)) != (name in actual, actual.get(name))
        ]
        if not names:
            break
        place.append(names[0])
        expected, actual = expected.get(names[0]), actual.get(names[0])
    return ".".join(place)


def _tokens(tokenize: Tokenize, call: tuple[Sequence[str], ...]) -> dict[str, Any]:
    return dict(tokenize(*map(list, call)))


def _changed_rows(texts: Sequence[str], expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    if expected.keys() != actual.keys():
        return [f"expected {', '.join(expected)}, got {', '.join(actual)}"] * len(texts)
    changes = []
    for number, text in enumerate(texts):
        for name in expected:
            before, after = expected[name][number], actual[name][number]
            if before != after:
                pairs = enumerate(zip_longest(before, after))
                place, (old, new) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
                changes.append(f"{name}[{place}] of {text!r:.80}: expected {old}, got {new}")
                break
    return changes


def _answer(part: Callable[[Any], Any], item: Any) -> tuple[Any, str]:
    """Return what a tokenizer, processor or pipeline makes of an input, or None and the error in words."""
    try:
        return part(item), ""
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - they raise whatever they like
        return None, f"{type(error).__name__}: {first_line(error)}"


def _named(item: Any) -> str:
    return " ".join(repr(item).split())[:_LONGEST_NAME]


def _changed_answer(expected: tuple[Any, str], actual: tuple[Any, str], *, tolerance: tuple[float, float]) -> str:
    if expected[1] and actual[1]:
        return ""
    if expected[1] or actual[1]:
        return f"expected {expected[1] or 'an answer'}, got {actual[1] or 'an answer'}"
    return first_difference(actual[0], expected[0], tolerance, "answer") or ""
