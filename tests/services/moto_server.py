"""The S3 server of moto in a separate process, to which the real client talks over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.services.secrets import AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY

_START_TIMEOUT_S = 60
# The server runs on this machine, so a proxy from the environment must not be used.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Moto:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    @cache  # noqa: B019 - there is one server a session
    def client(self, service: str = "s3") -> Any:
        """Return a boto3 client."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=AWS_ACCESS_KEY_ID,
            aws_secret_access_key=AWS_SECRET_ACCESS_KEY,
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 2}),
        )

    def make_bucket(self, name: str) -> str:
        """Create an empty bucket and return its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def age(self, bucket: str, key: str, *, seconds: float) -> None:
        """Make an object older by a number of seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"age {bucket} {key} {seconds}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def make_user_key(self) -> dict[str, str]:
        """Create a user with all rights, and return AccessKeyId and SecretAccessKey."""
        client = self.client("iam")
        client.create_user(UserName="user")
        allow = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
        client.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
        key: dict[str, str] = client.create_access_key(UserName="user")["AccessKey"]
        return key

    def check_signatures(self) -> None:
        """Check keys, signatures and rights from now on. By default, moto does not."""
        url, kind = f"{self.url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with _OPENER.open(urllib.request.Request(url, data=b"0", headers=kind)):  # noqa: S310 - it is http
            pass


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
def serve_moto(folder: Path, *, latency_s: float = 0.0) -> Iterator[Moto]:
    """Run the server on a free port of 127.0.0.1 for the duration of the block.

    Args:
        folder: Folder for the log.
        latency_s: Seconds that the server waits before it handles a request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "moto.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COMPILEFLOW_")}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.moto_process", str(port), str(latency_s)],
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
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            with _OPENER.open(url, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"moto's server did not start: {log_path.read_text()[-2000:]}") from error
            time.sleep(0.05)
