"""Runs that are refused or fail: checked before anything starts, with the way to the report, and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from compileflow.catalog import open_registry, open_store
from compileflow.cli import app as compileflow_app
from compileflow.errors import RegistryError
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.steps.preflight import check_request
from compileflow.steps.request import CompileRequest
from compileflow.testing.registries import version_entry
from flows.commands import app as flows_app
from tests.conftest import ModelFactory
from tests.in_process import InProcess

ROOT = Path(__file__).parents[2]
APPS = {"compileflow": compileflow_app, "flows": flows_app}
# In a process of its own: prints, as JSON, the exit code and the error of each request, and what was imported.
CALL = """
import json, sys
from typer.testing import CliRunner
from flows.commands import app

def refuse(event, arguments):
    if event in ("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess.Popen"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
outcomes = [CliRunner().invoke(app, words) for words in json.loads(sys.argv[1])]
print(json.dumps({
    "outcomes": [[outcome.exit_code, outcome.stderr] for outcome in outcomes],
    "imported": sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[2].split())),
}))
"""


def invoke(app: Typer, *words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let some distributions seem absent."""

    def hide(*names: str) -> None:
        def version_of(name: str) -> str:
            if name.replace("_", "-") in names:
                raise PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr("compileflow._process.packages.version", version_of)

    return hide


