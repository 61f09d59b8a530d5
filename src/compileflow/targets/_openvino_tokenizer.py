"""The files beside a decoder that let openvino_genai open its folder: tokenizer, detokenizer and settings."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.contracts.toolkit import report_progress
from compileflow.errors import first_line
from compileflow.source_model.load import tokenizer_or_none

logger = logging.getLogger(__name__)
# Distribution that converts tokenizers. Compiles work without it.
CONVERTER = "openvino-tokenizers"
_TOKENIZERS = ("openvino_tokenizer", "openvino_detokenizer")
_SETTINGS = "generation_config.json"
# Files that openvino_genai reads, beside the graph.
FILES = (*(f"{name}.{suffix}" for name in _TOKENIZERS for suffix in ("xml", "bin")), _SETTINGS)
# Texts that a converted tokenizer must read and write as the original does.
_TEXTS = (
    "The train was late, and it's cold: 12.50 euros, isn't it?",
    "  Two  spaces,\ttabs\nand lines.\n\n",
    "Größe, café, naïve; 東京は雨 и снег 🙂",
    "def f(x): return x**2 # <b>&amp;</b>",
)


def write_tokenizer(source_dir: Path, out_dir: Path, *, trust_remote_code: bool) -> tuple[str, ...]:
    """Write what openvino_genai needs beside a graph, if the tokenizer can be converted; otherwise say why not.

    Args:
        source_dir: Folder of the source model.
        out_dir: Folder of the component.
        trust_remote_code: Whether Python files of the source model may run.

    Returns:
        Names of the files that were written; () if openvino_genai cannot open the folder.
    """
    tokenizer = tokenizer_or_none(source_dir, trust_remote_code=trust_remote_code)
    try:
        converted = _converted(tokenizer)
    except Exception as error:
        logger.info("the tokenizer was not converted", exc_info=error)
        report_progress(f"openvino_genai cannot open this artifact: {first_line(error)}")
        return ()
    import openvino

    for name, model in zip(_TOKENIZERS, converted, strict=True):
        openvino.save_model(model, str(out_dir / f"{name}.xml"))
    if (source_dir / _SETTINGS).is_file():
        shutil.copyfile(source_dir / _SETTINGS, out_dir / _SETTINGS)
    return tuple(name for name in FILES if (out_dir / name).is_file())


def _converted(tokenizer: Any) -> tuple[Any, Any]:
    """Return a tokenizer and a detokenizer as models of OpenVINO.

    Raises:
        ImportError: The converter is not installed, or does not suit this OpenVINO.
        ValueError: A text does not become the same tokens, or tokens do not become the same text.
        Exception: The converter refuses the tokenizer.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import openvino
        from openvino_tokenizers import convert_tokenizer

        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
        # The import has registered the operators of tokenizers with OpenVINO.
        encode, decode = (openvino.compile_model(model, "CPU") for model in (encoder, decoder))
    for text in _TEXTS:
        ids = tokenizer(text)["input_ids"]
        if encode([text])["input_ids"][0].tolist() != ids:
            raise ValueError(f"OpenVINO's tokenizer splits {text!r} in another way")
        if str(decode(np.array([ids], np.int64))[0][0]) != tokenizer.decode(ids, skip_special_tokens=True):
            raise ValueError(f"OpenVINO's detokenizer writes {text!r} in another way")
    return encoder, decoder
