"""The Neptune-compatible server: what one process with the real client does with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.neptune_server.tokens import make_api_token
from tests.services.neptune import ROOT, serve_neptune
from tests.services.neptune_session import HUGE_BYTES, LARGE_BYTES, MOMENT

# What the server's process may have in memory at once while 200 MB go up and come down.
MEMORY_BYTES = 100_000_000


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process with the real client saw, and the server's memory before it was restarted."""
    folder = tmp_path_factory.mktemp("client")
    with serve_neptune(folder / "server") as server:
        client = {
            "NEPTUNE_DATA_DIRECTORY": str(folder / "data"),
            # Pages of three, so that seven rows are several.
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
        assert process.returncode == 0, server.log.read_text("utf-8")
        assert " ERROR " not in server.log.read_text("utf-8")
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text("utf-8"))
    return found | {"peak memory": peak}


def test_client_makes_a_model_once_and_a_version_of_it(seen: dict[str, Any]) -> None:
    model, version = seen["ids"]
    assert model.endswith("-KEY")
    assert version == f"{model}-1"
    assert seen["collision"] == "NeptuneModelKeyAlreadyExistsError"


def test_client_reads_what_it_wrote(seen: dict[str, Any]) -> None:
    found = seen["fields"]
    assert {name: found[name] for name in ("string", "float", "int", "bool")} == {
        "string": "other text",
        "float": 0.5,
        "int": 3,
        "bool": True,
    }
    assert found["time"] == MOMENT.isoformat()
    assert found["tags"] == ["one", "three"]
    assert found["absent"] == "MissingFieldException"


def test_long_string_is_cut_and_nan_is_dropped(seen: dict[str, Any]) -> None:
    assert seen["fields"]["long"] == 16_384
    assert seen["fields"]["names"] == ["bool", "float", "int", "long", "string", "time"]


def test_series_keep_every_point(seen: dict[str, Any]) -> None:
    assert seen["series"] == {
        "last": 0.125,
        "steps": [0.0, 1.0, 2.0, 10.0],
        "values": [1.0, 0.5, 0.25, 0.125],
        "text": ["a line"],
    }


def test_stage_changes_and_own_fields_do_not(seen: dict[str, Any]) -> None:
    assert (seen["stages"]["before"], seen["stages"]["after"]) == ("none", "production")
    assert seen["stages"]["own"] == "MetadataInconsistency"


def test_files_come_back_as_they_were_whole_and_in_parts(seen: dict[str, Any]) -> None:
    assert seen["files"] == {"same": {"empty": True, "small": True, "large": True, "huge": True}, "again": 10}


def test_memory_stays_small_while_large_files_go_up_and_down(seen: dict[str, Any]) -> None:
    assert 0 < seen["peak memory"] < MEMORY_BYTES < HUGE_BYTES


def test_folder_comes_back_as_zip(seen: dict[str, Any]) -> None:
    assert seen["sets"] == {
        "same": {"config.json": True, "model.bin": True, "sub/vocabulary.txt": True},
        "entries": [["config.json", 2, "file"], ["model.bin", LARGE_BYTES, "file"]],
        "after": ["config.json", "model.bin"],
        "absent": "MissingFieldException",
    }


def test_tracked_files_are_listed(seen: dict[str, Any]) -> None:
    assert seen["tracked"] == ["config.json", "vocabulary.txt"]


def test_tables_are_filtered_sorted_and_paged(seen: dict[str, Any]) -> None:
    table = seen["table"]
    assert table["all"] == ["7", "6", "5", "4", "3", "2", "1"]
    assert table["pages"] == ["1", "2", "3", "4", "5", "6", "7"]
    # Versions 2 to 7 have the scores 0.0 to 0.5.
    assert table["digest"] == ["5"]
    assert table["greater"] == ["4", "5", "7"]
    assert table["limit"] == ["7", "6"]
    assert table["syntax"] == "NeptuneInvalidQueryException"
    assert table["column"] == "ValueError"


def test_upload_in_parts_goes_on_after_a_restart(seen: dict[str, Any]) -> None:
    assert seen["restart"] is True


def test_trashed_version_is_found_by_id_only_and_deleted_from_the_trash_only(seen: dict[str, Any]) -> None:
    assert seen["trash"] == {
        "before": True,
        "not in the trash": "",
        "trashed": False,
        "in the trash": "",
        "deleted": "ModelVersionNotFound",
        "number comes again": False,
    }


def test_client_says_what_is_wrong_with_its_token_its_project_or_its_key(seen: dict[str, Any]) -> None:
    assert seen["wrong token"] == "Unauthorized"
    assert seen["projects"] == {
        "made": True,
        "unknown": "ProjectNotFoundWithSuggestions",
        "model key": "ClientHttpError",
    }


def test_client_wants_leave_to_use_plain_http(seen: dict[str, Any]) -> None:
    assert seen["plain http"] == ["InsecureTransportError", ""]


def peak_memory(pid: int) -> int:
    """Return the most memory that a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
