"""How fast do 500 MB in 250 files upload to S3 and download again, compared with boto3? JSON on standard output.

python benchmarks/exp_s3_throughput.py [--megabytes N] [--files N] [--rounds N] [--latency-ms N]

The baseline calls boto3's upload_file and download_file with their defaults, one file after another; the store
transfers the folder. Both talk in turn to moto's server, a process on this machine, so that other load affects
both. The store also hashes each file before the upload and after the download, and never sends the same bytes
twice. Each request waits at the server, as with a remote one: AWS states 100 to 200 ms for small objects
(Optimizing Amazon S3 performance, S3 user guide); the default here is a tenth of that. With --latency-ms 0, two
processes compete for two cores, and the server's work takes most of the time. The table shows MB/s (10^6 bytes)
and the median, over the rounds, of the ratio of the times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import print_rows
from compileflow.catalog import open_store
from compileflow.settings import Settings
from compileflow.validation.report import environment
from tests.services.moto_server import Moto, serve_moto, store_environment

STORE, BOTO3 = "store", "boto3, one file after another"
# Smallest accepted ratio, for upload and download.
LIMIT = 2.0


def make_files(folder: Path, count: int, size_bytes: int) -> None:
    """Write random files with log-normal sizes, similar to those of models; the same files in every run."""
    random = np.random.default_rng(5)
    shares = random.lognormal(sigma=1.0, size=count)
    sizes = np.maximum(1, shares / shares.sum() * size_bytes).astype(int)
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:04}.bin").write_bytes(random.bytes(int(size)))


def race(moto: Moto, folder: Path, work: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Let both upload and download the folder in turn; return seconds by contestant and direction."""
    times: dict[str, dict[str, list[float]]] = {name: {"up": [], "down": []} for name in (STORE, BOTO3)}
    contestants: dict[str, Callable[[], Any]] = {STORE: _store, BOTO3: _boto3}
    for number in range(rounds):
        # The order changes every round.
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            with _bucket(moto, f"round-{number}-{name[:5]}") as bucket:
                send, fetch = contestants[name](moto, bucket, folder, work / "home")
                began = time.perf_counter()
                send()
                sent = time.perf_counter()
                fetch(work / "out")
                times[name]["down"].append(time.perf_counter() - sent)
                times[name]["up"].append(sent - began)
            _check_same(folder, work / "out")
            shutil.rmtree(work / "out")
    return times


def _store(moto: Moto, bucket: str, folder: Path, home: Path) -> tuple[Callable[[], Any], Callable[[Path], Any]]:
    fields = {
        name.removeprefix("COMPILEFLOW_").lower(): value for name, value in store_environment(moto.url).items()
    }
    store = open_store(f"s3://{bucket}/store", Settings(home=home, **fields))
    return lambda: store.put_folder(folder), lambda out: store.get_folder(next(store.list()), out)


def _boto3(moto: Moto, bucket: str, folder: Path, home: Path) -> tuple[Callable[[], Any], Callable[[Path], Any]]:
    import boto3

    fields = store_environment(moto.url)
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=moto.url,
        region_name="us-east-1",
        aws_access_key_id=fields["COMPILEFLOW_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=fields["COMPILEFLOW_S3_SECRET_ACCESS_KEY"],
    )
    names = sorted(path.name for path in folder.iterdir())

    def send() -> None:
        for name in names:
            client.upload_file(str(folder / name), bucket, name)

    def fetch(out: Path) -> None:
        out.mkdir()
        for name in names:
            client.download_file(bucket, name, str(out / name))

    return send, fetch


@contextmanager
def _bucket(moto: Moto, name: str) -> Iterator[str]:
    """Create an empty bucket, and delete its objects afterwards to free the server's memory."""
    client = moto.client()
    bucket = moto.make_bucket(name.replace(",", ""))
    yield bucket
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        client.delete_objects(
            Bucket=bucket, Delete={"Objects": [{"Key": entry["Key"]} for entry in page["Contents"]]}
        )


def _check_same(folder: Path, out: Path) -> None:
    for path in folder.iterdir():
        if path.read_bytes() != (out / path.name).read_bytes():
            raise SystemExit(f"{path.name} was downloaded with other bytes")


def main() -> None:
    """Send, fetch and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--files", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--latency-ms", type=float, default=10.0, help="time that each request waits at the server"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_files(work / "folder", arguments.files, int(arguments.megabytes * 1e6))
        size_bytes = sum(path.stat().st_size for path in (work / "folder").iterdir())
        with serve_moto(work / "moto", latency_s=arguments.latency_ms / 1e3) as moto:
            times = race(moto, work / "folder", work, arguments.rounds)
    machine = environment(1) | {"cpu_count": os.cpu_count()}
    machine |= {name: version(name) for name in ("boto3", "moto")}
    rows = {
        name: {f"{way}_mb_per_s": size_bytes / 1e6 / statistics.median(seconds) for way, seconds in ways.items()}
        for name, ways in times.items()
    }
    ratios = {
        way: statistics.median(
            boto / store for boto, store in zip(times[BOTO3][way], times[STORE][way], strict=True)
        )
        for way in ("up", "down")
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    print_rows(
        [
            [f"{arguments.files} files, {size_bytes / 1e6:.0f} MB", "up MB/s", "down MB/s"],
            *([name, *(f"{value:.0f}" for value in row.values())] for name, row in rows.items()),
            ["times as fast", *(f"{ratio:.2f}" for ratio in ratios.values())],
        ]
    )
    answer = {
        "question": "times as fast as boto3's own defaults, one file after another",
        "environment": machine,
        "latency_ms": arguments.latency_ms,
        "files": arguments.files,
        "size_bytes": size_bytes,
        "within_limit": min(ratios.values()) >= LIMIT,
        "times_as_fast": ratios,
        "seconds": times,
        "results": rows,
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
