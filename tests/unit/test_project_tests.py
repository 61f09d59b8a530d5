"""The project's own tests: their fixtures, their outcome in the verdict, and why they may show nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compileflow.catalog import open_store
from compileflow.errors import SpecError
from compileflow.settings import Settings
from compileflow.spec import ComponentSpec, HfTask, Precision
from compileflow.steps.preflight import check_request
from compileflow.steps.project_tests import run_project_tests
from compileflow.steps.report_file import export_bundle, read_report
from compileflow.steps.reproduce import NOT_TRIED, SHOWN, reproduce
from compileflow.steps.request import CompileRequest
from compileflow.validation.judge import judge
from compileflow.validation.project_tests import ProjectTests, digest_of_tests
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.steps import Pipeline
from tests.unit.test_judge import healthy

INPUTS = ["a good day", "a bad day"]
Runner = Callable[..., ProjectTests]


def write(folder: Path, **files: str) -> Path:
    """Write a folder of tests; a keyword is the name of a file of Python."""
    folder.mkdir(exist_ok=True)
    (folder / "inputs.json").write_text(json.dumps(INPUTS))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def run_tests(tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path) -> Runner:
    """Run a folder of tests on a compiled text classifier."""

    def run(
        folder: Path,
        *,
        task: HfTask = HfTask.TEXT_CLASSIFICATION,
        components: list[ComponentSpec] | None = None,
        registered_dir: Path | None = None,
        timeout_s: float = 120,
    ) -> ProjectTests:
        model, work = tiny_model(task), tmp_path / "work"
        artifact_dir = (
            in_process.compile(
                model, tmp_path / "artifact", target="openvino", hf_task=task, components=components
            )
            if components
            else in_process.compiled(model, "openvino", task)
        )
        work.mkdir()
        return run_project_tests(
            str(folder),
            artifact_dir=artifact_dir,
            source_dir=model,
            registered_dir=registered_dir,
            work_dir=work,
            log_path=tmp_path / "tests.log",
            timeout_s=timeout_s,
            threads=1,
            trust_remote_code=False,
            on_progress=lambda _: None,
        )

    return run


def verdict_on(tests: ProjectTests) -> tuple[str, str]:
    measurements = healthy()
    tests.measure(measurements)
    verdict = judge(measurements, precision=Precision.FP32, hf_task=HfTask.TEXT_CLASSIFICATION)
    return verdict.outcome, verdict.reason


def test_outcome_of_the_tests_decides_the_verdict() -> None:
    assert verdict_on(ProjectTests(passed=3))[0] == "pass"
    assert verdict_on(ProjectTests(passed=1, skipped=1, failed=("test_a.py::test_x[word]",))) == (
        "fail",
        "fail: project_tests measured 1, the limit is at most 0; 1 passed, 1 failed, 1 skipped: "
        "test_a.py::test_x[word]",
    )
    assert verdict_on(ProjectTests(problem="no test was found")) == (
        "error",
        "error: project_tests_ran measured 1, the limit is at most 0; no test was found",
    )


def test_only_some_failed_tests_are_named() -> None:
    names = tuple(f"test_{number}" for number in range(7))
    summary = ProjectTests(failed=names).summary
    assert summary == "0 passed, 7 failed, 0 skipped: test_0, test_1, test_2, test_3, test_4 and 2 more"


def test_folder_without_tests_is_refused_before_the_compile(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    def check(folder: Path) -> None:
        model, validation = str(tiny_model(HfTask.TEXT_CLASSIFICATION)), {"tests_path": str(folder)}
        request = CompileRequest.model_validate({"model": model, "target": "openvino", "validation": validation})
        check_request(request, settings)

    with pytest.raises(SpecError, match=r"folder of tests .*nothing does not exist"):
        check(tmp_path / "nothing")
    with pytest.raises(SpecError, match=r"has no file of tests\. Name one test_\*\.py or \*_test\.py"):
        check(write(tmp_path / "tests", helpers=""))
    check(write(tmp_path / "tests", test_a=""))


def test_digest_changes_with_the_tests_and_not_with_what_python_leaves(tmp_path: Path) -> None:
    folder = write(tmp_path / "tests", test_a="")
    before = digest_of_tests(str(folder))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "test_a.pyc").write_bytes(b"x")
    assert digest_of_tests(str(folder)) == before
    write(folder, test_a="import os")
    assert digest_of_tests(str(folder)) != before


FIXTURES = """
import pytest

def test_fixtures(
    compiled_pipeline, reference_pipeline, test_inputs, inference_params, expected_predictions, tolerances
):
    assert type(compiled_pipeline).__name__ == "CompiledPipeline"
    assert type(reference_pipeline.model).__module__.startswith("transformers.")
    assert test_inputs == ["a good day", "a bad day"]
    assert inference_params == {}
    answers = compiled_pipeline(test_inputs, **inference_params)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected_predictions]
    assert tolerances == {"rtol": 1e-4, "atol": 1e-4}
    for answer, expected in zip(answers, expected_predictions):
        assert answer["score"] == pytest.approx(expected["score"], rel=tolerances["rtol"])
    print("seen", len(answers))

def test_that_fails(compiled_pipeline):
    assert compiled_pipeline("a good day") == "nothing"

def test_that_is_skipped():
    pytest.skip("not today")
