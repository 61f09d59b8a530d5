"""Labels of examples: the forms in which a user gives them, and what an answer of a model is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from compileflow.errors import MeasurementError
from compileflow.serving.answer_spans import Window
from compileflow.spec import HfTask

# Tasks whose recordings or pictures may lie in one folder for each label.
CLASS_FOLDERS = (HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION)
# Tasks whose label is the name or number of one class.
ONE_LABEL = (HfTask.TEXT_CLASSIFICATION, *CLASS_FOLDERS)
# In a configuration, the problem_type of models that decide about each label separately.
MULTI_LABEL = "multi_label_classification"
# Metrics that are measured only on examples with labels.
METRICS_OF_LABELS = ("right_answers_kept", "span_f1_kept")
# Why labels of such models, and of those with a single output, are not compared.
LABELS_UNUSED = "the model does not choose one label"
_NO_ENTITY = "O"
# Fields of an example that give its label, by task.
_LABEL_FIELDS = {
    HfTask.TEXT_CLASSIFICATION: ("label",),
    HfTask.TOKEN_CLASSIFICATION: ("entities",),
    HfTask.QUESTION_ANSWERING: ("answers", "answer"),
    HfTask.TEXT_RANKING: ("label",),
    HfTask.FEATURE_EXTRACTION: ("relevant",),
    HfTask.SENTENCE_SIMILARITY: ("relevant",),
}
# The form of token classification that gives the words.
_TAGGED_WORDS = ("tokens", "tags")
# Share of equal letters from which one name is a misspelling of another.
_MISSPELLED = 0.7

Example = dict[str, Any]
# Type, first word and the word after the last one.
Entity = tuple[str, int, int]


@dataclass(frozen=True)
class LabelledWords:
    """Labelled entities of a text.

    Attributes:
        first_tokens: Position of the first token of each word. Its tag is that of the word.
        entities: The entities, in words.
    """

    first_tokens: tuple[int, ...]
    entities: frozenset[Entity]


@dataclass(frozen=True)
class LabelledAnswer:
    """Right answers to a question.

    Attributes:
        answers: Texts, each of which is right.
        context: Text that contains them.
        window: Tokens of the question and the context.
    """

    answers: tuple[str, ...]
    context: str
    window: Window


@dataclass(frozen=True, eq=False)
class Searched:
    """A query or a document of a search by embeddings.

    Attributes:
        name: Id of a document; None if no query finds the text.
        relevant: Ids of the documents that a query should find.
    """

    name: str | None
    relevant: frozenset[str]


@dataclass(frozen=True)
class Ranked:
    """A document that is ranked for a query.

    Attributes:
        query: The query.
        is_relevant: Whether the document should come first.
    """

    query: str
    is_relevant: bool


# Of a classifier, the name or number of the right label.
Truth = str | LabelledWords | LabelledAnswer | Searched | Ranked


def label_fields(data: Mapping[str, Any], task: HfTask) -> Example:
    """Return the text of an example and its label, if it has one.

    Args:
        data: One JSON object, or the cells of one row.
        task: Task of the model.

    Raises:
        ValueError: A field is missing, that of the label is misspelled, or one does not have the form of the task.
    """
    _check_spelling(data, task)
    if task is HfTask.TOKEN_CLASSIFICATION and "tokens" in data:
        return _tagged(data)
    names = ("question", "context") if task.reads_pairs else ("text",)
    for name in names:
        if not isinstance(data.get(name), str):
            problem = "is not a string" if name in data else "is missing"
            raise ValueError(f"{name} {problem}")
        if not data[name].strip():
            raise ValueError(f"{name} is empty")
    example: Example = {name: data[name] for name in names}
    label = data.get("label")
    if task is HfTask.TEXT_CLASSIFICATION and label is not None and label != "":
        if not isinstance(label, str | int):
            raise ValueError(f"label is not a name or a whole number: {label!r:.80}")
        return example | {"label": str(label)}
    if task is HfTask.TEXT_RANKING and label is not None and label != "":
        if label not in (0, 1, "0", "1"):
            raise ValueError(f"label is not 1 for a relevant document or 0 for another one: {label!r:.80}")
        return example | {"label": str(int(label))}
    if task.graph_task is HfTask.FEATURE_EXTRACTION:
        return example | _search_fields(data)
    if task is HfTask.TOKEN_CLASSIFICATION and "entities" in data:
        return example | {"entities": _entities(data["entities"], len(example["text"]))}
    if task is HfTask.QUESTION_ANSWERING and (answers := _answers(data)):
        return example | {"answers": answers}
    return example


def known_fields(data: Mapping[str, Any], task: HfTask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the fields that are read of an example: those of its text, and those of its label.

    Args:
        data: One JSON object, or the cells of one row. The form of the example may depend on it.
        task: Task of the model.
    """
    if task is HfTask.TOKEN_CLASSIFICATION and "tokens" in data:
        return _TAGGED_WORDS[:1], _TAGGED_WORDS[1:]
    labels = _LABEL_FIELDS.get(task, ())
    if "relevant" in labels:
        return ("text", "id"), labels
    return ("question", "context") if task.reads_pairs else ("text",), labels


