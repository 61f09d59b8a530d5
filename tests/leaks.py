"""After a test run, search everything that it wrote for the secrets that its tests used."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.services import secrets

# A server must keep its own token, and a user his own key and .env file.
_MAY_HOLD_SECRETS = {"token", ".env", "secret-keys"}
# Weights: large, and nothing but the model's own numbers.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pt2", ".onnx", ".data", ".so", ".arrow"}
_LARGE_BYTES = 2**20


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Search what a test printed and logged; a traceback shows the test's own values, too."""
    told = "\n".join(text for _, text in report.sections)
    for secret in leaked(told.encode(), secrets.ALL):
        _found.append(f"{report.nodeid} printed or logged {secret}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when a secret is found; once, in the process that the others report to."""
    if hasattr(session.config, "workerinput"):
        return
    root = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    _found.extend(f"{path.relative_to(root)} holds {secret}" for path, secret in leaks_below(root, secrets.ALL))
    if _found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was found."""
    for line in _found:
        terminalreporter.write_line(f"LEAK: {line}", red=True)


def leaks_below(root: Path, known: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Yield each file below `root` with each secret in it, shortened."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or not _MAY_HOLD_SECRETS.isdisjoint(path.parts):
            continue
        if path.suffix in _WEIGHTS and path.stat().st_size > _LARGE_BYTES:
            continue
        for secret in leaked(path.read_bytes(), known):
            yield path, secret


def leaked(body: bytes, known: Iterable[str]) -> list[str]:
    """Return the secrets in `body`, shortened, in any form that our clients and servers write."""
    return [f"{secret[:12]}..." for secret in known if any(form in body for form in _forms(secret))]


def _forms(secret: str) -> set[bytes]:
    """Return a secret as it is, in a URL, and inside base64 at each of its three alignments."""
    forms = {secret.encode(), quote(secret, safe="").encode()}
    for before in range(3):
        body = b"\0" * before + secret.encode()
        # Characters at both ends also depend on what stands beside the secret.
        forms.add(base64.b64encode(body)[(0, 2, 3)[before] : len(body) * 8 // 6])
    return forms


_found: list[str] = []