"""


@pytest.mark.slow
def test_tests_get_both_pipelines_inputs_and_tolerances(run_tests: Runner, tmp_path: Path) -> None:
    folder = write(tmp_path / "tests", test_a=FIXTURES)
    before = sorted(path.name for path in folder.iterdir())
    tests = run_tests(folder)
    assert (tests.passed, tests.failed, tests.skipped, tests.problem) == (
        1,
        ("test_a.py::test_that_fails[default]",),
        1,
        "",
    ), tests.output
    assert "AssertionError" in tests.output
    # The folder stays as it was.
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import nothing_of_this_name", "1 files cannot be collected, first test_a.py: ModuleNotFoundError"),
        ("def helper(): pass", "no test was found"),
        ("import pytest\ndef test_a(): pytest.skip()", "all 1 tests were skipped"),
        ("import os\ndef test_a(): os._exit(0)", "the tests died"),
        ("import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGSEGV)", "the tests died"),
        (
            "import pytest\ndef test_a(): pass\ndef test_b(): pytest.exit('enough')",
            "pytest ended with exit code 2",
        ),
    ],
)
def test_tests_that_show_nothing_say_why_in_one_line(
    text: str, problem: str, run_tests: Runner, tmp_path: Path
) -> None:
    tests = run_tests(write(tmp_path / "tests", test_a=text))
    assert tests.problem.startswith(problem), tests
    assert "\n" not in verdict_on(tests)[1]
    assert verdict_on(tests)[0] == "error"


@pytest.mark.slow
def test_tests_that_take_too_long_are_stopped(run_tests: Runner, tmp_path: Path) -> None:
    folder = write(tmp_path / "tests", test_a="import time\ndef test_a(): time.sleep(600)")
    tests = run_tests(folder, timeout_s=20)
    assert tests.problem == "the tests ran past their limit of 20 s"
    assert "test session starts" in tests.output


@pytest.mark.slow
def test_each_component_is_tested_and_conftest_replaces_a_fixture(run_tests: Runner, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "tests",
        conftest="import pytest\n@pytest.fixture\ndef tolerances(): return 'own'\n",
        test_a="def test_a(compiled_pipeline, component, tolerances):\n"
        "    assert tolerances == 'own'\n"
        "    assert component != 'word'\n",
    )
    components = [
        ComponentSpec(name="word", max_sequence_length=16),
        ComponentSpec(name="document", max_sequence_length=64),
    ]
    tests = run_tests(folder, task=HfTask.FEATURE_EXTRACTION, components=components)
    assert (tests.passed, tests.failed) == (1, ("test_a.py::test_a[word]",)), tests.output


@pytest.mark.slow
def test_inputs_that_are_registered_with_the_source_version_are_used(run_tests: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        "def test_a(compiled_pipeline, reference_pipeline, test_inputs, expected_predictions, inference_params):\n"
        "    assert test_inputs == [{'question': 'Who?', 'context': 'Ada wrote it.'}]\n"
        "    assert inference_params == {'top_k': 2} and expected_predictions == ['registered']\n"
        "    answers = [pipeline(**test_inputs[0]) for pipeline in (compiled_pipeline, reference_pipeline)]\n"
        "    assert answers[0]['answer'] == answers[1]['answer']\n"
    )
    registered = tmp_path / "registered"
    registered.mkdir()
    (registered / "inputs.json").write_text('[{"question": "Who?", "context": "Ada wrote it."}]')
    (registered / "inference_params.json").write_text('{"top_k": 2}')
    (registered / "predictions.json").write_text('["registered"]')
    tests = run_tests(folder, task=HfTask.QUESTION_ANSWERING, registered_dir=registered)
    assert (tests.passed, tests.failed) == (1, ()), tests.output


@pytest.mark.slow
def test_failing_test_blocks_registration_and_its_output_is_in_the_report(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    folder = write(tmp_path / "tests", test_a="def test_a(compiled_pipeline):\n    assert 0, 'a wrong <answer>'\n")
    request = pipeline.request(
        tiny_model(HfTask.TEXT_CLASSIFICATION), validation={"latency_pairs": 5, "tests_path": str(folder)}
    )
    artifact = pipeline.compile(request)
    validated = pipeline.validate(request, artifact)
    assert validated.reason.startswith(
        "fail: project_tests measured 1, the limit is at most 0; 0 passed, 1 failed"
    )
    report = read_report(validated.report_uri, pipeline.settings)
    assert report.project_tests is not None
    assert "a wrong <answer>" in report.project_tests.output
    bundle = export_bundle(validated.report_uri, pipeline.settings)
    assert bundle is not None
    open_store(pipeline.store_uri).get_folder(artifact.digest, tmp_path / "artifact")
    arguments = [str(tmp_path / "artifact"), "--source", request.model]
    failure = (bundle / "failure.json").read_text()
    assert reproduce(failure, "", folder=bundle, arguments=arguments) == NOT_TRIED, "a store named the tests"
    arguments += ["--tests", str(folder)]
    assert reproduce(failure, "", folder=bundle, arguments=arguments) == SHOWN
    # A verdict that refuses is not cached, and one that passes is, until the tests change.
    write(folder, test_a="def test_a(compiled_pipeline):\n    assert compiled_pipeline('a good day')\n")
    assert pipeline.validate(request, artifact).outcome == "pass"
    assert pipeline.validate(request, artifact).cached
