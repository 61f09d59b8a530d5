"""Both command lines: their output, their exit codes, and errors in one line."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

import compileflow
from compileflow.catalog import open_registry, open_store
from compileflow.cli import app as compileflow_app
from compileflow.cli.command import Command
from compileflow.errors import one_line
from compileflow.settings import Settings
from compileflow.spec import HfTask
from flows.__main__ import app as flows_app
from tests.conftest import ModelFactory
from tests.steps import Pipeline

ROOT = Path(__file__).parents[2]
APPS = {"compileflow": compileflow_app, "flows": flows_app}


def call(settings: Settings, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **more,
    )  # fmt: skip


def assert_one_line(completed: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert completed.returncode != 0
    lines = completed.stderr.strip().splitlines()
    assert len(lines) == 1, completed.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def registered(pipeline: Pipeline, tiny_model: ModelFactory) -> Any:
    return pipeline.run(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews"))


def test_targets_lists_each_with_what_is_missing(settings: Settings) -> None:
    rows = json.loads(call(settings, "compileflow", "targets", "--json").stdout)
    assert [row["target"] for row in rows] == [
        "aot-inductor", "blade", "hyperdex", "neuron", "neuronx", "onnx-runtime", "openvino", "torchscript",
    ]  # fmt: skip
    for row in rows:
        # Vendors' toolchains are not on PyPI.
        on_pypi = row["target"] not in ("blade", "hyperdex", "neuron", "neuronx")
        assert row["can_compile"] is row["can_run"] is on_pypi, row
        assert bool(row["reason"] and row["hint"]) is not on_pypi, row
        assert set(row["lacking"]) < set(row["precisions"])
    table = call(settings, "compileflow", "targets").stdout
    assert all(row["target"] in table for row in rows)


def test_reading_commands_agree_about_a_registered_version(settings: Settings, registered: Any) -> None:
    (version,) = json.loads(call(settings, "compileflow", "versions", "reviews", "--json").stdout)
    assert version == registered.model_dump(mode="json")
    uri = version["artifact_uri"]
    manifest = json.loads(call(settings, "compileflow", "inspect", uri, "--json").stdout)
    assert manifest["spec"] == version["spec"]
    proof = json.loads(call(settings, "compileflow", "verify", uri, "--json").stdout)
    assert proof.pop("validated_on") is not None
    assert proof == {
        "digest": version["artifact_digest"], "files": len(manifest["files"]) + 1, "intact": True,
        "attested": True, "signed_by": [], "verdict": "PASSED", "report_intact": True,
        "proven": True, "proof": "reviews version 1, verdict pass", "problems": [],
    }  # fmt: skip
    report = json.loads(call(settings, "compileflow", "inspect", version["report_uri"], "--json").stdout)
    assert report["verdict"]["outcome"] == "pass"
    for words in (("versions",), ("inspect", uri), ("verify", uri), ("inspect", version["report_uri"])):
        completed = call(settings, "compileflow", *words)
        assert (completed.returncode, completed.stderr) == (0, "")
        assert completed.stdout.strip()


def test_verify_refuses_an_altered_copy(settings: Settings, registered: Any, tmp_path: Path) -> None:
    from compileflow.artifact.open import copy_artifact, open_artifact

    folder = copy_artifact(open_artifact(registered.artifact_uri, settings=settings), tmp_path / "copy")
    assert call(settings, "compileflow", "verify", str(folder)).returncode == 0
    with (folder / "components" / "default" / "model.pt").open("ab") as graph:
        graph.write(b"\0")
    assert_one_line(call(settings, "compileflow", "verify", str(folder)), "model.pt was altered")


def test_verify_refuses_what_nothing_proves(
    settings: Settings, pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    artifact = pipeline.compile(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION)))
    assert_one_line(call(settings, "compileflow", "verify", artifact.uri), "has a passing verdict on this digest")
    assert call(settings, "compileflow", "verify", artifact.uri, "--integrity-only").returncode == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("inspect", "nowhere"), ("nowhere does not exist", "registry:NAME")),
        (("inspect", "s3x://b/manifests/x.json"), ("neither an artifact folder nor an artifact URI",)),
        (("versions", "nothing"), ("has no model 'nothing'",)),
        (("versions", "--registry", "toaster:1"), ("Unknown model registry 'toaster'", "sqlite")),
    ],
)
def test_reading_commands_refuse_in_one_line(
    settings: Settings, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert_one_line(call(settings, "compileflow", *words), *parts)


@pytest.mark.parametrize("app", APPS.values(), ids=APPS)
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("m", "--target", "toaster"),
            ("Unknown target 'toaster'", "auto, aot-inductor", "openvino, torchscript"),
        ),
        (
            ("m", "--task", "poetry"),
            ("--task: expected", "'feature-extraction'", "'question-answering'", "'poetry'"),
        ),
        (("m", "--precision", "fp12"), ("precision", "'fp32'", "'int8'")),
        (("m", "--bucket", "1by16"), ("'1by16' is not a shape bucket", "1x128")),
        (("m", "--component", "word"), ("'word' is not a component", "word=16")),
        (("m", "--component", "word=8", "--bucket", "1x16"), ("inside components",)),
        (("m", "--skip", "fetsch"), ("unknown step 'fetsch'", "steps are: fetch, compile, validate, register")),
        (("m", "--option", "opset=17", "--option", "opset=18"), ("--option opset was given twice",)),
        (("m", "--name", "a", "--name", "b"), ("--name was given more than once", "Give it once")),
        (("m", "--name=a", "--name=a"), ("--name was given more than once",)),
        (("m", "--progress", "--no-progress"), ("--progress/--no-progress was given more than once",)),
        (("m", "--allow-warn", "--allow-warn"), ("--allow-warn/--no-allow-warn was given more than once",)),
        (("m", "--max-sequence-length", "long"), ("--max-sequence-length: expected a whole number, got 'long'",)),
        (("m", "--max-latency-ratio", "1,5"), ("--max-latency-ratio: expected a number, got '1,5'",)),
        (("m", "--option", "opset"), ("'opset' is not a target option", "NAME=VALUE")),
        (("m", "--bucket", "1x16", "--max-sequence-length", "0"), ("--max-sequence-length", "got 0")),
        (("m", "--name", "a b"), ("--name: expected letters, digits, dots", "'a b'")),
        (("m", "--component", "Word=16"), ("--component: expected lower-case letters", "'Word'")),
        (("m", "--target", "auto", "--max-memory-mb", "nan"), ("--max-memory-mb: expected a number above 0",)),
        (("m", "--target", "auto", "--max-accuracy-loss", "2"), ("--max-accuracy-loss", "got 2.0")),
        (("m", "--target", "auto", "--target", "torchscript"), ("--target auto tries all targets", "--among")),
        (("m", "--target", "generic", "--target", "torchscript"), ("--target torchscript was given twice",)),
        (("m", "--among", "torchscript"), ("--among has no effect without --target auto",)),
        (("m", "--max-accuracy-loss", "0"), ("--max-accuracy-loss has no effect without --target auto",)),
        (("m", "--calibration", "c.txt"), ("--calibration has no effect", "--precision int8")),
        (("m", "--precision", "int8", "--calibration", "c.txt"), ("--calibration has no effect", "static")),
        (("m", "--max-examples", "0"), ("--max-examples: expected at least 1, got 0",)),
        (("m", "--skip", "validate", "--strict"), ("--strict has no effect with --skip validate",)),
        (("m", "--skip", "validate", "--shape", "1x16"), ("--shape has no effect with --skip validate",)),
        (("m", "--store", ""), ("--store was given an empty value",)),
        (("m", "--registry", "sqlite:////r.db", "--registry", ""), ("--registry was given an empty value",)),
        (("",), ("MODEL was given an empty value",)),
        (("no/such/folder",), ("no/such/folder is not a folder", "Hub id")),
        ((str(ROOT / "docs"),), ("config.json is missing",)),
        ((str(ROOT), "--revision", "main"), ("a folder has no revision 'main'",)),
        (("m", "--model", "n"), ("Two models were given: m and n",)),
        ((), ("No model was given", "owner/name")),
    ],
)
def test_wrong_request_is_refused_at_once_in_one_line(
    settings: Settings, app: Typer, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    outcome = CliRunner().invoke(app, ["compile", *words])
    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert outcome.stderr.startswith("error: ")
    for part in parts:
        assert part in outcome.stderr
    assert not (settings.home_dir / "store").exists()


@pytest.mark.parametrize("app", APPS.values(), ids=APPS)
def test_every_command_refuses_repeated_options(app: Typer) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name, command in commands.items() if not isinstance(command, Command)] == []


def test_repeated_option_is_also_json(settings: Settings) -> None:
    outcome = CliRunner().invoke(compileflow_app, ["versions", "--json", "--registry", "a", "--registry", "b"])
    assert outcome.exit_code == 2
    assert json.loads(outcome.stdout)["error"]["message"] == "--registry was given more than once."


def options_of(app: Typer) -> dict[str, tuple[str, ...]]:
    (command,) = [c for c in get_command(app).commands.values() if c.name == "compile"]  # type: ignore[attr-defined]
    return {parameter.name: tuple(parameter.opts) for parameter in command.params}


def test_both_commands_have_the_same_options_but_for_those_of_prefect() -> None:
    plain, as_flow = options_of(compileflow_app), options_of(flows_app)
    assert len(plain) > 20
    assert as_flow == plain | {"aws_credentials_block": ("--aws-credentials-block",)}


def test_help_shows_five_options_first(settings: Settings) -> None:
    lines = call(settings, "compileflow", "compile", "--help").stdout.splitlines()
    panel = lines[next(n for n, line in enumerate(lines) if "─ Options ─" in line) :]
    panel = panel[: next(n for n, line in enumerate(panel) if line.startswith("╰"))]
    options = [word for line in panel for word in line.split() if word.startswith("--")]
    assert options == ["--target", "--task", "--precision", "--name", "--examples", "--help"]


def test_version_is_the_packages(settings: Settings) -> None:
    for words in (("compileflow", "--version"), ("compileflow", "--version", "versions")):
        assert call(settings, *words).stdout == f"compileflow {compileflow.__version__}\n"


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("compileflow comp", ["compile"]),
        ("compileflow compile --target onn", ["onnx-runtime"]),
        ("compileflow compile --task text-cl", ["text-classification"]),
        ("compileflow compile --max-acc", ["--max-accuracy-loss"]),
    ],
)
def test_shell_completes_commands_options_and_values(words: str, completions: list[str]) -> None:
    script = Path(sys.executable).parent / "compileflow"
    environment = os.environ | {
        "_COMPILEFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    completed = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert completed.stdout.split() == completions, completed.stderr


def test_completion_is_installed_into_the_users_shell(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = Path(sys.executable).parent / "compileflow"
    completed = subprocess.run(
        [script, "--install-completion", "bash"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 0, completed.stderr
    sourced = (tmp_path / ".bashrc").read_text()
    assert "compileflow" in sourced


def test_compile_from_the_wheel_without_prefect_registers_a_version_and_shows_progress(
    settings: Settings, tiny_model: ModelFactory, wheel_without_prefect: Path
) -> None:
    imports = "import compileflow; print(compileflow.__file__); import prefect"
    process = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, timeout=60)
    assert Path(process.stdout.strip()).is_relative_to(wheel_without_prefect)
    assert "Prefect is not installed" in process.stderr
    words = (
        "compileflow", "compile", str(tiny_model(HfTask.TEXT_CLASSIFICATION)), "--target", "torchscript",
        "--bucket", "1x16", "--bucket", "1x64", "--shape", "1x16", "--name", "reviews", "--json",
    )  # fmt: skip
    completed = call(settings, *words)
    assert completed.returncode == 0, completed.stderr
    (result,) = json.loads(completed.stdout)
    assert (result["target"], result["validated"]["outcome"]) == ("torchscript", "pass")
    version = open_registry(settings.resolved_registry_uri()).get("reviews", 1)
    assert version.model_dump(mode="json") == result["version"]
    lines = completed.stderr.splitlines()
    starts = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
    assert starts == ["fetch", "compile", "validate", "register"]
    assert any(
        re.fullmatch(r"compile: tracing shape bucket 1x16 \(1 of 2\) \(\d+\.\d s\)", line) for line in lines
    )
    assert any(re.fullmatch(r"validate: verdict pass: .* \(\d+\.\d s\)", line) for line in lines)

    again = call(settings, *words, "--no-progress")
    assert (again.returncode, again.stderr) == (0, "")
    (second,) = json.loads(again.stdout)
    assert second["version"] == result["version"]
    assert second["artifact"]["cached"]
    assert second["validated"]["cached"]


def test_each_target_is_one_run_and_one_failure_does_not_stop_the_others(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    model = str(tiny_model(HfTask.FEATURE_EXTRACTION))
    completed = call(
        settings, "compileflow", "compile", model, "--target", "neuron", "--target", "torchscript",
        "--bucket", "1x16", "--skip", "validate", "--skip", "register", "--json",
    )  # fmt: skip
    # Its toolchain is absent: a failed run, not a wrong request.
    assert completed.returncode == 1
    refused, compiled = json.loads(completed.stdout)
    assert (refused["target"], compiled["target"]) == ("neuron", "torchscript")
    assert refused["error"]["message"].startswith("neuron cannot compile here")
    lines = completed.stderr.splitlines()
    assert lines[-1].startswith("error: neuron cannot compile here")
    assert "compile ..." in lines
    assert not [line for line in lines if line.startswith("neuron")]


def test_progress_on_a_terminal_shows_each_step_with_its_time(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    command = [
        sys.executable, "-m", "compileflow", "compile", str(model), "--target", "torchscript", "--bucket", "1x16",
        "--skip", "validate", "--skip", "register",
    ]  # fmt: skip
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "TERM": "xterm", "COLUMNS": "120"}
    terminal, stderr = pty.openpty()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr) as process:
        os.close(stderr)
        output = b""
        # Linux ends a terminal whose last writer is gone with EIO.
        with suppress(OSError):
            while chunk := os.read(terminal, 4096):
                output += chunk
        os.close(terminal)
        assert process.stdout is not None
        assert b"torchscript" in process.stdout.read()
    assert process.returncode == 0, output
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert re.search(r"fetch +0:00:\d\d source model file://", text), text
    assert re.search(r"compile +0:00:\d\d loading the source model", text), text
    assert re.search(r"compile +0:00:\d\d artifact [0-9a-f]{12}: compiled in", text), text


@pytest.mark.usefixtures("flows_on_server")
def test_refusal_deep_in_the_flow_is_one_line_and_leaves_nothing(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    completed = call(
        settings, "flows", "compile", "--model", str(model), "--target", "torchscript",
        "--task", "text-classification", "--no-progress",
    )  # fmt: skip
    assert_one_line(completed, "no classifier", "saved as BertModel, not for text-classification", " Log: ")
    assert not (settings.home_dir / "registry.db").exists()
    assert not list((settings.home_dir / "work").iterdir())


@pytest.mark.parametrize("is_in_profile", [True, False])
def test_prefect_server_that_does_not_answer_is_one_line(
    settings: Settings,
    tiny_model: ModelFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_in_profile: bool,
) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    url = "http://user:s3cr3t@127.0.0.1:9/api"
    if is_in_profile:
        (tmp_path / ".prefect").mkdir()
        profile = f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{url}"\n'
        (tmp_path / ".prefect" / "profiles.toml").write_text(profile)
    else:
        monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("HOME", str(tmp_path))
    completed = call(settings, "flows", "compile", "--model", str(tiny_model(HfTask.TEXT_CLASSIFICATION)))
    assert completed.returncode == 1
    assert_one_line(completed, "The Prefect server at http://***@127.0.0.1:9/api does not answer", "refused")
    assert not (settings.home_dir / "prefect").exists()


def test_unwritable_home_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    completed = call(Settings(home=tmp_path / "file" / "home"), "flows", "compile", "--model", "m")
    assert_one_line(completed, "ENOTDIR")


@pytest.mark.parametrize(
    ("module", "number", "word"),
    [
        ("compileflow", signal.SIGINT, "Interrupted."),
        ("compileflow", signal.SIGTERM, "Terminated."),
        pytest.param("flows", signal.SIGINT, "Interrupted.", marks=pytest.mark.slow),
        pytest.param("flows", signal.SIGTERM, "Terminated.", marks=pytest.mark.slow),
    ],
)
def test_signal_ends_without_traceback_and_the_next_run_works(
    settings: Settings, tiny_model: ModelFactory, module: str, number: signal.Signals, word: str
) -> None:
    command = [
        sys.executable, "-m", module, "compile", "--model", str(tiny_model(HfTask.TEXT_CLASSIFICATION)),
        "--target", "torchscript", "--bucket", "1x16", "--bucket", "1x64", "--name", "reviews",
        "--skip", "validate", "--skip", "register", "--no-progress",
    ]  # fmt: skip
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not list((settings.home_dir / "work").glob("compile-*/artifact")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err, err
    assert one_line(err) == f"{word} Finished steps are kept; run the command again to do the rest.", out
    assert not list((settings.home_dir / "work").iterdir())
    # The source model is whole; nothing else is in the store.
    store = open_store(settings.resolved_store_uri())
    assert len(list(store.list())) == 1
    again = call(settings, *command[2:])
    assert again.returncode == 0, again.stderr
    assert len(list(store.list())) == 2


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "Interrupted."), (signal.SIGTERM, "Terminated.")])
def test_signal_while_python_imports_ends_at_once_with_one_line(number: signal.Signals, line: str) -> None:
    code = (
        "import os; from compileflow._process.interrupts import end_at_once; end_at_once(); "
        f"os.kill(os.getpid(), {number:d}); import numpy"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (completed.returncode, completed.stderr) == (128 + number, f"{line}\n")


def test_signal_that_a_library_turns_into_an_error_ends_with_one_line() -> None:
    code = f"""
