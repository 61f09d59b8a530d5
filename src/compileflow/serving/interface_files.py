"""The configuration, tokenizer, processor and output class of an artifact, as transformers' own classes read them.

An artifact may come from a stranger. Its Python files run only if the caller trusts them, and a file that
transformers cannot use ends in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from compileflow.artifact.open import OpenArtifact
from compileflow.errors import CompileflowError, LoadError, first_line
from compileflow.source_model.interface_limits import check_interface_files
from compileflow.source_model.processor import Processor, probe_signals
from compileflow.spec import Modality

# Modules of transformers that define output classes.
_OUTPUT_CLASS = re.compile(r"transformers\.(?:\w+\.)*(?:modeling_\w+|utils\.generic|file_utils):\w+")
# Model files with code are imported under this name.
_REMOTE_MODULE = "transformers_modules"
_MODALITIES: dict[str, Modality] = {"AutoImageProcessor": "image", "AutoFeatureExtractor": "audio"}


def load_part(artifact: OpenArtifact, auto_class: str) -> Any:
    """Load one part of an artifact with a class of transformers, for example AutoConfig or AutoTokenizer.

    Raises:
        LoadError: The artifact brings Python code that the caller does not trust, or transformers cannot use its
            files.
    """
    artifact.check_code()
    if not artifact.trust_remote_code:
        _check_files(artifact.folder, artifact.digest)
    # After the checks, so that a refused artifact imports nothing.
    import transformers

    with foreign_errors(artifact, f"{auto_class} of transformers cannot use the files of the artifact"):
        part = getattr(transformers, auto_class).from_pretrained(
            artifact.folder, local_files_only=True, trust_remote_code=artifact.trust_remote_code
        )
        _try(part, auto_class)
    return part


@lru_cache(maxsize=32)
def _check_files(folder: Path, digest: str) -> None:
    """Check the files of an artifact once; `digest` tells its contents."""
    try:
        check_interface_files(folder)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{folder}: {first_line(error)}.",
            hint="Compile the model again, or fetch the artifact again. If you trust the artifact, pass "
            "trust_remote_code=True, which loads it without limits.",
        ) from error


def _try(part: Any, auto_class: str) -> None:
    """Call a part once, so that settings which it does not take are found at the load."""
    if auto_class == "AutoTokenizer":
        part("a")
    elif auto_class in _MODALITIES:
        processor = Processor(part, _MODALITIES[auto_class])
        processor(probe_signals(processor)[:1])


@contextmanager
def foreign_errors(artifact: OpenArtifact, problem: str) -> Iterator[None]:
    """Turn whatever a library raises about the files of an artifact into a LoadError of one line.

    Args:
        artifact: The artifact whose files are read.
        problem: First part of the error: what cannot be done.
    """
    try:
        yield
    except CompileflowError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise artifact.untrusted_code() from error
        raise _load_error(problem, error) from error
    except BaseException as error:
        # A panic of a library in Rust is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _load_error(problem, error) from error


def check_output_class(artifact: OpenArtifact, path: str) -> None:
    """Check that an output class, "module:Class", belongs to transformers or to code that the caller trusts.

    Raises:
        LoadError: It does not. Nothing was imported.
    """
    if path.startswith(f"{_REMOTE_MODULE}."):
        artifact.check_code()
        if not artifact.trust_remote_code:
            raise artifact.untrusted_code()
    elif _OUTPUT_CLASS.fullmatch(path) is None:
        raise LoadError(f"{path!r} is not an output class of transformers.", hint="Compile the model again.")


def output_class(artifact: OpenArtifact, path: str) -> Any:
    """Import the output class of a component.

    Raises:
        LoadError: See `check_output_class`; or the installed transformers has no such class.
    """
    check_output_class(artifact, path)
    module, _, name = path.partition(":")
    with foreign_errors(artifact, f"The output class {path!r} cannot be imported"):
        if module.startswith(f"{_REMOTE_MODULE}."):
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            # From the artifact's own file, which was checked, not from the cache of an earlier load.
            return get_class_from_dynamic_module(
                f"{module.rpartition('.')[2]}.{name}", str(artifact.folder), local_files_only=True
            )
        kind = getattr(import_module(module), name)
        from transformers.utils import ModelOutput

        if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
            raise LoadError(f"{path!r} is not an output class of transformers.", hint="Compile the model again.")
        return kind


def _load_error(problem: str, error: BaseException) -> LoadError:
    return LoadError(
        f"{problem}: {type(error).__name__}: {first_line(error)}.",
        hint="Compile the model again, or fetch the artifact again.",
    )
