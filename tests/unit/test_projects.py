"""Project files: the three that come with the repository, new ones, and wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.errors import SpecError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.request import StepSwitches
from flows.projects import load_project, project_names
from flows.run_project import steps_from, steps_of


def buckets(project: str) -> list[tuple[int, int]]:
    shapes = load_project(project).request.shape_buckets
    return [(shape.batch_size, shape.sequence_length) for shape in shapes]


def test_repository_has_three_projects() -> None:
    assert project_names() == ["keywords", "ner", "sentiment"]
    tasks = {name: load_project(name).request.hf_task for name in project_names()}
    assert tasks == {
        "keywords": HfTask.FEATURE_EXTRACTION,
        "ner": HfTask.TOKEN_CLASSIFICATION,
        "sentiment": HfTask.TEXT_CLASSIFICATION,
    }


def test_keywords_has_a_component_for_words_and_one_for_documents() -> None:
    components = load_project("keywords").request.components
    assert [component.name for component in components] == ["word", "document"]


def test_ner_takes_one_or_six_texts_of_128_tokens() -> None:
    assert load_project("ner").request.max_sequence_length == 128
    assert buckets("ner") == [(1, 128), (6, 128)]


def test_new_file_is_a_project_named_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "reviews.yaml"
    path.write_text("model: owner/reviews\nvalidation: {examples_path: ours.txt, suite_path: /srv/suite.yaml}\n")
    project = load_project(str(path))
    assert (project.name, project.request.name) == ("reviews", "reviews")
    # Relative paths start at the file.
    assert project.request.validation.examples_path == str(tmp_path / "ours.txt")
    assert project.request.validation.suite_path == "/srv/suite.yaml"


def test_another_model_takes_the_place_of_the_projects_own(tmp_path: Path) -> None:
    path = tmp_path / "reviews.yaml"
    path.write_text("model: owner/reviews\nrevision: v1\n")
    request = load_project(str(path)).request_for(StepSwitches(), "/srv/reviews")
    assert (request.model, request.revision) == ("/srv/reviews", None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\ntargte: openvino\n", ("targte: this name is not known", "names are: model, revision,")),
        ("model: m\nvalidation: {strikt: true}\n", ("validation.strikt", "names are: examples_path, suite")),
        ("model: m\ncomponents: [{name: word, length: 3}]\n", ("components.0.length", "name, max_sequence")),
        ("model: m\ntarget: onix\n", ("expected one of aot-inductor,", "got 'onix'")),
        ("model: m\ntarget: auto\n", ("target: expected one of", "got 'auto'")),
        ("model: m\nhf_task: nerr\n", ("hf_task: expected 'feature-extraction',", "got 'nerr'")),
        ("model: m\nmax_sequence_length: 0\n", ("max_sequence_length: expected at least 1, got 0",)),
        ("model: m\nsteps: {fetch: false}\n", ("steps: the command that runs the project chooses",)),
        ("target: openvino\n", ("model: a value is required.",)),
        ("target: openvino\nmodel: m\ntarget: blade\n", ("is wrong: line 3: target was given twice.",)),
        ("model: m\nvalidation: {max_examples: 1, max_examples: 2}\n", ("line 2: max_examples was given twice",)),
        ("- m\n", ("expected fields such as model",)),
        ("model: [\n", ("is not YAML: line 2",)),
        ("[" * 3000, ("cannot be read: maximum recursion depth exceeded",)),
        ("", ("expected fields such as model",)),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_with_its_path_the_field_and_what_is_allowed(
    text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "reviews.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_project(str(path))
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_unknown_project_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SpecError, match=r"Unknown project 'nre'.*keywords, ner, sentiment"):
        load_project("nre")


@pytest.mark.parametrize("name", ["nope.yaml", "/srv/nope.yaml", "./nope"])
def test_path_without_a_file_is_refused_as_such(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=rf"^The project file {name} does not exist\. Check the path"):
        load_project(name)


def test_task_switches_one_step_on() -> None:
    assert steps_of("validate-model") == StepSwitches(fetch=False, compile=False, validate=True, register=False)
    assert steps_of(None) == StepSwitches()
    with pytest.raises(SpecError, match=r"Unknown task 'upload'.*upload-model"):
        steps_of("upload")


@pytest.mark.parametrize(
    ("switch", "step"),
    [("DOWNLOAD", "fetch"), ("COMPILE", "compile"), ("TEST", "validate"), ("UPLOAD", "register")],
)
def test_switch_of_the_older_component_switches_one_step_on(
    switch: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"COMPILE_PIPELINE_EXECUTION_{switch}", "true")
    off = dict.fromkeys(("fetch", "compile", "validate", "register"), False)
    assert steps_from(Settings()) == StepSwitches(**off | {step: True})


def test_switches_that_are_all_off_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"No step is switched on\. Set COMPILE_PIPELINE_EXECUTION_DOWNLOAD"):
        steps_from(Settings())
