"""Objects of a bucket below a prefix: list them, tell their age, read and write small ones."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from compileflow.settings import Settings
from compileflow.stores.layout import MOST_LISTING_BYTES, MOST_RECORD_BYTES
from compileflow.stores.s3.client import make_client, object_arguments
from compileflow.stores.s3.errors import BUSY_STATUSES, code_of, s3_errors, status_of

# S3 copies larger objects only in parts.
_COPY_BYTES = 5 * 2**30
_READ_ATTEMPTS = 3
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class S3Object:
    """An existing object.

    Attributes:
        key: Key of the object, relative to the store.
        size_bytes: Size of the object.
        age_s: Seconds since the object was put, by the server's clock, with a resolution of one second.
        etag: ETag for conditional requests.
    """

    key: str
    size_bytes: int
    age_s: float
    etag: str


class S3Objects:
    """Access to the objects of a store, by keys relative to it. Several threads may share it.

    Args:
        uri: URI of the store, for errors.
        bucket: Name of the bucket.
        prefix: "" or a path that ends with a slash.
        settings: Settings that name the server and the credentials.
    """

    def __init__(self, uri: str, *, bucket: str, prefix: str, settings: Settings):
        self.uri = uri
        self.bucket = bucket
        self.prefix = prefix
        self.settings = settings
        self._client: Any = None
        self._client_lock = threading.Lock()

    @property
    def client(self) -> Any:
        """The boto3 client, which is created on first use."""
        with self._client_lock:
            if self._client is None:
                self._client = make_client(self.settings, bucket=self.bucket)
            return self._client

    def place(self, key: str) -> dict[str, str]:
        """Return the boto3 arguments that name an object."""
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def head(self, key: str) -> S3Object | None:
        """Return an object's size, age and ETag; None if it does not exist."""
        from botocore.exceptions import ClientError

        with s3_errors(self.uri, "read"):
            try:
                reply = self.client.head_object(**self.place(key))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                if status_of(error) not in BUSY_STATUSES:
                    self._raise_reason(key)
                raise
        return S3Object(key, reply["ContentLength"], _age(reply["LastModified"], reply), reply["ETag"])

    def _raise_reason(self, key: str) -> None:
        """Raise the reason that only a GET tells after a HEAD has failed: the key id, the secret or rights."""
        from botocore.exceptions import ClientError

        try:
            self.client.get_object(**self.place(key))["Body"].close()
        except ClientError as error:
            if code_of(error) != "NoSuchKey":
                raise

    def sha256_checksum(self, key: str) -> str | None:
        """Return the SHA-256 that the server keeps of an object, in base64; None without one.

        The checksum of an object that was sent in parts ends with "-" and the number of its parts.
        """
        from botocore.exceptions import ClientError

        with s3_errors(self.uri, "read"):
            try:
                reply = self.client.head_object(ChecksumMode="ENABLED", **self.place(key))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise
        checksum: str | None = reply.get("ChecksumSHA256")
        return checksum

    def list(self, prefix: str) -> Iterator[S3Object]:
        """Yield all objects whose key starts with `prefix`, sorted by key."""
        token: str | None = None
        while True:
            page, token = self.page(prefix, token)
            yield from page
            if token is None:
                return

    def page(self, prefix: str, token: str | None = None) -> tuple[tuple[S3Object, ...], str | None]:
        """Return up to 1000 objects with one request, and the token of the next page; None after the last one."""
        arguments = {"ContinuationToken": token} if token else {}
        with s3_errors(self.uri, "list"):
            reply = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **arguments)
        page = tuple(
            S3Object(
                entry["Key"].removeprefix(self.prefix),
                entry["Size"],
                _age(entry["LastModified"], reply),
                entry["ETag"],
            )
            for entry in reply.get("Contents", ())
        )
        return page, reply.get("NextContinuationToken")

    def read(self, key: str, *, most_bytes: int = MOST_RECORD_BYTES) -> tuple[bytes, S3Object] | None:
        """Return the content of a small object; None if it does not exist.

        Of an object of over `most_bytes`, only the beginning is returned, of over `most_bytes` as well.
        """
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        with s3_errors(self.uri, "read"):
            for attempt in range(_READ_ATTEMPTS):
                try:
                    reply = self.client.get_object(**self.place(key))
                    body = _body(reply, most_bytes)
                except ClientError as error:
                    if code_of(error) == "NoSuchKey":
                        return None
                    raise
                except (BotoCoreError, HTTPError):
                    # boto3 retries only until the body begins.
                    if attempt + 1 == _READ_ATTEMPTS:
                        raise
                else:
                    return body, S3Object(key, len(body), _age(reply["LastModified"], reply), reply["ETag"])
        raise AssertionError("the last attempt returns or raises")

    def read_checked(self, key: str, is_right: Callable[[bytes], bool]) -> tuple[bytes, S3Object] | None:
        """Return the content of a listing. Wrong bytes are read once more: the way may have damaged them."""
        content = self.read(key, most_bytes=MOST_LISTING_BYTES)
        if content is None or is_right(content[0]):
            return content
        return self.read(key, most_bytes=MOST_LISTING_BYTES)

    def write(self, key: str, body: bytes) -> None:
        """Put a small object, whether or not one exists."""
        with s3_errors(self.uri, "write to"):
            self.client.put_object(**self._put_arguments(key, body))

    def write_if(self, key: str, body: bytes, *, etag: str | None) -> str | None:
        """Put a small object if the existing one is as expected; return the new ETag, or None if it is not.

        A refusal may be due to our own earlier request; see lost_replies.py.

        Args:
            key: Key of the object.
            body: New content.
            etag: ETag of the expected object; None if no object is expected.
        """
        from botocore.exceptions import ClientError

        with s3_errors(self.uri, "write to"):
            try:
                reply = self.client.put_object(**self._put_arguments(key, body), **expecting(etag))
            except ClientError as error:
                if is_conflict(error):
                    return None
                raise
        return str(reply["ETag"])

    def _put_arguments(self, key: str, body: bytes) -> dict[str, Any]:
        checksum = {"ChecksumSHA256": b64encode(hashlib.sha256(body).digest()).decode()}
        return {"Body": body} | self.place(key) | checksum | object_arguments(self.settings, blob=False)

    def delete(self, key: str, *, etag: str | None = None) -> bool:
        """Delete an object. With an ETag, delete it only if it still has that ETag, and say whether it had."""
        from botocore.exceptions import ClientError

        condition = {"IfMatch": etag} if etag else {}
        with s3_errors(self.uri, "delete from"):
            try:
                self.client.delete_object(**self.place(key), **condition)
            except ClientError as error:
                if is_conflict(error):
                    return False
                raise
        return True

    def refresh(self, existing_object: S3Object, *, blob: bool) -> bool:
        """Reset the age of an object, by a copy onto itself on the server; False if it does not exist any more."""
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import ClientError

        # S3 refuses a copy onto itself that changes nothing. Replacing empty metadata counts as a change.
        arguments = object_arguments(self.settings, blob=blob) | {"MetadataDirective": "REPLACE"}
        if "Tagging" in arguments:
            arguments["TaggingDirective"] = "REPLACE"
        place = self.place(existing_object.key)
        config = TransferConfig(multipart_threshold=_COPY_BYTES, preferred_transfer_client="classic")
        with s3_errors(self.uri, "write to"):
            try:
                self.client.copy(place, place["Bucket"], place["Key"], ExtraArgs=arguments, Config=config)
            except ClientError as error:
                if status_of(error) == 404 and code_of(error) != "NoSuchBucket":
                    return False
                raise
        return True

    def abort_uploads(self, prefix: str, *, min_age: timedelta) -> None:
        """Abort old multipart uploads, because the provider charges for their parts."""
        with s3_errors(self.uri, "collect garbage in"):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                if datetime.now(UTC) - upload["Initiated"] > min_age:
                    place = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self.client.abort_multipart_upload(**place)


def expecting(etag: str | None) -> dict[str, str]:
    """Return the condition of a write: the object has this ETag, or with None, no object exists."""
    return {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}


def is_conflict(error: Any) -> bool:
    """Say whether a ClientError means that the object is not as the condition of the request expects."""
    return status_of(error) in (409, 412) or code_of(error) == "NoSuchKey"


def _body(reply: Any, most_bytes: int) -> bytes:
    """Return the body of a reply, or its beginning if that is longer than `most_bytes`."""
    body = bytearray()
    with closing(reply["Body"]) as stream:
        # boto3 checks the length and the checksum when it has read the end.
        while len(body) <= most_bytes and (block := stream.read(_BLOCK_BYTES)):
            body += block
    return bytes(body)


def _age(modified: datetime, reply: Any) -> float:
    """Return an age in seconds by the server's clock, because the clock of this machine may differ."""
    server_time = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, (server_time - modified).total_seconds())
