"""Compiles, proves and serves a model where there is no network, and a name server records each look-up.

`python -m tests.services.no_network MODEL FOLDER TARGET...`, started by `UNSHARE`. FOLDER/names gets a line
for each name that a process looks up, and FOLDER/answers the answer of each service.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from tests.services.example_process import WAIT_S, ExampleProcess

# Namespaces of a network with a loopback interface only, and of mounts.
UNSHARE = ("unshare", "--map-root-user", "--net", "--mount")
# Looked up first, to show that the name server is asked.
CONTROL = "control.invalid"
# Compiled before, which saves a compile and a proof: both use torch for every target.
_TORCHSCRIPT = Path(__file__).parents[1] / "artifacts" / "v1-torchscript"
# From <linux/sockios.h> and <linux/if.h>.
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_RESPONSE_NAME_ERROR = 0x8183


def main(model: str, folder: Path, targets: list[str]) -> None:
    """Look up a name as a control; compile and prove the model for each target, and ask a service of each."""
    _start_loopback()
    _start_name_server(folder)
    with suppress(socket.gaierror):
        socket.getaddrinfo(CONTROL, 443)
    options = [word for target in targets for word in ("--target", target)]
    options += ["--max-examples", "40", "--skip", "register", "--json"]
    command = [sys.executable, "-m", "compileflow", "compile", model, *options]
    compiled = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    artifacts = {result["target"]: result["artifact"]["uri"] for result in json.loads(compiled.stdout)}
    artifacts["torchscript"] = str(_TORCHSCRIPT)
    with ExitStack() as stack:
        services = {}
        for target, uri in artifacts.items():
            (folder / target).mkdir()
            variables = {"ARTIFACT": uri, "COMPILEFLOW_HOME": os.environ["COMPILEFLOW_HOME"]}
            service = ExampleProcess.started("serve_fastapi.py", folder / target, variables)
            services[target] = stack.enter_context(service)
        answers = {target: _ask(service) for target, service in services.items()}
    (folder / "answers").write_text(json.dumps(answers))


def _ask(service: ExampleProcess) -> object:
    with httpx.Client(base_url=service.url(), trust_env=False, timeout=WAIT_S) as client:
        service.poll(lambda: client.get("/ready").status_code == 200)
        return client.post("/predict", json={"inputs": "it arrived on time"}).json()


def _start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _start_name_server(folder: Path) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    threading.Thread(target=_record, args=(server, folder / "names"), daemon=True).start()
    # Other sources of names than "files" and "dns" ask a service outside the namespace.
    for path, text in (("resolv.conf", "nameserver 127.0.0.1\n"), ("nsswitch.conf", "hosts: files dns\n")):
        (folder / path).write_text(text)
        subprocess.run(["mount", "--bind", str(folder / path), f"/etc/{path}"], check=True)


def _record(server: socket.socket, log: Path) -> None:
    """Write the name of each query down, and answer that it does not exist."""
    with log.open("a") as lines:
        while True:
            query, client = server.recvfrom(4096)
            # A header of 12 bytes, the labels of the name, each after its length, a zero, and four more bytes.
            labels, place = [], 12
            while length := query[place]:
                labels.append(query[place + 1 : place + 1 + length].decode("ascii", "replace"))
                place += 1 + length
            print(".".join(labels), file=lines, flush=True)
            header = query[:2] + struct.pack("!HHHHH", _RESPONSE_NAME_ERROR, 1, 0, 0, 0)
            server.sendto(header + query[12 : place + 5], client)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
