"""How fast do many small files and one large file upload to S3 and download again, compared with other clients?

python benchmarks/exp_s3_throughput.py [--files N] [--file-kb N] [--large-mb N] [--rounds N] [--latency-ms N]
                                       [--page PATH]

JSON on standard output, tables on standard error. Contestants: compileflow's store; boto3's TransferManager, which
gets all files at once and transfers them with threads; obstore, a client in Rust (pip install obstore; without it,
the tables say so), called from as many threads as the store has; and boto3's upload_file and download_file, one
file after another. Each has the defaults of its library, and has sent one request before the clock starts.

All talk in turn to moto's server, a process on this machine, so that other load affects all of them. Each request
waits at the server, as with a remote one: AWS states 100 to 200 ms for small objects (Optimizing Amazon S3
performance, S3 user guide); the default here is a tenth of that.

The store does more than the others: it hashes each file with SHA-256 before the upload and after the download,
asks which files it already has, and writes a manifest. boto3 computes a CRC32, obstore nothing. "x store" is the
median, over the rounds, of the time divided by the store's time in the same round; the processor time is that of
the client.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import print_rows
from compileflow.catalog import open_store
from compileflow.settings import Settings
from compileflow.validation.report import environment
from tests.services.moto_server import Moto, serve_moto, store_environment

STORE, MANAGER, OBSTORE, BOTO3 = "store", "boto3 TransferManager", "obstore", "boto3, one file after another"
Transfer = tuple[Callable[[], Any], Callable[[Path], Any]]
# Seconds on the clock and of the client's processor, by contestant and direction, one pair per round.
Times = dict[str, dict[str, list[tuple[float, float]]]]


def make_files(folder: Path, sizes: Sequence[int]) -> Path:
    """Write random files, the same ones in every run, and return the folder."""
    random = np.random.default_rng(5)
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:04}.bin").write_bytes(random.bytes(size))
    return folder


def race(moto: Moto, folder: Path, work: Path, rounds: int) -> Times:
    """Let all contestants upload and download the folder in turn."""
    contestants: dict[str, Callable[[Moto, str, Path, Path], Transfer]] = {
        STORE: _store,
        MANAGER: _manager,
        OBSTORE: _obstore,
        BOTO3: _boto3,
    }
    if _installed("obstore") is None:
        del contestants[OBSTORE]
    times: Times = {name: {"up": [], "down": []} for name in contestants}
    for number in range(rounds):
        # The order changes every round.
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            with _bucket(moto, f"{folder.name}-{number}-{list(contestants).index(name)}") as bucket:
                send, fetch = contestants[name](moto, bucket, folder, work / "home")
                out = work / "out"
                times[name]["up"].append(_timed(send))
                times[name]["down"].append(_timed(partial(fetch, out)))
            _check_same(folder, out)
            shutil.rmtree(out)
    return times


def _timed(transfer: Callable[[], Any]) -> tuple[float, float]:
    began, began_cpu = time.perf_counter(), time.process_time()
    transfer()
    return time.perf_counter() - began, time.process_time() - began_cpu


def _settings(moto: Moto, home: Path) -> Settings:
    fields = {
        name.removeprefix("COMPILEFLOW_").lower(): value for name, value in store_environment(moto.url).items()
    }
    return Settings(home=home, **fields)


def _store(moto: Moto, bucket: str, folder: Path, home: Path) -> Transfer:
    store = open_store(f"s3://{bucket}/store", _settings(moto, home))
    list(store.list())
    return lambda: store.put_folder(folder), lambda out: store.get_folder(next(store.list()), out)


def _client(moto: Moto, bucket: str) -> Any:
    import boto3

    fields = store_environment(moto.url)
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=moto.url,
        region_name="us-east-1",
        aws_access_key_id=fields["COMPILEFLOW_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=fields["COMPILEFLOW_S3_SECRET_ACCESS_KEY"],
    )
    client.list_objects_v2(Bucket=bucket)
    return client


def _manager(moto: Moto, bucket: str, folder: Path, home: Path) -> Transfer:
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    client, config = _client(moto, bucket), TransferConfig(preferred_transfer_client="classic")
    names = _names(folder)

    def send() -> None:
        with create_transfer_manager(client, config) as manager:
            for future in [manager.upload(str(folder / name), bucket, name) for name in names]:
                future.result()

    def fetch(out: Path) -> None:
        out.mkdir()
        with create_transfer_manager(client, config) as manager:
            for future in [manager.download(bucket, name, str(out / name)) for name in names]:
                future.result()

    return send, fetch


def _obstore(moto: Moto, bucket: str, folder: Path, home: Path) -> Transfer:
    import obstore
    from obstore.store import S3Store

    fields = store_environment(moto.url)
    store = S3Store(
        bucket,
        endpoint=moto.url,
        region="us-east-1",
        access_key_id=fields["COMPILEFLOW_S3_ACCESS_KEY_ID"],
        secret_access_key=fields["COMPILEFLOW_S3_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    list(obstore.list(store))
    names, at_once = _names(folder), _settings(moto, home).s3_files_at_once

    def for_all(function: Callable[[str], object]) -> None:
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(function, names))

    def fetch_file(out: Path, name: str) -> None:
        with (out / name).open("wb") as file:
            for chunk in obstore.get(store, name):
                file.write(chunk)

    def fetch(out: Path) -> None:
        out.mkdir()
        for_all(lambda name: fetch_file(out, name))

    return lambda: for_all(lambda name: obstore.put(store, name, folder / name)), fetch


def _boto3(moto: Moto, bucket: str, folder: Path, home: Path) -> Transfer:
    client, names = _client(moto, bucket), _names(folder)

    def send() -> None:
        for name in names:
            client.upload_file(str(folder / name), bucket, name)

    def fetch(out: Path) -> None:
        out.mkdir()
        for name in names:
            client.download_file(bucket, name, str(out / name))

    return send, fetch


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def _bucket(moto: Moto, name: str) -> Iterator[str]:
    """Create an empty bucket, and delete its objects afterwards to free the server's memory."""
    client = moto.client()
    bucket = moto.make_bucket(name)
    yield bucket
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        client.delete_objects(
            Bucket=bucket, Delete={"Objects": [{"Key": entry["Key"]} for entry in page["Contents"]]}
        )


