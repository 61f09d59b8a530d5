"""Objects of a bucket below a prefix: what is there and how old by the server's clock, small reads and writes."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from compileflow.settings import Settings
from compileflow.stores.s3.client import code_of, make_client, object_arguments, s3_errors, status_of

# Larger ones can only be copied in parts.
_COPY_BYTES = 5 * 2**30
CONFLICTS = (409, 412)


@dataclass(frozen=True)
class Found:
    """An object that is there.

    Attributes:
        key: Its place, relative to the store.
        size_bytes: Its size.
        age_s: Seconds since it was put, by the server's clock, to the second.
        etag: What a conditional request names it by.
    """

    key: str
    size_bytes: int
    age_s: float
    etag: str


class S3Objects:
    """Keys are relative to the store. Safe to use from several threads; nothing is asked before the first call.

    Args:
        uri: The store's URI, for errors.
        bucket: Name of the bucket.
        prefix: "" or a path that ends with a slash.
        settings: Where the server is, and how to talk to it.
    """

    def __init__(self, uri: str, *, bucket: str, prefix: str, settings: Settings):
        self.uri = uri
        self.bucket = bucket
        self.prefix = prefix
        self.settings = settings
        self._client: Any = None
        self._making = threading.Lock()

    @property
    def client(self) -> Any:
        """The boto3 client, made when it is first needed."""
        with self._making:
            if self._client is None:
                self._client = make_client(self.settings)
            return self._client

    def place(self, key: str) -> dict[str, str]:
        """Return how boto3 names an object."""
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def head(self, key: str) -> Found | None:
        """Look whether an object is there."""
        from botocore.exceptions import ClientError

        with s3_errors(self.uri, "read"):
            try:
                reply = self.client.head_object(**self.place(key))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                # A HEAD has no body to say whether it is the key, the secret or the rights; the same as a GET has.
                self.client.get_object(**self.place(key))["Body"].close()
                raise
        return Found(key, reply["ContentLength"], _age(reply["LastModified"], reply), reply["ETag"])

    def list(self, below: str) -> Iterator[Found]:
        """Yield all objects whose key starts with `below`, by key."""
        following: str | None = None
        while True:
            found, following = self.page(below, following)
            yield from found
            if following is None:
                return

    def page(self, below: str, following: str | None = None) -> tuple[tuple[Found, ...], str | None]:
        """Return up to 1000 objects with one request, and what gives the next page, or None."""
        more = {"ContinuationToken": following} if following else {}
        with s3_errors(self.uri, "list"):
            reply = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + below, **more)
        found = tuple(
            Found(one["Key"].removeprefix(self.prefix), one["Size"], _age(one["LastModified"], reply), one["ETag"])
            for one in reply.get("Contents", ())
        )
        return found, reply.get("NextContinuationToken")

    def read(self, key: str) -> tuple[bytes, Found] | None:
        """Read a small object whole; None when it is not there."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        tries = 3
        with s3_errors(self.uri, "read"):
            while True:
                try:
                    reply = self.client.get_object(**self.place(key))
                    body = reply["Body"].read()
                except ClientError as error:
                    if code_of(error) == "NoSuchKey":
                        return None
                    raise
                except (BotoCoreError, HTTPError):
                    # boto3 itself tries again only until the body begins.
                    tries -= 1
                    if tries == 0:
                        raise
                else:
                    return body, Found(key, len(body), _age(reply["LastModified"], reply), reply["ETag"])

    def write(self, key: str, body: bytes) -> None:
        """Put a small object, whatever was there."""
        with s3_errors(self.uri, "write to"):
            self.client.put_object(**self._put_arguments(key, body))

    def write_if(self, key: str, body: bytes, *, etag: str | None) -> str | None:
        """Put a small object if it is as we last saw it; return its new ETag, or None when it is not.

        Args:
            key: Its place.
            body: What it shall hold.
            etag: What was seen; None: that nothing was there.
        """
        from botocore.exceptions import ClientError

        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        with s3_errors(self.uri, "write to"):
            try:
                return str(self.client.put_object(**self._put_arguments(key, body), **condition)["ETag"])
            except ClientError as error:
                if status_of(error) in CONFLICTS or code_of(error) == "NoSuchKey":
                    return None
                raise

    def _put_arguments(self, key: str, body: bytes) -> dict[str, Any]:
        checksum = {"ChecksumSHA256": b64encode(hashlib.sha256(body).digest()).decode()}
        return {"Body": body} | self.place(key) | checksum | object_arguments(self.settings, blob=False)

    def delete(self, key: str, *, etag: str | None = None) -> bool:
        """Delete an object, if it has that ETag when one is given, and say whether it was so."""
        from botocore.exceptions import ClientError

        condition = {"IfMatch": etag} if etag else {}
        with s3_errors(self.uri, "delete from"):
            try:
                self.client.delete_object(**self.place(key), **condition)
            except ClientError as error:
                if status_of(error) in CONFLICTS or code_of(error) == "NoSuchKey":
                    return False
                raise
        return True

    def refresh(self, found: Found, *, blob: bool) -> bool:
        """Make an object young again by copying it onto itself, in the server; False when it has gone."""
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import ClientError

        # A copy onto itself is refused unless it changes something; replacing no metadata by none counts.
        arguments = object_arguments(self.settings, blob=blob) | {"MetadataDirective": "REPLACE"}
        if "Tagging" in arguments:
            arguments["TaggingDirective"] = "REPLACE"
        place = self.place(found.key)
        config = TransferConfig(multipart_threshold=_COPY_BYTES, preferred_transfer_client="classic")
        with s3_errors(self.uri, "write to"):
            try:
                self.client.copy(place, place["Bucket"], place["Key"], ExtraArgs=arguments, Config=config)
            except ClientError as error:
                if status_of(error) == 404 and code_of(error) != "NoSuchBucket":
                    return False
                raise
        return True

    def abort_uploads(self, below: str, *, min_age: timedelta) -> None:
        """Give up the multipart uploads that were begun so long ago: their parts cost as objects do."""
        with s3_errors(self.uri, "collect garbage in"):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.prefix + below
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                if datetime.now(UTC) - upload["Initiated"] > min_age:
                    place = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self.client.abort_multipart_upload(**place)


def _age(modified: datetime, reply: Any) -> float:
    """Return seconds by the server's own clock, which this machine's need not agree with."""
    now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, (now - modified).total_seconds())
