"""A world: one home folder, store and registry, the models to compile, and what the runs acknowledged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tests.services.fault_proxy import FaultProxy
from tests.services.moto_server import Moto, store_environment

# Weights of the models. The third one is trained on while it is compiled.
MODELS = ("a", "b", "c", "c-trained")
CHANGING = "c"
WEIGHTS = "model.safetensors"
LENGTHS = range(8, 40)


@dataclass(frozen=True)
class Request:
    """What a run is asked for. The name in the registry says all of it."""

    model: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.length}"


class Objects(Protocol):
    """The objects of a store, below compileflow's code."""

    def names(self) -> list[str]:
        """Return the names of all objects, sorted."""

    def read(self, name: str) -> bytes | None:
        """Return an object; None without it."""

    def write(self, name: str, body: bytes) -> None:
        """Write an object."""

    def delete(self, name: str) -> None:
        """Delete an object."""


@dataclass(frozen=True)
class LocalObjects:
    """Files of a local store."""

    root: Path

    def names(self) -> list[str]:
        paths = (path for kind in ("blobs", "manifests", "records") for path in (self.root / kind).rglob("*"))
        return sorted(str(path.relative_to(self.root)) for path in paths if path.is_file())

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, body: bytes) -> None:
        # Another inode: the store's own may have further names in work folders.
        part = self.root / f"{name}.damage"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(body)
        part.replace(self.root / name)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class S3Objects:
    """Objects of a bucket, read and written past the faulty proxy."""

    client: Any
    bucket: str

    def names(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="p/")
        keys = (item["Key"].removeprefix("p/") for page in pages for item in page.get("Contents", ()))
        return sorted(key for key in keys if key.partition("/")[0] in ("blobs", "manifests", "records"))

    def read(self, name: str) -> bytes | None:
        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=f"p/{name}")["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return body

    def write(self, name: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"p/{name}", Body=body)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"p/{name}")


@dataclass
class World:
    """One home folder with its store and registry.

    Attributes:
        folder: Folder of everything; on a disk of its own if `can_fill`.
        is_signed: Runs sign, and trust only their own key.
        proxy: The way to the S3 server; None for a local store.
        can_fill: The folder is on a disk that may be filled.
        asked: Requests of earlier runs.
        acknowledged: Artifact digest of each version that a run printed, by name and number.
        duration_s: Seconds that a run without a fault takes.
    """

    folder: Path
    is_signed: bool
    objects: Objects
    store_uri: str
    environment: Mapping[str, str]
    proxy: FaultProxy | None
    can_fill: bool
    asked: list[Request] = field(default_factory=list)
    acknowledged: dict[tuple[str, int], str] = field(default_factory=dict)
    duration_s: float = 6.0

    @classmethod
    def make(
        cls,
        folder: Path,
        models: Path,
        *,
        is_signed: bool,
        proxy: FaultProxy | None,
        moto: Moto | None,
        can_fill: bool,
    ) -> World:
        """Make an empty world; with a proxy, its store is on S3."""
        home = folder / "home"
        (folder / "tmp").mkdir(parents=True)
        for model in MODELS:
            shutil.copytree(models / model, folder / model)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_"))},
            "PREFECT_HOME": str(home / "prefect"),
            # A busy machine is no fault.
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "400",
            "COMPILEFLOW_HOME": str(home),
            "TMPDIR": str(folder / "tmp"),
            "COMPILEFLOW_SIGNING_KEY": str(models / "key.pem") if is_signed else "",
            "COMPILEFLOW_TRUSTED_KEYS": str(models / "key.pub") if is_signed else "",
        }
        if proxy is None or moto is None:
            store = home / "store"
            return cls(folder, is_signed, LocalObjects(store), store.as_uri(), environment, None, can_fill)
        bucket = moto.make_bucket(folder.name)
        environment |= store_environment(proxy.url) | {"COMPILEFLOW_STORE_URI": f"s3://{bucket}/p"}
        objects = S3Objects(moto.client(), bucket)
        return cls(folder, is_signed, objects, f"s3://{bucket}/p", environment, proxy, can_fill)

    def request(self, random: Random, *, is_new: bool) -> Request:
        """Choose a request: a new one, or one of an earlier run."""
        if self.asked and not is_new:
            return random.choice(self.asked)
        model = random.choice(MODELS[:2])
        return Request(model, random.choice([n for n in LENGTHS if Request(model, n) not in self.asked]))

    def words(self, request: Request) -> list[str]:
        """Return the command line of a request."""
        shape = f"1x{request.length}"
        return [
            "compile", str(self.folder / request.model), "--target", "torchscript", "--bucket", shape,
            "--shape", shape, "--max-examples", "30", "--allow-warn", "--name", request.name,
            "--no-progress", "--json",
        ]  # fmt: skip

    def states(self, model: str) -> dict[str, dict[str, str]]:
        """Return the states that a model's folder had: SHA-256 of each file, by the folder of that state."""
        folders = [name for name in MODELS if name == model or (model == CHANGING and name.startswith(CHANGING))]
        return {name: _hashes(self.folder.parent / "models" / name) for name in folders}

    def listing(self, digest: str) -> dict[str, str]:
        """Return the SHA-256 of each file of a stored folder, read and hashed from the store.

        Raises:
            AssertionError: The folder or a file of it is missing or altered.
        """
        body = self.objects.read(f"manifests/sha256/{digest}.json")
        assert body is not None, f"the folder {digest[:12]} is lost"
        assert hashlib.sha256(body).hexdigest() == digest, f"the listing {digest[:12]} was altered"
        hashes = {}
        for record in json.loads(body)["files"]:
            sha256 = record["sha256"]
            blob = self.objects.read(f"blobs/sha256/{sha256[:2]}/{sha256}")
            assert blob is not None, f"the blob of {record['path']} in {digest[:12]} is lost"
            assert hashlib.sha256(blob).hexdigest() == sha256, f"{record['path']} in {digest[:12]} was altered"
            assert len(blob) == record["size_bytes"]
            hashes[record["path"]] = sha256
        return hashes

    def read_file(self, digest: str, path: str) -> bytes:
        """Return a file of a stored folder."""
        sha256 = self.listing(digest)[path]
        body = self.objects.read(f"blobs/sha256/{sha256[:2]}/{sha256}")
        assert body is not None
        return body


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
