"""The S3 store under faults of the network and the server, which a proxy injects, and what each fault leaves.

The file is long because every test puts a fault between the same store and the same proxy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.response import StreamingBody
from urllib3.exceptions import SSLError

from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, SpecError, StoreError, StoreUnavailableError
from compileflow.settings import Settings, get_settings
from compileflow.stores.s3 import blob_downloads, blob_uploads
from compileflow.stores.s3 import client as s3_client
from compileflow.stores.s3.blob_uploads import BlobUploads
from compileflow.stores.s3.store import S3Store
from compileflow.testing.processes import other_process
from tests.services.fault_proxy import (
    Answer,
    Corrupt,
    CutRequest,
    CutResponse,
    Fault,
    FaultProxy,
    Hang,
    LoseReply,
)
from tests.services.moto_server import Moto, serve_moto, store_environment
from tests.services.secrets import ALL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY

MIB = 2**20
BLOBS, LISTINGS = "/blobs/", "/manifests/"
SLOW_DOWN = Answer(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
BROKEN = Answer(500, b"<Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>")


@pytest.fixture
def proxy(moto: Moto, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between the store and the server. boto3 gives up early, to keep the tests short."""
    monkeypatch.setattr(s3_client, "_ATTEMPTS", 2)
    monkeypatch.setattr(blob_downloads, "_PAUSE_S", 0.01)
    with FaultProxy(moto.url) as started:
        monkeypatch.setenv("COMPILEFLOW_S3_ENDPOINT_URL", started.url)
        get_settings.cache_clear()
        yield started


@pytest.fixture
def store(proxy: FaultProxy, bucket: str) -> S3Store:
    return S3Store(f"s3://{bucket}/p", get_settings())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "config.json").write_bytes(b"{}")
    (path / "weights").write_bytes(os.urandom(MIB))
    return path


def blob_bytes(proxy: FaultProxy, *, since: int = 0) -> int:
    """Return the number of bytes of blobs that were sent."""
    return sum(
        request.body_size for request in proxy.seen[since:] if request.method == "PUT" and BLOBS in request.path
    )


def assert_whole(store: S3Store, folder: Path, out: Path) -> None:
    """Check that the store holds only this folder, with the same bytes."""
    digest = folder_digest(list_files(folder))
    assert list(store.list()) == [digest]
    assert store.exists(digest)
    assert list_files_of(store, digest, out) == list_files(folder)


def list_files_of(store: S3Store, digest: str, out: Path) -> tuple[object, ...]:
    store.get_folder(digest, out)
    return list_files(out)


