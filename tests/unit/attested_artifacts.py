"""Key pairs, artifacts of a few bytes, and statements about them. Nothing here compiles or imports a runtime."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import SecretStr

from compileflow.artifact.attestations.envelopes import seal, write_bundle
from compileflow.artifact.attestations.keys import load_public_keys, load_signer
from compileflow.artifact.attestations.statements import (
    CompileRun,
    Outcome,
    ValidationRun,
    provenance_statement,
    verdict_statement,
)
from compileflow.artifact.manifest import (
    ArtifactManifest,
    SourceRecord,
    TargetRecord,
    artifact_files,
    read_manifest,
)
from compileflow.catalog import open_store
from compileflow.contracts import ComponentRecord, TensorRecord, VersionEntry
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.settings import Settings
from compileflow.spec import CompileSpec, HfTask
from compileflow.testing.registries import version_entry

SOURCE, REPORT, REQUEST = "5" * 64, "7" * 64, "4" * 64
RUN = CompileRun(
    invocation_id="run-1",
    started=datetime(2026, 3, 5, 12, 0, 0, tzinfo=UTC),
    finished=datetime(2026, 3, 5, 12, 1, 30, tzinfo=UTC),
    threads=2,
    request_digest=REQUEST,
)
Envelope = dict[str, Any]


@dataclass(frozen=True)
class Keys:
    """A key pair as PEM files."""

    private: Path
    public: Path
    password: str | None = None

    @property
    def settings(self) -> Settings:
        secret = SecretStr(self.password) if self.password else None
        return Settings(signing_key=self.private, signing_key_password=secret)

    @property
    def signer(self) -> Any:
        return load_signer(self.settings)

    @property
    def trusted(self) -> tuple[Any, ...]:
        return load_public_keys([self.public])

    @property
    def id(self) -> str:
        return str(self.trusted[0].keyid)


def make_keys(folder: Path, name: str = "key", *, kind: str = "ed25519", password: str | None = None) -> Keys:
    """Write a new key pair below an existing folder."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    makers: Mapping[str, Callable[[], Any]] = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    }
    key = makers[kind]()
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub", password)
    keys.private.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    keys.private.chmod(0o600)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    keys.public.write_bytes(key.public_key().public_bytes(pem, public))
    return keys


def small_artifact(folder: Path, *, source: str = SOURCE, graph: bytes = b"graph") -> Path:
    """Write an artifact that verifies, although no runtime could load it."""
    (folder / "default").mkdir(parents=True)
    (folder / "default" / "model.onnx").write_bytes(graph)
    tensor = TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence"))
    ArtifactManifest(
        spec=CompileSpec(target="onnx-runtime", hf_task=HfTask.TEXT_CLASSIFICATION),
        source=SourceRecord(uri="hf://a/b", revision="c" * 40, digest=source, architecture="BertModel"),
        target=TargetRecord(
            name="onnx-runtime",
            version=3,
            toolchain={"onnx": "1.21.0", "torch_blade": "0.2.0+cpu"},
            cpu_features=("avx2",),
        ),
        components={
            "default": ComponentRecord(
                folder="default",
                inputs=(tensor,),
                outputs=(tensor,),
                output_class="transformers.modeling_outputs:SequenceClassifierOutput",
                max_sequence_length=64,
                dynamic_axes=True,
            )
        },
        files=list_files(folder),
    ).write(folder)
    return folder


def stored_entry(settings: Settings, name: str, *, number: int = 1) -> VersionEntry:
    """Store a small artifact in the configured store and return an entry of it; `number` determines its digest."""
    with TemporaryDirectory() as temporary:
        folder = small_artifact(Path(temporary) / "artifact", graph=f"graph {number}".encode())
        stored_folder = open_store(settings.resolved_store_uri(), settings).put_folder(folder)
        manifest = read_manifest(folder)
    return version_entry(name, number).model_copy(
        update={
            "artifact_uri": stored_folder.uri,
            "artifact_digest": stored_folder.digest,
            "source_digest": manifest.source.digest,
            "spec": manifest.spec.model_dump(mode="json"),
        }
    )


def digest_of(folder: Path) -> str:
    return folder_digest(artifact_files(folder))


def judged(outcome: Outcome = "pass", *, source: str = SOURCE, report: str = REPORT) -> ValidationRun:
    gates: dict[str, Outcome] = {"finite_outputs": "pass", "rel_l2": outcome}
    uri = f"file:///store/manifests/sha256/{report}.json"
    return ValidationRun(outcome, gates, "6" * 64, source, report, uri, REQUEST, RUN.finished)


def envelopes_for(
    folder: Path, keys: Keys | None, *, outcome: Outcome = "pass", source: str | None = None, report: str = REPORT
) -> list[Envelope]:
    """Return what a run would write: provenance and verdict about the artifact in `folder`."""
    manifest, digest = read_manifest(folder), digest_of(folder)
    signer = keys.signer if keys is not None else None
    verdict = judged(outcome, source=source or manifest.source.digest, report=report)
    return [
        dict(seal(provenance_statement(manifest, digest, RUN), signer)),
        dict(seal(verdict_statement(digest, verdict), signer)),
    ]


def attest(folder: Path, keys: Keys | None, **options: Any) -> None:
    """Write provenance and verdict beside an artifact's files, as a run would."""
    write_bundle(folder, envelopes_for(folder, keys, **options))


def statement_of(envelope: Mapping[str, Any]) -> dict[str, Any]:
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return statement


def altered(envelope: Mapping[str, Any], old: str, new: str) -> Envelope:
    """Change the payload of an envelope but keep the signatures."""
    text = base64.b64decode(envelope["payload"]).decode()
    assert text.count(old) == 1, text
    return {**envelope, "payload": base64.b64encode(text.replace(old, new).encode()).decode()}


def signed_by_both(envelope: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> Envelope:
    """Join the signatures of several envelopes around one payload."""
    signatures = [signature for item in (envelope, *others) for signature in item["signatures"]]
    return {**envelope, "signatures": signatures}
