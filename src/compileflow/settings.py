"""Configuration from the environment and a .env file: where the store, the registry and the cache are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from compileflow.errors import SpecError, first_problem


class Settings(BaseSettings):
    """Settings of one process. Names in the environment carry the prefix COMPILEFLOW_, except HF_TOKEN."""

    model_config = SettingsConfigDict(
        env_prefix="COMPILEFLOW_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    home: Path = Field(
        Path("~/.local/share/compileflow"),
        description="Folder of the embedded store, registry and work files.",
    )
    store_uri: str | None = Field(None, description="Artifact store. Empty: file://HOME/store.")
    registry_uri: str | None = Field(
        None,
        description="Model registry, or several with commas between; the first is read. "
        "Empty: sqlite:///HOME/registry.db.",
    )
    threads: int = Field(2, ge=1, le=1024, description="Threads of a compile and of a validation.")
    hub_endpoint: str = Field(
        "https://huggingface.co",
        validation_alias="HF_ENDPOINT",
        description="Hub that hf:// models come from.",
    )
    hub_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="Token for gated and private models; never logged."
    )
    s3_endpoint_url: str | None = Field(None, description="S3 server. Empty: that of AWS.")
    s3_region: str | None = Field(None, description="Its region. Empty: from AWS's own configuration.")
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="How a bucket is named in a URL. Servers of one's own want path."
    )
    s3_kms_key_id: str | None = Field(None, description="Encrypt objects with this KMS key (SSE-KMS).")
    s3_storage_class: str | None = Field(None, description="Storage class of blobs, for example STANDARD_IA.")
    s3_tags: dict[str, str] = Field(default_factory=dict, description="Tags of every object, as a JSON object.")
    s3_access_key_id: SecretStr | None = Field(
        None, description="Access key. Empty: AWS's own chain of environment, profile and role."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Its secret; never logged.")
    s3_session_token: SecretStr | None = Field(None, description="Its session token, where it has one.")
    s3_files_at_once: int = Field(8, ge=1, le=64, description="Files that are sent or fetched at once.")
    s3_lease_s: float = Field(
        60.0, ge=1, description="Seconds after which a lock counts as free whose holder was killed."
    )
    neptune_api_token: SecretStr | None = Field(
        None, validation_alias="NEPTUNE_API_TOKEN", description="Token of the Neptune server; never logged."
    )
    neptune_timeout_s: float = Field(
        120.0, gt=0, description="Seconds of silence after which a call of the Neptune client is killed."
    )
    neptune_upload_weights: bool = Field(
        False, description="Upload the artifact's files to Neptune, too, for those who pull from there."
    )
    signing_key: Path | None = Field(
        None, description="Private key (PEM) that signs what a run says of an artifact. Empty: unsigned."
    )
    signing_key_password: SecretStr | None = Field(None, description="Its password; never logged.")
    trusted_keys: str | None = Field(
        None, description="Public keys (PEM files, commas between) whose signatures count."
    )
    require_signature: bool = Field(
        False, description="Load only artifacts whose provenance and verdict a trusted key signed."
    )

    @property
    def home_dir(self) -> Path:
        """`home`, absolute, with ~ expanded."""
        return self.home.expanduser().absolute()

    @property
    def work_dir(self) -> Path:
        """Folder for unfinished work; may be deleted whenever nothing runs."""
        return self.home_dir / "work"

    def log_path(self, name: str) -> Path:
        """Return the file for what a child process prints, for example of "compile-0a1b2c"."""
        return self.home_dir / "logs" / f"{name}.log"

    def resolved_store_uri(self, override: str | None = None) -> str:
        """Return the store to use: the caller's, else the configured one, else the embedded one."""
        return override or self.store_uri or (self.home_dir / "store").as_uri()

    def resolved_registry_uris(self, override: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the registries to write to: the caller's, else the configured ones, else the embedded one."""
        configured = tuple(uri.strip() for uri in (self.registry_uri or "").split(",") if uri.strip())
        return tuple(override) or configured or (f"sqlite:///{self.home_dir / 'registry.db'}",)

    def resolved_registry_uri(self, override: str | None = None) -> str:
        """Return the registry to read: the first of those that are written to."""
        return self.resolved_registry_uris((override,) if override else ())[0]


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return this process's settings, read once. Tests call `get_settings.cache_clear()`.

    Raises:
        SpecError: a variable holds what it cannot.
    """
    hint = "Correct it in the environment or in .env; docs/reference/settings.md lists what each one takes."
    try:
        return Settings()
    except ValidationError as error:
        # What was found is not repeated: it may be a secret that was put under a wrong name.
        raise SpecError(f"The setting {first_problem(error)}.", hint=hint) from error
    except SettingsError as error:
        raise SpecError(f"The settings cannot be read: {error}.", hint=hint) from error
