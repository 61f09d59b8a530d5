"""Logs of toolchains whose steps succeeded: kept in the store for the bundle of a failed validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compileflow.contracts import ArtifactStore
from compileflow.validation.bundle import LOG, without_passwords

_RECORD, _COMPILE = "log-of", "compile"


def keep_log(store: ArtifactStore, artifact_digest: str, log: str) -> None:
    """Keep what the toolchain printed while it compiled an artifact, without credentials in URIs."""
    if log:
        store.put_record(_RECORD, artifact_digest, {_COMPILE: without_passwords(log)})


def write_logs(folder: Path, store: ArtifactStore, artifact_digest: str, logs: Mapping[str, str]) -> None:
    """Write the log of the compile and further logs into a bundle.

    Args:
        folder: Folder of the bundle. Without it, the function does nothing.
        store: Store of the artifact.
        artifact_digest: Digest of the artifact.
        logs: Text of each further log, by the step that printed it.
    """
    if not folder.is_dir():
        return
    compile_log = (store.get_record(_RECORD, artifact_digest) or {}).get(_COMPILE) or ""
    parts = [
        f"== {step}\n{without_passwords(str(log)) or 'nothing was printed'}\n"
        for step, log in {_COMPILE: compile_log, **logs}.items()
    ]
    (folder / LOG).write_text("\n".join(parts), "utf-8")
