"""Files that a registered version only refers to: they lie in S3, and the registry knows where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compileflow._process.folders import os_errors
from compileflow.errors import SourceError, SourceUnavailableError, StoreError, StoreUnavailableError
from compileflow.settings import Settings
from compileflow.stores.s3.client import make_client
from compileflow.stores.s3.errors import s3_errors

SCHEME = "s3://"


@dataclass(frozen=True)
class TrackedFile:
    """One file as the registry knows it.

    Attributes:
        path: Path of the file, relative to what was tracked.
        location: s3://bucket/key.
        etag: ETag of the object when it was tracked; "" if the registry does not know it.
    """

    path: str
    location: str
    etag: str


def download_tracked(files: Sequence[tuple[TrackedFile, Path]], settings: Settings, place: str) -> None:
    """Download tracked files from S3.

    Args:
        files: The files, each with the path to write to.
        settings: Endpoint, region and credentials of S3.
        place: Name of the version, for errors.

    Raises:
        SourceError: A file is not in S3, is gone, or was replaced since it was tracked.
        SourceUnavailableError: S3 did not answer.
    """
    if not files:
        return
    with _source_errors():
        client = make_client(settings)
        for file, dest in files:
            _download(client, file, dest, place)


def objects_at(location: str, settings: Settings) -> list[TrackedFile]:
    """Return the object at s3://bucket/key, or the objects below that prefix.

    Raises:
        SourceError: There is none, or S3 refuses to list the bucket.
        SourceUnavailableError: S3 did not answer.
    """
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    prefix = key.rstrip("/")
    with _source_errors(), s3_errors(f"{SCHEME}{bucket}", f"list {prefix} in"):
        client = make_client(settings, bucket=bucket)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [entry for page in pages for entry in page.get("Contents", ())]
    files = [
        TrackedFile(
            path=entry["Key"][len(prefix) :].lstrip("/") or PurePosixPath(prefix).name,
            location=f"{SCHEME}{bucket}/{entry['Key']}",
            etag=entry["ETag"].strip('"'),
        )
        for entry in objects
        if entry["Key"] == prefix or entry["Key"].startswith(f"{prefix}/")
    ]
    if not files:
        raise SourceError(f"{location} does not exist.", hint="Restore the object, or register the version again.")
    return files


@contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except StoreUnavailableError as error:
        raise SourceUnavailableError(error.message, hint=error.hint) from error
    except StoreError as error:
        raise SourceError(error.message, hint=error.hint) from error


def _download(client: Any, file: TrackedFile, dest: Path, place: str) -> None:
    bucket, _, key = file.location.removeprefix(SCHEME).partition("/")
    if not file.location.startswith(SCHEME) or not bucket or not key:
        raise SourceError(
            f"{place} tracks {file.path!r} at {file.location or 'no location'}, which is not in S3.",
            hint="Track files at s3://bucket/key, or upload them to the version.",
        )
    with s3_errors(f"{SCHEME}{bucket}", f"read {key} from"):
        answer = client.get_object(Bucket=bucket, Key=key)
        if file.etag and answer["ETag"].strip('"') != file.etag:
            raise SourceError(
                f"{file.location} was replaced since {place} tracks it: its ETag is {answer['ETag']}, expected "
                f"{file.etag!r}.",
                hint="Register the version again, or restore the object.",
            )
        with os_errors(dest, "download to"):
            dest.parent.mkdir(parents=True, exist_ok=True)
            with dest.open("xb") as stream:
                for chunk in answer["Body"].iter_chunks(1 << 20):
                    stream.write(chunk)
