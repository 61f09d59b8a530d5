"""Configuration from the environment and a .env file: where the store, the registry and the cache are."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    registry_uri: str | None = Field(None, description="Model registry. Empty: sqlite:///HOME/registry.db.")
    threads: int = Field(2, ge=1, le=1024, description="Threads of a compile and of a validation.")
    hub_endpoint: str = Field(
        "https://huggingface.co",
        validation_alias="HF_ENDPOINT",
        description="Hub that hf:// models come from.",
    )
    hub_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="Token for gated and private models; never logged."
    )

    @property
    def home_dir(self) -> Path:
        """`home`, absolute, with ~ expanded."""
        return self.home.expanduser().absolute()

    @property
    def work_dir(self) -> Path:
        """Folder for unfinished work; may be deleted whenever nothing runs."""
        return self.home_dir / "work"

    def resolved_store_uri(self, override: str | None = None) -> str:
        """Return the store to use: the caller's, else the configured one, else the embedded one."""
        return override or self.store_uri or (self.home_dir / "store").as_uri()

    def resolved_registry_uri(self, override: str | None = None) -> str:
        """Return the registry to use: the caller's, else the configured one, else the embedded one."""
        return override or self.registry_uri or f"sqlite:///{self.home_dir / 'registry.db'}"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return this process's settings, read once. Tests call `get_settings.cache_clear()`."""
    return Settings()
