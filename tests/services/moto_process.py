"""The S3 server of moto, which `serve_moto` runs in a separate process.

python -m tests.services.moto_process PORT LATENCY_S

Each line on standard input, `age BUCKET KEY SECONDS`, makes an object older, because S3 has no request for that.
"""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from typing import Any

from moto import backends
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.s3.models import s3_backends
from moto.server import main


def obey() -> None:
    """Carry out the commands from standard input, and answer each with `done`."""
    for line in sys.stdin:
        _, bucket, key, seconds = line.split()
        aged = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[key]
        aged.last_modified -= timedelta(seconds=float(seconds))
        sys.stdout.write("done\n")
        sys.stdout.flush()


def look_at_its_folder_once() -> None:
    """Let moto list its own folder once, not at every request, which costs more than a small object."""
    modules = tuple(backends.list_of_moto_modules())
    backends.list_of_moto_modules = lambda: modules


def answer_late(latency_s: float) -> None:
    """Wait before each request, as if the server were far away."""
    answer = DomainDispatcherApplication.__call__

    def late(self: Any, environ: Any, start_response: Any) -> Any:
        time.sleep(latency_s)
        return answer(self, environ, start_response)

    DomainDispatcherApplication.__call__ = late


if __name__ == "__main__":
    look_at_its_folder_once()
    if float(sys.argv[2]):
        answer_late(float(sys.argv[2]))
    threading.Thread(target=obey, daemon=True).start()
    main(["--host", "127.0.0.1", "--port", sys.argv[1]])
