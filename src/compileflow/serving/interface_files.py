"""The configuration, tokenizer, processor and output class of an artifact, as transformers' own classes read them.

An artifact may come from a stranger. Its Python files run only if the caller trusts them, and a file that
transformers cannot use ends in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from compileflow.artifact.open import OpenArtifact, untrusted_code
from compileflow.contracts import ComponentRecord
from compileflow.contracts.toolkit import library_errors
from compileflow.errors import LoadError, first_line
from compileflow.source_model.interface_limits import check_interface_files, check_tokenizer
from compileflow.source_model.processor import Processor, probe_signals
from compileflow.source_model.tasks import LABELLED_TASKS
from compileflow.spec import Modality

# Modules of transformers that define output classes.
_OUTPUT_CLASS = re.compile(r"transformers\.(?:\w+\.)*modeling_\w+:\w+")
# Model files with code are imported under this name.
_REMOTE_MODULE = "transformers_modules"
# Values of `function_to_apply` in transformers' pipelines for classification.
_FUNCTIONS = (None, "sigmoid", "softmax", "none")
_MODALITIES: dict[str, Modality] = {"AutoImageProcessor": "image", "AutoFeatureExtractor": "audio"}


def load_part(artifact: OpenArtifact, auto_class: str) -> Any:
    """Load one part of an artifact with a class of transformers, for example AutoConfig or AutoTokenizer.

    Raises:
        LoadError: The artifact brings Python code that the caller does not trust, or transformers cannot use its
            files.
    """
    artifact.check_code()
    folder = artifact.tokenizer_folder if auto_class == "AutoTokenizer" else artifact.folder
    check_files(artifact, folder)
    # After the checks, so that a refused artifact imports nothing.
    import transformers

    with foreign_errors(folder, f"{auto_class} of transformers cannot use the files in {folder}"):
        part = getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, trust_remote_code=artifact.trust_remote_code
        )
        if auto_class == "AutoTokenizer" and not artifact.trust_remote_code:
            _check_converted(part, folder)
        _try(part, auto_class)
    if auto_class == "AutoConfig" and not artifact.trust_remote_code:
        # These are names of classes in Python files. The graph answers behind transformers' own pipeline.
        vars(part).pop("custom_pipelines", None)
    return part


def load_saved_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load a tokenizer from a folder that is not an artifact.

    Raises:
        LoadError: The tokenizer brings Python code that the caller does not trust, or transformers cannot use it.
    """
    if not trust_remote_code:
        _check_limits(folder)
    from transformers import AutoTokenizer

    with foreign_errors(folder, f"AutoTokenizer of transformers cannot use the files in {folder}"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def check_files(artifact: OpenArtifact, folder: Path) -> None:
    """Check the files of an artifact in a folder against the limits of files that a stranger may have written.

    Raises:
        LoadError: A file breaks a limit, and the caller does not trust the artifact with trust_remote_code.
    """
    if not artifact.trust_remote_code:
        _check_once(folder, artifact.digest)


@lru_cache(maxsize=32)
def _check_once(folder: Path, digest: str) -> None:
    """Check a folder of an artifact only at the first load; `digest` stands for its contents."""
    _check_limits(folder)


def _check_limits(folder: Path) -> None:
    try:
        check_interface_files(folder)
    except (OSError, ValueError) as error:
        raise _beyond_limits(str(folder), error) from error


def _beyond_limits(subject: str, error: Exception) -> LoadError:
    return LoadError(
        f"{subject}: {first_line(error)}.",
        hint="Compile the model again, or fetch the artifact again. If you trust the artifact, pass "
        "trust_remote_code=True, which loads it without limits.",
    )


def _check_converted(tokenizer: Any, folder: Path) -> None:
    """Check a tokenizer that transformers made from files in other forms, which `check_files` does not read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (folder / "tokenizer.json").is_file():
        return
    try:
        check_tokenizer(json.loads(backend.to_str()))
    except ValueError as error:
        raise _beyond_limits(f"The tokenizer in {folder}", error) from error


def _try(part: Any, auto_class: str) -> None:
    """Call a part once, so that settings which it does not take are found at the load."""
    if auto_class == "AutoTokenizer":
        part("a")
    elif auto_class in _MODALITIES:
        processor = Processor(part, _MODALITIES[auto_class])
        processor(probe_signals(processor)[:1])


@contextmanager
def foreign_errors(folder: Path, problem: str) -> Iterator[None]:
    """Turn whatever a library raises about the files in a folder into a LoadError of one line.

    Args:
        folder: Folder whose files are read.
        problem: First part of the error: what cannot be done.
    """
    with library_errors(problem, hint="Compile the model again, or fetch the artifact again."):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise untrusted_code(folder) from error
            raise


def check_answers(artifact: OpenArtifact, record: ComponentRecord, config: Any, kind: Any) -> None:
    """Check that the output class takes the outputs of the graph, and that the configuration names their classes.

    Args:
        artifact: The artifact.
        record: Record of the component.
        config: Configuration of the source model.
        kind: Output class.

    Raises:
        LoadError: It does not.
    """
    hint = "Compile the model again, or fetch the artifact again."
    # Code that the caller trusts may define another kind of class.
    fields = getattr(kind, "__dataclass_fields__", None)
    unknown_names = [tensor.name for tensor in record.outputs if fields is not None and tensor.name not in fields]
    if unknown_names:
        raise LoadError(f"{record.output_class} has no output {unknown_names[0]!r}.", hint=hint)
    if artifact.manifest.hf_task.graph_task not in LABELLED_TASKS:
        return
    function = getattr(config, "function_to_apply", None)
    if function not in _FUNCTIONS:
        raise LoadError(f"function_to_apply of config.json is {function!r}, which no pipeline knows.", hint=hint)
    labels = getattr(config, "id2label", None) or {}
    for tensor in record.outputs:
        classes = tensor.axes[-1] if tensor.name == "logits" and tensor.axes else 0
        if isinstance(classes, int) and any(number not in labels for number in range(classes)):
            raise LoadError(
                f"The graph returns {classes} classes, but config.json names {len(labels)} labels.", hint=hint
            )


def check_output_class(artifact: OpenArtifact, path: str) -> None:
    """Check that an output class, "module:Class", belongs to transformers or to code that the caller trusts.

    Raises:
        LoadError: It does not. Nothing was imported.
    """
    if path.startswith(f"{_REMOTE_MODULE}."):
        artifact.check_code()
        if not artifact.trust_remote_code:
            raise untrusted_code(artifact.saved_folder)
    elif _OUTPUT_CLASS.fullmatch(path) is None:
        raise LoadError(f"{path!r} is not an output class of transformers.", hint="Compile the model again.")


def output_class(artifact: OpenArtifact, path: str) -> Any:
    """Import the output class of a component.

    Raises:
        LoadError: See `check_output_class`; or the installed transformers has no such class.
    """
    check_output_class(artifact, path)
    module, _, name = path.partition(":")
    with foreign_errors(artifact.saved_folder, f"The output class {path!r} cannot be imported"):
        if module.startswith(f"{_REMOTE_MODULE}."):
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            # From the artifact's own file, which was checked, not from the cache of an earlier load.
            return get_class_from_dynamic_module(
                f"{module.rpartition('.')[2]}.{name}", str(artifact.folder), local_files_only=True
            )
        kind = getattr(import_module(module), name)
        from transformers.utils import ModelOutput

        if not (isinstance(kind, type) and issubclass(kind, ModelOutput) and is_dataclass(kind)):
            raise LoadError(f"{path!r} is not an output class of transformers.", hint="Compile the model again.")
        return kind
