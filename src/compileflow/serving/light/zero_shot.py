"""Zero-shot classification: labels that a call chooses, scored by a model of what follows from a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.light.task import Settings
from compileflow.serving.light.text_task import TextTask
from compileflow.serving.rows import PreparedItem
from compileflow.source_model.activations import softmax
from compileflow.spec import HfTask

_TEMPLATE = "This example is {}."


class ZeroShotClassification(TextTask):
    """Scores each candidate label by the sentence that it makes of the template."""

    hf_task = HfTask.ZERO_SHOT_CLASSIFICATION
    load_settings = ("batch_size", "candidate_labels", "hypothesis_template", "multi_label")

    def __call__(self, inputs: Any, candidate_labels: Any = None, **settings: Any) -> Any:
        """Classify a text, a list, or the texts of an iterator; see `LightTask`.

        Args:
            inputs: A text, a list of texts, or an iterator.
            candidate_labels: A list of labels, or a text with commas between them.
            **settings: Other settings of the call.
        """
        if candidate_labels is not None:
            settings["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **settings)

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[str]:
        """Tokenize a text with the sentence of each label."""
        labels, template = _labels(settings), settings.get("hypothesis_template", _TEMPLATE)
        if not isinstance(item, str) or not item:
            raise InputError(f"Expected a text, got {item!r:.80}.", hint="Pass a text of at least one character.")
        if not isinstance(template, str) or template.format(labels[0]) == template:
            raise InputError(
                f"hypothesis_template has no place for the label: {template!r}.", hint="Write {} where it goes."
            )
        return PreparedItem([self._pair(item, template.format(label)) for label in labels], item)

    def answer(self, settings: Settings, details: str, row_outputs: list[Arrays]) -> dict[str, Any]:
        """Return the labels with their scores, the best first."""
        labels = _labels(settings)
        logits = np.concatenate([outputs["logits"] for outputs in row_outputs]).astype(np.float32)
        entailment = self._entailment
        if settings.get("multi_label") or len(labels) == 1:
            contradiction = -1 if entailment == 0 else 0
            scores = softmax(logits[:, [contradiction, entailment]])[:, 1]
        else:
            scores = softmax(logits[:, entailment])
        best = scores.argsort()[::-1]
        return {
            "sequence": details,
            "labels": [labels[number] for number in best],
            "scores": scores[best].tolist(),
        }

    @property
    def _entailment(self) -> int:
        """Number of the label that says that a sentence follows; -1 if no label is named so."""
        named = self.model.config.label2id.items()
        return next((number for label, number in named if label.lower().startswith("entail")), -1)

    def _pair(self, text: str, hypothesis: str) -> Arrays:
        """Tokenize a text and the sentence of a label, which stays whole where the text is cut."""
        try:
            return self.row(self.tokenizer(text, hypothesis, truncation="only_first"))
        except InputError:
            raise
        except Exception as error:
            # The package tokenizers has no class for it.
            if "too short" not in str(error):
                raise
            return self.row(self.tokenizer(text, hypothesis, truncation=False))


def _labels(settings: Settings) -> Sequence[str]:
    labels = settings.get("candidate_labels")
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",") if label.strip()]
    if not labels:
        raise InputError("Zero-shot classification needs candidate labels.", hint="Pass candidate_labels.")
    return list(labels)
