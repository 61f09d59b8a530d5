"""Files that a registered version only refers to: they lie in S3, and the registry knows where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from compileflow._process.folders import os_errors
from compileflow.errors import SourceError, SourceUnavailableError, StoreError, StoreUnavailableError
from compileflow.settings import Settings
from compileflow.stores.s3.client import make_client
from compileflow.stores.s3.errors import s3_errors


@dataclass(frozen=True)
class TrackedFile:
    """One file as the registry knows it.

    Attributes:
        path: Path of the file, relative to what was tracked.
        location: s3://bucket/key.
        etag: ETag of the object when it was tracked.
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
    try:
        client = make_client(settings)
        for file, dest in files:
            _download(client, file, dest, place)
    except StoreUnavailableError as error:
        raise SourceUnavailableError(error.message, hint=error.hint) from error
    except StoreError as error:
        raise SourceError(error.message, hint=error.hint) from error


def _download(client: object, file: TrackedFile, dest: Path, place: str) -> None:
    url = urlsplit(file.location)
    if url.scheme != "s3" or not url.netloc:
        raise SourceError(
            f"{place} tracks {file.path!r} at {file.location or 'no location'}, which is not in S3.",
            hint="Track files at s3://bucket/key, or upload them to the version.",
        )
    with s3_errors(f"s3://{url.netloc}", f"read {url.path.lstrip('/')} from"):
        answer = client.get_object(Bucket=url.netloc, Key=url.path.lstrip("/"))  # type: ignore[attr-defined]
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