@pytest.mark.parametrize("app", APPS.values(), ids=APPS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "torchscript", "--option", "opset=18"), "torchscript option opset: this name is not known"),
        (("--target", "torchscript", "--precision", "int8"), "torchscript does not support int8"),
        (("--target", "auto", "--option", "opset=18"), "Target 'auto' takes no target options"),
        (("--target", "auto", "--skip", "validate"), "the validate step is off"),
        (("--target", "auto", "--among", "toaster"), "Unknown target 'toaster'"),
        (("--component", "a=8", "--component", "a=9"), "two components have the name 'a'"),
        (
            ("--option", "opset=abc"),
            "option opset: expected a whole number, got 'abc'. The options of onnx-runtime",
        ),
        (("--option", "opset=99"), "option opset: expected at most 25, got 99."),
        (("--option", "reduce_range=7"), "option reduce_range: expected true or false, got 7."),
        (("--max-sequence-length", "0"), "--max-sequence-length: expected at least 1, got 0."),
        (("--max-sequence-length", "10000001"), "--max-sequence-length: expected at most 10000000, got 10000001."),
        (("--examples", "missing.txt"), "The examples missing.txt do not exist"),
        (
            ("--precision", "int8", "--option", "quantization=static", "--calibration", "missing.txt"),
            "The calibration examples missing.txt do not exist",
        ),
        (("--store", "ftp://host/store"), "Unknown artifact store 'ftp'"),
        (("--registry", "redis://host"), "Unknown model registry 'redis'"),
        (("--name", "a" * 129), "--name: expected at most 128 characters"),
    ],
)
def test_wrong_request_about_a_real_model_is_refused_before_anything_is_stored(
    settings: Settings, tiny_model: ModelFactory, app: Typer, words: tuple[str, ...], message: str
) -> None:
    outcome = invoke(app, "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), *words)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
    assert not settings.home_dir.exists()


def test_refused_requests_start_no_server_and_import_nothing_heavy(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEPTUNE_API_TOKEN", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMPILEFLOW_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    model = str(tiny_model(HfTask.TEXT_CLASSIFICATION))
    messages = {
        ("compile", "/no/such/folder"): "/no/such/folder is not a folder.",
        ("compile", str(tmp_path / "model")): "got none of them.",
        ("compile", model, "--target", "toaster"): "Unknown target 'toaster'.",
        ("compile", model, "--precision", "bf16"): "onnx-runtime does not support bf16.",
        ("compile", model, "--option", "nonsense=1"): "option nonsense: this name is not known.",
        ("compile", "registry:nothing@production"): "has no model 'nothing'.",
        ("compile", "neptune://workspace/project/PRO-MOD-1"): "NEPTUNE_API_TOKEN is not set.",
        ("compile", "mlflow:nothing"): "got one without a model's name.",
        ("run", "nothing"): "Unknown project 'nothing'.",
        ("run", "ner", "--model", "/no/such/folder"): "/no/such/folder is not a folder.",
        ("matrix", "--model", model, "--target", "toaster"): "Unknown target 'toaster'.",
        ("matrix", "--model", "/no/a", "--model", "/no/b", "--target", "openvino"): "/no/a is not a folder.",
    }
    heavy = "torch transformers prefect great_expectations onnxruntime openvino boto3 neptune mlflow"
    finished = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps([*messages]), heavy],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    for (status, error), (words, message) in zip(answer["outcomes"], messages.items(), strict=True):
        assert (status in (1, 2), error.count("\n")) == (True, 1), (words, error)
        assert message in error
    assert answer["imported"] == []
    assert not settings.home_dir.exists()


def test_version_that_the_registry_has_is_not_refused(settings: Settings, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    open_registry(uri).register(version_entry("known", 1))
    chosen = settings.model_copy(update={"registry_uri": uri})
    for ref in ("registry:known", "registry:known@1"):
        check_request(CompileRequest(model=ref, target="torchscript"), chosen)
    with pytest.raises(RegistryError, match="has no version 2"):
        check_request(CompileRequest(model="registry:known@2", target="torchscript"), chosen)


@pytest.mark.parametrize("place", ["folder", "text.db", "text.db/below.db"])
def test_registry_that_cannot_be_written_is_refused_at_the_start(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("This is not a database.\n" * 100, "utf-8")
    model = str(tiny_model(HfTask.TEXT_CLASSIFICATION))
    outcome = invoke(compileflow_app, "compile", model, "--registry", f"sqlite:///{tmp_path / place}")
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1
    assert str(tmp_path / place) in outcome.stderr
    assert not settings.home_dir.exists()


@pytest.mark.parametrize("content", [None, "{", "[1]"], ids=["absent", "cut off", "another type"])
def test_unusable_models_end_alike(settings: Settings, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    outcome = invoke(compileflow_app, "compile", str(tmp_path), "--no-progress")
    assert outcome.exit_code == 2
    assert "config.json" in outcome.stderr


def test_missing_toolchain_of_every_target_of_auto_is_refused(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    words = ("--target", "auto", "--among", "neuron", "--among", "blade")
    outcome = invoke(flows_app, "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), *words)
    assert outcome.exit_code == 1
    assert "None of the requested targets compiles and runs here: neuron: torch-neuron" in outcome.stderr
    assert not settings.home_dir.exists()


@pytest.mark.parametrize(
    ("app", "hidden", "packages", "extras"),
    [
        (
            compileflow_app,
            ("onnx", "onnxscript", "great-expectations", "boto3"),
            "onnx, onnxscript, great-expectations, boto3, which are",
            "compile,validation,s3",
        ),
        (flows_app, ("prefect",), "prefect, which is", "prefect"),
    ],
)
@pytest.mark.usefixtures("settings")
def test_all_missing_extras_are_named_at_once(
    tiny_model: ModelFactory,
    uninstall: Callable[..., None],
    app: Typer,
    hidden: tuple[str, ...],
    packages: str,
    extras: str,
) -> None:
    uninstall(*hidden)
    store = ("--store", "s3://bucket/prefix") if "boto3" in hidden else ()
    outcome = invoke(app, "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), *store)
    # As for a toolchain that pip cannot install: the request is right, and this machine lacks a package.
    assert outcome.exit_code == 1
    assert outcome.stderr == (
        f"error: This run needs {packages} not installed. Run: pip install 'compileflow[{extras}]'\n"
    )


@pytest.mark.usefixtures("settings")
def test_demo_names_its_missing_extras_like_compile(uninstall: Callable[..., None]) -> None:
    uninstall("onnxruntime", "great-expectations")
    outcome = invoke(compileflow_app, "demo")
    assert outcome.exit_code == 1
    assert "needs onnxruntime, great-expectations" in outcome.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "nowhere"),
        ("verify", "nowhere"),
        ("versions", "nothing"),
        ("lineage", "nothing", "1"),
        ("promote", "nothing", "1", "--stage", "production"),
        ("pull", "nothing", "folder"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.usefixtures("settings")
def test_failure_is_json_too(words: tuple[str, ...]) -> None:
    outcome = invoke(compileflow_app, *words, "--json")
    error = json.loads(outcome.stdout)["error"]
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(f"error: {error['message']}")
    assert {"type", "message", "hint", "log_path"} <= error.keys()


@pytest.mark.usefixtures("settings")
def test_wrong_request_is_json_too() -> None:
    outcome = invoke(compileflow_app, "compile", "m", "--task", "poetry", "--json")
    error = json.loads(outcome.stdout)["error"]
    assert (outcome.exit_code, error["type"]) == (2, "SpecError")
    assert error["message"].startswith("--task: expected")


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_refused_run_names_the_page_of_its_report(
    settings: Settings, in_process: InProcess, tiny_model: ModelFactory, extra: tuple[str, ...]
) -> None:
    words = (
        "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), "--target", "torchscript", "--bucket", "1x16",
        "--bucket", "1x64", "--max-latency-ratio", "1e-6", "--no-progress", *extra,
    )  # fmt: skip
    with in_process.instead_of_children():
        outcome = invoke(compileflow_app, *words)
    assert outcome.exit_code == 1
    error_line, report_line, bundle_line = outcome.stderr.splitlines()
    assert error_line.startswith("error: The verdict is fail: latency_ratio")
    page = Path(report_line.removeprefix("report: "))
    assert page.parent == settings.home_dir / "reports"
    assert "latency_ratio" in page.read_text("utf-8")
    bundle = Path(bundle_line.removeprefix("bundle: "))
    assert {path.name for path in bundle.iterdir()} == {"failure.json", "reproduce.py", "toolchain.log"}
    if extra:
        (entry,) = json.loads(outcome.stdout)
        assert (entry["target"], entry["error"]["type"]) == ("torchscript", "VerdictError")
        assert (entry["error"]["report"], entry["error"]["bundle"]) == (str(page), str(bundle))
        assert open_store(settings.resolved_store_uri()).folder_uri("")[:-5] in entry["error"]["report_uri"]
    else:
        assert outcome.stdout == ""


def test_shape_that_is_too_long_to_time_is_refused_before_the_compile(
    settings: Settings, in_process: InProcess, tiny_model: ModelFactory
) -> None:
    words = (
        "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), "--target", "torchscript", "--bucket", "1x16",
        "--shape", "1x99999", "--no-progress",
    )  # fmt: skip
    with in_process.instead_of_children():
        outcome = invoke(compileflow_app, *words)
    assert (outcome.exit_code, outcome.stderr) == (
        2,
        "error: Cannot time the shape 1x99999: the longest row of this model is 16. "
        "Give shapes with rows of at most that length.\n",
    )
    assert not settings.home_dir.exists()


def test_examples_that_cannot_be_used_are_refused_before_the_compile(
    settings: Settings, in_process: InProcess, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"tex": "a"}\n', "utf-8")
    words = (
        "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), "--target", "torchscript", "--bucket", "1x16",
        "--examples", str(examples), "--no-progress",
    )  # fmt: skip
    with in_process.instead_of_children() as counts:
        outcome = invoke(compileflow_app, *words)
    assert (outcome.exit_code, outcome.stderr) == (
        2,
        f'error: The examples cannot be used: text is missing in line 1: {{"tex": "a"}}: {examples}. '
        'Give a text file with one example per line, or JSON lines or CSV with "text". '
        'A label goes into "label".\n',
    )
    assert counts == {"compile": 0, "validate": 0}


LABEL_GATE = """schema_version: 1
name: mine
gates:
  - {gate: kept_right, says: right answers stay right, table: rates, metric: right_answers_kept, severity: warning,
     type: expect_rate_to_be_at_least, limit: kept_right, tasks: [text-classification]}
limits:
  kept_right: {fp32: 0.9}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text\na\n", "gate 'kept_right' needs labels, and no example has one. Give examples with labels"),
        ("text,label\na,\nb,Great\n", "does not have the label 'Great' of examples.csv (line 3)"),
        ("text,label\n,good\n", "line 2: text is empty"),
    ],
)
def test_examples_without_the_labels_of_a_gate_or_of_the_model_are_refused_before_the_compile(
    in_process: InProcess, tiny_model: ModelFactory, settings: Settings, tmp_path: Path, body: str, message: str
) -> None:
    examples, suite = tmp_path / "examples.csv", tmp_path / "suite.yaml"
    examples.write_text(body, "utf-8")
    suite.write_text(LABEL_GATE, "utf-8")
    words = (
        "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), "--target", "torchscript", "--bucket", "1x16",
        "--examples", str(examples), "--suite", str(suite), "--no-progress",
    )  # fmt: skip
    with in_process.instead_of_children() as counts:
        outcome = invoke(compileflow_app, *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert counts == {"compile": 0, "validate": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("promote", "ner", "1", "--stage", "shipped"), "Unknown stage 'shipped'"),
        (("pull", "a/b@1", "folder"), "'a/b@1'"),
        (("versions", ""), "NAME was given an empty value"),
        (("gc", "--store", ""), "--store was given an empty value"),
        (("verify", "somewhere", "--key", ""), "--key was given an empty value"),
    ],
)
@pytest.mark.usefixtures("settings")
def test_wrong_request_of_other_commands_exits_with_two(words: tuple[str, ...], message: str) -> None:
    outcome = invoke(compileflow_app, *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr


def test_gc_with_nothing_registered_says_so(settings: Settings) -> None:
    outcome = invoke(compileflow_app, "gc")
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith("Nothing was deleted: sqlite:///")
    (settings.home_dir / "mistyped.db").parent.mkdir(parents=True, exist_ok=True)
    mistyped = invoke(compileflow_app, "gc", "--registry", f"sqlite:///{settings.home_dir / 'mistyped.db'}")
    assert (mistyped.exit_code, "does not exist" in mistyped.stderr) == (1, True)


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_versions_fit_the_terminal(settings: Settings, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    registry = open_registry(settings.resolved_registry_uri(), settings)
    registry.register(version_entry("a-model-with-a-rather-long-name", 1))
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = invoke(compileflow_app, "versions").stdout.splitlines()
    # Every cell stays in one piece.
    assert sum("a-model-with-a-rather-long-name" in line for line in lines) == 1
    assert max(map(len, lines)) <= columns
    assert any("│" in line for line in lines) is (columns > 40)


@pytest.mark.usefixtures("settings")
def test_versions_are_whole_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    registry = open_registry(get_settings().resolved_registry_uri(), get_settings())
    entry = version_entry("a-model-with-a-rather-long-name", 1)
    registry.register(entry)
    assert entry.artifact_digest[:12] in invoke(compileflow_app, "versions").stdout
