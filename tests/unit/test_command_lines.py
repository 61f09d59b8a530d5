"""Both command lines: what they print, how they end, and that a user's mistake is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compileflow.errors import one_line
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.steps import in_process

ROOT = Path(__file__).parents[2]


def call(settings: Settings, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **more,
    )  # fmt: skip


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def registered(settings: Settings, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    with in_process(settings, monkeypatch) as pipeline:
        return pipeline.run(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews"))


def test_targets_lists_each_with_what_is_missing(settings: Settings) -> None:
    rows = json.loads(call(settings, "compileflow.cli", "targets", "--json").stdout)
    assert [row["target"] for row in rows] == [
        "aot-inductor", "blade", "hyperdex", "neuron", "neuronx", "onnx-runtime", "openvino", "torchscript",
    ]  # fmt: skip
    for row in rows:
        # Vendors' toolchains are not on PyPI.
        here = row["target"] not in ("blade", "hyperdex", "neuron", "neuronx")
        assert row["can_compile"] is row["can_run"] is here, row
        assert bool(row["reason"] and row["hint"]) is not here, row
        assert set(row["lacking"]) < set(row["precisions"])
    table = call(settings, "compileflow.cli", "targets").stdout
    assert all(row["target"] in table for row in rows)


def test_reading_commands_agree_about_a_registered_version(settings: Settings, registered: Any) -> None:
    (version,) = json.loads(call(settings, "compileflow.cli", "versions", "reviews", "--json").stdout)
    assert version == registered.model_dump(mode="json")
    uri = version["artifact_uri"]
    manifest = json.loads(call(settings, "compileflow.cli", "inspect", uri, "--json").stdout)
    assert manifest["spec"] == version["spec"]
    proof = json.loads(call(settings, "compileflow.cli", "verify", uri, "--json").stdout)
    assert proof == {
        "digest": version["artifact_digest"], "files": len(manifest["files"]) + 1, "intact": True,
        "attested": True, "signed_by": [], "verdict": "PASSED", "report_intact": True,
        "proven": True, "proof": "reviews version 1, verdict pass", "problems": [],
    }  # fmt: skip
    report = json.loads(call(settings, "compileflow.cli", "inspect", version["report_uri"], "--json").stdout)
    assert report["verdict"]["outcome"] == "pass"
    for words in (("versions",), ("inspect", uri), ("verify", uri), ("inspect", version["report_uri"])):
        done = call(settings, "compileflow.cli", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip()


def test_verify_refuses_an_altered_copy(settings: Settings, registered: Any, tmp_path: Path) -> None:
    from compileflow.artifact.open import copy_artifact, open_artifact

    folder = copy_artifact(open_artifact(registered.artifact_uri, settings=settings), tmp_path / "copy")
    assert call(settings, "compileflow.cli", "verify", str(folder)).returncode == 0
    with (folder / "components" / "default" / "model.pt").open("ab") as graph:
        graph.write(b"\0")
    assert_one_line(call(settings, "compileflow.cli", "verify", str(folder)), "model.pt was altered")


def test_verify_refuses_what_nothing_proves(
    settings: Settings, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process(settings, monkeypatch) as pipeline:
        artifact = pipeline.compile(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION)))
    assert_one_line(call(settings, "compileflow.cli", "verify", artifact.uri), "No passing verdict")
    assert call(settings, "compileflow.cli", "verify", artifact.uri, "--integrity-only").returncode == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("inspect", "nowhere"), ("has no manifest.json",)),
        (("inspect", "s3x://b/manifests/x.json"), ("neither an artifact folder nor an artifact URI",)),
        (("versions", "nothing"), ("has no model 'nothing'",)),
        (("versions", "--registry", "toaster:1"), ("Unknown model registry 'toaster'", "sqlite")),
    ],
)
def test_reading_commands_refuse_in_one_line(
    settings: Settings, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert_one_line(call(settings, "compileflow.cli", *words), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--target", "toaster"), ("Unknown target 'toaster'", "auto, aot-inductor", "openvino, torchscript")),
        (("--task", "poetry"), ("hf_task", "'feature-extraction'", "'question-answering'")),
        (("--precision", "fp12"), ("precision", "'fp32'", "'int8'")),
        (("--bucket", "1by16"), ("'1by16' is no shape bucket", "1x128")),
        (("--component", "word"), ("'word' is no component", "word=16")),
        (("--component", "word=8", "--bucket", "1x16"), ("inside components",)),
        (("--skip", "fetsch"), ("steps", "fetsch")),
        (("--bucket", "1x16", "--max-sequence-length", "0"), ("max_sequence_length",)),
    ],
)
def test_wrong_request_is_refused_at_once_in_one_line(
    settings: Settings, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    done = call(settings, "flows", "compile", "--model", "m", *words)
    assert_one_line(done, *parts)
    assert not (settings.home_dir / "store").exists()


@pytest.mark.usefixtures("flows_on_server")
def test_refusal_deep_in_the_flow_is_one_line_and_leaves_nothing(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    done = call(
        settings, "flows", "compile", "--model", str(model), "--target", "torchscript",
        "--task", "text-classification",
    )  # fmt: skip
    assert_one_line(done, "no classifier", "saved as BertModel, not for text-classification", " Log: ")
    assert not (settings.home_dir / "registry.db").exists()
    assert not list((settings.home_dir / "work").iterdir())


def test_unwritable_home_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = call(Settings(home=tmp_path / "file" / "home"), "flows", "compile", "--model", "m")
    assert_one_line(done, "ENOTDIR")


@pytest.mark.slow
def test_interrupt_ends_without_traceback_and_the_next_run_works(
    settings: Settings, tiny_model: ModelFactory
) -> None:
    command = [
        sys.executable, "-m", "flows", "compile", "--model", str(tiny_model(HfTask.TEXT_CLASSIFICATION)),
        "--target", "torchscript", "--bucket", "1x16", "--bucket", "1x64", "--name", "reviews",
    ]  # fmt: skip
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as flow:
        deadline = time.monotonic() + 120
        while not list((settings.home_dir / "work").glob("compile-*/artifact")):
            assert flow.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        flow.send_signal(signal.SIGINT)
        out, err = flow.communicate(timeout=60)
    assert flow.returncode != 0
    assert "Traceback" not in err, err
    assert one_line(err) == "Interrupted; nothing half-made was kept. Run again to go on.", out
    assert not list((settings.home_dir / "work").iterdir())
    again = call(settings, *command[2:])
    assert again.returncode == 0, again.stderr


def test_reading_command_starts_within_a_second(settings: Settings) -> None:
    assert any(_seconds(settings) < 1.0 for _ in range(5))


def _seconds(settings: Settings) -> float:
    start = time.perf_counter()
    assert call(settings, "compileflow.cli", "targets").returncode == 0
    return time.perf_counter() - start