def unused_fields(data: Mapping[str, Any], task: HfTask) -> list[str]:
    """Return the names of the fields that are not read."""
    texts, labels = known_fields(data, task)
    return [name for name in data if name not in (*texts, *labels)]


def has_label(example: Example) -> bool:
    """Whether an example, as `label_fields` returns it, has a label."""
    return any(name in example for name in ("label", "tags", "entities", "answers", "relevant"))


def check_ids(examples: Sequence[Example], lines: Sequence[int] = ()) -> None:
    """Check that each document has an id of its own, and that those of relevant documents exist.

    Args:
        examples: Examples, as `label_fields` returns them.
        lines: Line of each example, for the message.

    Raises:
        ValueError: They do not.
    """
    queries = [(number, example) for number, example in enumerate(examples) if "relevant" in example]
    ids = Counter(example["id"] for example in examples if "id" in example)
    if queries and ids and (most := ids.most_common(1)[0])[1] > 1:
        second = [number for number, example in enumerate(examples) if example.get("id") == most[0]][1]
        raise ValueError(f"two examples have the id {most[0]!r}{_line_of(second, lines)}")
    for number, example in queries:
        for name in example["relevant"]:
            if name not in ids or name == example.get("id"):
                place = _line_of(number, lines)
                raise ValueError(f"relevant names {name!r}, which is not the id of another example{place}")


def _line_of(number: int, lines: Sequence[int]) -> str:
    return f" (line {lines[number]})" if lines else ""


def check_labels(
    task: HfTask,
    examples: Sequence[Example],
    labels: Mapping[int, str],
    origin: str,
    *,
    lines: Sequence[int] = (),
) -> None:
    """Check that the model has the labels of the examples; otherwise each of them would count as a wrong answer.

    Args:
        task: Task of the model.
        examples: Examples, as `label_fields` returns them.
        labels: Name of each label of the model.
        origin: Name of the file or folder, for the message.
        lines: Line of each example in the file, for the message.

    Raises:
        MeasurementError: The model lacks a label.
    """
    if task in ONE_LABEL and len(labels) > 1:
        used_labels: list[set[str]] = [{example["label"]} if "label" in example else set() for example in examples]
        known_labels = _names_or_numbers(labels)
    elif task is HfTask.TOKEN_CLASSIFICATION:
        used_labels = [
            {entity["label"] for entity in example.get("entities", ())} | set(map(str, example.get("tags", ())))
            for example in examples
        ]
        known_labels = {_type_of(name) for name in labels.values()} - {_NO_ENTITY}
        known_labels |= {*_names_or_numbers(labels), _NO_ENTITY}
    else:
        return
    for number, used in enumerate(used_labels):
        if unknown_labels := sorted(used - known_labels):
            raise MeasurementError(
                f"The examples cannot be used: the model does not have the label {unknown_labels[0]!r} of "
                f"{origin}{_line_of(number, lines)}.",
                hint=f"Its labels are: {', '.join(labels[number] for number in sorted(labels)[:20])}.",
            )


def _names_or_numbers(labels: Mapping[int, str]) -> set[str]:
    """Return the words for a model's labels: their names, and their numbers unless some number is a name."""
    names, numbers = set(labels.values()), set(map(str, labels))
    return names if names & numbers else names | numbers


def truth_of(example: Example, encode: Any, labels: Mapping[int, str]) -> Truth | None:
    """Return what the answer to an example is compared with; None without a label.

    Args:
        example: Example, as `label_fields` returns it.
        encode: Function from one or two texts to their tokens with offsets, as a fast tokenizer returns them.
        labels: Name of each label of the model.
    """
    if "relevant" in example or ("id" in example and "question" not in example):
        return Searched(example.get("id"), frozenset(example.get("relevant", ())))
    if "label" in example and "question" in example:
        return Ranked(example["question"], example["label"] == "1")
    if "answers" in example:
        return _labelled_answer(example, encode(example["question"], example["context"]))
    if "tags" in example or "entities" in example:
        return _labelled_words(example, encode(example["text"]), labels)
    label: str | None = example.get("label")
    return label


def spans(tags: Sequence[str]) -> set[Entity]:
    """Return entities as (type, start, end): from BIO prefixes if there are any, else from runs of one tag."""
    entities = set()
    open_entity: tuple[str, int] | None = None
    for position, tag in enumerate([*tags, _NO_ENTITY]):
        kind = "" if tag == _NO_ENTITY else _type_of(tag)
        if open_entity is not None and (tag.startswith("B-") or kind != open_entity[0]):
            entities.add((open_entity[0], open_entity[1], position))
            open_entity = None
        if open_entity is None and kind:
            open_entity = (kind, position)
    return entities


def _type_of(tag: str) -> str:
    prefix, dash, entity_type = tag.partition("-")
    return entity_type if dash and prefix in ("B", "I") else tag


