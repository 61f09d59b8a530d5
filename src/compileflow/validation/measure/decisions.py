"""Decisions: what a service would do with the outputs, and how often both models decide alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.spec import HfTask, Precision
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.labels import LabelledAnswer, LabelledWords, Ranked, Searched, Truth, spans
from compileflow.validation.measure import metrics
from compileflow.validation.measure.detections import corners, detected
from compileflow.validation.measure.flips import (
    SURE_MARGIN,
    Change,
    Decode,
    Flip,
    Words,
    choice,
    listed,
    span_choice,
    token_choice,
)
from compileflow.validation.measure.likelihoods import Likelihoods
from compileflow.validation.measure.scores import Scores
from compileflow.validation.measure.searches import Searches

# With a smaller margin the reference has not decided between two answers; either counts as agreement. The same
# holds for a gap between two logits that is a smaller share of half the range of all logits: two steps of the
# format's grid, which are 2^-9 for the 11 bits of fp16, 2^-6 for the 8 bits of bf16, and 2/127 for int8, which has
# 127 steps up to the largest value. At fp32, each of the two logits may differ by 1e-4. A number that all logits
# have in common does not matter to a decision, so the range does not count it.
TIE_MARGIN = 1e-3
# int4 stores the last layer in 8 bits, so its logits have the same grid.
_TIE_SHARES = {
    Precision.FP32: 2e-4,
    Precision.FP16: 2**-9,
    Precision.BF16: 2**-6,
    Precision.INT8: 2 / 127,
    Precision.INT4: 2 / 127,
}
# Difference of two cosines that one rounding to the format's grid makes: at most 2^-11, 2^-8 and 1/254. At fp32 it
# is the largest 1 - cosine that the gates allow.
_COSINE_TIES = {
    Precision.FP32: 1e-6,
    Precision.FP16: 2**-11,
    Precision.BF16: 2**-8,
    Precision.INT8: 1 / 254,
    Precision.INT4: 1 / 254,
}
# Share of the logits' size by which the gates let all logits differ, at int8 those of the median example.
_LOGIT_ERRORS = {
    Precision.FP32: 1e-4,
    Precision.FP16: 1e-2,
    Precision.BF16: 5e-2,
    Precision.INT8: 0.1,
    Precision.INT4: 0.3,
}
# At int8, one of so many decisions may flip although the source model is sure, such as one of a thousand tokens: a
# value beyond the range that calibration saw is cut off.
_SURE_DECISIONS = 1000
_NEIGHBOURS = 10
# Tasks with one decision per input.
_WHOLE_INPUT = (HfTask.TEXT_CLASSIFICATION, HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION)
# Tasks with labels whose columns of logits may be misplaced.
_LABELLED = (
    *_WHOLE_INPUT,
    HfTask.TOKEN_CLASSIFICATION,
    HfTask.IMAGE_SEGMENTATION,
    HfTask.OBJECT_DETECTION,
    HfTask.AUDIO_FRAME_CLASSIFICATION,
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
)
# Pixels of a picture that are compared one by one, and detections of a picture, best first.
_PIXELS, _DETECTIONS = 500, 10
# With how many others each score is compared, and the share of their standard deviation up to which two are equal.
_OTHERS, _SCORE_TIE = 20, 0.05
# How far the corner of a box may move, as a share of the picture's width or height, and how far a depth may, as a
# share of the picture's range of depths.
_BOX_TOLERANCE, _DEPTH_TOLERANCE = 0.01, 0.01

# From the tokens of a text to its embedding.
Pool = Callable[[Any], Any]


def mean_of_tokens(tokens: Any) -> Any:
    """Return the mean of tokens, shape (tokens, size)."""
    return tokens.mean(axis=0)


@dataclass
class Decisions:
    """Collects decisions over the natural examples of one task.

    Attributes:
        task: Task that defines the decision; one of `GRAPH_TASKS`.
        labels: Name of each class: id2label of the model's configuration, or the characters of a speech model.
        multi_label: True if the model decides about each label separately.
        pools: Functions from the tokens of a text, shape (tokens, size), to its embedding: that of the source
            model and that of the compiled model.
        precision: Precision of the compiled model, whose grid decides what a tie is.
        scores: Answers to examples that have labels.
    """

    task: HfTask
    labels: dict[int, str] = field(default_factory=dict)
    multi_label: bool = False
    pools: tuple[Pool, Pool] = (mean_of_tokens, mean_of_tokens)
    precision: Precision = Precision.FP32
    scores: Scores = field(init=False)
    _rates: list[dict[str, Any]] = field(default_factory=list)
    _confident_flips: int = 0
    _largest: float = 0.0
    _shifts: list[Any] = field(default_factory=list)
    _logits: list[tuple[Any, Any]] = field(default_factory=list)
    _pictures: list[tuple[Any, Any]] = field(default_factory=list)
    _embeddings: list[tuple[Any, Any]] = field(default_factory=list)
    _embedding_errors: list[float] = field(default_factory=list)
    _tags: list[tuple[list[str], list[str]]] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _scores: list[tuple[str, tuple[float, float]]] = field(default_factory=list)
    _changes: list[Change] = field(default_factory=list)
    _likelihoods: Likelihoods = field(default_factory=Likelihoods)

    def __post_init__(self) -> None:
        self.scores = Scores(self.task, Searches(_COSINE_TIES[self.precision], _SCORE_TIE))

    def add(self, case: Case, expected: Arrays, actual: Arrays) -> None:
        """Add one natural batch. Outputs of the wrong shape are judged by the shape gate."""
        if any(name not in actual or actual[name].shape != value.shape for name, value in expected.items()):
            return
        if self.task is HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION:
            self._add_label(case.name, *(outputs["logits_per_image"][0] for outputs in (expected, actual)))
            return
        for row, text in enumerate(case.texts):
            mask = case.mask[row].astype(bool)
            truth = case.truths[row] if case.truths else None
            if self.task.modality != "text":
                self._add_signal(text, mask, _row(expected, row), _row(actual, row), truth)
                continue
            if self.task in _WHOLE_INPUT:
                self._add_label(text, expected["logits"][row], actual["logits"][row], truth)
                continue
            if self.task is HfTask.MULTIPLE_CHOICE:
                # A row of the graph is one choice; the order of such rows decides.
                self._add_score(text, expected["logits"][row], actual["logits"][row])
                continue
            ids = [int(token) for token in case.inputs["input_ids"][row][mask]]
            if self.task is HfTask.FEATURE_EXTRACTION:
                tokens = (outputs["last_hidden_state"][row][mask] for outputs in (expected, actual))
                before, after = (pool(value) for pool, value in zip(self.pools, tokens, strict=True))
                self._add_embedding(text, before, after)
                if isinstance(truth, Searched):
                    self.scores.searches.add_embedding(text, truth, before, after)
            elif self.task is HfTask.TOKEN_CLASSIFICATION:
                self._add_tokens(text, ids, expected["logits"][row][mask], actual["logits"][row][mask], truth)
            elif self.task.generates:
                self._add_next_tokens(text, ids, expected["logits"][row][mask], actual["logits"][row][mask])
            elif self.task is HfTask.FILL_MASK:
                position = case.positions[row]
                self._add_mask(text, expected["logits"][row, position], actual["logits"][row, position])
            else:
                names = ("start_logits", "end_logits")
                before, after = ([outputs[name][row][mask] for name in names] for outputs in (expected, actual))
                self._add_span(text, ids, before, after, truth)

    def rates(self) -> list[dict[str, Any]]:
        """Return one row per example and metric: metric, text, hits, trials."""
        overlaps, k = self._neighbours()
        return [
            *self._rates,
            *({"metric": "neighbour_overlap", "text": "", "hits": overlap, "trials": k} for overlap in overlaps),
            *(
                {"metric": "order_agreement", "text": text, "hits": hits, "trials": trials}
                for text, hits, trials in self._orders()
                if trials
            ),
        ]

    def scalars(self) -> dict[str, float]:
        """Return one number per metric, over all examples."""
        scalars: dict[str, float] = {}
        if self.task in _LABELLED and self._logits:
            before, after = (np.concatenate(logits) for logits in zip(*self._logits, strict=True))
            tolerance = _LOGIT_ERRORS[self.precision]
            scalars["misplaced_labels"] = metrics.misplaced_labels(before, after, tolerance=tolerance)
            decisions = sum(row["trials"] for row in self._rates if row["metric"] == "label_agreement")
            allowed = decisions // _SURE_DECISIONS if self.precision.is_integer else 0
            scalars["confident_flips"] = max(0, self._confident_flips - allowed)
        if self._shifts and self.precision.is_integer and not self.task.generates:
            scalars["probability_shift"] = float(np.concatenate(self._shifts).mean())
        if self._embedding_errors:
            scalars["embedding_error"] = float(np.max(self._embedding_errors))
        scalars |= self._likelihoods.scalars()
        if self._pictures:
            scalars["mean_iou"] = metrics.mean_iou(*zip(*self._pictures, strict=True))
        if self._tags:
            before_tags, after_tags = zip(*self._tags, strict=True)
            scalars["entity_f1"] = metrics.entity_f1(before_tags, after_tags)
        return scalars

    def details(self) -> dict[str, str]:
        """Return what was found, in words, for some of the scalars."""
        return self._likelihoods.details()

    def flips(self, decode: Decode, limit: int = 50) -> tuple[Flip, ...]:
        """Return the examples whose decision differs, most confident first. Ties of the source model do not count.

        For embeddings: the ten examples that lost most of their nearest neighbours.

        Args:
            decode: Function from token ids to text, such as a tokenizer's `decode`.
            limit: Maximum number of flips to return.
        """
        changes = sorted(self._changes, key=lambda change: (-(change.margin or 0.0), change.text))
        changes += (self._moved() + self._reordered())[:_NEIGHBOURS]
        return tuple(change.flip(decode) for change in changes[:limit])

    def flips_count(self) -> int:
        """Return how many examples flipped; for embeddings, how many lost a neighbour."""
        return len(self._changes) + len(self._moved()) + len(self._reordered())

    def _neighbours(self) -> tuple[list[int], int]:
        """Return how many of its k nearest others each example keeps, and k; empty without embeddings."""
        if len(self._embeddings) < 2:
            return [], 0
        before, after = (np.stack(embeddings) for embeddings in zip(*self._embeddings, strict=True))
        k = min(_NEIGHBOURS, len(before) - 1)
        return metrics.neighbour_overlaps(before, after, k, tie=_COSINE_TIES[self.precision]), k

    def _moved(self) -> list[Change]:
        """Return the examples that lost neighbours; those that lost most come first."""
        overlaps, k = self._neighbours()
        losses = sorted(
            (overlap, text) for overlap, text in zip(overlaps, self._texts, strict=False) if overlap < k
        )
        return [
            Change("neighbour_overlap", text, None, [f"{k} nearest examples"], [f"{k - overlap} of them lost"])
            for overlap, text in losses
        ]

    def _orders(self) -> list[tuple[str, int, int]]:
        """Return (text, others that keep their side, others) for each example with one score.

        Others with nearly the same score in the source model do not count.
        """
        if len(self._scores) < 2:
            return []
        before, after = np.asarray([scores for _, scores in self._scores], np.float64).T
        tie = _SCORE_TIE * before.std()
        orders = []
        for index, (text, _) in enumerate(self._scores):
            others = np.arange(index + 1, index + 1 + min(_OTHERS, len(before) - 1)) % len(before)
            distances = before[others] - before[index]
            kept = np.sign(distances) == np.sign(after[others] - after[index])
            differs = np.abs(distances) > tie
            orders.append((text, int((kept & differs).sum()), int(differs.sum())))
        return orders

    def _reordered(self) -> list[Change]:
        """Return the examples that changed places with others; those that changed most come first."""
        losses = sorted((hits - trials, text, trials) for text, hits, trials in self._orders() if hits < trials)
        return [
            Change("order_agreement", text, None, [f"order among {trials} others"], [f"{-loss} of them changed"])
            for loss, text, trials in losses
        ]

    def _add_signal(self, text: str, mask: Any, before: Arrays, after: Arrays, truth: Truth | None) -> None:
        """Add one image or recording: its outputs by name, without the batch axis."""
        if self.task in _WHOLE_INPUT:
            self._add_label(text, before["logits"], after["logits"], truth)
        elif self.task is HfTask.SPEECH_RECOGNITION:
            self._add_speech(text, *(_counted(outputs["logits"], mask) for outputs in (before, after)))
        elif self.task is HfTask.AUDIO_FRAME_CLASSIFICATION:
            self._add_frames(text, *(_counted(outputs["logits"], mask) for outputs in (before, after)))
        elif self.task is HfTask.IMAGE_SEGMENTATION:
            self._add_picture(text, before["logits"], after["logits"])
        elif self.task is HfTask.OBJECT_DETECTION:
            self._add_detections(text, before, after)
        elif self.task is HfTask.DEPTH_ESTIMATION:
            self._add_depths(text, before["predicted_depth"], after["predicted_depth"])
        else:
            # The pipelines answer with the first output; of speaker verification, the embedding counts.
            name = "embeddings" if self.task is HfTask.AUDIO_XVECTOR else next(iter(before))
            self._texts.append(text)
            self._embeddings.append((_pooled(before[name]), _pooled(after[name])))

    def _add_embedding(self, text: str, before: Any, after: Any) -> None:
        """Compare two embeddings of a text, each of shape (size,)."""
        self._texts.append(text)
        self._embeddings.append((before, after))
        is_alike = before.shape == after.shape
        self._embedding_errors.append(metrics.rel_l2(before, after) if is_alike else float("inf"))

    def _add_score(self, text: str, before: Any, after: Any) -> None:
        """Add the single logit of a model that scores its inputs, shape (1,)."""
        self._scores.append((text, (float(before[0]), float(after[0]))))

    def _add_label(self, text: str, before: Any, after: Any, truth: Truth | None = None) -> None:
        if before.size == 1:
            self._add_score(text, before, after)
            if isinstance(truth, Ranked):
                self.scores.searches.add_score(truth, float(before[0]), float(after[0]))
        self._logits.append((before[None], after[None]))
        if not self.multi_label and before.size > 1:
            words: list[Words] = [[choice(logits, self._name)] for logits in (before, after)]
            self._count("label_agreement", text, before[None], after[None], lambda _: words)
            if isinstance(truth, str):
                choices = (int(before.argmax()), int(after.argmax()))
                was_right, is_right = (self._is(label, truth) for label in choices)
                is_tie = bool(self._ties(before[None])[0])
                self._rates[-1] |= {
                    "right_to_wrong": int(was_right and not is_right and not is_tie),
                    "wrong_to_right": int(is_right and not was_right and not is_tie),
                }
                self.scores.add_label(text, was_right, is_right, is_tie=is_tie)
            return
        self._count_each("label_agreement", text, before, after, self._name)

    def _add_frames(self, text: str, before: Any, after: Any) -> None:
        """Compare each label of each frame, logits of shape (frames, labels)."""
        labels = before.shape[-1]
        self._logits.append((before, after))
        self._count_each(
            "label_agreement",
            text,
            before.ravel(),
            after.ravel(),
            lambda i: f"frame {i // labels}, {self._name(i % labels)}",
        )

    def _add_picture(self, text: str, before: Any, after: Any) -> None:
        """Compare the labels of all pixels, and some pixels one by one; logits (labels, height, width)."""
        self._pictures.append((before.argmax(0), after.argmax(0)))
        pixels = _spread(before[0].size)
        width = before.shape[-1]
        before, after = pair = [logits.reshape(len(logits), -1).T[pixels] for logits in (before, after)]
        self._logits.append((before, after))

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed(
                    [
                        [f"row {pixels[i] // width}, column {pixels[i] % width}: {choice(logits[i], self._name)}"]
                        for i in flipped
                    ]
                )
                for logits in pair
            ]

        self._count("label_agreement", text, before, after, describe)

    def _add_depths(self, text: str, before: Any, after: Any) -> None:
        """Compare the depths of some pixels, with a tolerance that is a share of the picture's range of depths."""
        pixels = _spread(before.size)
        tolerance = _DEPTH_TOLERANCE * np.ptp(before)
        before, after = (np.asarray(depths, np.float64).ravel()[pixels] for depths in (before, after))
        equals = np.abs(before - after) <= tolerance
        self._rates.append(
            {"metric": "depth_agreement", "text": text, "hits": int(equals.sum()), "trials": len(equals)}
        )
        if not equals.all():
            worst = int(np.abs(before - after).argmax())
            words: list[Words] = [[f"pixel {pixels[worst]}: {depths[worst]:.4g}"] for depths in (before, after)]
            self._changes.append(Change("depth_agreement", text, None, *words))

    def _add_detections(self, text: str, before: Arrays, after: Arrays) -> None:
        """Look for the best detections of the source model among those of the compiled model, in any order.

        A detection is repeated by one of equal label whose corners are nearly in the same place.
        """
        self._logits.append((before["logits"], after["logits"]))
        labels, scores, margins = detected(before["logits"], len(self.labels))
        boxes, other_boxes = (corners(outputs["pred_boxes"]) for outputs in (before, after))
        other_labels, _, _ = detected(after["logits"], len(self.labels))
        ties = self._ties(before["logits"])
        best = np.argsort(-scores, kind="stable")[:_DETECTIONS]
        hits = 0
        for query in best:
            distances = np.abs(other_boxes - boxes[query]).max(axis=-1)
            is_alike = (other_labels == labels[query]) | ties[query]
            if (is_alike & (distances <= _BOX_TOLERANCE)).any():
                hits += 1
                continue
            nearest = int(distances.argmin())
            words: list[Words] = [
                [f"{self._name(int(label))} at {np.array2string(box, precision=3)}"]
                for label, box in ((labels[query], boxes[query]), (other_labels[nearest], other_boxes[nearest]))
            ]
            self._changes.append(Change("box_agreement", text, float(margins[query]), *words))
        self._rates.append({"metric": "box_agreement", "text": text, "hits": hits, "trials": len(best)})

    def _count_each(self, metric: str, text: str, before: Any, after: Any, name: Callable[[int], str]) -> None:
        """Count decisions of two choices, no or yes, each by one logit, shape (decisions,)."""
        # A logit near zero alone does not show how large the numbers are that it was computed from.
        self._largest = max(self._largest, float(np.abs(before).max(initial=0.0)))
        before, after = pair = [np.stack([-logits / 2, logits / 2], axis=-1) for logits in (before, after)]

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"{name(i)}: {choice(logits[i], ('no', 'yes').__getitem__)}"] for i in flipped])
                for logits in pair
            ]

        self._count(metric, text, before, after, describe, size=self._largest)

    def _add_tokens(self, text: str, ids: list[int], before: Any, after: Any, truth: Truth | None) -> None:
        self._logits.append((before, after))

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"token {i} ", [ids[i]], f": {choice(logits[i], self._name)}"] for i in flipped])
                for logits in (before, after)
            ]

        self._count("label_agreement", text, before, after, describe)
        tags = [[self._name(int(label)) for label in logits.argmax(-1)] for logits in (before, after)]
        self._tags.append((tags[0], tags[1]))
        if isinstance(truth, LabelledWords):
            agreed = [tags[int(not is_tie)][position] for position, is_tie in enumerate(self._ties(before))]
            before_spans, after_spans, agreed_spans = (
                frozenset(spans([given[token] for token in truth.first_tokens])) for given in (*tags, agreed)
            )
            self.scores.add_entities(text, truth.entities, before_spans, after_spans, agreed=agreed_spans)

    def _add_speech(self, text: str, before: Any, after: Any) -> None:
        """Compare the character of each frame, and the transcript, where repeats of a character merge (CTC)."""
        if not len(before):
            return
        transcripts = [[int(label) for label, _ in groupby(logits.argmax(-1))] for logits in (before, after)]

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"frame {i}: {choice(logits[i], self._name)}"] for i in flipped])
                for logits in (before, after)
            ]

        flips = len(self._changes)
        self._count("label_agreement", text, before, after, describe)
        is_equal = transcripts[0] == transcripts[1] or len(self._changes) == flips
        self._rates.append({"metric": "exact_transcript", "text": text, "hits": int(is_equal), "trials": 1})

    def _add_next_tokens(self, text: str, ids: list[int], before: Any, after: Any) -> None:
        """Compare the predictions of all tokens of a text but the first, logits of shape (tokens, vocabulary)."""
        if len(ids) < 2:
            return
        before, after, next_ids = before[:-1], after[:-1], ids[1:]
        self._likelihoods.add(text, before, after, next_ids)

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([["after ", [ids[i]], ": ", *token_choice(logits[i])] for i in flipped])
                for logits in (before, after)
            ]

        self._count("next_token", text, before, after, describe)

    def _add_mask(self, text: str, before: Any, after: Any) -> None:
        words = [token_choice(logits) for logits in (before, after)]
        self._count("label_agreement", text, before[None], after[None], lambda _: words)
        k = min(5, before.size)
        tie = _TIE_SHARES[self.precision] * float(np.ptp(before)) / 2
        hits = metrics.overlap_at(before, after, k, tie=tie)
        self._rates.append({"metric": "top5_overlap", "text": text, "hits": hits, "trials": k})

    def _add_span(
        self, text: str, ids: list[int], before: list[Any], after: list[Any], truth: Truth | None
    ) -> None:
        ties = [bool(self._ties(logits[None])[0]) for logits in before]
        # A span flips with either end, but not with an end that is a tie of the reference.
        margins = [
            float(metrics.margins(before_logits))
            for before_logits, after_logits, is_tie in zip(before, after, ties, strict=True)
            if before_logits.argmax() != after_logits.argmax() and not is_tie
        ]
        margin, is_equal = max(margins, default=0.0), not margins
        self._rates.append(
            {"metric": "exact_span", "text": text, "hits": int(is_equal), "trials": 1, "ties": int(any(ties))}
        )
        if isinstance(truth, LabelledAnswer):
            self.scores.add_answer(text, truth, before, after, is_tie=is_equal and any(ties))
        if not is_equal:
            words = [span_choice(ids, ends) for ends in (before, after)]
            self._changes.append(Change("exact_span", text, margin, *words))

    def _count(
        self,
        metric: str,
        text: str,
        before: Any,
        after: Any,
        describe: Callable[[list[int]], list[Words]],
        *,
        size: float = 0.0,
    ) -> None:
        """Count decisions, logits of shape (decisions, choices).

        Args:
            metric: Name of the rate.
            text: The example.
            before: Logits of the source model.
            after: Logits of the compiled model.
            describe: Function that puts the flipped decisions into words.
            size: Size of the numbers that the format rounds, if it exceeds half the range of the logits.
        """
        margin = metrics.margins(before)
        ties = self._ties(before, size)
        equals = before.argmax(-1) == after.argmax(-1)
        flipped = ~equals & ~ties
        self._confident_flips += int((flipped & (margin > SURE_MARGIN)).sum())
        self._shifts.append(np.abs(metrics.softmax(before) - metrics.softmax(after)).max(-1))
        self._rates.append(
            {
                "metric": metric,
                "text": text,
                "hits": int((~flipped).sum()),
                "trials": len(equals),
                "ties": int(ties.sum()),
            }
        )
        if flipped.any():
            words = describe([int(position) for position in np.flatnonzero(flipped)])
            self._changes.append(Change(metric, text, float(margin[flipped].max()), *words))

    def _ties(self, logits: Any, size: float = 0.0) -> Any:
        """Return where the source model has not decided, for logits of shape (decisions, choices)."""
        gaps = metrics.gaps(logits)
        # Of two choices, the gap as a margin. With hundreds of choices, all probabilities and margins are small.
        is_close = np.tanh(gaps / 2) < TIE_MARGIN
        return is_close | (gaps <= _TIE_SHARES[self.precision] * np.maximum(np.ptp(logits, axis=-1) / 2, size))

    def _is(self, label: int, truth: str) -> bool:
        """Return whether a label is the right one, which is given by its name or else by its number."""
        return truth == (self._name(label) if truth in self.labels.values() else str(label))

    def _name(self, label: int) -> str:
        return self.labels.get(label, str(label))


def _row(outputs: Arrays, row: int) -> Arrays:
    """Return the outputs of one row, without those of detectors whose first axis is not the batch."""
    return {name: value[row] for name, value in outputs.items() if row < len(value)}


def _spread(count: int) -> Any:
    """Return the numbers of some pixels of a picture with `count` pixels, evenly spread."""
    return np.linspace(0, count - 1, min(_PIXELS, count)).astype(int)


def _counted(logits: Any, mask: Any) -> Any:
    """Return the frames that the mask counts; all where the number of frames does not follow from the input."""
    return logits[mask] if len(mask) == len(logits) else logits


def _pooled(features: Any) -> Any:
    """Return one vector: of tokens (tokens, features) or of a picture (features, height, width), the mean."""
    return (
        features.reshape(len(features), -1).mean(axis=1) if features.ndim == 3 else np.atleast_2d(features).mean(0)
    )
