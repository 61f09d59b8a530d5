"""check_interface_files: limits for the files that transformers and tokenizers read, checked before they do.

Native code ends the process when memory runs out, so that no caller can catch it. The limits are far above the
sizes of public models.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compileflow.contracts.json_files import MOST_JSON_BYTES, read_json
from compileflow.source_model.patterns import check_pattern

# Numbers that transformers creates as many objects for.
_COUNT = re.compile(r"(^|_)(num|n|nb|extra)_|(layers|labels|depths?|stages|blocks|levels|offset)$")
_MOST_OBJECTS = 1_000_000
# Tokens that a tokenizer adds one by one.
_MOST_TOKENS = 200_000
_TOKEN_COUNT = re.compile(r"extra_ids|offset|num_madeup_words")
_MOST_EXTRA_TOKENS = 10_000
_LONGEST_TOKEN = 10_000
# Sides of images in pixels, and sizes of spectra: their product is the memory of one row.
_SIZE = re.compile(r"height|width|edge|^(crop_)?size$|feature_size|mel|fft|freq.*bins")
_LARGEST_SIZE = 16_384
_LARGEST_NUMBER = 10**9
# Characters of all tokens; a trie takes 300 bytes for each. Public models have up to 2 million.
_MOST_CHARACTERS = 2**22
_MOST_LINES = 2_000_000
# Models of SentencePiece have up to 5 MB.
_MOST_MODEL_BYTES = 8 * 2**20
_MOST_STEPS = 200
# Product over all steps of a tokenizer: how many times longer a text can become.
_MOST_GROWTH = 100_000
# Longest replacement of one character: U+FDFA becomes 18 characters.
_UNICODE_GROWTH = {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "BertNormalizer": 3, "ByteLevel": 4, "Metaspace": 2}
_LONGEST_WORD = 10_000
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_interface_files(folder: Path) -> None:
    """Check the configuration, tokenizer and processor files of a model or an artifact.

    Raises:
        ValueError: A file breaks a limit or cannot be read; the text names the file.
    """
    for path in sorted(folder.iterdir()):
        name = path.name
        try:
            if name.endswith(".json") and not name.endswith(".index.json") and name != "manifest.json":
                _check_json(name, read_json(path))
            elif name.endswith((".txt", ".model", ".jinja", ".codes", ".tiktoken")):
                _check_text(path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_json(name: str, content: Any) -> None:
    if name.startswith("tokenizer") and isinstance(content, dict) and "model" in content:
        check_tokenizer(content)
        # The vocabulary is large, and its numbers are token ids.
        content = {key: value for key, value in content.items() if key != "model"}
    elif name.startswith("vocab") or name == "added_tokens.json":
        return
    for key, value in _numbers(content):
        limit = _LARGEST_NUMBER
        if name.startswith("tokenizer") and _TOKEN_COUNT.search(key):
            limit = _MOST_EXTRA_TOKENS
        elif (name == "tokenization_settings.json" and "length" not in key) or (
            name.endswith("processor_config.json") and _SIZE.search(key)
        ):
            limit = _LARGEST_SIZE
        elif _COUNT.search(key):
            limit = _MOST_OBJECTS
        # Tokenizers without a maximum store 10^30, and thetas of rotary positions may be large.
        elif "length" in key or "theta" in key or key.endswith("_id"):
            continue
        if abs(value) > limit:
            raise ValueError(f"expected {key} of at most {limit}, got a larger number")
    if name == "tokenizer_config.json" and isinstance(content, dict):
        _check_added_tokens(content.get("added_tokens_decoder"))
    if name.startswith(("tokenizer", "special_tokens")):
        _check_fields(content)


def _check_fields(content: Any) -> None:
    """Check the names in tokens below a JSON value: native code prints those that it does not know."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            unprintable_names = [name for name in value if not name.isprintable()]
            if "content" in value and unprintable_names:
                raise ValueError(f"a token has the field {unprintable_names[0]!r}")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _numbers(content: Any) -> Iterator[tuple[str, int]]:
    """Yield each whole number below a JSON value, with the name of the nearest object's field."""
    pending = [("", content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((key, item) for item in value)
        elif isinstance(value, int):
            yield key, value


def _check_text(path: Path) -> None:
    if not path.is_file():
        raise ValueError("it is not a regular file")
    most_bytes = _MOST_MODEL_BYTES if path.suffix == ".model" else MOST_JSON_BYTES
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it is larger than {most_bytes / 2**20:g} MiB")
    lines = path.read_bytes().count(b"\n")
    if lines > _MOST_LINES:
        raise ValueError(f"it has {lines} lines, and {_MOST_LINES} are the most")


def check_tokenizer(content: Mapping[str, Any]) -> None:
    """Check a tokenizer in the form of tokenizer.json.

    Raises:
        ValueError: It breaks a limit.
    """
    _check_model(content["model"])
    _check_added_tokens(content.get("added_tokens"))
    growth = 1.0
    steps = [step for name in _STEPS for step in _steps(content.get(name), 0)]
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"it has {len(steps)} steps, and {_MOST_STEPS} are the most")
    for step in steps:
        growth *= max(1.0, _growth(step))
        if growth > _MOST_GROWTH:
            raise ValueError(
                f"its steps up to {step.get('type')} can make a text {growth:.3g} times longer, and "
                f"{_MOST_GROWTH} times is the most"
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        return
    word = model.get("max_input_chars_per_word")
    if isinstance(word, int) and word > _LONGEST_WORD:
        raise ValueError(f"expected max_input_chars_per_word of at most {_LONGEST_WORD}, got a larger number")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        tokens = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary]
    else:
        tokens = list(vocabulary) if isinstance(vocabulary, dict) else []
    characters = sum(len(token) for token in tokens if isinstance(token, str))
    if characters > _MOST_CHARACTERS:
        raise ValueError(f"its tokens have {characters} characters, and {_MOST_CHARACTERS} are the most")


def _check_added_tokens(tokens: Any) -> None:
    if isinstance(tokens, dict):
        if any(len(number) > len(str(_LARGEST_NUMBER)) for number in tokens):
            raise ValueError(f"the id of an added token is at most {_LARGEST_NUMBER}")
        tokens = list(tokens.values())
    if not isinstance(tokens, list):
        return
    if len(tokens) > _MOST_TOKENS:
        raise ValueError(f"it adds {len(tokens)} tokens, and {_MOST_TOKENS} are the most")
    texts = [token.get("content") for token in tokens if isinstance(token, dict)]
    lengths = [len(text) for text in texts if isinstance(text, str)]
    if max(lengths, default=0) > _LONGEST_TOKEN:
        raise ValueError(f"an added token has {max(lengths)} characters, and {_LONGEST_TOKEN} are the most")
    if sum(lengths) > _MOST_CHARACTERS:
        raise ValueError(f"its added tokens have {sum(lengths)} characters, and {_MOST_CHARACTERS} are the most")


def _steps(step: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a tokenizer's part, with those of its sequences."""
    if not isinstance(step, dict):
        return
    if depth > 10:
        raise ValueError("its sequences are nested too deeply")
    yield step
    for inner_steps in step.values():
        for inner_step in inner_steps if isinstance(inner_steps, list) else ():
            if isinstance(inner_step, dict) and "type" in inner_step:
                yield from _steps(inner_step, depth + 1)


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times longer a step can make a text.

    Raises:
        ValueError: The pattern or a size breaks a limit.
    """
    kind = step.get("type")
    pattern = step.get("pattern")
    shortest = 1
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        try:
            shortest = check_pattern(pattern["Regex"])
        except ValueError as error:
            raise ValueError(f"the pattern of {kind} {error}: {pattern['Regex'][:100]!r}") from error
    elif isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        shortest = len(pattern["String"])
    if kind == "FixedLength" and step.get("length") == 0:
        raise ValueError("the length of FixedLength is 0")
    if kind == "Replace":
        content = len(str(step.get("content", "")))
        return content / shortest if shortest else 1 + content
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        return _repeats(step)
    if kind == "Strip" and max(_whole(step.get("start")), _whole(step.get("stop"))) > 1000:
        raise ValueError("a decoder of type Strip removes at most 1000 characters")
    return _UNICODE_GROWTH.get(str(kind), 1)


def _longest_replacement(charsmap: Any) -> int:
    """Return the length in bytes of the longest text in a SentencePiece map of characters.

    The map is the size of a trie in four bytes, the trie, and texts that end in a zero byte.
    """
    if not isinstance(charsmap, str):
        return 1
    try:
        data = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the map of Precompiled is not in base64") from error
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(len(text) for text in texts.split(b"\0"))


def _repeats(step: Mapping[str, Any]) -> int:
    """Return how often a template repeats the tokens of a text."""
    tokens = step.get("special_tokens")
    counts = [
        len(token["ids"])
        for token in (tokens.values() if isinstance(tokens, dict) else ())
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    ]
    if sum(counts) > _LONGEST_TOKEN:
        raise ValueError(f"its template adds {sum(counts)} tokens, and {_LONGEST_TOKEN} are the most")
    most = 1
    for name in ("single", "pair"):
        pieces = step.get(name)
        pieces = pieces if isinstance(pieces, list) else []
        if len(pieces) > 100:
            raise ValueError(f"its template has {len(pieces)} pieces, and 100 are the most")
        texts = [str(piece["Sequence"]) for piece in pieces if isinstance(piece, dict) and "Sequence" in piece]
        most = max([most, *(texts.count(text) for text in set(texts))])
    return most


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