from compileflow._process.end_at_once import end_at_once
end_at_once()
import os, typer
from compileflow.cli.common import one_line_errors
def command() -> None:
    try:
        os.kill(os.getpid(), {signal.SIGINT:d})
    except BaseException:
        raise ValueError("Error calling a function: Stopped: 2") from None
typer.run(one_line_errors(command))
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (completed.returncode, completed.stderr) == (130, "Interrupted. No partial result was kept.\n")


@pytest.mark.parametrize("module", ["compileflow", "flows"])
def test_command_line_imports_nothing_before_a_signal_ends_it_in_one_line(module: str) -> None:
    # The first import of any other module presses Ctrl-C.
    code = f"""
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        needed = ("{module}", "compileflow", "{module}.__main__", "compileflow._process")
        if name not in (*needed, "compileflow._process.end_at_once", "__future__"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
import runpy, {module}
for name in [name for name in sys.modules if name.startswith("compileflow")]:
    del sys.modules[name]
sys.meta_path.insert(0, Press())
runpy.run_module("{module}.__main__", run_name="__main__")
"""
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (completed.returncode, completed.stderr) == (130, "Interrupted.\n")


def test_output_that_cannot_be_written_is_one_line(settings: Settings) -> None:
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir)}
    command = [sys.executable, "-m", "compileflow", "targets", "--json"]
    with Path("/dev/full").open("w") as full:
        completed = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert completed.returncode == 1
    assert completed.stderr == "error: The output cannot be written: No space left on device.\n"
    reader, writer = os.pipe()
    os.close(reader)
    completed = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (completed.returncode, completed.stderr) == (1, "")


def test_reading_command_starts_within_a_second(settings: Settings) -> None:
    assert min(_cpu_seconds(settings, "compileflow", "targets") for _ in range(3)) < 1.0


@pytest.mark.parametrize("words", [("no/such/model",), (".", "--target", "neuron"), (".", "--option", "x=1")])
def test_refusal_of_a_flow_takes_less_than_two_seconds(
    settings: Settings, tiny_model: ModelFactory, words: tuple[str, ...]
) -> None:
    model = str(tiny_model(HfTask.TEXT_CLASSIFICATION))
    command = ("flows", "compile", *(model if word == "." else word for word in words))
    assert any(_cpu_seconds(settings, *command, refused=True) < 2.0 for _ in range(2))
    # The embedded server keeps its database there.
    assert not (settings.home_dir / "prefect").exists()


def _cpu_seconds(settings: Settings, *words: str, refused: bool = False) -> float:
    """Run a command and return its CPU time, which other load on the machine hardly changes."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert bool(call(settings, *words).returncode) is refused
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
