"""GGUF: a model in one file, as llama.cpp reads it, converted to a model folder with weights in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compileflow._process.child_process import report_progress
from compileflow._process.packages import installed_versions
from compileflow._process.run_in_child import run_in_child
from compileflow.contracts.digests import file_digest
from compileflow.errors import MissingPackageError, SourceError, first_line
from compileflow.settings import Settings
from compileflow.sources.files import choose_files_below

_PACKAGES = ("accelerate", "gguf")


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, which need not exist."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def gguf_revision(path: Path) -> str:
    """Return the digest of a GGUF file and the version of transformers, which together decide the weights.

    Raises:
        SourceError: The file does not exist.
    """
    if not path.is_file():
        raise SourceError(f"{path} is not a file.", hint="Check the path of the GGUF file.")
    return f"{file_digest(path)}+transformers-{installed_versions(('transformers',))['transformers']}"


def check_gguf(path: Path) -> None:
    """Check that a file is GGUF, and that its weights can be converted, without converting them.

    Raises:
        MissingPackageError: gguf or accelerate is not installed.
        SourceError: The file is truncated or not GGUF, or some of its weights cannot be converted.
    """
    missing = [name for name in _PACKAGES if name not in installed_versions(_PACKAGES)]
    if missing:
        raise MissingPackageError(
            f"Reading {path.name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed.",
            hint="Run: pip install 'compileflow[gguf]'",
        )
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        tensors = {tensor.tensor_type: tensor for tensor in GGUFReader(path).tensors}
    except Exception as error:
        raise SourceError(
            f"{path.name} is truncated or not GGUF ({path.stat().st_size} bytes): {first_line(error)}.",
            hint="Copy or download the file again.",
        ) from error
    for kind, tensor in tensors.items():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise SourceError(
                f"{path.name} holds weights of the quantization {kind.name}, which gguf cannot convert.",
                hint="Get the model with another quantization, such as Q8_0 or Q4_K, or its original checkpoint.",
            ) from error


def convert_gguf(path: Path, folder: Path, settings: Settings) -> tuple[str, ...]:
    """Convert a GGUF file to a model folder, in a child process, so that its memory returns.

    Args:
        path: The file.
        folder: Gets config.json, weights in fp32 and the tokenizer.
        settings: Folder for logs, and threads.

    Returns:
        The paths of the model's files, relative to the folder.

    Raises:
        MissingPackageError: gguf or accelerate is not installed.
        SourceError: The file cannot be read, or transformers does not read models of its architecture.
    """
    check_gguf(path)
    folder.mkdir(parents=True, exist_ok=True)
    run_in_child(
        f"{__name__}:write_model_folder",
        {"path": str(path), "folder": str(folder)},
        work_dir=folder.parent,
        log_path=settings.log_path(f"gguf-{path.stem}"),
        threads=settings.threads,
    )
    return choose_files_below(folder, str(path))


def write_model_folder(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a GGUF file as `convert_gguf` asks. Runs in a child process.

    Raises:
        SourceError: transformers does not read the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path, folder = Path(request["path"]), request["folder"]
    report_progress(f"converting {path.name} to fp32")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            # Otherwise the model stays quantized, and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise SourceError(
            f"transformers does not read {path.name}: {first_line(error)}.",
            hint="Give the model's original checkpoint, as save_pretrained writes it.",
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}
