"""The Neptune-compatible server in a session with the real client."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.neptune_server.api import OPERATIONS
from deployments.neptune_server.tokens import make_api_token
from tests.services.neptune import ROOT, serve_neptune
from tests.services.neptune_session import HUGE_BYTES, LARGE_BYTES, MOMENT

# Limit of the memory of the server's process while a file of 200 MB is uploaded and downloaded.
MAX_MEMORY_BYTES = 100_000_000


@pytest.fixture(scope="module")
def observations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The observations of the client's session, the server's peak memory and the calls in the server's log."""
    folder = tmp_path_factory.mktemp("client")
    with serve_neptune(folder / "server") as server:
        client = {
            "NEPTUNE_DATA_DIRECTORY": str(folder / "data"),
            # With pages of three, a table of seven rows has several pages.
            "NEPTUNE_FETCH_TABLE_STEP_SIZE": "3",
            "OTHER_ADDRESS_TOKEN": server.token_for(server.url.replace("127.0.0.1", "localhost")),
            "WRONG_TOKEN": make_api_token(server.url, "no-such-key"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.neptune_session", server.project(), str(folder)],
            cwd=ROOT,
            env=os.environ | server.environment | client,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            peak = 0
            while line := process.stdout.readline():
                if line == "restart\n":
                    peak = peak_memory(server.pid)
                    assert server.stop() == 0
                    server.start()
                    process.stdin.write("\n")
                    process.stdin.flush()
    log = server.log.read_text("utf-8")
    assert process.returncode == 0, log
    assert " ERROR " not in log
    observations: dict[str, Any] = json.loads((folder / "observations.json").read_text("utf-8"))
    calls = set(re.findall(r" (GET|POST) (/api/\S+/v1/\S+) ", log))
    return observations | {"peak memory": peak, "calls": calls}


def test_client_makes_every_call_of_the_api(observations: dict[str, Any]) -> None:
    assert observations["calls"] == set(OPERATIONS)


def test_client_creates_a_model_once_and_a_version_of_it(observations: dict[str, Any]) -> None:
    model, version = observations["ids"]
    assert model.endswith("-KEY")
    assert version == f"{model}-1"
    assert observations["collision"] == "NeptuneModelKeyAlreadyExistsError"


def test_client_reads_what_it_wrote(observations: dict[str, Any]) -> None:
    fields = observations["fields"]
    assert {name: fields[name] for name in ("string", "float", "int", "bool")} == {
        "string": "other text",
        "float": 0.5,
        "int": 3,
        "bool": True,
    }
    assert fields["time"] == MOMENT.isoformat()
    assert fields["tags"] == ["one", "three"]
    assert fields["absent"] == "MissingFieldException"
    assert fields["one by one"] == [True] * 5


def test_long_string_is_cut_and_nan_is_dropped(observations: dict[str, Any]) -> None:
    assert observations["fields"]["long"] == 16_384
    assert observations["fields"]["names"] == ["bool", "float", "int", "long", "string", "time"]


def test_series_keep_every_point(observations: dict[str, Any]) -> None:
    assert observations["series"] == {
        "last": 0.125,
        "steps": [0.0, 1.0, 2.0, 10.0],
        "values": [1.0, 0.5, 0.25, 0.125],
        "text": ["a line"],
        "last text": "a line",
    }


def test_stage_changes_and_read_only_fields_do_not(observations: dict[str, Any]) -> None:
    assert (observations["stages"]["before"], observations["stages"]["after"]) == ("none", "production")
    assert observations["stages"]["read-only"] == "MetadataInconsistency"


def test_downloaded_files_are_the_uploaded_ones(observations: dict[str, Any]) -> None:
    assert observations["files"] == {
        "equal": {"empty": True, "small": True, "large": True, "huge": True},
        "replaced": 10,
        "extension": "bin",
    }


def test_memory_stays_small_while_large_files_are_transferred(observations: dict[str, Any]) -> None:
    assert 0 < observations["peak memory"] < MAX_MEMORY_BYTES < HUGE_BYTES


def test_folder_is_downloaded_as_a_zip(observations: dict[str, Any]) -> None:
    assert observations["sets"] == {
        "equal": {"config.json": True, "model.bin": True, "sub/vocabulary.txt": True},
        "entries": [["config.json", 2, "file"], ["model.bin", LARGE_BYTES, "file"]],
        "after deletion": ["config.json", "model.bin"],
        "small": ["vocabulary.txt"],
        "single file": ["config.json"],
        "absent": "MissingFieldException",
    }


def test_tracked_files_are_listed(observations: dict[str, Any]) -> None:
    assert observations["tracked"] == ["config.json", "vocabulary.txt"]


def test_tables_are_filtered_sorted_and_paged(observations: dict[str, Any]) -> None:
    table = observations["table"]
    assert table["all"] == ["7", "6", "5", "4", "3", "2", "1"]
    assert table["pages"] == ["1", "2", "3", "4", "5", "6", "7"]
    # Versions 2 to 7 have the scores 0.0 to 0.5.
    assert table["digest"] == ["5"]
    assert table["greater"] == ["4", "5", "7"]
    assert table["limit"] == ["7", "6"]
    assert table["syntax"] == "NeptuneInvalidQueryException"
    assert table["column"] == "ValueError"


def test_upload_in_parts_continues_after_a_restart(observations: dict[str, Any]) -> None:
    assert observations["restart"] is True


def test_version_in_the_trash_is_opened_by_id_but_not_listed_until_it_is_deleted(
    observations: dict[str, Any],
) -> None:
    assert observations["trash"] == {
        "before": True,
        "not in the trash": "",
        "trashed": False,
        "in the trash": "",
        "deleted": "ModelVersionNotFound",
        "number is reused": False,
    }


def test_client_raises_an_error_for_a_wrong_token_project_or_key(observations: dict[str, Any]) -> None:
    assert observations["wrong token"] == "Unauthorized"
    assert observations["projects"] == {
        "created": True,
        "unknown": "ProjectNotFoundWithSuggestions",
        "model key": "ClientHttpError",
    }


def test_client_needs_permission_to_use_plain_http(observations: dict[str, Any]) -> None:
    assert observations["plain http"] == ["InsecureTransportError", ""]


def peak_memory(pid: int) -> int:
    """Return the peak memory of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
