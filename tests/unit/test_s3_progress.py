"""Only a long transfer on a terminal shows a progress bar."""

from __future__ import annotations

import io
import sys

import pytest

from compileflow.stores.s3 import progress as s3_progress
from compileflow.stores.s3.progress import TransferProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def transfer() -> None:
    with TransferProgress("storing", 2_000_000) as progress:
        progress.add(1_000_000)
        progress.add(1_000_000)


def test_terminal_shows_bytes_and_rate_of_a_long_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_progress, "SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    transfer()
    output = sys.stderr.getvalue()
    assert "storing" in output
    assert "2.0/2.0 MB" in output
    assert "/s" in output


def test_short_transfer_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    transfer()
    assert sys.stderr.getvalue() == ""


def test_log_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_progress, "SHOW_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    transfer()
    assert sys.stderr.getvalue() == ""