def _check_spelling(data: Mapping[str, Any], task: HfTask) -> None:
    """Refuse a field that is nearly the name of a missing label: a label that is not read would vanish."""
    texts, labels = known_fields(data, task)
    missing = [] if any(name in data for name in labels) else labels
    for field in unused_fields(data, task):
        if task is HfTask.TOKEN_CLASSIFICATION and field in ("tags", "entities"):
            raise ValueError(f"{field} needs the field {'tokens' if field == 'tags' else 'text'}, got {texts[0]}")
        words = field.casefold().strip()
        meant = [name for name in missing if name in words.split("_")]
        meant = meant or get_close_matches(words, missing, n=1, cutoff=_MISSPELLED)
        if meant:
            raise ValueError(f"expected the field {meant[0]!r}, got {field!r}")


def _tagged(data: Mapping[str, Any]) -> Example:
    tokens, tags = (
        value.split() if isinstance(value, str) else value for value in (data["tokens"], data.get("tags", []))
    )
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens is not a list of strings")
    example: Example = {"text": " ".join(tokens)}
    if not example["text"].strip():
        raise ValueError("tokens is empty")
    if not tags:
        return example
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) for tag in tags):
        raise ValueError("tags is not a list of names or numbers")
    if len(tags) != len(tokens):
        raise ValueError(f"expected {len(tokens)} tags, one for each token, got {len(tags)}")
    return example | {"tokens": tokens, "tags": [str(tag) for tag in tags]}


def _search_fields(data: Mapping[str, Any]) -> Example:
    """Return the id of a document and the ids of the documents that a query should find."""
    example: Example = {}
    name, relevant = data.get("id"), data.get("relevant")
    if isinstance(name, str | int) and name != "":
        example["id"] = str(name)
    names = relevant.split() if isinstance(relevant, str) else [] if relevant is None else relevant
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise ValueError("relevant is not a list of ids")
    if names:
        example["relevant"] = list(dict.fromkeys(map(str, names)))
    return example


def _entities(value: Any, length: int) -> list[Example]:
    fields = {"start": int, "end": int, "label": str}
    if not isinstance(value, list):
        raise ValueError("entities is not a list")
    for entity in value:
        is_valid = isinstance(entity, dict) and all(isinstance(entity.get(key), fields[key]) for key in fields)
        if not is_valid or not 0 <= entity["start"] < entity["end"] <= length:
            raise ValueError(f"an entity is not a start, an end and a label within the text: {entity!r}")
    return [{name: entity[name] for name in fields} for entity in value]


def _answers(data: Mapping[str, Any]) -> list[str]:
    """Return the right answers: a list of texts, or SQuAD's object with such a list, or one text."""
    value = data.get("answers", data.get("answer"))
    if isinstance(value, dict):
        if "text" not in value:
            raise ValueError("answers has no list of texts under 'text'")
        value = value["text"]
    answers = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers is not a list of texts")
    return [answer for answer in answers if answer]


def _labelled_answer(example: Example, encoded: Any) -> LabelledAnswer:
    words = encoded.word_ids(0)
    window = Window(
        inputs={},
        in_context=np.asarray([sequence == 1 for sequence in encoded.sequence_ids(0)]),
        null=None,
        offsets=np.asarray(encoded["offset_mapping"], np.int64),
        words=np.asarray([-1 if word is None else word for word in words], np.int64),
    )
    return LabelledAnswer(tuple(example["answers"]), example["context"], window)


def _labelled_words(example: Example, encoded: Any, labels: Mapping[int, str]) -> LabelledWords:
    starts: dict[int, tuple[int, int]] = {}
    ends: dict[int, int] = {}
    for position, word in enumerate(encoded.word_ids(0)):
        if word is not None:
            start, end = encoded["offset_mapping"][position]
            starts.setdefault(word, (position, start))
            ends[word] = end
    words = [(position, start, ends[word]) for word, (position, start) in starts.items()]
    entities = set()
    for kind, start, end in _character_spans(example, labels):
        # Words that a span touches: the tokenizer may divide the text in another way than the labels do.
        touched = [number for number, (_, first, last) in enumerate(words) if first < end and last > start]
        if touched:
            entities.add((kind, touched[0], touched[-1] + 1))
    return LabelledWords(tuple(position for position, _, _ in words), frozenset(entities))


def _character_spans(example: Example, labels: Mapping[int, str]) -> Iterator[Entity]:
    """Yield entities as (type, start, end), in characters of the text."""
    for entity in example.get("entities", ()):
        yield _type_of(entity["label"]), entity["start"], entity["end"]
    if "tags" not in example:
        return
    tags = [labels[int(tag)] if tag.isdecimal() and tag not in labels.values() else tag for tag in example["tags"]]
    starts = np.cumsum([0, *(len(token) + 1 for token in example["tokens"])])
    for kind, first, after in spans(tags):
        yield kind, int(starts[first]), int(starts[after]) - 1
