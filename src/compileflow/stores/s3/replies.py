"""Check that replies are S3's own. A proxy's login page that counts as an empty listing would empty a store.

A reply that is not S3's becomes the error of a failing server, which boto3 retries, with a code of our own.
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

NOT_S3 = "NotS3"
_BAD_GATEWAY = 502
# A load balancer sends these with a page of its own. They say that the server is busy, whatever the page is.
_BUSY_STATUSES = (429, 502, 503, 504)
# S3 explains every other refusal in XML. Some servers leave these unexplained.
_UNEXPLAINED_STATUSES = (301, 302, 304, 307, 308, 409, 412)
_ROOTS = {
    "ListObjectsV2": "ListBucketResult",
    "ListMultipartUploads": "ListMultipartUploadsResult",
    "ListParts": "ListPartsResult",
    "CreateMultipartUpload": "InitiateMultipartUploadResult",
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
    "CopyObject": "CopyObjectResult",
    "UploadPartCopy": "CopyPartResult",
}
_HEADERS = {
    "HeadObject": ("ETag", "Content-Length", "Date", "Last-Modified"),
    "GetObject": ("ETag", "Date", "Last-Modified"),
    "ListObjectsV2": ("Date",),
    "PutObject": ("ETag",),
    "UploadPart": ("ETag",),
}
_EMPTY = ("DeleteObject", "AbortMultipartUpload")
_ENTRY_FIELDS = ("Key", "LastModified", "ETag", "Size")


def replace_foreign_reply(
    operation_model: Any, response_dict: dict[str, Any], *, bucket: str | None, server: str, **_: Any
) -> None:
    """Replace a reply that is not S3's by an error with the code NOT_S3. For boto3's event `before-parse`.

    Args:
        operation_model: botocore's model of the request.
        response_dict: Status, headers and body of the reply.
        bucket: Bucket that the requests name; None if there are several.
        server: Address of the server, which becomes the message of the error.
    """
    try:
        _check(operation_model.name, response_dict, bucket)
    except (ValueError, TypeError, ElementTree.ParseError):
        if hasattr(response_dict["body"], "close"):
            response_dict["body"].close()
        response_dict["status_code"] = _BAD_GATEWAY
        response_dict["body"] = f"<Error><Code>{NOT_S3}</Code><Message>{escape(server)}</Message></Error>".encode()


def _check(operation: str, reply: dict[str, Any], bucket: str | None) -> None:
    status, headers, body = reply["status_code"], reply["headers"], reply["body"]
    if status in _BUSY_STATUSES:
        return
    if status >= 300:
        if not operation.startswith("Head") and (body or status not in _UNEXPLAINED_STATUSES):
            _parse(body, "Error")
        return
    names = _HEADERS.get(operation, ())
    _demand(all(headers.get(name) for name in names))
    for name in ("Date", "Last-Modified"):
        if name in names:
            _demand(parsedate_to_datetime(headers[name]).tzinfo is not None)
    if operation in _EMPTY:
        _demand(not body)
    elif operation in _ROOTS:
        _check_result(_parse(body, _ROOTS[operation]), operation, bucket)


def _check_result(fields: dict[str, list[ElementTree.Element]], operation: str, bucket: str | None) -> None:
    buckets = {element.text for name in ("Name", "Bucket") for element in fields.get(name, ())}
    # AWS may give the bucket's own name where the request gave the alias of an access point.
    _demand(bucket is None or buckets <= {bucket} or bucket.endswith("-s3alias"))
    if operation == "CopyObject":
        _demand("ETag" in fields)
    if operation == "ListObjectsV2":
        _demand(bool(buckets))
        is_truncated = any(element.text == "true" for element in fields.get("IsTruncated", ()))
        _demand(not is_truncated or "NextContinuationToken" in fields)
        for entry in fields.get("Contents", ()):
            values = {_local_name(element): element.text for element in entry}
            _demand(all(values.get(name) for name in _ENTRY_FIELDS))


def _parse(body: bytes, root: str) -> dict[str, list[ElementTree.Element]]:
    """Return the elements below the root by their names."""
    # botocore parses the same bytes with the same parser.
    element = ElementTree.fromstring(body)  # noqa: S314
    # Some servers write "ListPartsResponse".
    _demand(_local_name(element) in (root, root.replace("Result", "Response")))
    fields: dict[str, list[ElementTree.Element]] = {}
    for child in element:
        fields.setdefault(_local_name(child), []).append(child)
    return fields


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _demand(is_met: bool) -> None:
    if not is_met:
        raise ValueError("the reply is not S3's")
