"""LightTokenizer: the tokenizer of an artifact, read from tokenizer.json by the package tokenizers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compileflow.errors import InputError
from compileflow.serving.turns import Turns

# The values of `truncation` in transformers, and those of the package tokenizers.
_TRUNCATIONS: Mapping[Any, str | None] = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
    False: None,
    None: None,
    "do_not_truncate": None,
}
_PADDINGS: Mapping[Any, str | None] = {
    True: "longest",
    "longest": "longest",
    "max_length": "max_length",
    False: None,
    None: None,
    "do_not_pad": None,
}
# As transformers joins tokens again if the files of the tokenizer say so.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


@dataclass(frozen=True)
class TokenizerTraits:
    """What tokenizer_config.json says about a tokenizer besides its tokenizer.json.

    Attributes:
        special_tokens: Special tokens by their role: bos, eos, unk, sep, pad, cls and mask.
        input_names: Inputs that the tokenizer makes for the model.
        padding_side: Side on which rows are padded.
        truncation_side: Side on which long rows are cut.
        pad_token_type_id: Token type of the padding.
        cleans_spaces: Whether decoding removes the spaces before punctuation.
    """

    special_tokens: Mapping[str, str]
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    padding_side: str = "right"
    truncation_side: str = "right"
    pad_token_type_id: int = 0
    cleans_spaces: bool = False


class Encoded(dict[str, list[Any]]):
    """Tokens of one text, or lists of those of several texts or windows, by the names of transformers."""

    def __init__(self, encodings: Sequence[Any], values: Mapping[str, list[Any]]):
        super().__init__(values)
        self._encodings = encodings

    def sequence_ids(self, index: int) -> list[int | None]:
        """Return 0 or 1 for each token of the first or second text of a row; None for special tokens."""
        return list(self._encodings[index].sequence_ids)

    def word_ids(self, index: int) -> list[int | None]:
        """Return the number of each token's word in its text; None for special tokens."""
        return list(self._encodings[index].word_ids)


