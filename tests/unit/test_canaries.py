"""No failure and no run shows a secret: every setting, with every kind of secret, in every failure."""

from __future__ import annotations

import io
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compileflow.artifact.attestations.keys import configured_keys, load_public_keys, load_signer
from compileflow.artifact.open import open_artifact
from compileflow.catalog import open_registry, open_store
from compileflow.cli import app
from compileflow.errors import CompileflowError
from compileflow.settings import Settings, get_settings, variable_of
from compileflow.spec import HfTask
from compileflow.steps.fetch import fetch_source
from compileflow.steps.report_file import export_report, read_report
from compileflow.steps.summary import figures_table, summary_markdown
from compileflow.stores.s3 import client as s3_client
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.leaks import leaked
from tests.unit.attested_artifacts import make_keys

# Nothing listens at this port.
NOWHERE = "127.0.0.1:9"
CANARY = "CANARYkMx29"
SECRETS = {
    "AWS secret key": f"{CANARY}/bPxRfiCYEXAMPLEKEYwJalrXUtnFE",
    "AWS key id": f"AKIA{CANARY.upper()}EXAMPLE"[:20],
    "Hub token": f"hf_{CANARY}abcdefghijklmnopqrstuvw",
    "Neptune token": f"eyJhcGlfYWRkcmVzcyI6Imh0dHAi{CANARY}fQ==",
    "password in a URL": "{scheme}://user:" + CANARY + "@" + NOWHERE + "/x",
    "password with signs": "{scheme}://user:" + CANARY + "/p@w:d@" + NOWHERE + "/x",
    "presigned URL": "{scheme}://" + NOWHERE + "/x?X-Amz-Credential=a%2Fb&X-Amz-Signature=" + CANARY,
}
SCHEMES = ("http", "https", "s3", "file", "sqlite", "mlflow:http", "neptune")
URIS = ("store_uri", "registry_uri", "hub_endpoint", "s3_endpoint_url", "project_model")
FAILURES: Mapping[str, Callable[[Settings], object]] = {
    "store": lambda settings: open_store(settings.resolved_store_uri(), settings).get_record("fetch", "x"),
    "registry": lambda settings: open_registry(settings.resolved_registry_uri(), settings).find("0" * 64),
    "private key": load_signer,
    "trusted keys": lambda settings: load_public_keys(configured_keys(settings)),
    "artifact": lambda settings: open_artifact(
        f"{settings.resolved_store_uri()}/manifests/sha256/{'0' * 64}.json"
    ),
    "model": lambda settings: fetch_source(
        settings.project_model or "owner/name", None, store_uri="file:///nowhere/store", settings=settings
    ),
}


def canaries(kind: str) -> Iterator[tuple[str, str]]:
    """Yield each variable with a secret of a kind."""
    secret = SECRETS[kind]
    for name in Settings.model_fields:
        for scheme in SCHEMES if "{scheme}" in secret and name in URIS else SCHEMES[:1]:
            yield variable_of(name), secret.replace("{scheme}", scheme)


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(s3_client, "_ATTEMPTS", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path / "home"))
    for name, value in {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    yield
    get_settings.cache_clear()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged, as a user sees it who logs to a file."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


def told(fails: Callable[..., object], *arguments: object) -> str:
    """Return what a failure tells: its line, its forms, and its chain of tracebacks; '' if nothing fails."""
    try:
        fails(*arguments)
    except CompileflowError as error:
        return f"{error} {error!r} {error.to_dict()} {''.join(traceback.format_exception(error))}"
    return ""


@pytest.mark.parametrize("kind", SECRETS)
def test_no_failure_shows_a_secret_of_any_setting(
    kind: str, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaks = []
    for variable, secret in canaries(kind):
        with monkeypatch.context() as patched:
            if kind == "AWS secret key":
                # Nothing tells such a key from another word, so it has to be in its own place as well.
                patched.setenv("AWS_SECRET_ACCESS_KEY", secret)
            patched.setenv(variable, secret)
            get_settings.cache_clear()
            texts = {"settings": told(get_settings)}
            if not texts["settings"]:
                settings = get_settings()
                for name, failure in FAILURES.items():
                    texts[name] = told(failure, settings)
        texts["log"] = log.getvalue()
        leaks += [
            f"{variable}, {secret}, {name}: {text[-2000:]}"
            for name, text in texts.items()
            if CANARY.lower() in text.lower()
        ]
    assert not leaks, "\n".join(leaks)


@pytest.mark.parametrize("words", [("versions",), ("versions", "--json"), ("verify", "registry:a"), ("gc",)])
@pytest.mark.parametrize("kind", ["Hub token", "password with signs", "presigned URL"])
def test_no_command_shows_a_secret(words: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("COMPILEFLOW_REGISTRY_URI", "COMPILEFLOW_STORE_URI"):
        monkeypatch.setenv(variable, SECRETS[kind].replace("{scheme}", "s3"))
    get_settings.cache_clear()
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code in (1, 2)
    assert result.stderr.count("\n") == 1
    assert CANARY not in result.output


def test_whole_run_leaves_no_secret_in_any_file(
    in_process: InProcess,
    tiny_model: ModelFactory,
    tmp_path: Path,
    log: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = SECRETS["Hub token"]
    keys = make_keys(tmp_path, password=secret)
    secrets = {variable_of(name): secret for name in ("hub_token", "s3_secret_access_key", "s3_session_token")}
    secrets |= {
        variable_of(name): secret for name in ("s3_access_key_id", "neptune_api_token", "signing_key_password")
    }
    urls = {
        "HF_ENDPOINT": "http",
        "COMPILEFLOW_PROJECT_MODEL": "https",
        "MLFLOW_TRACKING_URI": "http",
        "HTTPS_PROXY": "http",
    }
    secrets |= {name: SECRETS["password in a URL"].replace("{scheme}", scheme) for name, scheme in urls.items()}
    for name, value in (secrets | {variable_of("signing_key"): str(keys.private)}).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    settings = get_settings()
    with in_process.pipeline(settings) as pipeline:
        request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews")
        artifact = pipeline.compile(request)
        validated = pipeline.validate(request, artifact)
        version = pipeline.run(request)
    page = export_report(validated.report_uri, settings)
    report = read_report(validated.report_uri, settings)
    markdown = summary_markdown(pipeline.fetch(request), artifact, validated, report=report, page=page.as_uri())
    told_texts = [
        markdown,
        json.dumps(figures_table(artifact, validated)),
        version.model_dump_json(),
        log.getvalue(),
    ]
    for text in (*told_texts, *pipeline.lines):
        assert leaked(text.encode(), [CANARY]) == []
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    kinds = {path.parent.name for path in files}
    assert {"compile", "provenance", "verdict", "reports"} <= kinds
    for path in files:
        assert leaked(path.read_bytes(), [CANARY]) == [], path