def _check_same(folder: Path, out: Path) -> None:
    for path in folder.iterdir():
        if path.read_bytes() != (out / path.name).read_bytes():
            raise SystemExit(f"{path.name} was downloaded with other bytes")


def summary(times: Times, size_bytes: int) -> dict[str, dict[str, float]]:
    """Return, for each contestant, MB/s, the time in units of the store's, and the client's processor seconds."""
    return {
        name: {
            key: value
            for way, pairs in ways.items()
            for key, value in {
                f"{way}_mb_per_s": size_bytes / 1e6 / statistics.median(seconds for seconds, _ in pairs),
                f"{way}_x_store": statistics.median(
                    seconds / stores for (seconds, _), (stores, _) in zip(pairs, times[STORE][way], strict=True)
                ),
                f"{way}_cpu_s": statistics.median(cpu for _, cpu in pairs),
            }.items()
        }
        for name, ways in times.items()
    }


def rows_of(title: str, results: dict[str, dict[str, float]]) -> list[list[str]]:
    """Return the table of one set of files, header first."""
    columns = [f"{way} {unit}" for way in ("up", "down") for unit in ("MB/s", "x store", "CPU s")]
    rows = [
        [name, *(f"{value:.{0 if key.endswith('mb_per_s') else 2}f}" for key, value in row.items())]
        for name, row in results.items()
    ]
    missing = [] if OBSTORE in results else [["obstore is not installed", *[""] * len(columns)]]
    return [[title, *columns], *rows, *missing]


def write_page(
    path: Path, tables: Sequence[Sequence[Sequence[str]]], machine: dict[str, str], *, about: str
) -> None:
    """Write the tables as a page of the documentation."""
    lines = [
        "# S3 transfers",
        "",
        "Written by `benchmarks/exp_s3_throughput.py`, whose first lines say how it measures. Columns: megabytes",
        "per second, the time in units of the store's time (x store: below 1 is faster than compileflow's store),",
        "and processor seconds of the client. [Use S3](../how-to/use-s3.md#what-to-expect) says what they mean.",
        "",
        f"{about} Machine and versions: {', '.join(f'{name} {value}' for name, value in machine.items())}.",
    ]
    for header, *rows in tables:
        lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    """Send, fetch and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200, help="number of small files")
    parser.add_argument("--file-kb", type=float, default=100, help="size of each small file")
    parser.add_argument("--large-mb", type=float, default=150, help="size of the large file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--latency-ms", type=float, default=10.0, help="time that each request waits at the server"
    )
    parser.add_argument("--page", type=Path, help="page of the documentation to write")
    arguments = parser.parse_args()
    cases = {
        f"{arguments.files} files of {arguments.file_kb:g} kB": [int(arguments.file_kb * 1e3)] * arguments.files,
        f"1 file of {arguments.large_mb:g} MB": [int(arguments.large_mb * 1e6)],
    }
    facts = environment(1)
    machine = {name: facts[name] for name in ("machine", "processor", "system", "python", "compileflow")}
    machine |= {"CPUs": str(os.cpu_count()), "load": f"{os.getloadavg()[0]:.1f}"}
    machine |= {name: _installed(name) or "not installed" for name in ("boto3", "obstore", "moto")}
    results: dict[str, Any] = {}
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with serve_moto(work / "moto", latency_s=arguments.latency_ms / 1e3) as moto:
            for number, (title, sizes) in enumerate(cases.items()):
                folder = make_files(work / f"case-{number}", sizes)
                times = race(moto, folder, work, arguments.rounds)
                compared = summary(times, sum(sizes))
                results[title] = {"size_bytes": sum(sizes), "contestants": compared, "seconds": times}
                tables.append(rows_of(title, compared))
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    for table in tables:
        print_rows(table)
    about = f"{arguments.rounds} rounds; each request waits {arguments.latency_ms:g} ms at the server."
    if arguments.page is not None:
        write_page(arguments.page, tables, machine, about=about)
    answer = {
        "question": "time of other clients of S3 in units of the store's",
        "environment": machine,
        "latency_ms": arguments.latency_ms,
        "results": results,
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