class LightTokenizer:
    """Tokenizes as `CompiledTokenizer` does for the same artifact.

    Attributes:
        backend_tokenizer: Tokenizer of the package tokenizers.
        traits: Special tokens and the sides of padding and truncation.
        tokenization_settings: Settings of each call.
        is_fast: True, as in transformers: offsets and words of tokens are known.
    """

    is_fast = True

    def __init__(self, backend: Any, traits: TokenizerTraits, settings: Mapping[str, Any], *, fixed: bool = False):
        self.backend_tokenizer = backend
        self.traits = traits
        self.tokenization_settings = dict(settings)
        self._fixed = fixed
        self._turns = Turns()
        self._truncation: tuple[Any, ...] | None = None
        backend.no_padding()
        backend.no_truncation()

    def __call__(self, text: Any, text_pair: Any = None, **settings: Any) -> Encoded:
        """Tokenize with `tokenization_settings`; saved settings of an artifact win over those of the call."""
        saved = self.tokenization_settings
        return self.encoded(text, text_pair, **(settings | saved if self._fixed else saved | settings))

    def encoded(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int = 0,
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        return_overflowing_tokens: bool = False,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        verbose: bool = True,
    ) -> Encoded:
        """Tokenize a text, a pair, or lists of these, with these settings alone. Names are those of transformers.

        Raises:
            InputError: A setting has a value that transformers does not know, an input is not a text, or texts of
                different lengths need padding and the tokenizer has no token for it.
        """
        strategy, side = _choice("truncation", truncation, _TRUNCATIONS), self.traits.truncation_side
        width = _choice("padding", padding, _PADDINGS)
        limit = max_length or self.model_max_length
        in_list = isinstance(text, list | tuple) and not is_split_into_words
        _check_texts([text] if text_pair is None else [text, text_pair], words=is_split_into_words)
        with self._turns.lock:
            self._set_truncation((limit, stride, strategy, side) if strategy else None)
            if in_list:
                items = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
                encodings = self.backend_tokenizer.encode_batch(items, add_special_tokens=add_special_tokens)
            else:
                encodings = [
                    self.backend_tokenizer.encode(text, text_pair, is_split_into_words, add_special_tokens)
                ]
        if return_overflowing_tokens:
            encodings = [part for encoding in encodings for part in (encoding, *encoding.overflowing)]
        if width == "max_length" or (width and len(encodings) > 1):
            self._pad(encodings, limit if width == "max_length" else max(map(len, encodings)))
        returned_fields = (
            ("input_ids", "ids", True),
            ("token_type_ids", "type_ids", "token_type_ids" in self.traits.input_names),
            ("attention_mask", "attention_mask", return_attention_mask),
            ("offset_mapping", "offsets", return_offsets_mapping),
            ("special_tokens_mask", "special_tokens_mask", return_special_tokens_mask),
        )
        values = {
            name: [getattr(item, field) for item in encodings]
            for name, field, is_returned in returned_fields
            if is_returned
        }
        is_single = not in_list and not return_overflowing_tokens
        return Encoded(encodings, {name: rows[0] for name, rows in values.items()} if is_single else values)

    @property
    def model_max_length(self) -> int:
        """Longest row of a call in tokens."""
        return int(self.tokenization_settings["max_length"])

    @property
    def padding_side(self) -> str:
        """Side on which rows are padded: left or right."""
        return self.traits.padding_side

    @property
    def all_special_ids(self) -> list[int]:
        """Numbers of the special tokens."""
        ids = [self.token_id(role) for role in self.traits.special_tokens]
        return [number for number in ids if number is not None]

    @property
    def cls_token_id(self) -> int | None:
        """Number of the token at the start of a row; None without one."""
        return self.token_id("cls")

    def token_id(self, role: str) -> int | None:
        """Return the number of the special token of a role, such as mask or pad; None without one."""
        token = self.traits.special_tokens.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens a text, or a pair of texts, gets."""
        return int(self.backend_tokenizer.num_special_tokens_to_add(pair))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text = str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        if self.traits.cleans_spaces and type(self.backend_tokenizer.model).__name__ != "BPE":
            for part in _CLEANED:
                text = text.replace(part, part.strip())
        return text

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens that are given by their names."""
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def _set_truncation(self, truncation: tuple[Any, ...] | None) -> None:
        """Set the truncation of the backend; its own getter takes as long as tokenizing a short text."""
        if truncation == self._truncation:
            return
        if truncation is None:
            self.backend_tokenizer.no_truncation()
        else:
            longest, stride, strategy, side = truncation
            self.backend_tokenizer.enable_truncation(longest, stride=stride, strategy=strategy, direction=side)
        self._truncation = truncation

    def _pad(self, encodings: Sequence[Any], length: int) -> None:
        pad_id = self.token_id("pad")
        if pad_id is None:
            if all(len(encoding) == length for encoding in encodings):
                return
            raise InputError(
                "The tokenizer has no padding token, so it cannot make a batch of texts of different lengths.",
                hint="Tokenize one text at a time without padding.",
            )
        for encoding in encodings:
            encoding.pad(
                length,
                direction=self.padding_side,
                pad_id=pad_id,
                pad_type_id=self.traits.pad_token_type_id,
                pad_token=self.traits.special_tokens["pad"],
            )


def _choice(name: str, value: Any, choices: Mapping[Any, str | None]) -> str | None:
    if isinstance(value, bool | str | None) and value in choices:
        return choices[value]
    raise InputError(
        f"{name} is {value!r}.", hint=f"Pass one of: {', '.join(map(repr, (item for item in choices if item)))}."
    )


def _check_texts(values: Sequence[Any], *, words: bool) -> None:
    for value in values:
        in_list = isinstance(value, list | tuple)
        kinds = [type(text).__name__ for text in (value if in_list else [value]) if not isinstance(text, str)]
        if kinds or (words and not in_list):
            expected = "a list of words" if words else "a text"
            raise InputError(
                f"Expected {expected}, got {kinds[0] if kinds else 'a text'}.", hint=f"Pass {expected} as str."
            )
