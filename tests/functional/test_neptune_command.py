"""The command line of the Neptune-compatible server, and a wheel without the server."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deployments.neptune_server.api import LEADERBOARD
from deployments.neptune_server.tokens import read_api_token
from tests.services import secrets
from tests.services.neptune import ROOT, Neptune, serve_neptune, wait_until
from tests.services.neptune_calls import download, make_version, upload_query


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command that starts the server on a free port with a folder in the test's folder."""
    return [sys.executable, "-m", "deployments.neptune_server", "--root", str(tmp_path / "root"), "--port", "0"]


def test_token_is_printed_once_and_its_file_is_private(tmp_path: Path, command: list[str]) -> None:
    first, second = (start_and_stop(command) for _ in range(2))
    path = tmp_path / "root" / "token"
    token = first[1].removeprefix("NEPTUNE_API_TOKEN=")
    url = first[0].split()[3].rstrip(",")
    assert read_api_token(token) == {
        "api_address": url,
        "api_url": url,
        "api_key": read_api_token(path.read_text())["api_key"],
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert second[1] == f"NEPTUNE_API_TOKEN is in {path}."
    key = read_api_token(token)["api_key"].encode()
    for file in (tmp_path / "root").rglob("*"):
        assert file == path or file.is_dir() or key not in file.read_bytes()


def test_key_is_read_from_a_file_and_not_printed(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "secret-keys").mkdir()
    key = tmp_path / "secret-keys" / "key"
    key.write_text(f"{secrets.NEPTUNE_API_KEY}\n")
    lines = start_and_stop([*command, "--api-key-file", str(key), "--url", "https://registry.example/"])
    assert lines[0].startswith("Neptune-compatible registry at https://registry.example, ")
    output = "\n".join(lines)
    assert secrets.NEPTUNE_API_KEY not in output
    token = (tmp_path / "root" / "token").read_text().strip()
    assert token not in output
    assert base64.b64decode(token).decode() == json.dumps(
        {
            "api_address": "https://registry.example",
            "api_url": "https://registry.example",
            "api_key": secrets.NEPTUNE_API_KEY,
        }
    )


@pytest.mark.parametrize("option", ["--root", "--api-key-file"])
def test_empty_path_is_refused(tmp_path: Path, option: str) -> None:
    options = {"--root": str(tmp_path / "root")} | {option: ""}
    arguments = [part for pair in options.items() for part in pair]
    command = [sys.executable, "-m", "deployments.neptune_server", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(f"argument {option}: expected a path, got ''")


def test_request_in_progress_is_answered_before_the_server_ends(tmp_path: Path) -> None:
    with serve_neptune(tmp_path / "server") as server:
        version = make_version(server, server.project())
        path = f"{LEADERBOARD}/attributes/file/upload?{upload_query(version, 'f')}"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
        head += f"Authorization: {server.session()['Authorization']}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + b"12345")
            wait_until(lambda: any((server.folder / "unfinished").iterdir()))
            os.kill(server.pid, signal.SIGTERM)
            wait_until(lambda: not is_listening(server))
            connection.sendall(b"67890")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.stop() == 0
        server.start()
        assert download(server, version, "f") == b"1234567890"


def test_second_server_on_one_folder_is_refused(neptune_server: Neptune) -> None:
    options = ("--root", str(neptune_server.folder), "--port", "0")
    process = subprocess.run(
        [sys.executable, "-m", "deployments.neptune_server", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert process.returncode == 2
    assert "is in use by another server" in process.stderr
    assert "--root" in process.stderr


def test_port_in_use_is_reported(neptune_server: Neptune, command: list[str]) -> None:
    port = neptune_server.url.rpartition(":")[2]
    process = subprocess.run([*command, "--port", port], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert process.returncode == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in process.stderr


def test_wheel_does_not_contain_deployments(tmp_path: Path) -> None:
    command = ["-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packages = {name.partition("/")[0] for name in archive.namelist()}
    assert "compileflow" in packages
    assert all(package == "compileflow" or package.endswith(".dist-info") for package in packages)


def is_listening(server: Neptune) -> bool:
    try:
        return bool(server.send("GET", "/api/backend/swagger.json", None, {}))
    except OSError:
        return False


def start_and_stop(command: list[str]) -> list[str]:
    """Start a server, end it with SIGTERM when it is ready, and return the lines that it printed."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.readlines()
    assert process.returncode == 0
    return [line.rstrip("\n") for line in lines]
