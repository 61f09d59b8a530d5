"""Configuration from the environment and dotenv files: home folder, store, registries, credentials and keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from compileflow.errors import SpecError, first_line, first_problem, hide

_ENV, _SWITCHES = "COMPILEFLOW_ENV", "COMPILE_PIPELINE_EXECUTION_"
_ENV_FOLDER = Path("deployments") / "env"
# Secrets of the services' own clients.
_SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"),
)


class Settings(BaseSettings):
    """Settings of one process.

    The environment variable of a field is its name with the prefix COMPILEFLOW_, unless the field has an alias.
    """

    model_config = SettingsConfigDict(
        env_prefix="COMPILEFLOW_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    env: Literal["dev", "prod"] = Field(
        "dev",
        description="File of deployments/env with settings that the environment lacks: dev.env or prod.env. Where "
        "CI is set, the default is prod.",
    )
    home: Path = Field(
        Path("~/.local/share/compileflow"),
        description="Folder of the embedded store, the embedded registry and work files. A user without a home "
        "folder must set it; other libraries then keep their files there as well.",
    )
    store_uri: str | None = Field(None, description="Artifact store. Empty: file://COMPILEFLOW_HOME/store.")
    registry_uri: str | None = Field(
        None,
        description="Model registries, separated by commas; the first is read, all are written. "
        "Empty: sqlite:///COMPILEFLOW_HOME/registry.db.",
    )
    outputs: Path = Field(
        Path("outputs"),
        description="Folder of the files that `python -m flows run` leaves for a person to look into.",
    )
    project_model: str | None = Field(
        None,
        description="Model of `python -m flows run` in the place of the project's own, for example a folder.",
    )
    execute_download: bool = Field(
        False,
        validation_alias="COMPILE_PIPELINE_EXECUTION_DOWNLOAD",
        description="`python -m flows run PROJECT --from-environment` runs the step download-model.",
    )
    execute_compile: bool = Field(
        False,
        validation_alias="COMPILE_PIPELINE_EXECUTION_COMPILE",
        description="The same for the step compile-model.",
    )
    execute_test: bool = Field(
        False,
        validation_alias="COMPILE_PIPELINE_EXECUTION_TEST",
        description="The same for the step validate-model.",
    )
    execute_upload: bool = Field(
        False,
        validation_alias="COMPILE_PIPELINE_EXECUTION_UPLOAD",
        description="The same for the step upload-model.",
    )
    threads: int = Field(2, ge=1, le=1024, description="Threads that a compile or a validation uses.")
    child_variables: str = Field(
        "",
        description="Further variables of the environment, separated by commas, that child processes get, for "
        "example those of a toolchain's license.",
    )
    hub_endpoint: str = Field(
        "https://huggingface.co",
        validation_alias="HF_ENDPOINT",
        description="Hugging Face Hub that models are downloaded from.",
    )
    hub_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="Hub token for gated and private models; never logged."
    )
    s3_endpoint_url: str | None = Field(None, description="URL of the S3 server. Empty: AWS.")
    s3_region: str | None = Field(
        None, description="Region of the S3 server. Empty: from the configuration of AWS."
    )
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Form of bucket URLs: auto, path or virtual. Self-hosted servers usually need path."
    )
    s3_kms_key_id: str | None = Field(None, description="Encrypt objects with this KMS key (SSE-KMS).")
    s3_storage_class: str | None = Field(None, description="Storage class of blobs, for example STANDARD_IA.")
    s3_tags: dict[str, str] = Field(
        default_factory=dict, description="Tags that every object gets, as a JSON object."
    )
    s3_access_key_id: SecretStr | None = Field(
        None, description="Access key of S3. Empty: the default chain of AWS (environment, profile, role)."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret of the access key; never logged.")
    s3_session_token: SecretStr | None = Field(
        None, description="Session token of a temporary access key; never logged."
    )
    s3_files_at_once: int = Field(
        8, ge=1, le=64, description="Files that are uploaded or downloaded at the same time."
    )
    s3_lease_s: float = Field(
        60.0, ge=1, description="Seconds after which the lock of a killed process counts as free."
    )
    neptune_api_token: SecretStr | None = Field(
        None, validation_alias="NEPTUNE_API_TOKEN", description="API token of the Neptune server; never logged."
    )
    neptune_timeout_s: float = Field(
        120.0, gt=0, description="Seconds of silence after which a call of the Neptune client is killed."
    )
    neptune_upload_weights: bool = Field(
        False, description="Upload the artifact's files to Neptune as well, for clients that download from there."
    )
    signing_key: Path | None = Field(
        None,
        description="Private key (PEM file) that signs the attestations of a run. Empty: they are not signed.",
    )
    signing_key_password: SecretStr | None = Field(None, description="Password of the private key; never logged.")
    trusted_keys: str | None = Field(
        None, description="Public keys (PEM files, separated by commas) whose signatures are trusted."
    )
    require_signature: bool = Field(
        False, description="Load only artifacts whose provenance and verdict are signed by a trusted key."
    )

    @field_validator("home", "outputs", "signing_key", "trusted_keys", mode="before")
    @classmethod
    def _is_no_url(cls, value: object) -> object:
        # As a path it would lose a slash, and messages would show the password in it.
        if "://" in str(value):
            raise ValueError("expected a path, got a URL")
        return value

    @property
    def home_dir(self) -> Path:
        """`home`, absolute, with ~ expanded.

        Raises:
            SpecError: The user has no home folder.
        """
        try:
            return self.home.expanduser().absolute()
        except RuntimeError as error:
            raise SpecError(
                f"{self.home} cannot be expanded: HOME is not set, and this user has no home folder.",
                hint="Set COMPILEFLOW_HOME to a folder.",
            ) from error

    @property
    def work_dir(self) -> Path:
        """Folder for unfinished work; you may delete it while no process of compileflow runs."""
        return self.home_dir / "work"

    @property
    def reference_dir(self) -> Path:
        """Folder of the source models' answers, which validations share; you may delete it at any time."""
        return self.home_dir / "reference"

    def log_path(self, name: str) -> Path:
        """Return the log file of a child process, for example "compile-0a1b2c"."""
        return self.home_dir / "logs" / f"{name}.log"

    def resolved_store_uri(self, override: str | None = None) -> str:
        """Return the URI of the store: the caller's, else the configured one, else the embedded one."""
        return override or self.store_uri or (self.home_dir / "store").as_uri()

    def resolved_registry_uris(self, override: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the URIs of the registries: the caller's, else the configured ones, else the embedded one."""
        configured = tuple(uri.strip() for uri in (self.registry_uri or "").split(",") if uri.strip())
        return tuple(override) or configured or (f"sqlite:///{self.home_dir / 'registry.db'}",)

    def resolved_registry_uri(self, override: str | None = None) -> str:
        """Return the URI of the registry to read, the first of the registries."""
        return self.resolved_registry_uris((override,) if override else ())[0]


def dotenv_files() -> tuple[Path, ...]:
    """Return the dotenv files that settings come from; a later one takes precedence."""
    own = Path(".env")
    name = {**_values_in(own), **os.environ}.get(_ENV) or ("prod" if os.environ.get("CI") else "dev")
    # A wrong name is refused when it is read as a setting.
    name = name if name in get_args(Settings.model_fields["env"].annotation) else "dev"
    return _ENV_FOLDER / f"{name}.env", own


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the settings of this process, read once. Tests call `get_settings.cache_clear()`.

    Raises:
        SpecError: A variable has a wrong value or is nearly a setting, or a dotenv file cannot be read.
    """
    files = dotenv_files()
    hint = (
        f"Correct it in the environment or in {' or '.join(map(str, files))}; docs/reference/settings.md lists "
        "what each one takes."
    )
    try:
        _check_spelling(files)
        _hide_secrets(files)
        settings = Settings(_env_file=files)
    except ValidationError as error:
        # The error does not repeat the value, which may be a secret under a wrong name.
        name, _, problem = first_problem(error).partition(": ")
        variable = variable_of(name) if name in Settings.model_fields else name
        raise SpecError(f"The setting {variable}: {problem}.", hint=hint) from error
    except SettingsError as error:
        raise SpecError(f"The settings cannot be read: {error}.", hint=hint) from error
    _give_home(settings)
    return settings


def _give_home(settings: Settings) -> None:
    """Give a user without a home folder one: Prefect, Great Expectations and others look for it at import."""
    try:
        Path.home()
    except RuntimeError:
        # Without COMPILEFLOW_HOME, the first use of the folder raises an error.
        with suppress(SpecError):
            os.environ["HOME"] = str(settings.home_dir)


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    alias = Settings.model_fields[name].validation_alias
    return str(alias or f"{Settings.model_config['env_prefix']}{name.upper()}")


def _hide_secrets(files: Sequence[Path]) -> None:
    """Keep the values of secret settings out of all errors, even where somebody gave one to another setting."""
    fields = Settings.model_fields.items()
    names = [*_SECRETS, *(variable_of(name) for name, field in fields if SecretStr in get_args(field.annotation))]
    sources: list[Mapping[str, str | None]] = [os.environ, *map(_values_in, files)]
    for values in sources:
        hide(values.get(name) for name in names)


def _values_in(file: Path) -> dict[str, str | None]:
    """Read a dotenv file; {} without one.

    Raises:
        SpecError: The file cannot be read, or a line does not set a variable.
    """
    try:
        text = file.read_text("utf-8") if file.is_file() else ""
        for binding in parse_stream(StringIO(text)):
            # NAME alone would hide that a setting is not set.
            if binding.error or (binding.key is not None and binding.value is None):
                # Empty lines before it belong to the line, which may hold a secret.
                original = binding.original
                line = original.line + len(original.string) - len(original.string.lstrip("\n"))
                raise SpecError(
                    f"{file.absolute()} cannot be read: line {line} does not set a variable.",
                    hint="Write NAME=value, and close a quote on its line.",
                )
        return dotenv_values(file)
    except (UnicodeDecodeError, OSError) as error:
        reason = first_line(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise SpecError(
            f"{file.absolute()} cannot be read: {reason}.",
            hint="Save it as UTF-8, and give this user access to it.",
        ) from error


def _check_spelling(files: Sequence[Path]) -> None:
    """Refuse variables that are nearly settings: they would be ignored, and `require_signature` with them."""
    variables = [*os.environ, *(name for file in files for name in _values_in(file))]
    for prefix, likeness in ((str(Settings.model_config["env_prefix"]), 0.8), (_SWITCHES, 0.0)):
        known_names = [
            variable.removeprefix(prefix)
            for variable in map(variable_of, Settings.model_fields)
            if variable.startswith(prefix)
        ]
        for variable in variables:
            name = variable.upper().removeprefix(prefix)
            near_names = get_close_matches(name, known_names, n=1, cutoff=likeness)
            if variable.upper().startswith(prefix) and near_names and name not in known_names:
                raise SpecError(f"{variable} is not a setting.", hint=f"Did you mean {prefix}{near_names[0]}?")
