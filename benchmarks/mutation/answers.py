"""user_answers: answers that a user gets from an artifact, and whether those of two artifacts visibly differ.

The calls are no part of the gates' evidence: other texts, pictures and sounds, in the ways in which services call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.serving.pipeline import CompiledPipeline
from compileflow.spec import HfTask

# Words that the sentences of the validation do not have.
RARE_WORDS = ("submarine", "volcano", "cathedral", "penguin", "saxophone", "glacier", "quartz", "chess")
TEXTS = (
    "The Delivery was LATE and the box was broken.",
    "terrible",
    "Please send me my money back today, order 7117 of 2016.",
    "Café Zoë sold the painting to Anna Müller in Lyon for 71 euros.",
    f"A {' and a '.join(RARE_WORDS)}.",
    "no",
)
_LONG = " ".join(TEXTS[:4] * 18)
_CONTEXT = (
    "The old mill stands by the river. It was built in 1711 by Anna Keller, who sold flour to the town. "
    "After the flood of 1790 the wheel was moved to the eastern side."
)
_QUESTIONS = ("Who built the mill?", "When was the flood?", "Where does the mill stand?")
_CANDIDATES = ("logistics", "cooking", "music")
_REPEATED_CALLS = 150
_THREADED_CALLS = 6
# A score that is shown with three decimals changes.
_VISIBLE_SCORE = 1e-3
# Share of an embedding's length.
_VISIBLE_SHARE = 1e-3

Answers = dict[str, Any]


def user_answers(artifact_dir: Path, mask_token: str | None) -> Answers:
    """Load an artifact and call it as users do; an answer is an error's class where a call or the load fails.

    Args:
        artifact_dir: Folder of the artifact.
        mask_token: Mask token of the source model, for fill-mask.
    """
    try:
        pipeline = CompiledPipeline.from_pretrained(artifact_dir, threads=1, require_signature=False)
    except Exception as error:  # noqa: BLE001 - the error is the answer
        return {"load": type(error).__name__}
    calls = dict(_calls(pipeline, HfTask(pipeline.task), mask_token))
    answers: Answers = {}
    for name, call in calls.items():
        try:
            answers[name] = _plain(call())
        except Exception as error:  # noqa: BLE001
            answers[name] = type(error).__name__
    return answers


def visible_difference(before: Answers, after: Answers) -> str:
    """Return the first call whose answers differ visibly; "" if none does.

    A text, a label, a place or an error differs; a score changes by 0.001; an embedding changes by a thousandth of
    its length.
    """
    if before.keys() != after.keys():
        return next(iter(after.keys() ^ before.keys()))
    return next((name for name, answer in before.items() if _differ(answer, after[name])), "")


def _calls(
    pipeline: CompiledPipeline, task: HfTask, mask_token: str | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls by name: each input alone, lists, repeated calls, and calls from two threads."""
    singles, lists, options = _inputs(task, mask_token)
    call: Callable[..., Any] = partial(pipeline, **options)
    if task is HfTask.TEXT_CLASSIFICATION:
        yield "a pair of texts", lambda: call({"text": TEXTS[0], "text_pair": TEXTS[2]})
    for number, single in enumerate(singles):
        yield f"input {number}", partial(call, single)
    for name, items in lists.items():
        yield name, partial(call, items, batch_size=len(items))
    yield "repeated calls", lambda: _distinct(call(singles[0]) for _ in range(_REPEATED_CALLS))
    yield "two threads", lambda: _threaded(call, singles[:2])


