"""The load contract: what is refused, in which words, and that nothing was deserialized or imported by then."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow._process import cpu
from compileflow.artifact.open import open_artifact
from compileflow.artifact.verify import attestations_of, verify_artifact
from compileflow.contracts.digests import file_digest
from compileflow.errors import IntegrityError, LoadError, SpecError, StoreError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.stores.local import LocalStore
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.attested_artifacts import attest, make_keys
from tests.unit.refused_loads import GRAPH, REFUSALS, Refusal, attempt, pretend_installed, rewrite_manifest

ROOT = Path(__file__).parents[2]
TASK = HfTask.TEXT_CLASSIFICATION
CELLS = [(name, kind) for name, each in REFUSALS.items() for kind in each.kinds]
# No load that is refused imports any of them.
RUNTIMES = ("torch", "onnxruntime", "openvino", "transformers", "tokenizers", "safetensors")
DESERIALIZERS = {
    "pickle": ("load", "loads"),
    "torch": ("load",),
    "torch.jit": ("load",),
    "torch._C._aoti": ("AOTIModelPackageLoader",),
    "torch._inductor": ("aoti_load_package",),
    "onnxruntime": ("InferenceSession",),
    "openvino": ("Core.compile_model", "Core.read_model"),
    "transformers": ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"),
}
# Loads as JSON on standard input, refusals as JSON on standard output.
_FRESH = f"""
import json, sys
from tests.unit.refused_loads import attempt
for load in json.load(sys.stdin):
    refusal = attempt(load)
    print(json.dumps(refusal | {{"imported": [name for name in {RUNTIMES!r} if name in sys.modules]}}))
"""


@pytest.fixture(scope="module")
def sound(tiny_model: ModelFactory, in_process: InProcess) -> Path:
    """An artifact, to read only."""
    return in_process.compiled(tiny_model(TASK), "torchscript", TASK)


@pytest.fixture(scope="module")
def loads(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every refusal's artifact, damaged, and how it is loaded, as JSON.

    The graph of each is garbage that agrees with the manifest: a runtime that opened it would raise another error.
    """
    root = tmp_path_factory.mktemp("refused")
    return {
        name: prepared(sound, root / str(number), each) for number, (name, each) in enumerate(REFUSALS.items())
    }


def prepared(sound: Path, root: Path, refusal: Refusal) -> dict[str, Any]:
    folder = Path(shutil.copytree(sound, root / "artifact"))
    turn_into_garbage(folder)
    refusal.spoil(folder)
    for name, version in refusal.installed.items():
        pretend_installed(root / "installed", name, version)
    if refusal.flags:
        (root / "cpuinfo").write_text(f"flags\t\t: {refusal.flags}\n", "utf-8")
    arguments = dict(refusal.arguments)
    if isinstance(arguments.get("require_signature"), str):
        arguments["require_signature"] = str(root / arguments["require_signature"])
    return {
        "location": refusal.location(folder),
        "arguments": arguments,
        "installed": str(root / "installed"),
        "cpuinfo": str(root / "cpuinfo" if refusal.flags else cpu.CPUINFO),
    }


def turn_into_garbage(folder: Path) -> None:
    (folder / GRAPH).write_bytes(b"garbage")

    def agree(data: dict[str, Any]) -> None:
        (record,) = (file for file in data["files"] if file["path"] == GRAPH)
        record |= {"size_bytes": len(b"garbage"), "sha256": file_digest(folder / GRAPH)}

    rewrite_manifest(agree)(folder)


@pytest.fixture(scope="module")
def fresh(
    loads: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """All refusals of one process that did nothing else, each with the runtimes that were imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", _FRESH],
        input=json.dumps([loads[name] | {"kind": kind} for name, kind in CELLS]),
        cwd=ROOT,
        env=os.environ | {"COMPILEFLOW_HOME": str(tmp_path_factory.mktemp("home"))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CELLS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was deserialized, in order; each call goes on to the real thing."""
    calls: list[str] = []

    def spy(holder: Any, name: str, label: str) -> None:
        real = getattr(holder, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return real(*args, **kwargs)

        monkeypatch.setattr(holder, name, called)

    for module, names in DESERIALIZERS.items():
        for name in names:
            holder, _, attribute = name.rpartition(".")
            found = import_module(module)
            spy(getattr(found, holder) if holder else found, attribute, f"{module}.{name}")
    return calls


def assert_refused(found: Mapping[str, Any], refusal: Refusal) -> None:
    assert found["error"] == refusal.error.__name__, found
    assert re.search(refusal.says, found["says"]), found["says"]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_refused_before_anything_is_deserialized(
    loads: dict[str, dict[str, Any]], opened: list[str], settings: object, name: str, kind: str
) -> None:
    assert_refused(attempt(loads[name] | {"kind": kind}), REFUSALS[name])
    assert opened == []


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_refused_before_any_runtime_is_imported(
    fresh: dict[tuple[str, str], dict[str, Any]], name: str, kind: str
) -> None:
    assert_refused(fresh[name, kind], REFUSALS[name])
    assert fresh[name, kind]["imported"] == []


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        ("torchscript", "torch.jit.load"),
        pytest.param("onnx-runtime", "onnxruntime.InferenceSession", marks=pytest.mark.slow),
        pytest.param("openvino", "openvino.Core.compile_model", marks=pytest.mark.slow),
        pytest.param("aot-inductor", "torch._C._aoti.AOTIModelPackageLoader", marks=pytest.mark.slow),
    ],
)
def test_the_check_sees_what_a_load_that_is_not_refused_deserializes(
    tiny_model: ModelFactory,
    in_process: InProcess,
    opened: list[str],
    target: str,
    runtime: str,
) -> None:
    folder = in_process.compiled(tiny_model(TASK), target, TASK)
    opened.clear()
    CompiledPipeline.from_pretrained(folder)
    assert {
        runtime,
        "transformers.AutoConfig.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
    } <= set(opened)


