"""How many of the user's examples are compared, which ones, and what the user is told about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compileflow.errors import MeasurementError
from compileflow.spec import HfTask
from compileflow.validation.cases import note_on_count, sample_examples, signals_digest

CLASSIFY, RANK, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.TEXT_RANKING, HfTask.SENTENCE_SIMILARITY
IMAGES, DEPTH = HfTask.IMAGE_CLASSIFICATION, HfTask.DEPTH_ESTIMATION


def _write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def test_a_sorted_file_gives_a_sample_of_all_its_labels(tmp_path: Path) -> None:
    path = _write(tmp_path / "sorted.jsonl", [{"text": f"text {n}", "label": n // 500} for n in range(1000)])
    examples, origin, digest = sample_examples(CLASSIFY, path, 400)
    assert len({example["text"] for example in examples}) == 400
    assert 150 < sum(example["label"] == "1" for example in examples) < 250
    numbers = [int(example["text"].split()[1]) for example in examples]
    assert numbers == sorted(numbers)
    assert origin == "sorted.jsonl"
    # The same sample each time, and another cache key than that of the whole file or of another sample.
    assert sample_examples(CLASSIFY, path, 400)[0] == examples
    assert len({digest, sample_examples(CLASSIFY, path, 401)[2], sample_examples(CLASSIFY, path, 1000)[2]}) == 3
    assert sample_examples(CLASSIFY, path, 1000)[2] == sample_examples(CLASSIFY, path, 2000)[2]
    assert note_on_count(CLASSIFY, path, 400) == (
        "Validation compares 400 of the 1000 examples in sorted.jsonl, a random sample."
    )


@pytest.mark.parametrize("task", [RANK, EMBED])
def test_queries_stay_with_their_documents(tmp_path: Path, task: HfTask) -> None:
    documents: list[dict[str, object]] = [{"id": n, "text": f"document {n}"} for n in range(500)]
    rows = [{"text": "query", "relevant": [0]}, *documents] if task is EMBED else []
    rows = rows or [{"question": "q", "context": f"document {n}"} for n in range(501)]
    path = _write(tmp_path / "search.jsonl", rows)
    used = sample_examples(task, path, 400)[0]
    assert used == sample_examples(task, path, 501)[0][:400]
    assert note_on_count(task, path, 400).endswith("400 of the 501 examples in search.jsonl, the first ones.")


def test_few_and_repeated_examples_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"text {n % 12}", "label": n % 2} for n in range(320)]
    path = _write(tmp_path / "few.jsonl", rows)
    assert note_on_count(CLASSIFY, path, 400) == (
        "Validation has only 12 different examples in few.jsonl: 300 without a change show that at most 1 % of "
        "decisions change."
    )
    path = _write(tmp_path / "enough.jsonl", [{"text": f"text {n}"} for n in range(300)])
    assert note_on_count(CLASSIFY, path, 400) == ""
    assert note_on_count(CLASSIFY, path, 299).startswith("Validation compares 299 of the 300 examples")
    assert "only 299 different examples" in note_on_count(CLASSIFY, path, 299)


def test_a_folder_gives_a_sample_of_its_files(tmp_path: Path) -> None:
    for number in range(600):
        (tmp_path / f"{number:03}.png").touch()
    assert note_on_count(DEPTH, str(tmp_path), 400) == (
        f"Validation compares 400 of the 600 files in {tmp_path.name}, a random sample."
    )
    # What is not compared is no part of the cache key.
    digests = [signals_digest(str(tmp_path), "image", 400)]
    for number in range(30):
        (tmp_path / f"{number:03}.png").write_bytes(b"changed")
        digests.append(signals_digest(str(tmp_path), "image", 400))
    assert 10 < len(set(digests)) - 1 < 30


def test_folders_of_classes_give_some_files_of_each(tmp_path: Path) -> None:
    for number in range(600):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{number}.png").touch()
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "broken.png").mkdir()
    assert note_on_count(IMAGES, str(tmp_path), 400).endswith(
        "601 files in " + tmp_path.name + ", some of each class."
    )
    with pytest.raises(MeasurementError, match=r"dog/broken\.png: .*Is a directory"):
        signals_digest(str(tmp_path), "image", 400, by_class=True)


@pytest.mark.parametrize(
    ("names", "task", "deep", "place"),
    [
        (("cat/1.png", "dog/train/2.png"), IMAGES, "dog/train/2.png", "the folder of their label"),
        (("all/1.png",), DEPTH, "all/1.png", ""),
    ],
)
def test_files_in_a_folder_too_deep_are_refused(
    tmp_path: Path, names: tuple[str, ...], task: HfTask, deep: str, place: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(MeasurementError) as caught:
        note_on_count(task, str(tmp_path), 400)
    assert caught.value.message == f"{tmp_path} holds image files in a folder too deep: {deep}."
    assert caught.value.hint == f"Put the files directly into {place or tmp_path}."


def test_subfolders_without_labels_are_left_alone(tmp_path: Path) -> None:
    for name in ("1.png", "small/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert note_on_count(DEPTH, str(tmp_path), 400).startswith("Validation has only 1 different file in ")
