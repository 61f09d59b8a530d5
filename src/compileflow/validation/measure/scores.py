"""Scores: how well both models answer by the labels of the examples, and which right answers were lost."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from compileflow.serving.answer_spans import AnswerSettings, best_answers
from compileflow.spec import HfTask
from compileflow.validation.cases.labels import Entity, LabelledAnswer
from compileflow.validation.measure.searches import Searches

# What is scored, by task; elsewhere, the share of right labels.
_NAMES = {HfTask.TOKEN_CLASSIFICATION: "span F1", HfTask.QUESTION_ANSWERING: "answer F1"}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class LabelScore(BaseModel):
    """Score of both models on the labels of the examples.

    Attributes:
        name: accuracy, span F1, answer F1, or recall among the first documents, such as recall@10.
        source: Score of the source model, 0 to 1.
        compiled: Score of the compiled model.
        examples: Number of examples with a label.
        right: Right answers of the source model.
        right_to_wrong: Those that the compiled model gets wrong.
        wrong_to_right: Right answers of the compiled model alone.
        undecided: Answers of `right_to_wrong` on which the source model is undecided; gates count them as kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: float
    compiled: float
    examples: int
    right: int
    right_to_wrong: int
    wrong_to_right: int
    undecided: int = 0


@dataclass(frozen=True)
class _Scored:
    """One labelled example; pairs are of the source model and the compiled model.

    Attributes:
        text: The example.
        expected: Number of answers that the labels give.
        given: Number of answers of each model.
        hits: How many of them are right, with fractions for partly right ones.
        right: Right answers of the source model.
        lost: Those that the compiled model gets wrong.
        gained: Right answers of the compiled model alone.
        undecided: Lost answers on which the source model is undecided.
    """

    text: str
    expected: int
    given: tuple[int, int]
    hits: tuple[float, float]
    right: int
    lost: int
    gained: int
    undecided: int = 0


@dataclass
class Scores:
    """Collects the answers to labelled examples.

    Attributes:
        task: Task of the model.
        searches: Answers to labelled queries.
    """

    task: HfTask
    searches: Searches = field(default_factory=Searches)
    _scored: list[_Scored] = field(default_factory=list)

    def add_label(self, text: str, was_right: bool, is_right: bool, *, is_tie: bool) -> None:
        """Add one decision."""
        self._add_whole(text, (was_right, is_right), (float(was_right), float(is_right)), is_tie)

    def add_entities(
        self,
        text: str,
        truth: frozenset[Entity],
        before: frozenset[Entity],
        after: frozenset[Entity],
        *,
        agreed: frozenset[Entity],
    ) -> None:
        """Add the entities of a text that each model finds.

        Args:
            text: The example.
            truth: Entities that the labels give.
            before: Entities that the source model finds.
            after: Entities that the compiled model finds.
            agreed: The same, with the source model's tags where it is undecided.
        """
        right_before, right_after = truth & before, truth & after
        self._scored.append(
            _Scored(
                text,
                len(truth),
                (len(before), len(after)),
                (len(right_before), len(right_after)),
                right=len(right_before),
                lost=len(right_before - right_after),
                gained=len(right_after - right_before),
                undecided=len((right_before - right_after) & agreed),
            )
        )

    def add_answer(
        self, text: str, truth: LabelledAnswer, before: Sequence[Any], after: Sequence[Any], *, is_tie: bool
    ) -> None:
        """Add the answers to a question.

        Args:
            text: The example.
            truth: The right answers.
            before: Start and end logits of the source model, each of shape (tokens,).
            after: Those of the compiled model.
            is_tie: The models differ at most where the source model is undecided.
        """
        settings = AnswerSettings()
        answers = [
            best_answers([(truth.window, *logits)], truth.context, settings)[0]["answer"]
            for logits in ((before[0], before[1]), (after[0], after[1]))
        ]
        was_right, is_right = (
            any(normalized(answer) == normalized(right) for right in truth.answers) for answer in answers
        )
        first, second = (max(word_f1(answer, right) for right in truth.answers) for answer in answers)
        self._add_whole(text, (was_right, is_right), (first, second), is_tie)

    def rates(self) -> list[dict[str, Any]]:
        """Return one row per example: how many right answers of the source model stay right."""
        rows = [
            {
                "metric": "right_answers_kept",
                "text": scored.text,
                "hits": scored.right - scored.lost + scored.undecided,
                "trials": scored.right,
                "ties": scored.undecided,
                "right_to_wrong": scored.lost - scored.undecided,
                "wrong_to_right": scored.gained,
            }
            for scored in self._all()[1]
        ]
        return rows if any(row["trials"] for row in rows) else []

    def scalars(self) -> dict[str, float]:
        """Return the scores by name, and for entities the share of the source model's score that is kept."""
        score = self.result()
        if score is None:
            return {}
        name = score.name.replace(" ", "_").replace("@", "_at_").lower()
        scalars = {name: score.compiled, f"{name}_of_source_model": score.source}
        if self.task is HfTask.TOKEN_CLASSIFICATION and score.source > 0.0:
            scalars["span_f1_kept"] = score.compiled / score.source
        return scalars

    def result(self) -> LabelScore | None:
        """Return the score of both models; None if no example has a label."""
        name, all_scored = self._all()
        if not all_scored:
            return None
        expected = sum(scored.expected for scored in all_scored)
        source, compiled = (
            _f1(
                sum(scored.hits[side] for scored in all_scored),
                expected + sum(scored.given[side] for scored in all_scored),
            )
            for side in (0, 1)
        )
        return LabelScore(
            name=name,
            source=source,
            compiled=compiled,
            examples=len(all_scored),
            right=sum(scored.right for scored in all_scored),
            right_to_wrong=sum(scored.lost for scored in all_scored),
            wrong_to_right=sum(scored.gained for scored in all_scored),
            undecided=sum(scored.undecided for scored in all_scored),
        )

    def _all(self) -> tuple[str, list[_Scored]]:
        """Return what is scored, and the labelled examples; for searches, the queries."""
        k, found = self.searches.found()
        if not found:
            return _NAMES.get(self.task, "accuracy"), self._scored
        return f"recall@{k}", [
            _Scored(
                query.text,
                query.relevant,
                (query.relevant, query.relevant),
                (query.before, query.before - query.lost + query.gained),
                query.before,
                query.lost,
                query.gained,
            )
            for query in found
        ]

    def _add_whole(self, text: str, right: tuple[bool, bool], hits: tuple[float, float], is_tie: bool) -> None:
        was_right, is_right = right
        lost = int(was_right and not is_right)
        self._scored.append(
            _Scored(
                text,
                1,
                (1, 1),
                hits,
                right=int(was_right),
                lost=lost,
                gained=int(is_right and not was_right),
                undecided=lost if is_tie else 0,
            )
        )


def normalized(answer: str) -> str:
    """Return an answer without case, punctuation, articles and repeated spaces, as SQuAD compares answers.

    Source: evaluate-v1.1.py of SQuAD, https://rajpurkar.github.io/SQuAD-explorer/
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def word_f1(answer: str, right: str) -> float:
    """Return the F1 of the words of an answer, as SQuAD measures it."""
    words, right_words = (Counter(normalized(text).split()) for text in (answer, right))
    return _f1((words & right_words).total(), words.total() + right_words.total())


def _f1(hits: float, both: int) -> float:
    return 2.0 * hits / both if both else 1.0
