"""The container files: every command, path and variable in them exists. No image is built here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from compileflow.settings import Settings, variable_of
from flows.projects import load_project
from flows.run_project import STEPS

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deployments" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
OWN_IMAGES = {name: service for name, service in SERVICES.items() if "build" in service}
# Variables of other programs.
FOREIGN = {"DO_NOT_TRACK", "OAUTHLIB_INSECURE_TRANSPORT", "PATH", "PYTHONUNBUFFERED"}


def instructions(dockerfile: Path) -> list[tuple[str, list[str]]]:
    """Return each instruction of a Dockerfile with its words."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def stages(dockerfile: Path) -> list[str]:
    return [words[2] for name, words in instructions(dockerfile) if name == "FROM"]


def commands() -> list[tuple[str, list[str]]]:
    """Return the commands of all services, without the shell around them, as (service, words)."""
    found = []
    for name, service in OWN_IMAGES.items():
        words = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in service["command"]]
        parts = [shlex.split(part) for part in words[2].split("&&")] if words[:2] == ["sh", "-c"] else [words]
        found += [(name, part) for part in parts]
    return found


def test_services_of_the_issue_exist() -> None:
    assert {
        "postgres", "prefect-server", "worker", "s3", "neptune", "compile", "compile-unit", "compile-functional",
        "compile-download-model", "compile-compile-model", "compile-validate-model", "compile-upload-model",
    } <= set(SERVICES)  # fmt: skip


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_has_both_targets_and_copies_what_exists(dockerfile: Path) -> None:
    assert {"development", "production"} <= set(stages(dockerfile))
    for name, words in instructions(dockerfile):
        if name == "COPY":
            sources = [word for word in words[:-1] if not word.startswith("--")]
            stage = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
            assert stage is None or stage in stages(dockerfile)
            assert stage is not None or all((ROOT / source).exists() for source in sources), sources


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_contains_what_the_ignore_file_lets_through(dockerfile: Path) -> None:
    allowed = [line[1:] for line in dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().split()
               if line.startswith("!")]  # fmt: skip
    copied = {
        word for name, words in instructions(dockerfile) if name == "COPY" and "--from=build" not in words
        for word in words[:-1]
    }  # fmt: skip
    assert all((ROOT / path).exists() for path in allowed)
    assert copied - {"."} <= set(allowed)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_extras_that_an_image_installs_exist(dockerfile: Path) -> None:
    known_extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[([a-z0-9,-]+)\]'", dockerfile.read_text())
    assert installed
    assert {extra for names in installed for extra in names.split(",")} <= set(known_extras)


def test_images_of_the_services_are_stages_of_dockerfiles() -> None:
    for service in OWN_IMAGES.values():
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert build["target"] in stages(ROOT / build["dockerfile"])
        for word in service.get("entrypoint", ()):
            assert (ROOT / word.removeprefix("/app/")).is_file(), word


@pytest.mark.parametrize(
    ("service", "words"), commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_command_of_a_service_exists(service: str, words: list[str]) -> None:
    if words[0] == "prefect":
        assert "deploy" not in words or (ROOT / words[-1]).is_file()
        return
    assert words[:2] == ["python", "-m"], words
    assert find_spec(words[2]) is not None
    if words[2:4] == ["flows", "run"]:
        assert load_project(words[4])
        assert words[5:] in ([], ["--from-environment"], *(["--task", task] for task in STEPS))
    elif words[2] == "pytest":
        assert (ROOT / words[-1]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for _, words in commands() if words[0] == "prefect"], ids=" ".join)
def test_options_of_prefects_commands_exist(words: list[str]) -> None:
    end = next(
        (place for place, word in enumerate(words) if word.startswith("--") and word != "--no-prompt"), None
    )
    end = 3 if "work-pool" in words else end
    completed = subprocess.run(
        [sys.executable, "-m", *words[:end], "--help"], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    for word in words:
        assert not word.startswith("--") or word in completed.stdout or word == "--no-prompt", word


def test_variables_are_settings() -> None:
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_settings_fields

    known_variables = {variable_of(name) for name in Settings.model_fields} | set(
        _get_settings_fields(PrefectSettings)
    )
    used = {name for service in OWN_IMAGES.values() for name in service.get("environment", ())}
    for dockerfile in DOCKERFILES:
        used |= {
            word.partition("=")[0] for name, words in instructions(dockerfile) if name == "ENV" for word in words
        }
    unknown = {name for name in used - FOREIGN if not name.startswith("PIP_")} - known_variables
    assert not unknown


def test_nothing_is_reachable_from_other_machines_and_secrets_have_no_default() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    text = (DOCKER / "compose.yaml").read_text()
    for name in ("PREFECT_AUTH", "POSTGRES_PASSWORD", "S3_SECRET"):
        assert re.search(rf"\$\{{{name}:\?", text), name
        assert f"${{{name}:-" not in text
