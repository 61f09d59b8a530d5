"""Raw inputs of a service: texts for a tokenizer, and what a pipeline of each task is called with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from compileflow.source_model.processor import Processor
from compileflow.spec import HfTask
from compileflow.validation.cases.generated_signals import NamedSignal, generated_signals, odd_signals
from compileflow.validation.cases.text import ODD_TEXTS

# A tokenizer in Python takes some ten times as long as one in Rust.
_TEXTS, _TEXTS_OF_A_SLOW_TOKENIZER = 10_000, 300
_PIECES_PER_TEXT = 6
_SIGNALS, _ANSWERED_SIGNALS = 50, 4
_ANSWERED_TEXTS = 4
# Longer rows take a model seconds.
_LONGEST_ANSWERED = 1024
_LABELS = ["travel", "food", "dogs and cats"]

# Settings of a call, which show as much of an answer as the pipeline can give.
CALL_SETTINGS: Mapping[HfTask, Mapping[str, Any]] = {
    HfTask.FEATURE_EXTRACTION: {"return_tensors": True},
    HfTask.TEXT_CLASSIFICATION: {"top_k": None},
    HfTask.TOKEN_CLASSIFICATION: {"ignore_labels": []},
    HfTask.TEXT_GENERATION: {"max_new_tokens": 8, "do_sample": False},
    HfTask.IMAGE_CLASSIFICATION: {"top_k": 1000},
    HfTask.IMAGE_FEATURE_EXTRACTION: {"return_tensors": True},
    HfTask.OBJECT_DETECTION: {"threshold": 0.3},
    HfTask.ZERO_SHOT_CLASSIFICATION: {"candidate_labels": _LABELS},
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION: {"candidate_labels": _LABELS},
}
# A compiled pipeline always truncates; pipelines of transformers truncate with one of three settings.
TRUNCATION: Mapping[HfTask, Mapping[str, Any]] = {
    HfTask.FEATURE_EXTRACTION: {"truncation": True},
    HfTask.TEXT_CLASSIFICATION: {"truncation": True},
    HfTask.FILL_MASK: {"tokenizer_kwargs": {"truncation": True}},
}


def token_texts(tokenizer: Any, sentences: Sequence[str], seed: int) -> list[str]:
    """Return about 10,000 texts: every piece of the vocabulary, parts of sentences in odd spellings, odd texts.

    Args:
        tokenizer: Tokenizer of the source model. One in Python gets 300 texts.
        sentences: Natural sentences.
        seed: Seed of the random choices.
    """
    chance = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
    count = _TEXTS if tokenizer.is_fast else _TEXTS_OF_A_SLOW_TOKENIZER
    texts = [*ODD_TEXTS.values(), " ".join(map(str, tokenizer.all_special_tokens)), " ".join(sentences)]
    pieces = sorted(map(str, tokenizer.get_vocab()))
    chance.shuffle(pieces)
    groups = [pieces[start : start + _PIECES_PER_TEXT] for start in range(0, len(pieces), _PIECES_PER_TEXT)]
    texts += [" ".join(group) for group in groups[: count * 3 // 4]]
    while len(texts) < count:
        sentence = chance.choice(sentences)
        start = chance.randrange(len(sentence))
        text = sentence[start : start + chance.randrange(10, 90)]
        texts.append(
            chance.choice((str, str.upper, str.title, str.swapcase))(text)
            + chance.choice(("", "é", " ", "…\n", "💡"))
        )
    return texts


def processor_signals(processor: Processor, seed: int) -> list[NamedSignal]:
    """Return 50 pictures or sounds of several sizes, and odd ones among them."""
    odd = odd_signals(processor)
    return odd + generated_signals(processor, _SIGNALS - len(odd), seed=seed)


def raw_texts(
    task: HfTask, examples: Sequence[Mapping[str, str]], tokenizer: Any, max_length: int, seed: int
) -> list[Any]:
    """Return a few inputs for a pipeline of text: natural ones, an odd one, and one beyond the maximum.

    Args:
        task: Task of the pipeline.
        examples: Natural examples.
        tokenizer: Tokenizer of the source model.
        max_length: Longest row in tokens.
        seed: Seed of the random choices.
    """
    chosen = random.Random(seed).sample(list(examples), min(_ANSWERED_TEXTS, len(examples)))  # noqa: S311 - as above
    long_text = " ".join(example["context" if "context" in example else "text"] for example in examples[:200])
    long_text = " ".join(long_text.split()[: max_length + 8])
    # A long row of fill-mask has a score for each word at each token: a gigabyte for a large vocabulary.
    is_answered = max_length <= _LONGEST_ANSWERED and task is not HfTask.FILL_MASK and not task.generates
    if task.reads_pairs:
        pairs = [(example["question"], example["context"]) for example in chosen]
        pairs += [(pairs[0][0], ODD_TEXTS["CJK"]), *([(pairs[0][0], long_text)] if is_answered else [])]
        if task is HfTask.QUESTION_ANSWERING:
            return [{"question": question, "context": context} for question, context in pairs]
        return list(pairs)
    texts = [example["text"] for example in chosen]
    texts += [f"{ODD_TEXTS['emoji']} {ODD_TEXTS['CJK']}", *([long_text] if is_answered else [])]
    if task.generates and getattr(tokenizer, "chat_template", None):
        return [*texts, [{"role": "user", "content": texts[0]}]]
    if task is HfTask.FILL_MASK:
        return [f"{tokenizer.mask_token} {text}" for text in texts]
    return list(texts)


def raw_signals(processor: Processor, seed: int) -> list[Any]:
    """Return a few inputs for a pipeline of pictures or sounds: natural ones and an odd one."""
    signals = [*generated_signals(processor, _ANSWERED_SIGNALS, seed=seed), odd_signals(processor)[1]]
    if processor.modality == "audio":
        return [signal.values for signal in signals]
    from PIL import Image

    return [Image.fromarray(signal.values) for signal in signals]