@pytest.mark.parametrize("fault", [CutRequest(MIB // 2), BROKEN, SLOW_DOWN], ids=["reset mid-body", "500", "503"])
def test_fault_that_passes_is_not_noticed(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    proxy.inject(fault, method="PUT", path=BLOBS)
    store.put_folder(folder)
    assert_whole(store, folder, tmp_path / "out")


@pytest.mark.parametrize("fault", [CutRequest(1000), BROKEN, SLOW_DOWN], ids=["reset mid-body", "500", "503"])
def test_fault_that_stays_leaves_no_listing_and_the_next_put_sends_only_missing_blobs(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    weights = next(record.sha256 for record in list_files(folder) if record.path == "weights")
    proxy.inject(fault, method="PUT", path=weights, times=2)
    with pytest.raises(StoreUnavailableError) as caught:
        store.put_folder(folder)
    assert caught.value.retryable
    assert_says_no_secret(caught.value)
    assert list(store.list()) == []
    request_count = len(proxy.seen)
    store.put_folder(folder)
    assert blob_bytes(proxy, since=request_count) <= MIB + len(b"{}")
    assert_whole(store, folder, tmp_path / "out")
    request_count = len(proxy.seen)
    store.put_folder(folder)
    assert blob_bytes(proxy, since=request_count) == 0


@pytest.mark.parametrize("path", [BLOBS, LISTINGS])
def test_lost_reply_after_a_successful_put_is_success(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, path: str
) -> None:
    proxy.inject(LoseReply(), method="PUT", path=path)
    store.put_folder(folder)
    assert_whole(store, folder, tmp_path / "out")


def test_download_that_breaks_off_goes_on_where_it_broke_off(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block counts once it is whole.
    monkeypatch.setattr(blob_downloads, "_BLOCK_BYTES", 64 * 1024)
    digest = store.put_folder(folder).digest
    weights = next(record.sha256 for record in list_files(folder) if record.path == "weights")
    proxy.inject(CutResponse(MIB // 2), method="GET", path=weights)
    ranges: list[str] = []
    store._objects.client.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: ranges.append(params["headers"].get("Range", "whole"))
    )
    assert list_files_of(store, digest, tmp_path / "out") == list_files(folder)
    assert any(byte_range.startswith("bytes=") and byte_range != "bytes=0-" for byte_range in ranges)


def test_reply_whose_encryption_breaks_is_asked_for_again(
    store: S3Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 does not translate an error that TLS finds in a body."""
    digest = store.put_folder(folder).digest
    reading, broken = StreamingBody.read, 0

    def read(self: StreamingBody, amt: int | None = None) -> bytes:
        nonlocal broken
        if broken < 2:
            broken += 1
            raise SSLError("decryption failed or bad record mac")
        return reading(self, amt)

    monkeypatch.setattr(StreamingBody, "read", read)
    assert list_files_of(store, digest, tmp_path / "out") == list_files(folder)
    assert broken == 2
    broken = -99
    with pytest.raises(StoreUnavailableError, match="SSLError"):
        store.exists(digest)


def test_download_that_always_breaks_off_leaves_nothing(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    digest = store.put_folder(folder).digest
    proxy.inject(CutResponse(100), method="GET", path=BLOBS, times=99)
    with pytest.raises(StoreUnavailableError, match="broke off"):
        store.get_folder(digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_download_that_was_spoilt_on_the_way_is_fetched_again(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    digest = store.put_folder(folder).digest
    proxy.inject(Corrupt(), method="GET", path=BLOBS)
    assert list_files_of(store, digest, tmp_path / "out") == list_files(folder)


def test_listing_that_was_spoilt_on_the_way_is_read_again(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    digest = store.put_folder(folder).digest
    for act in (
        lambda: store.exists(digest),
        lambda: list_files_of(store, digest, tmp_path / "out") == list_files(folder),
        lambda: store.put_folder(folder).digest == digest,
    ):
        proxy.inject(Corrupt(), method="GET", path=LISTINGS)
        assert act()
    assert not [request for request in proxy.seen[-3:] if request.method == "PUT"]


@pytest.mark.parametrize("opened", [True, False])
def test_wrong_bytes_are_never_served(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, *, opened: bool
) -> None:
    digest = store.put_folder(folder).digest
    proxy.inject(Corrupt(), method="GET", path=BLOBS, times=99)
    with pytest.raises(IntegrityError, match="missing or altered"):
        store.open_folder(digest).__enter__() if opened else store.get_folder(digest, tmp_path / "out")
    cached = get_settings().home_dir / "blobs"
    assert [path for path in cached.rglob("*") if path.is_file()] == []


def test_opened_folder_is_downloaded_once_and_checked_again(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    digest = store.put_folder(folder).digest

    def downloads() -> int:
        return sum(
            request.method == "GET" and BLOBS in request.path and "list-type" not in request.path
            for request in proxy.seen
        )

    for _ in range(2):
        with store.open_folder(digest) as opened:
            assert list_files(opened) == list_files(folder)
            assert (opened / "weights").stat().st_mode & 0o222 == 0
        assert downloads() == 2
    store.get_folder(digest, tmp_path / "out")
    assert downloads() == 2
    # The test may write to the fetched folder without changing the cache.
    (tmp_path / "out" / "weights").write_bytes(b"mine")
    cached = next(path for path in (get_settings().home_dir / "blobs").rglob("*") if path.stat().st_size == MIB)
    cached.chmod(0o644)
    cached.write_bytes(bytes(MIB))
    with store.open_folder(digest) as opened:
        assert list_files(opened) == list_files(folder)
    assert downloads() == 3


@pytest.mark.parametrize("size_bytes", [MIB, 12 * MIB], ids=["one PUT", "parts"])
def test_eight_writers_of_one_folder_at_once_store_it_once(
    proxy: FaultProxy,
    bucket: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size_bytes: int,
) -> None:
    (folder / "weights").write_bytes(os.urandom(size_bytes))
    stores = [in_parts(S3Store(f"s3://{bucket}/p", get_settings())) for _ in range(8)]
    with ThreadPoolExecutor(len(stores)) as threads:
        digests = set(threads.map(lambda store: store.put_folder(folder).digest, stores))
    assert digests == {folder_digest(list_files(folder))}
    assert_whole(stores[0], folder, tmp_path / "out")


def test_parts_that_arrived_are_not_sent_again(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    (folder / "weights").write_bytes(os.urandom(17 * MIB))
    in_parts(store)
    proxy.inject(BROKEN, path="partNumber=4", times=2)
    with pytest.raises(StoreUnavailableError):
        store.put_folder(folder)
    assert list(store.list()) == []
    request_count = len(proxy.seen)
    store.put_folder(folder)
    # Missing are the fourth part, which is the last one, and perhaps the small file.
    assert 2 * MIB <= blob_bytes(proxy, since=request_count) <= 2 * MIB + len(b"{}")
    assert_whole(store, folder, tmp_path / "out")


def test_lost_reply_to_the_last_request_of_an_upload_is_success(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    (folder / "weights").write_bytes(os.urandom(12 * MIB))
    in_parts(store)
    proxy.inject(LoseReply(), method="POST", path="uploadId=")
    store.put_folder(folder)
    assert_whole(store, folder, tmp_path / "out")


def test_file_that_changed_before_its_parts_were_sent_is_refused(store: S3Store, folder: Path, moto: Moto) -> None:
    (folder / "weights").write_bytes(os.urandom(12 * MIB))
    record = next(record for record in list_files(folder) if record.path == "weights")
    (folder / "weights").write_bytes(os.urandom(12 * MIB))
    with pytest.raises(StoreError, match="changed while"):
        in_parts(store)._uploads.put_file(folder / "weights", record, None, lambda size: None)
    assert not list(store._objects.list("blobs/"))
    assert "Uploads" not in moto.client().list_multipart_uploads(Bucket=store._objects.bucket)


@pytest.mark.parametrize("mebibytes", [160, pytest.param(500, marks=pytest.mark.slow)])
def test_put_that_was_killed_in_the_middle_is_resumed(
    store: S3Store, proxy: FaultProxy, moto: Moto, tmp_path: Path, mebibytes: int
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    block = os.urandom(MIB)
    with (folder / "weights").open("wb") as stream:
        for number in range(mebibytes):
            stream.write(number.to_bytes(8) + block[8:])
    size_bytes = mebibytes * MIB
    middle = size_bytes // blob_uploads.PART_BYTES // 2
    proxy.inject(Hang(600), path=f"partNumber={middle}&")
    put = ("compileflow.testing.stores:put", "compileflow.catalog:open_store", store.uri, str(folder))
    with other_process(*put) as other:
        wait_for(lambda: any(f"partNumber={middle + 2}&" in request.path for request in proxy.seen))
        assert other.kill() == []
    assert list(store.list()) == []
    assert list(store._objects.list("blobs/")) == []
    arrived = parts_bytes(moto, store)
    assert arrived >= (middle - 4) * blob_uploads.PART_BYTES
    request_count = len(proxy.seen)
    store.put_folder(folder)
    assert 0 < blob_bytes(proxy, since=request_count) <= size_bytes - arrived
    assert_whole(store, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (400, "BadDigest", "proxies and memory"),
        (403, "AccessDenied", "s3:GetObject"),
        (403, "ExpiredToken", "aws sso login --profile default"),
    ],
)
def test_refusal_is_one_line_with_a_hint(
    store: S3Store, proxy: FaultProxy, folder: Path, status: int, code: str, hint: str
) -> None:
    # The message of a server may quote the request.
    body = f"<Error><Code>{code}</Code><Message>{AWS_SECRET_ACCESS_KEY}</Message></Error>".encode()
    proxy.inject(Answer(status, body), method="PUT", path=BLOBS, times=9)
    with pytest.raises(StoreError, match=code) as caught:
        store.put_folder(folder)
    assert hint in caught.value.hint
    assert not caught.value.retryable
    assert_says_no_secret(caught.value)
    assert list(store.list()) == []


def test_missing_bucket_is_reported(bucket: str, folder: Path) -> None:
    absent = S3Store("s3://no-such-bucket/p", get_settings())
    for ask in (lambda: absent.put_folder(folder), lambda: absent.exists("0" * 64), lambda: list(absent.list())):
        with pytest.raises(StoreError, match="NoSuchBucket") as caught:
            ask()
        assert "Create the bucket" in caught.value.hint
        assert not caught.value.retryable


def test_wrong_key_and_wrong_secret_are_refused_by_a_server_that_checks_them(
    tmp_path: Path, folder: Path, settings: Settings
) -> None:
    with serve_moto(tmp_path / "moto") as moto:
        moto.make_bucket("bucket")
        key = moto.make_user_key()
        moto.check_signatures()

        def put(key_id: str, secret: str) -> None:
            fields = {
                name.removeprefix("COMPILEFLOW_").lower(): value
                for name, value in store_environment(moto.url).items()
            }
            fields |= {"s3_access_key_id": key_id, "s3_secret_access_key": secret}
            S3Store("s3://bucket/p", Settings(home=settings.home, **fields)).put_folder(folder)

        for key_id, secret, code, hint in (
            (
                key["AccessKeyId"],
                AWS_SECRET_ACCESS_KEY,
                "SignatureDoesNotMatch",
                "COMPILEFLOW_S3_SECRET_ACCESS_KEY",
            ),
            (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "InvalidAccessKeyId", "COMPILEFLOW_S3_ACCESS_KEY_ID"),
        ):
            with pytest.raises(StoreError, match=code) as caught:
                put(key_id, secret)
            assert hint in caught.value.hint
            assert not caught.value.retryable
            assert_says_no_secret(caught.value)
        put(key["AccessKeyId"], key["SecretAccessKey"])


def test_server_that_is_down_is_unavailable(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_ATTEMPTS", 1)
    for name, value in store_environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    with pytest.raises(StoreUnavailableError, match="Cannot") as caught:
        S3Store("s3://bucket/p", get_settings()).put_folder(folder)
    assert "COMPILEFLOW_S3_ENDPOINT_URL" in caught.value.hint
    assert_says_no_secret(caught.value)


def test_server_that_hangs_is_given_up(
    store: S3Store, proxy: FaultProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_READ_TIMEOUT_S", 0.3)
    proxy.inject(Hang(60), method="PUT", path=BLOBS, times=9)
    with pytest.raises(StoreUnavailableError, match="ReadTimeoutError"):
        store.put_folder(folder)
    assert list(store.list()) == []


def test_missing_credentials_and_a_missing_boto3_give_a_hint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    bare = Settings(home=settings.home, s3_endpoint_url="http://127.0.0.1:9", s3_region="us-east-1")
    with pytest.raises(StoreError, match="credentials are missing or incomplete") as caught:
        list(S3Store("s3://bucket/p", bare).list())
    assert not caught.value.retryable
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StoreError, match="boto3") as caught:
        list(S3Store("s3://bucket/p", bare).list())
    assert "compileflow[s3]" in caught.value.hint


@pytest.mark.parametrize("url", ["localhost:9000", "http://me:secret@host:1x", "ftp://host", "http://", "//host"])
def test_endpoint_that_is_not_a_url_is_refused(settings: Settings, url: str) -> None:
    wrong = settings.model_copy(update={"s3_endpoint_url": url})
    with pytest.raises(StoreError, match="COMPILEFLOW_S3_ENDPOINT_URL is not the URL of a server") as caught:
        S3Store("s3://bucket/p", wrong).exists("0" * 64)
    assert "http://host:port" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_file_that_vanishes_while_it_is_put_is_one_clear_error(
    store: S3Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: BlobUploads, path: Path) -> Any:
        path.unlink()
        return reading(self, path)

    reading = BlobUploads.read
    monkeypatch.setattr(BlobUploads, "read", read)
    with pytest.raises(StoreError, match="ENOENT"):
        store.put_folder(folder)
    assert list(store.list()) == []


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix", "s3://user:secret@bucket", "s3://b/p?versionId=1"])
def test_uri_without_a_valid_bucket_is_refused(settings: Settings, uri: str) -> None:
    with pytest.raises(SpecError, match="is not the URI of a store on S3") as caught:
        S3Store(uri, settings)
    assert "s3://bucket/prefix" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_objects_carry_encryption_tags_and_storage_class(moto: Moto, bucket: str, folder: Path) -> None:
    fields = {"s3_kms_key_id": "key", "s3_storage_class": "STANDARD_IA", "s3_tags": {"team": "a b"}}
    store = S3Store(f"s3://{bucket}/p", get_settings().model_copy(update=fields))
    digest = store.put_folder(folder).digest
    client = moto.client()
    keys = {item.key: store._objects.place(item.key) for item in store._objects.list("")}
    assert len(keys) == 3
    for key, place in keys.items():
        head = client.head_object(**place)
        assert head["SSEKMSKeyId"] == "key"
        assert client.get_object_tagging(**place)["TagSet"] == [{"Key": "team", "Value": "a b"}]
        assert head.get("StorageClass", "STANDARD") == ("STANDARD_IA" if key.startswith("blobs/") else "STANDARD")
    assert store.exists(digest)


def test_stale_uploads_are_given_up_and_young_ones_are_not(store: S3Store, proxy: FaultProxy, moto: Moto) -> None:
    client, bucket = moto.client(), store._objects.bucket
    client.create_multipart_upload(Bucket=bucket, Key="p/blobs/sha256/aa/stale")
    other = client.create_multipart_upload(Bucket=bucket, Key="elsewhere")["UploadId"]
    young = (
        b"<ListMultipartUploadsResult><Upload><Key>p/blobs/sha256/aa/stale</Key><UploadId>1</UploadId>"
        b"<Initiated>2999-01-01T00:00:00.000Z</Initiated></Upload></ListMultipartUploadsResult>"
    )
    # moto dates every upload 2010. This reply has a date in the future.
    proxy.inject(Answer(200, young, {"Content-Type": "application/xml"}), path="?uploads")
    store.gc((), min_age_s=0)
    assert [request for request in proxy.seen if request.method == "DELETE"] == []
    store.gc((), min_age_s=0)
    assert [upload["UploadId"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [other]


LOGIN_PAGE = b"<html><body>Please log in</body></html>"
OTHER_PAGE = b"<!DOCTYPE html><html><body>Please log in<br></body></html>"


def listing(bucket: str, *elements: str) -> bytes:
    return f"<ListBucketResult><Name>{bucket}</Name>{''.join(elements)}</ListBucketResult>".encode()


@pytest.mark.parametrize(
    "body",
    [
        LOGIN_PAGE,
        OTHER_PAGE,
        b"",
        b"<ListBucketResult/>",
        listing("another-bucket"),
        listing("BUCKET", "<IsTruncated>true</IsTruncated>"),
        listing("BUCKET", "<Contents><Key>p/blobs/x</Key><Size>1</Size><ETag>e</ETag></Contents>"),
    ],
    ids=["XHTML", "HTML", "empty", "nameless", "other bucket", "no next page", "no LastModified"],
)
def test_list_that_is_not_s3s_stops_a_collection(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, body: bytes
) -> None:
    digest = store.put_folder(folder).digest
    body = body.replace(b"BUCKET", store._objects.bucket.encode())
    for path in ("manifests", "blobs"):
        proxy.inject(Answer(200, body), method="GET", path=f"{path}%2Fsha256%2F&", times=2)
        with pytest.raises(StoreUnavailableError, match="does not answer like S3") as caught:
            store.gc((), min_age_s=0)
        assert proxy.url in caught.value.message
        assert_says_no_secret(caught.value)
    assert not [request for request in proxy.seen if request.method == "DELETE"]
    assert_whole(store, folder, tmp_path / "out")
    assert store.exists(digest)


@pytest.mark.parametrize(
    ("status", "page"), [(200, LOGIN_PAGE), (302, OTHER_PAGE), (403, LOGIN_PAGE), (404, OTHER_PAGE)]
)
def test_page_of_a_proxy_is_not_an_answer(
    store: S3Store, proxy: FaultProxy, folder: Path, status: int, page: bytes
) -> None:
    digest = store.put_folder(folder).digest
    for method, act in (
        ("GET", lambda: store.exists(digest)),
        ("GET", lambda: store.get_record("cache", "key")),
        ("PUT", lambda: store.put_record("cache", "key", {})),
        ("DELETE", lambda: store.delete_blob(list_files(folder)[0].sha256, min_age_s=0)),
    ):
        proxy.inject(Answer(status, page, {"Location": "/login"}), method=method, times=99)
        with pytest.raises(StoreUnavailableError, match="does not answer like S3"):
            act()
        proxy.heal()
    assert store.exists(digest)


def test_head_of_another_server_is_not_an_answer(store: S3Store, proxy: FaultProxy, folder: Path) -> None:
    proxy.inject(Answer(200), method="HEAD", times=99)
    with pytest.raises(StoreUnavailableError, match="does not answer like S3"):
        store.put_folder(folder)


def test_busy_answer_to_a_head_is_not_a_missing_key(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path
) -> None:
    proxy.inject(Answer(503), method="HEAD", times=99)
    with pytest.raises(StoreUnavailableError, match="busy"):
        store.put_folder(folder)
    proxy.heal()
    proxy.inject(Answer(503), method="HEAD")
    store.put_folder(folder)
    assert_whole(store, folder, tmp_path / "out")


@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize("body", [b"<Error><Code>PermanentRedirect</Code></Error>", b""], ids=["XML", "empty"])
def test_redirect_without_a_region_is_one_line(
    store: S3Store, proxy: FaultProxy, folder: Path, status: int, body: bytes
) -> None:
    proxy.inject(Answer(status, body), times=99)
    for act in (lambda: store.put_folder(folder), lambda: store.exists("0" * 64), lambda: list(store.list())):
        with pytest.raises(StoreError, match="Redirect") as caught:
            act()
        assert "COMPILEFLOW_S3_REGION" in caught.value.hint
        assert_says_no_secret(caught.value)


def test_put_replaces_an_altered_blob_that_was_sent_in_parts(
    store: S3Store, proxy: FaultProxy, folder: Path, tmp_path: Path, moto: Moto
) -> None:
    (folder / "weights").write_bytes(os.urandom(12 * MIB))
    in_parts(store).put_folder(folder)
    weights = next(record for record in list_files(folder) if record.path == "weights")
    place = store._objects.place(f"blobs/sha256/{weights.sha256[:2]}/{weights.sha256}")
    moto.client().put_object(Body=bytes(12 * MIB), **place)
    store.put_folder(folder)
    assert_whole(store, folder, tmp_path / "out")
    request_count = len(proxy.seen)
    store.put_folder(folder)
    assert {request.method for request in proxy.seen[request_count:] if BLOBS in request.path} == {"HEAD"}


def test_refused_replacement_of_an_altered_blob_is_not_success(
    store: S3Store, proxy: FaultProxy, folder: Path, moto: Moto
) -> None:
    store.put_folder(folder)
    weights = next(record for record in list_files(folder) if record.path == "weights")
    place = store._objects.place(f"blobs/sha256/{weights.sha256[:2]}/{weights.sha256}")
    moto.client().put_object(Body=bytes(MIB), **place)
    proxy.inject(BROKEN, method="PUT", path=weights.sha256, times=99)
    with pytest.raises(StoreUnavailableError):
        store.put_folder(folder)


def in_parts(store: S3Store) -> S3Store:
    """Let the store send parts of 5 MiB, the minimum of S3, where it would send one request."""
    store._uploads = blob_uploads.BlobUploads(store._objects, single_bytes=2 * MIB, part_bytes=5 * MIB)
    return store


def parts_bytes(moto: Moto, store: S3Store) -> int:
    """Return the size of the parts of unfinished uploads on the server."""
    client, bucket = moto.client(), store._objects.bucket
    (upload,) = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    parts = client.list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]).get("Parts", ())
    return sum(part["Size"] for part in parts)


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {timeout_s:g} s"
        time.sleep(0.02)


def assert_says_no_secret(error: BaseException) -> None:
    """Check that an error is one line without a secret or a signature."""
    text = str(error)
    assert not [secret for secret in (*ALL, AWS_ACCESS_KEY_ID, "X-Amz-Signature") if secret in text]
    assert "\n" not in str(error)
