"""hf: a model on the Hugging Face Hub, pinned to a commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from compileflow._process.folders import os_errors
from compileflow.contracts import LocatedSource
from compileflow.errors import SourceError, SourceUnavailableError, redacted
from compileflow.settings import Settings
from compileflow.sources.files import CONFIG, choose_files


class HubSource:
    """Downloads a model's files from one commit of a Hub repository."""

    def __init__(self, settings: Settings):
        _check_endpoint(settings.hub_endpoint)
        self._endpoint = settings.hub_endpoint
        # A secret string, so that the token does not appear in tracebacks or logs of this object.
        self._token = settings.hub_token

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Ask the Hub for the current commit of `revision` (default: main)."""
        repository = _repository(location)
        return f"hf://{repository}", self._info(repository, revision).sha

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Download the model's files at one commit below `work_dir`."""
        return self._download(location, revision, work_dir)

    def preview(
        self, location: str, revision: str | None, work_dir: Path, *, patterns: Sequence[str] = CONFIG
    ) -> LocatedSource:
        """Download the configurations alone, as a rule in a second; the other files of the model are empty.

        Args:
            location: Hub id.
            revision: Branch, tag or commit.
            work_dir: Folder for the files.
            patterns: Names of the files to download.
        """
        located = self._download(location, revision, work_dir, patterns=patterns)
        for path in (work_dir / name for name in located.files):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}" if path.suffix == ".json" else "")
        return located

    def _download(
        self, location: str, revision: str | None, work_dir: Path, *, patterns: Sequence[str] = ("*",)
    ) -> LocatedSource:
        from huggingface_hub import snapshot_download

        repository = _repository(location)
        info = self._info(repository, revision)
        files = choose_files([sibling.rfilename for sibling in info.siblings or []], f"hf://{repository}")
        with os_errors(work_dir, "download to"), _hub_errors(repository, revision):
            snapshot_download(
                repository,
                revision=info.sha,
                allow_patterns=[name for name in files if any(fnmatch(name, pattern) for pattern in patterns)],
                local_dir=work_dir,
                endpoint=self._endpoint,
                token=self._bearer(),
            )
        return LocatedSource(uri=f"hf://{repository}", revision=info.sha, folder=work_dir, files=files)

    def _info(self, repository: str, revision: str | None) -> Any:
        from huggingface_hub import HfApi

        with _hub_errors(repository, revision):
            return HfApi(endpoint=self._endpoint, token=self._bearer()).model_info(repository, revision=revision)

    def _bearer(self) -> str | Literal[False]:
        """Return the token; False keeps huggingface_hub from searching for another one."""
        return self._token.get_secret_value() if self._token else False


def _check_endpoint(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid:
        # The message does not show the URL, which may contain a password.
        raise SourceError("HF_ENDPOINT is not the URL of a server.", hint="Write it as https://host.")


def _repository(location: str) -> str:
    return location.removeprefix("hf://").strip("/")


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's errors into one line each; neither they nor their causes show a secret."""
    # HTTPError belongs to the client that huggingface_hub uses: httpx before its version 2.0, httpx2 since.
    from huggingface_hub.errors import (  # type: ignore[attr-defined,unused-ignore]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise SourceError(
            f"Expected a folder or a Hub id, got {repository!r}.",
            hint="Give a model folder, or owner/name.",
        ) from redacted(error)
    except GatedRepoError as error:
        raise SourceError(
            f"hf://{repository} is gated, and this token has no access to it.",
            hint="Accept its licence on its Hub page and set HF_TOKEN to a token of that account.",
        ) from redacted(error)
    except RevisionNotFoundError as error:
        raise SourceError(
            f"hf://{repository} has no revision {revision!r}.", hint="Give a branch, a tag or a full commit."
        ) from redacted(error)
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"hf://{repository} does not exist, or is private and HF_TOKEN has no access to it.",
            hint="Check the name; for a private model set HF_TOKEN. A local model is given as ./folder.",
        ) from redacted(error)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = SourceUnavailableError if status >= 500 or status in (0, 408, 429) else SourceError
        raise kind(
            f"The Hub answered HTTP {status} for hf://{repository}.", hint="Try again later."
        ) from redacted(error)
    except OfflineModeIsEnabled as error:
        raise SourceError(
            f"hf://{repository} cannot be downloaded while HF_HUB_OFFLINE is set.",
            hint="Unset HF_HUB_OFFLINE, or give a model folder.",
        ) from redacted(error)
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise SourceUnavailableError(
            f"The Hub did not answer for hf://{repository} ({type(error).__name__}).",
            hint="Check the network and HF_ENDPOINT.",
        ) from redacted(error)
