"""Limits of the files that native code reads: public models pass, and what ends a process is refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compileflow import CompiledTokenizer
from compileflow.errors import LoadError
from compileflow.source_model.interface_limits import check_interface_files
from compileflow.source_model.patterns import check_pattern
from tests.unit.malformed import ESCAPES, reseal

SOUND = Path(__file__).parents[1] / "artifacts" / "v1-torchscript"
# Patterns of GPT-2, GPT-4o, BLOOM, CLIP, DeepSeek and T5.
PUBLIC_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": 1,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+": 1,
    r" ?[^(\s|[.,!?…。、])]+": 1,
    r"(?i:'s|'t)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+": 1,
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+| ?[\\p{P}\\p{S}]+[\r\n]*|[一-龥]+": 1,
    r"(?i:[sdmt]|ll)|[^\r\n\p{L}]?+\p{L}++|\s+": 1,
    " {2,}": 2,
    r"(?=(\d{3})+(?!\d))": 0,
    r"^\s+|\s+$": 1,
    "": 0,
}
DANGEROUS_PATTERNS = (
    "(a+)+b", "(a*)*", "(a|a)*b", "(a|ab|b)+c", "(x+x+)+y", "(a?){30}a{30}", "a?" * 30 + "a" * 30,
    "(.*)(.*)(.*)(.*)x", "a*a*a*a*b",
    "((a{100}){100}){100}", "(?:a{1,200}){1,200}", "((a+)b?)+c", r"(a)\1", r"(?<n>a)\g<n>", "(?~abc)",
    "(?(1)a)", "(", "(a", "a)", "[a", "\\", "(" * 50 + "a" + ")" * 50, "[" * 50, r"\p{L", "a" * 30_000,
)  # fmt: skip


@pytest.mark.parametrize(("pattern", "shortest"), PUBLIC_PATTERNS.items())
def test_patterns_of_public_models_pass(pattern: str, shortest: int) -> None:
    assert check_pattern(pattern) == shortest


@pytest.mark.parametrize("pattern", DANGEROUS_PATTERNS)
def test_patterns_that_backtrack_without_end_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|repeats|ends|lacks) "):
        check_pattern(pattern)


def charsmap(*texts: str) -> str:
    """A map of characters with an empty trie."""
    trie = b"\0" * 8
    data = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return base64.b64encode(data).decode()


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def nested(depth: int) -> Any:
    step: Any = {"type": "Lowercase"}
    for _ in range(depth):
        step = sequence(step)
    return step


def template(*pieces: str, ids: int = 1) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": piece, "type_id": 0}} for piece in pieces],
        "pair": [],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2] * ids, "tokens": ["[CLS]"] * ids}},
    }


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "catastrophic pattern": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}}}, "of variable"),
    "replacement": ({"normalizer": sequence(*[replace("a" * 50)] * 12)}, "times longer"),
    "replacement of nothing": ({"normalizer": sequence(*[replace("a" * 50, Regex="x*")] * 12)}, "times longer"),
    "replacement in the decoder": (
        {"decoder": {"type": "Sequence", "decoders": [replace("a" * 99)] * 9}},
        "longer",
    ),
    "prefixes": ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "a" * 99}] * 9)}, "times longer"),
    "bytes as characters": ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 60)}, "times longer"),
    "map of characters": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("x", "y" * 200_000)}},
        "times longer",
    ),
    "nesting": ({"normalizer": nested(40)}, "nested too deeply"),
    "steps": ({"normalizer": sequence(*[{"type": "Lowercase"}] * 300)}, r"\d+ steps, and 200 are the most"),
    "pieces of length 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength is 0"),
    "template": ({"post_processor": template(*"A" * 200)}, "200 pieces"),
    "templates": (
        {"post_processor": {"type": "Sequence", "processors": [template(*"A" * 50)] * 5}},
        "times longer",
    ),
    "tokens of a template": ({"post_processor": template("A", ids=50_000)}, "adds 50000 tokens"),
    "padding": ({"padding": {"strategy": {"Fixed": 10**12}}}, "expected Fixed of at most 1000000000"),
    "control characters": ({"added_tokens": [{"id": 1, "content": "a", ESCAPES: 1}]}, r"the field '\\x1b\[2J"),
    "added tokens": ({"added_tokens": [{"id": 1, "content": "a" * 20_000}]}, "20000 characters"),
}


def with_tokenizer(tmp_path: Path, **parts: Any) -> Path:
    folder = Path(shutil.copytree(SOUND, tmp_path / "artifact"))
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(data | parts), "utf-8")
    reseal(folder, "tokenizer.json")
    return folder


@pytest.mark.parametrize("name", BOMBS)
def test_tokenizer_that_would_end_the_process_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    parts, says = BOMBS[name]
    folder = with_tokenizer(tmp_path, **parts)
    start = time.monotonic()
    with pytest.raises(LoadError, match=rf"tokenizer\.json: .*{says}.*trust_remote_code=True") as caught:
        CompiledTokenizer.from_pretrained(folder)
    assert time.monotonic() - start < 2
    assert len(str(caught.value)) < 1000


def test_tokenizer_beyond_the_limits_loads_when_the_caller_trusts_it(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, normalizer=sequence(*[replace("b" * 50, String="aaa")] * 12))
    with pytest.raises(LoadError, match="times longer"):
        CompiledTokenizer.from_pretrained(folder)
    assert CompiledTokenizer.from_pretrained(folder, trust_remote_code=True)("the end")["input_ids"]


def test_panic_of_native_code_is_one_line(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"é": 0, "a": 1, "éa": 2}, "merges": [["é", "a"]]}
    folder = with_tokenizer(tmp_path, model=model | {"continuing_subword_prefix": "####"})
    with pytest.raises(LoadError, match="AutoTokenizer of transformers cannot use the files in"):
        CompiledTokenizer.from_pretrained(folder)


NUMBERS = {
    "config.json": [
        {"num_labels": 10**9},
        {"num_hidden_layers": 10**8},
        {"vocab_size": 10**12},
        {"hidden_size": -(10**400)},
    ],
    "tokenizer_config.json": [{"extra_ids": 10**6}, {"offset": 10**7}, {"added_tokens_decoder": {"9" * 20: {}}}],
    "preprocessor_config.json": [{"size": {"height": 10**6}}, {"feature_size": 10**5}, {"n_fft": 10**6}],
}


@pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name, cases in NUMBERS.items() for values in cases]
)
def test_numbers_that_become_objects_have_limits(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    (tmp_path / name).write_text(json.dumps(values), "utf-8")
    with pytest.raises(ValueError, match=rf"^{name}: .*at most"):
        check_interface_files(tmp_path)


def test_numbers_of_public_models_pass(tmp_path: Path) -> None:
    config = {
        "vocab_size": 262_208,
        "max_position_embeddings": 10_485_760,
        "rope_theta": 10**10,
        "num_labels": 21_843,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = {"model_max_length": 10**30, "extra_ids": 300, "bos_token_id": 262_207}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    processor = {"n_samples": 480_000, "feature_size": 128, "n_fft": 400, "size": {"shortest_edge": 2560}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    check_interface_files(tmp_path)


SPOIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "named pipe": (os.mkfifo, "not a regular file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "large": (lambda path: path.write_bytes(b" " * (65 * 2**20)), "larger than 64 MiB"),
    "many lists": (lambda path: path.write_bytes(b"[" + b"[]," * 4_100_000 + b"[]]"), "more than 8000000"),
    "deep": (lambda path: path.write_bytes(b"[" * 200_000 + b"]" * 200_000), "nested too deeply"),
    "with a BOM": (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "BOM"),
    "UTF-16": (lambda path: path.write_bytes("{}".encode("utf-16")), "utf-8"),
    "cut off": (lambda path: path.write_bytes(b'{"a": '), "Expecting value"),
}


@pytest.mark.parametrize("name", ["config.json", "special_tokens_map.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", SPOIL)
def test_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path, name: str, damage: str) -> None:
    spoil, says = SPOIL[damage]
    spoil(tmp_path / name)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^{name}: .*{says}"):
        check_interface_files(tmp_path)
    assert time.monotonic() - start < 2
