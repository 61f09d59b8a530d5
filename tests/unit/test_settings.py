"""Settings come from the environment and from .env, and secrets are not printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.errors import SpecError
from compileflow.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COMPILEFLOW_HOME", "COMPILEFLOW_THREADS", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def test_home_decides_where_the_embedded_store_and_registry_are(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "a b")
    assert settings.resolved_store_uri() == (tmp_path / "a b" / "store").as_uri()
    assert settings.resolved_registry_uri() == f"sqlite:///{tmp_path}/a b/registry.db"


def test_dotenv_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "COMPILEFLOW_THREADS=3\nCOMPILEFLOW_STORE_URI=file:///srv/store\nHF_TOKEN=hf_x\n"
    )
    settings = Settings()
    assert (settings.threads, settings.resolved_store_uri()) == (3, "file:///srv/store")
    assert settings.hub_token is not None
    assert settings.hub_token.get_secret_value() == "hf_x"
    monkeypatch.setenv("COMPILEFLOW_THREADS", "5")
    assert Settings().threads == 5


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILEFLOW_HOME", "")
    assert Settings().home == Path("~/.local/share/compileflow")


def test_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert "hf_very_secret" not in f"{Settings()!r} {Settings()} {Settings().model_dump_json()}"


def test_callers_choice_wins_over_the_configured_one() -> None:
    settings = Settings(store_uri="file:///configured", registry_uri="sqlite:////configured.db")
    assert settings.resolved_store_uri("file:///given") == "file:///given"
    assert settings.resolved_registry_uri("sqlite:////given.db") == "sqlite:////given.db"


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("COMPILEFLOW_THREADS", "hf_secret", "threads"),
        ("COMPILEFLOW_S3_TAGS", "{hf_secret", "s3_tags"),
        ("COMPILEFLOW_S3_ADDRESSING", "hf_secret", "s3_addressing"),
    ],
)
def test_wrong_value_is_one_line_that_names_the_variable_and_not_its_value(
    name: str, value: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    with pytest.raises(SpecError, match=part) as caught:
        get_settings()
    assert "docs/reference/settings.md" in caught.value.hint
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("COMPILEFLOW_REQUIRE_SIGNATURES", "COMPILEFLOW_REQUIRE_SIGNATURE"),
        ("compileflow_store_url", "COMPILEFLOW_STORE_URI"),
    ],
)
@pytest.mark.parametrize("is_in_file", [False, True])
def test_misspelled_setting_is_refused(
    name: str, setting: str, is_in_file: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_in_file:
        Path(".env").write_text(f"{name}=x", "utf-8")
    else:
        monkeypatch.setenv(name, "x")
    get_settings.cache_clear()
    with pytest.raises(SpecError) as caught:
        get_settings()
    assert str(caught.value) == f"{name} is not a setting. Did you mean {setting}?"


@pytest.mark.parametrize("name", ["COMPILEFLOW_COMPLETE", "COMPILEFLOW_NEPTUNE_API_KEY"])
def test_variables_of_other_programs_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    get_settings.cache_clear()
    assert get_settings().home
