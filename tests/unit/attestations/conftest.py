"""A key pair, a small artifact and a local store, for the tests of attestations."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.settings import Settings
from compileflow.stores.local import LocalStore
from tests.unit.attested_artifacts import Keys, make_keys, small_artifact


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return small_artifact(tmp_path / "artifact")


@pytest.fixture
def store(tmp_path: Path, settings: Settings) -> LocalStore:
    return LocalStore((tmp_path / "store").as_uri(), settings)