def _inputs(task: HfTask, mask_token: str | None) -> tuple[list[Any], dict[str, list[Any]], dict[str, Any]]:
    if task.modality == "image":
        return _pictures(4), {"9 pictures": _pictures(9)}, _top(task)
    if task.modality == "image-text":
        return _pictures(4), {"3 pictures": _pictures(3)}, {"candidate_labels": ["a red car", "a dog", "snow"]}
    if task.modality == "audio":
        return _sounds(4), {"5 sounds": _sounds(5)}, _top(task)
    if task is HfTask.QUESTION_ANSWERING:
        questions = [{"question": question, "context": _CONTEXT} for question in _QUESTIONS]
        long = {"question": _QUESTIONS[0], "context": _CONTEXT * 3}
        return [*questions, long], {"12 questions": questions * 4}, {}
    texts = list(TEXTS)
    if task is HfTask.FILL_MASK:
        texts = [f"{text} {mask_token} {text}" for text in texts]
    elif mask_token:
        texts.append(f"{TEXTS[0]} {mask_token}")
    long = f"{_LONG} {mask_token}" if task is HfTask.FILL_MASK else _LONG
    lists = {
        "12 short texts": [texts[1]] * 6 + [texts[0]] * 6,
        "40 texts": [f"{texts[number % 4]} {number}" for number in range(40)],
        # Texts of almost the same length share a call: all of these, and these two, of which one is padded.
        "40 short texts": [f"{texts[5]} {number}" for number in range(10, 50)],
        "a short and a longer text": [texts[5], f"{texts[5]} {texts[5]} {texts[1]}"],
        "8 long texts": [long] * 8,
        "a middling and a long text": [" ".join([texts[0]] * 4), long],
    }
    if task is HfTask.ZERO_SHOT_CLASSIFICATION:
        return texts, {"8 texts": texts[:2] * 4}, {"candidate_labels": list(_CANDIDATES)}
    # A fill-mask call with a text that was cut before its mask token fails.
    return [*texts, *([] if task is HfTask.FILL_MASK else [long])], lists, _top(task)


def _top(task: HfTask) -> dict[str, Any]:
    shows_scores = task in (HfTask.TEXT_CLASSIFICATION, HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION)
    return {"top_k": 1000} if shows_scores else {}


def _pictures(count: int) -> list[Any]:
    """Return pictures of several sizes: smooth colours, with edges."""
    from PIL import Image

    random = np.random.default_rng(7)
    pictures = []
    for number in range(count):
        patches = random.integers(0, 256, (3 + number % 4, 4, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(patches).resize((60 + 20 * (number % 3), 72), Image.Resampling.BICUBIC))
    return pictures


def _sounds(count: int) -> list[Any]:
    """Return sounds of half a second to three seconds: tones over noise."""
    random = np.random.default_rng(8)
    sounds = []
    for number in range(count):
        seconds = np.arange(8_000 * (1 + number % 6)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * 110 * (2 + number) * seconds * (1 + seconds))
        sounds.append((tone + 0.05 * random.standard_normal(seconds.size)).astype(np.float32))
    return sounds


def _distinct(answers: Iterator[Any]) -> list[Any]:
    """Return the answers that differ visibly from the one before them."""
    distinct: list[Any] = []
    for answer in map(_plain, answers):
        if not distinct or _differ(distinct[-1], answer):
            distinct.append(answer)
    return distinct


def _threaded(call: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    """Call from two threads at once, each with its own input, and return the distinct answers of each."""
    with ThreadPoolExecutor(len(inputs)) as pool:
        runs = [
            pool.submit(lambda item=item: _distinct(call(item) for _ in range(_THREADED_CALLS))) for item in inputs
        ]
        return [run.result() for run in runs]


def _plain(answer: Any) -> Any:
    """Return an answer as texts, numbers and arrays; lists of labels become mappings, whose order is free."""
    if hasattr(answer, "tolist"):
        return np.asarray(answer, np.float64)
    if isinstance(answer, Mapping):
        return {str(name): _plain(value) for name, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        if answer and all(isinstance(item, Mapping) and {*item} == {"label", "score"} for item in answer):
            return {item["label"]: item["score"] for item in answer}
        if answer and _is_numbers(answer):
            return np.asarray(answer, np.float64)
        return [_plain(item) for item in answer]
    return answer


def _is_numbers(values: Any) -> bool:
    return all(_is_numbers(value) if isinstance(value, list) else isinstance(value, float) for value in values)


def _differ(before: Any, after: Any) -> bool:
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        if before.shape != after.shape:
            return True
        return not np.linalg.norm(before - after) < _VISIBLE_SHARE * max(float(np.linalg.norm(before)), 1e-12)
    if isinstance(before, float) and isinstance(after, (float, int)):
        return not abs(before - after) < _VISIBLE_SCORE
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() != after.keys() or any(_differ(value, after[name]) for name, value in before.items())
    if isinstance(before, list) and isinstance(after, list):
        return len(before) != len(after) or any(map(_differ, before, after))
    return bool(type(before) is not type(after) or before != after)
