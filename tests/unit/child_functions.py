"""Functions that test_run_in_child.py runs in child processes. Light imports keep the start of a child short."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from compileflow._process.child_process import report_progress
from compileflow.errors import TargetUnavailableError

MIB = 2**20
Json = dict[str, Any]


def echo(request: Json) -> Json:
    return {"request": request, "pid": os.getpid()}


def refuse(request: Json) -> Json:
    raise TargetUnavailableError("the toolchain is absent", hint="install it")


def fail(request: Json) -> Json:
    report_progress("failing")
    print("the child's own words", flush=True)  # noqa: T201
    raise ValueError("first line\nsecond line")


_names: list[str] = []


def callers(request: Json) -> Json:
    return {"callers": [[frame.filename, frame.lineno, frame.name] for frame in traceback.extract_stack()]}


def look(request: Json) -> Json:
    _names.append(request["name"])
    return {
        "names": _names,
        "has_wave": "wave" in sys.modules,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "temporary": tempfile.gettempdir(),
    }


def hang(request: Json) -> Json:
    time.sleep(600)
    return {}


def import_absent(request: Json) -> Json:
    import absent_module  # type: ignore[import-not-found]

    return {"module": absent_module.__name__}


def read_absent(request: Json) -> Json:
    return {"text": Path("/absent/file").read_text()}


def fill_disk(request: Json) -> Json:
    with open("/dev/full", "w") as file:
        file.write("text")
    return {}


def nest_deeply(request: Json) -> Json:
    return nest_deeply(request)


def fail_with(request: Json) -> Json:
    raise RuntimeError(request["text"])


def end_by_signal(request: Json) -> Json:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.Signals[request["signal"]])
    time.sleep(600)
    return {}


def allocate_too_much(request: Json) -> Json:
    return {"size": len(bytearray(2**60))}


def leave(request: Json) -> Json:
    sys.exit(3)


def environment(request: Json) -> Json:
    return dict(os.environ)


def progress(request: Json) -> Json:
    report_progress("one of two")
    print("not progress", flush=True)  # noqa: T201
    logging.getLogger("toolchain").warning("nor this")
    report_progress("two of two")
    return {}


def noise(request: Json) -> Json:
    os.write(1, b"\xff\xfe no UTF-8\n")
    os.write(1, b"x" * 300_000 + b"\n")
    os.write(2, b"no line's end")
    return {}


def allocate(request: Json) -> Json:
    body = bytearray(request["size_bytes"])
    body[::4096] = b"x" * len(body[::4096])
    return {}


def grandchild_allocates(request: Json) -> Json:
    code = f"body = b'x' * {request['size_bytes']}"
    subprocess.run([sys.executable, "-c", code], check=True)
    return {}


def family(request: Json) -> Json:
    """Start a grandchild, write both process ids, and sleep; with or without the GIL."""
    grandchild = subprocess.Popen(["sleep", "600"])
    path = Path(request["path"])
    path.with_suffix(".part").write_text(f"{os.getpid()} {grandchild.pid}")
    path.with_suffix(".part").rename(path)
    report_progress("started")
    if request.get("hold_gil"):
        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)
    return {}


def detach(request: Json) -> Json:
    return {"pid": subprocess.Popen(["sleep", "600"], start_new_session=True).pid}
