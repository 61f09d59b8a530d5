"""Loads that must be refused: the damage to the artifact, the arguments of the load, and the text of the error.

Nothing here imports a runtime, so that a fresh process can show that a refusal does not import one either. The
file is long because it is one table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import compileflow
from compileflow._process import cpu
from compileflow.artifact.attestations.envelopes import write_bundle
from compileflow.artifact.manifest import ATTESTATIONS_NAME, MANIFEST_NAME
from compileflow.errors import (
    CompileflowError,
    IntegrityError,
    LoadError,
    ManifestError,
    SignatureError,
    SpecError,
)
from compileflow.spec import ShapeBucket
from tests.unit.attested_artifacts import altered, attest, envelopes_for, make_keys, small_artifact

GRAPH = "components/default/model.pt"
KINDS = ("CompiledTokenizer", "CompiledModel", "CompiledPipeline")
GRAPHS = KINDS[1:]


def rewrite_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        data = json.loads(path.read_text("utf-8"))
        change(data)
        path.write_text(json.dumps(data), "utf-8")

    return rewrite


def of_target(name: str, **toolchain: str) -> Callable[[Path], None]:
    return rewrite_manifest(lambda data: data["target"].update(name=name, toolchain=toolchain))


def of_component(**record: Any) -> Callable[[Path], None]:
    return rewrite_manifest(lambda data: data["components"]["default"].update(record))


def signed(by: str | None = "trusted", **options: Any) -> Callable[[Path], None]:
    """Write statements beside an artifact as a run would, signed by a new key. TRUSTED names the trusted key."""

    def sign(folder: Path) -> None:
        keys = {name: make_keys(folder.parent, name) for name in ("trusted", "stranger")}
        attest(folder, keys[by] if by else None, **options)

    return sign


def signed_then(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        signed()(folder)
        change(folder)

    return spoil


def alter_verdict(folder: Path) -> None:
    keys = make_keys(folder.parent, "trusted")
    provenance, verdict = envelopes_for(folder, keys)
    write_bundle(folder, [provenance, altered(verdict, '"failedTests":[]', '"failedTests":["rel_l2"]')])


def sign_another(folder: Path) -> None:
    keys = make_keys(folder.parent, "trusted")
    write_bundle(folder, envelopes_for(small_artifact(folder.parent / "other"), keys))


@dataclass(frozen=True)
class Refusal:
    """A load that must be refused.

    Attributes:
        error: Class of the error.
        says: Pattern of the error's text.
        spoil: Damages a sound artifact.
        arguments: Arguments of from_pretrained; `require_signature` names a file beside the artifact.
        kinds: Classes that are loaded.
        location: Returns the location to load, given the folder of the artifact.
        installed: Distribution to the version that it appears to have.
        flags: Features of another CPU; '' keeps those of this one.
    """

    error: type[CompileflowError]
    says: str
    spoil: Callable[[Path], object] = lambda folder: None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    location: Callable[[Path], Any] = str
    installed: Mapping[str, str] = field(default_factory=dict)
    flags: str = ""


TRUST = {"trust": True}
TRUSTED = {"require_signature": "trusted.pub"}
REFUSALS = {
    "no folder": Refusal(ManifestError, "does not exist", location=lambda folder: f"{folder}/nothing"),
    "None": Refusal(LoadError, "Expected the location of an artifact, got None", location=lambda folder: None),
    "an empty path": Refusal(
        LoadError, "Expected the location of an artifact, got ''", location=lambda folder: ""
    ),
    "a number": Refusal(LoadError, "Expected the location of an artifact, got 7", location=lambda folder: 7),
    "folder of an unknown user": Refusal(
        ManifestError, "does not exist", location=lambda folder: "~nobody-has-this-name/model"
    ),
    "a file": Refusal(ManifestError, "is not a folder", location=lambda folder: f"{folder}/{GRAPH}"),
    "no manifest": Refusal(
        ManifestError, r"has no manifest\.json", lambda folder: (folder / MANIFEST_NAME).unlink()
    ),
    "no manifest, by digest": Refusal(
        ManifestError,
        r"has no manifest\.json",
        lambda folder: (folder / MANIFEST_NAME).unlink(),
        {"digest": "0" * 12},
    ),
    "no JSON": Refusal(
        ManifestError, "cannot be read", lambda folder: (folder / MANIFEST_NAME).write_text("{", "utf-8")
    ),
    "unknown schema": Refusal(
        ManifestError,
        "expected schema_version 1, 2, 3, found 99.*Install the version of compileflow that wrote it",
        rewrite_manifest(lambda data: data.update(schema_version=99)),
    ),
    "unknown schema, trusted": Refusal(
        ManifestError,
        "schema_version .*found 99",
        rewrite_manifest(lambda data: data.update(schema_version=99)),
        TRUST,
    ),
    "unknown field": Refusal(
        ManifestError,
        "surprise: .*If a newer compileflow wrote it, update compileflow",
        rewrite_manifest(lambda data: data.update(surprise=1)),
    ),
    "unknown task": Refusal(
        ManifestError,
        "hf_task: .*update compileflow",
        rewrite_manifest(lambda data: data["spec"].update(hf_task="video-dreaming")),
    ),
    "code of its own": Refusal(
        LoadError,
        "brings its own Python code .*and trust_remote_code is off.*load with trust_remote_code=True",
        rewrite_manifest(lambda data: data["spec"].update(trust_remote_code=True)),
    ),
    "path out": Refusal(
        IntegrityError,
        "leaves its folder.*Do not load",
        rewrite_manifest(lambda data: data["files"][0].update(path="../outside")),
    ),
    "path out, trusted": Refusal(IntegrityError, "leaves its folder", of_component(folder="../outside"), TRUST),
    "link out": Refusal(
        IntegrityError, "is a link out of the folder", lambda folder: (folder / "link").symlink_to(sys.executable)
    ),
    "link out, trusted": Refusal(
        IntegrityError, "is a link", lambda folder: (folder / "link").symlink_to(folder.parent), TRUST
    ),
    "altered file": Refusal(
        IntegrityError,
        r"model\.pt was altered: .*Do not load.*trust=True .* native code and run with your rights",
        lambda folder: (folder / GRAPH).write_bytes(b"altered"),
    ),
    "altered file, by digest": Refusal(
        IntegrityError,
        r"model\.pt was altered: .*Do not load this artifact; fetch it again\.$",
        lambda folder: (folder / GRAPH).write_bytes(b"altered"),
        {"digest": "0" * 64},
    ),
    "missing file": Refusal(IntegrityError, r"model\.pt is missing", lambda folder: (folder / GRAPH).unlink()),
    "missing file, trusted": Refusal(
        IntegrityError, r"model\.pt is missing", lambda folder: (folder / GRAPH).unlink(), TRUST
    ),
    "unlisted file": Refusal(
        IntegrityError,
        r"tokenizer\.py is not in the manifest\. Do not load",
        lambda folder: (folder / "tokenizer.py").write_text("raise SystemExit", "utf-8"),
    ),
    "another digest": Refusal(
        IntegrityError,
        r"Digest mismatch for .*: expected 0{12}.*found .*compileflow versions",
        arguments={"digest": "0" * 12},
    ),
    "another digest, trusted": Refusal(
        IntegrityError,
        r"Digest mismatch for .*: expected 0{12}\.\.\., found ",
        lambda folder: (folder / GRAPH).write_bytes(b"altered"),
        {"digest": "0" * 64, **TRUST},
    ),
    "no digest": Refusal(
        SpecError, "Expected a digest of 12 to 64 .*, got digest='latest'", arguments={"digest": "latest"}
    ),
    "number as a digest": Refusal(SpecError, "digits 0-9 and a-f, got digest=7", arguments={"digest": 7}),
    "short digest": Refusal(SpecError, "Expected a digest of 12 to 64", arguments={"digest": "0" * 11}),
    "another digest than the URI's": Refusal(
        IntegrityError,
        r"Digest mismatch for file://.*: expected b{12}\.\.\., found a{12}",
        arguments={"digest": "b" * 64},
        location=lambda folder: f"file:///store/manifests/sha256/{'a' * 64}.json",
    ),
    "URI of nothing": Refusal(
        ManifestError, "neither an artifact folder nor an artifact URI", location=lambda folder: "s3://bucket/key"
    ),
    "URI of what is not stored": Refusal(
        IntegrityError,
        "does not hold the folder",
        location=lambda folder: f"{(folder.parent / 'store').as_uri()}/manifests/sha256/{'a' * 64}.json",
    ),
    "attestations among the files": Refusal(
        ManifestError,
        r"attestations\.intoto\.jsonl must not be listed as a file",
        rewrite_manifest(lambda data: data["files"][0].update(path=ATTESTATIONS_NAME)),
    ),
    "nothing said": Refusal(
        SignatureError,
        "has no provenance statement.*COMPILEFLOW_SIGNING_KEY",
        signed_then(lambda folder: (folder / ATTESTATIONS_NAME).unlink()),
        TRUSTED,
    ),
    "not signed": Refusal(SignatureError, "no trusted key signed the provenance", signed(None), TRUSTED),
    "signed by a stranger": Refusal(
        SignatureError, r"no trusted key signed the provenance\. Trusted keys: ", signed("stranger"), TRUSTED
    ),
    "signed, on another artifact": Refusal(SignatureError, "is about another artifact", sign_another, TRUSTED),
    "signed, and the verdict altered": Refusal(SignatureError, "The verdict was altered", alter_verdict, TRUSTED),
    "signed, on another source model": Refusal(
        SignatureError, "name different source models", signed(source="1" * 64), TRUSTED
    ),
    "signed, and failed": Refusal(
        SignatureError,
        "A signed verdict PASSED or WARNED is required, found FAILED",
        signed(outcome="fail"),
        TRUSTED,
    ),
    "signed, and altered, trusted": Refusal(
        SignatureError,
        "is about another artifact.*Do not load",
        signed_then(lambda folder: (folder / GRAPH).write_bytes(b"altered")),
        {**TRUST, **TRUSTED},
    ),
    "no key to trust": Refusal(
        SpecError, "no key is trusted.*COMPILEFLOW_TRUSTED_KEYS", signed(), {"require_signature": True}
    ),
    "no key": Refusal(
        SpecError, "cannot be used as a public key", signed(), {"require_signature": "artifact/config.json"}
    ),
    "unknown component": Refusal(
        LoadError, r"no component 'word'.*It has: default", arguments={"component": "word"}
    ),
    "another task": Refusal(
        LoadError,
        "was compiled for text-classification and does not serve 'fill-mask'.*It serves: ",
        arguments={"task": "fill-mask"},
        kinds=("CompiledPipeline",),
    ),
    "foreign output class": Refusal(
        LoadError,
        "'os:system' is not an output class of transformers",
        of_component(output_class="os:system"),
        kinds=GRAPHS,
    ),
    "unknown bucket": Refusal(
        LoadError,
        r"has no shape bucket 3x7\. Its shape buckets are: 1x8, ",
        arguments={"buckets": [[3, 7]]},
        kinds=GRAPHS,
    ),
    "unknown target": Refusal(
        LoadError,
        "for the unknown target 'abacus'. Known targets: aot-inductor, .*Install the distribution",
        of_target("abacus"),
        kinds=GRAPHS,
    ),
    "unknown device": Refusal(
        LoadError, r"torchscript does not run on 'neuron'.*cpu", arguments={"device": "neuron"}, kinds=GRAPHS
    ),
    "no runtime": Refusal(
        LoadError,
        "neuron cannot run here: torch-neuron is not installed.*Try: python -m pip install torch-neuron",
        of_target("neuron"),
        kinds=GRAPHS,
    ),
    "runtime too old": Refusal(
        LoadError,
        r"onnx-runtime needs onnxruntime >=1\.31 \(compiled with 1\.31\.1\), found 1\.20\.0\. "
        r"Run: pip install 'onnxruntime>=1\.31'",
        of_target("onnx-runtime", onnxruntime="1.31.1"),
        kinds=GRAPHS,
        installed={"onnxruntime": "1.20.0"},
    ),
    "runtime too new": Refusal(
        LoadError,
        r"aot-inductor needs torch ==2\.13\.\* \(compiled with 2\.13\.0\+cpu\), found 2\.14\.0\+cpu\. "
        r"Run: pip install 'torch==2\.13\.\*'",
        of_target("aot-inductor", torch="2.13.0+cpu"),
        kinds=GRAPHS,
        installed={"torch": "2.14.0+cpu"},
    ),
    "runtime of no version": Refusal(
        ManifestError,
        "names torch 'newest', which is not a version",
        of_target("torchscript", torch="newest"),
        kinds=GRAPHS,
    ),
    "precision that the CPU lacks": Refusal(
        LoadError,
        "torchscript cannot run bf16 here: this CPU has no bf16 .*--target torchscript --precision fp32",
        of_component(precision="bf16"),
        kinds=GRAPHS,
        flags="avx2 fma",
    ),
    "feature that the CPU lacks": Refusal(
        LoadError,
        "for a CPU with avx512f, which this CPU lacks.*Compile it on a machine like this one: compileflow ",
        rewrite_manifest(lambda data: data["target"].update(cpu_features=["avx2", "avx512f"])),
        kinds=GRAPHS,
        flags="avx2 fma",
    ),
}


def attempt(load: Mapping[str, Any]) -> dict[str, str]:
    """Load as described and return the refusal; {} if the load was not refused."""
    arguments = dict(load["arguments"])
    if "buckets" in arguments:
        arguments["buckets"] = [
            ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in arguments["buckets"]
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [load["installed"], *sys.path])
        patch.setattr(cpu, "CPUINFO", Path(load["cpuinfo"]))
        try:
            getattr(compileflow, load["kind"]).from_pretrained(load["location"], **arguments)
        except CompileflowError as error:
            return {"error": type(error).__name__, "says": str(error)}
    return {}


def pretend_installed(site: Path, name: str, version: str) -> None:
    """Make a distribution look installed in that version to a process with `site` first on sys.path."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
