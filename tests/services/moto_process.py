"""moto's server, run by `serve_moto` in a process of its own: python -m tests.services.moto_process PORT.

Each line on standard input, `age BUCKET KEY SECONDS`, makes an object older: no request of S3 can do that.
"""

from __future__ import annotations

import sys
import threading
from datetime import timedelta

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main


def obey() -> None:
    """Carry out the lines, and answer each with `done`."""
    for line in sys.stdin:
        _, bucket, key, seconds = line.split()
        aged = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[key]
        aged.last_modified -= timedelta(seconds=float(seconds))
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    threading.Thread(target=obey, daemon=True).start()
    main(["--host", "127.0.0.1", "--port", sys.argv[1]])
