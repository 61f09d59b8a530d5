"""Settings come from the environment and from dotenv files, and secrets are not printed."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
from dotenv import dotenv_values

from compileflow.errors import SpecError
from compileflow.settings import Settings, dotenv_files, get_settings, variable_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("COMPILEFLOW_HOME", "COMPILEFLOW_THREADS", "COMPILEFLOW_ENV", "CI", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    get_settings.cache_clear()


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
        ("COMPILEFLOW_THREADS", "hf_secret", "COMPILEFLOW_THREADS"),
        ("COMPILEFLOW_S3_TAGS", "{hf_secret", "s3_tags"),
        ("COMPILEFLOW_S3_ADDRESSING", "hf_secret", "COMPILEFLOW_S3_ADDRESSING"),
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
    assert "hf_secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("COMPILEFLOW_REQUIRE_SIGNATURES", "COMPILEFLOW_REQUIRE_SIGNATURE"),
        ("compileflow_store_url", "COMPILEFLOW_STORE_URI"),
        ("COMPILE_PIPELINE_EXECUTION_UPLOADS", "COMPILE_PIPELINE_EXECUTION_UPLOAD"),
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


@pytest.mark.parametrize("name", ["home", "outputs", "signing_key", "trusted_keys"])
def test_url_is_no_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable_of(name), "https://user:hf_secret@host/x")
    get_settings.cache_clear()
    with pytest.raises(SpecError, match=f"{variable_of(name)}: expected a path, got a URL"):
        get_settings()


@pytest.mark.parametrize("data", ["THREADS=1\n".encode("utf-16"), "TITLE=Überblick\n".encode("latin-1")])
def test_env_file_that_is_not_utf8_is_one_line_that_names_it(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".env").write_bytes(data)
    get_settings.cache_clear()
    with pytest.raises(SpecError, match=rf"^{tmp_path}/\.env cannot be read: it is not UTF-8\. Save it as UTF-8"):
        get_settings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('COMPILEFLOW_REGISTRY_URI="sqlite:///r.db\n', 1),
        ("# words\n\nCOMPILEFLOW_THREADS 2\n", 3),
        ("COMPILEFLOW_REQUIRE_SIGNATURE\n", 1),
    ],
)
def test_env_file_with_a_line_that_sets_nothing_is_one_line_that_names_it(
    tmp_path: Path, text: str, line: int
) -> None:
    (tmp_path / ".env").write_text(text)
    get_settings.cache_clear()
    with pytest.raises(SpecError, match=rf"/\.env cannot be read: line {line} does not set a variable\."):
        get_settings()


def test_wrong_value_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILEFLOW_THREADS", "two")
    get_settings.cache_clear()
    with pytest.raises(SpecError, match=r"^The setting COMPILEFLOW_THREADS: expected a whole number\."):
        get_settings()


def test_home_without_a_home_folder_is_one_line() -> None:
    with pytest.raises(SpecError, match=r"HOME is not set.* Set COMPILEFLOW_HOME to a folder"):
        _ = Settings(home=Path("~no-such-user/compileflow")).home_dir


@pytest.mark.parametrize("name", ["COMPILEFLOW_COMPLETE", "COMPILEFLOW_NEPTUNE_API_KEY"])
def test_variables_of_other_programs_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    get_settings.cache_clear()
    assert get_settings().home


def write_environments() -> None:
    folder = Path("deployments") / "env"
    folder.mkdir(parents=True)
    (folder / "dev.env").write_text("COMPILEFLOW_THREADS=3\nCOMPILEFLOW_STORE_URI=file:///dev\n")
    (folder / "prod.env").write_text("COMPILEFLOW_THREADS=4\nCOMPILEFLOW_STORE_URI=file:///prod\n")


@pytest.mark.parametrize(
    ("environment", "store"),
    [
        ({}, "file:///dev"),
        ({"COMPILEFLOW_ENV": "dev"}, "file:///dev"),
        ({"COMPILEFLOW_ENV": "prod"}, "file:///prod"),
        ({"CI": "true"}, "file:///prod"),
        ({"CI": "true", "COMPILEFLOW_ENV": "dev"}, "file:///dev"),
    ],
)
def test_environment_decides_which_file_of_the_repository_is_read(
    environment: dict[str, str], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_environments()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert get_settings().store_uri == store


def test_environment_wins_over_dotenv_and_dotenv_over_the_file_of_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_environments()
    Path(".env").write_text("COMPILEFLOW_STORE_URI=file:///own\nCOMPILEFLOW_HOME=/own\n")
    monkeypatch.setenv("COMPILEFLOW_HOME", "/environment")
    settings = get_settings()
    assert (settings.threads, settings.store_uri, str(settings.home)) == (3, "file:///own", "/environment")


def test_unknown_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILEFLOW_ENV", "staging")
    with pytest.raises(SpecError, match="COMPILEFLOW_ENV: expected 'dev' or 'prod'"):
        get_settings()


def test_steps_of_the_older_component_are_off_by_default_and_one_misspelled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = get_settings()
    switches = (
        settings.execute_download,
        settings.execute_compile,
        settings.execute_test,
        settings.execute_upload,
    )
    assert switches == (False, False, False, False)
    monkeypatch.setenv("COMPILE_PIPELINE_EXECUTION_VALIDATE", "true")
    get_settings.cache_clear()
    with pytest.raises(SpecError, match="COMPILE_PIPELINE_EXECUTION_VALIDATE is not a setting"):
        get_settings()


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_files_of_the_repository_hold_settings_and_no_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COMPILEFLOW_ENV", name)
    assert get_settings().home
    variables = dotenv_values(dotenv_files()[0])
    assert set(variables) <= {variable_of(field) for field in Settings.model_fields}
    assert not [name for name in variables if re.search("TOKEN|SECRET|PASSW|_KEY", name)]
