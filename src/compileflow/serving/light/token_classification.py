"""Token classification: a label for each token, or entities of several tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.entities import STRATEGIES, EntityReader, ScoredToken, without_overlaps
from compileflow.serving.light.task import Settings
from compileflow.serving.light.text_task import TextTask
from compileflow.serving.light.tokenizer import Encoded
from compileflow.serving.rows import PreparedItem
from compileflow.source_model.activations import softmax
from compileflow.spec import HfTask


@dataclass(frozen=True)
class _Windows:
    """A text and its windows, one for each row.

    Attributes:
        text: The text.
        encoded: Tokens of all windows.
        word_starts: First character of each word; () for a text that was not split into words.
    """

    text: str
    encoded: Encoded
    word_starts: tuple[int, ...] = ()


class TokenClassification(TextTask):
    """Labels the tokens of texts, or of lists of words with is_split_into_words.

    With `stride`, a long text is read in windows that share that many tokens; without it, it is cut.
    """

    hf_task = HfTask.TOKEN_CLASSIFICATION
    load_settings = (
        *("batch_size", "aggregation_strategy", "ignore_labels", "stride"),
        *("is_split_into_words", "delimiter"),
    )

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Label an item, a list, or the items of an iterator; see `LightTask`."""
        is_words = {**self.settings, **settings}.get("is_split_into_words")
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if inputs in ("", []) and not is_words:
            raise InputError(
                "Token classification needs at least one text.", hint="Pass a text, or a list of texts."
            )
        if is_words and isinstance(inputs, list) and not all(isinstance(item, list) for item in inputs):
            inputs = [inputs]
        return super().__call__(inputs, **settings)

    def check(self, settings: Settings) -> None:
        """Check the strategy and the stride."""
        strategy, stride = settings.get("aggregation_strategy"), settings.get("stride")
        if strategy is not None and not (isinstance(strategy, str) and strategy.lower() in STRATEGIES):
            raise InputError(
                f"aggregation_strategy is {strategy!r}.", hint=f"Pass one of: {', '.join(STRATEGIES)}."
            )
        longest = self.tokenizer.model_max_length - self.tokenizer.num_special_tokens_to_add()
        if stride is not None and not (type(stride) is int and 0 <= stride < longest):
            raise InputError(f"stride is {stride!r}.", hint=f"Pass a whole number from 0 to {longest - 1}.")
        if stride is not None and _strategy(settings) == "none":
            raise InputError(
                'With stride, windows overlap, but aggregation_strategy is "none".',
                hint=f"Pass another one: {', '.join(STRATEGIES[1:])}.",
            )

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[_Windows]:
        """Tokenize a text into one window or several."""
        stride = settings.get("stride")
        is_words = bool(settings.get("is_split_into_words"))
        if not isinstance(item, list if is_words else str):
            raise InputError(
                f"Expected {'a list of words' if is_words else 'a text'}, got {type(item).__name__}.",
                hint="is_split_into_words=True takes lists of words, without it the pipeline takes texts.",
            )
        encoded = self.tokenizer(
            item,
            truncation=True,
            stride=stride or 0,
            is_split_into_words=is_words,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        windows = _windows(item, encoded, settings.get("delimiter"))
        count = len(encoded["input_ids"]) if stride is not None else 1
        return PreparedItem([self.row(encoded, index) for index in range(count)], windows)

    def answer(self, settings: Settings, details: _Windows, row_outputs: list[Arrays]) -> list[dict[str, Any]]:
        """Return the entities of a text whose labels are not ignored."""
        ignored = settings.get("ignore_labels")
        ignored_labels = ["O"] if ignored is None else ignored
        reader = EntityReader(self.tokenizer, self.model.config.id2label, _strategy(settings))
        entities = []
        for index, outputs in enumerate(row_outputs):
            tokens = self._scored_tokens(details, index, outputs)
            entities += [
                entity
                for entity in reader.entities(tokens)
                if entity.get("entity", entity.get("entity_group")) not in ignored_labels
            ]
        return without_overlaps(entities) if len(row_outputs) > 1 else entities

    def _scored_tokens(self, windows: _Windows, index: int, outputs: Arrays) -> list[ScoredToken]:
        """Return the tokens of the text in a window, without special ones."""
        encoded, text = windows.encoded, windows.text
        backend = self.tokenizer.backend_tokenizer
        marks_subwords = bool(getattr(backend.model, "continuing_subword_prefix", None))
        unknown = self.tokenizer.token_id("unk")
        words = encoded.word_ids(index)
        tokens = []
        for position, scores in enumerate(softmax(outputs["logits"][0])):
            if encoded["special_tokens_mask"][index][position]:
                continue
            start, end = encoded["offset_mapping"][index][position]
            word = words[position]
            if windows.word_starts and word is not None:
                start, end = start + windows.word_starts[word], end + windows.word_starts[word]
            token_id, part = encoded["input_ids"][index][position], text[start:end]
            name = backend.id_to_token(token_id)
            if marks_subwords:
                is_subword = len(name) != len(part)
            else:
                is_subword = start > 0 and " " not in text[start - 1 : start + 1]
            if token_id == unknown:
                name, is_subword = part, False
            tokens.append(ScoredToken(name, scores, position, start, end, is_subword))
        return tokens


def _strategy(settings: Mapping[str, Any]) -> str:
    return str(settings.get("aggregation_strategy") or "none").lower()


def _windows(words: str | list[str], encoded: Encoded, delimiter: str | None) -> _Windows:
    if isinstance(words, str):
        return _Windows(words, encoded)
    delimiter = " " if delimiter is None else delimiter
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + len(delimiter))
    return _Windows(delimiter.join(words), encoded, tuple(starts[:-1]))