def test_garbage_whose_digest_is_right_reaches_the_runtime(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "artifact"))
    turn_into_garbage(folder)
    # The proof that the others were refused earlier.
    with pytest.raises(LoadError, match=r"model\.pt cannot be loaded by torch"):
        CompiledModel.from_pretrained(folder)


def test_signed_artifact_is_loaded_and_a_stranger_among_the_keys_does_no_harm(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "artifact"))
    keys = make_keys(tmp_path)
    attest(folder, keys)
    arguments = {"require_signature": [make_keys(tmp_path, "stranger").public, keys.public]}
    assert CompiledTokenizer.from_pretrained(folder, **arguments)("a")["input_ids"]
    pipeline = CompiledPipeline.from_pretrained(folder, **arguments)
    assert pipeline("the end") == CompiledPipeline.from_pretrained(sound)("the end")
    reloaded = CompiledModel.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"), **arguments)
    assert reloaded.artifact.attested == CompiledModel.from_pretrained(folder, **arguments).artifact.attested


def test_artifact_is_loaded_by_its_digest_or_the_beginning_of_it(
    sound: Path, settings: Settings, tmp_path: Path
) -> None:
    stored = LocalStore((tmp_path / "store").as_uri(), settings).put_folder(sound)
    for location in (sound, stored.uri):
        for digest in (stored.digest, stored.digest[:12]):
            assert open_artifact(location, digest=digest, settings=settings).digest == stored.digest
    assert CompiledTokenizer.from_pretrained(sound, digest=stored.digest)("a")["input_ids"]


@pytest.mark.parametrize("trust", [False, True])
def test_altered_cache_is_refused_whoever_is_trusted(
    sound: Path, settings: Settings, tmp_path: Path, trust: bool
) -> None:
    stored = LocalStore((tmp_path / "store").as_uri(), settings).put_folder(sound)
    cached = open_artifact(stored.uri, settings=settings).folder
    # The manifest agrees with the files, so that only the digest in the URI can tell.
    rewrite_manifest(lambda data: data["source"].update(revision="another"))(cached)
    for kind in (CompiledTokenizer, CompiledModel, CompiledPipeline):
        with pytest.raises(
            IntegrityError, match=r"Digest mismatch for .*: expected .*, found .*Delete that folder"
        ):
            kind.from_pretrained(stored.uri, trust=trust)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("require_signatures", "require_signature"),
        ("digset", "digest"),
        ("thread", "threads"),
        ("trust_remote_cod", "trust_remote_code"),
    ],
)
def test_misspelled_argument_of_a_pipeline_is_refused(sound: Path, name: str, argument: str) -> None:
    with pytest.raises(SpecError) as caught:
        CompiledPipeline.from_pretrained(sound, **{name: True})
    assert str(caught.value) == f"Unknown argument {name!r}. Did you mean {argument}?"


def test_empty_path_is_refused_instead_of_meaning_the_current_folder(
    sound: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "artifact"))
    tokenizer = CompiledTokenizer(CompiledTokenizer.from_pretrained(folder).tokenizer, {"max_length": 8})
    monkeypatch.chdir(folder)
    for load in (lambda: verify_artifact("", settings=settings), lambda: attestations_of("")):
        with pytest.raises(LoadError, match="Expected the location of an artifact, got ''"):
            load()
    monkeypatch.chdir(tmp_path)
    for saved in (tokenizer, CompiledTokenizer.from_pretrained(folder), CompiledModel.from_pretrained(folder)):
        with pytest.raises(StoreError, match=r"Expected a folder to write to, got ''\. Give its path\."):
            saved.save_pretrained("")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_artifact_that_is_not_stored_leaves_no_folder_in_the_cache(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="does not hold the folder"):
        open_artifact(f"{(tmp_path / 'store').as_uri()}/manifests/sha256/{'0' * 64}.json", settings=settings)
    assert not (settings.home_dir / "artifacts").exists()


class TestTrusted:
    @pytest.fixture
    def changed(self, sound: Path, tmp_path: Path) -> Path:
        """A copy with a file that was altered, and still does, and one that was added."""
        folder = Path(shutil.copytree(sound, tmp_path / "artifact"))
        with (folder / "config.json").open("a", encoding="utf-8") as stream:
            stream.write("\n")
        (folder / "notes.txt").write_text("mine", "utf-8")
        return folder

    def test_changed_artifact_answers_and_the_log_names_what_was_not_verified(
        self, sound: Path, changed: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "compileflow"):
            pipeline = CompiledPipeline.from_pretrained(changed, trust=True)
        (warning,) = caplog.messages
        assert warning == (
            f"Loading {changed} unverified, because of trust=True: "
            "config.json, notes.txt differ from the manifest or are not listed in it."
        )
        assert pipeline("the end") == CompiledPipeline.from_pretrained(sound)("the end")

    def test_opened_artifact_says_whether_it_was_verified(self, sound: Path, changed: Path) -> None:
        assert not open_artifact(changed, trust=True).verified
        assert open_artifact(sound).verified
        assert open_artifact(changed, trust=True).digest != open_artifact(sound).digest

    def test_sound_artifact_is_verified_without_a_word(
        self, sound: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "compileflow"):
            assert open_artifact(sound, trust=True).verified
        assert caplog.messages == []
