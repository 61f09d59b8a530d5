"""moto's S3 server: a process of its own, which the real client talks to over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.services.secrets import AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY

_START_TIMEOUT_S = 60


@dataclass(frozen=True)
class Moto:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def client(self, url: str | None = None) -> Any:
        """Return a boto3 client for S3; `url` says past which proxy."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=url or self.url,
            region_name="us-east-1",
            aws_access_key_id=AWS_ACCESS_KEY_ID,
            aws_secret_access_key=AWS_SECRET_ACCESS_KEY,
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 2}),
        )

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket and return its name."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def age(self, bucket: str, key: str, *, seconds: float) -> None:
        """Make an object older than it is."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"age {bucket} {key} {seconds}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


def store_environment(url: str) -> dict[str, str]:
    """Return the environment in which compileflow's store talks to the server at `url`."""
    return {
        "COMPILEFLOW_S3_ENDPOINT_URL": url,
        "COMPILEFLOW_S3_REGION": "us-east-1",
        "COMPILEFLOW_S3_ADDRESSING": "path",
        "COMPILEFLOW_S3_ACCESS_KEY_ID": AWS_ACCESS_KEY_ID,
        "COMPILEFLOW_S3_SECRET_ACCESS_KEY": AWS_SECRET_ACCESS_KEY,
    }


@contextmanager
def serve_moto(folder: Path) -> Iterator[Moto]:
    """Run the server on a free port of 127.0.0.1 until the block ends; its log goes below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "moto.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COMPILEFLOW_")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.moto_process", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/moto-api/", process, log_path)
        yield Moto(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


def _wait(url: str, process: subprocess.Popen[str], log_path: Path) -> None:
    until = time.monotonic() + _START_TIMEOUT_S
    # Whatever proxy the environment names, this server is on the same machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"moto's server did not start: {log_path.read_text()[-2000:]}") from error
            time.sleep(0.05)
