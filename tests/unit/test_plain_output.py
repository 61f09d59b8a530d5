"""What a store or a registry holds cannot move the cursor, hide text or begin a line of its own on a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from typer.testing import CliRunner, Result

import compileflow.cli
from compileflow.admin.approval import approval_markdown
from compileflow.catalog import open_registry, open_store
from compileflow.cli import app
from compileflow.cli.output import escape_log_lines
from compileflow.cli.progress import PlainProgress, TerminalProgress
from compileflow.cli.tables import print_table
from compileflow.settings import Settings
from compileflow.steps.values import ValidatedArtifact
from compileflow.testing.registries import version_entry
from tests.unit.attested_artifacts import stored_entry

# Clear the screen, ring, go back to the start of the line, begin a line, reverse the text, and half a character.
HOSTILE = "a\x1b[2J\x07\rb\nproven: all is well\u202ec\x9b31m\u2028d\ud800"
SHOWN = r"a\x1b[2J\x07\rb\nproven: all is well\u202ec\x9b31m\u2028d\ud800"
FOLDERS = [Path(compileflow.cli.__file__).parent, Path(__file__).parents[2] / "flows"]


@pytest.fixture
def hostile(settings: Settings) -> str:
    """A version whose every free text is hostile, and its digest."""
    # A lone surrogate is no text for SQLite's JSON; the others come from any registry.
    text = HOSTILE.removesuffix("\ud800")
    entry = stored_entry(settings, "ner")
    texts = dict.fromkeys(("source_uri", "source_revision", "report_uri", "target", "flow_run_id"), text)
    registry = open_registry(settings.resolved_registry_uri(), settings)
    registry.register(entry.model_copy(update=texts | {"report_digest": text}))
    registry.register(version_entry("ner", 2).model_copy(update=texts))
    registry.set_stage("ner", 2, "staging", who=text, reason=text)
    registry.note("ner", 1, who=text, reason=text)
    open_store(settings.resolved_store_uri(), settings).put_record(
        "report-of",
        entry.artifact_digest,
        ValidatedArtifact(
            artifact_digest=entry.artifact_digest,
            report_uri=text,
            report_digest=entry.artifact_digest,
            outcome="fail",
            reason=text,
            figures={},
            cached=True,
            why=text,
        ).model_dump(mode="json"),
    )
    return entry.artifact_digest


def is_plain(result: Result) -> bool:
    texts = (result.stdout, result.stderr)
    return all(
        line.isprintable() and not line.startswith("proven: all") for text in texts for line in text.split("\n")
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("versions",), SHOWN),
        (("lineage", "ner", "1"), f"noted: {SHOWN}"),
        (("lineage", "ner", "staging"), f"made it staging: {SHOWN}"),
        (("promote", "ner", "1", "--stage", "production"), "names the target a\\x1b[2J"),
        (("pull", "ner@staging", "out"), "error: "),
        (("verify", "registry:ner@1"), "names the target a\\x1b[2J"),
        (("inspect", "registry:ner@1"), ""),
    ],
)
def test_texts_of_a_registry_are_printed_as_escapes(hostile: str, words: tuple[str, ...], shown: str) -> None:
    for more in ((), ("--json",)):
        result = CliRunner().invoke(app, [*words, *more])
        assert is_plain(result), result.output
        assert more or shown.removesuffix("\\ud800") in result.output
        if more and result.stdout:
            json.loads(result.stdout)


def test_reason_of_a_refusal_in_the_store_is_printed_as_escapes(settings: Settings, hostile: str) -> None:
    registry_path = Path(settings.resolved_registry_uri().removeprefix("sqlite:///"))
    registry_path.unlink()
    result = CliRunner().invoke(app, ["verify", hostile])
    assert "The last validation refused it: a\\x1b[2J" in result.stderr
    assert is_plain(result)


def test_progress_lines_are_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress().step("compile") as show:
        show(HOSTILE)
    assert f"compile: {SHOWN} (" in capsys.readouterr().err
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, color_system=None)
    with (
        Progress(TextColumn("{task.description}"), console=console) as live,
        TerminalProgress(live).step("compile") as show,
    ):
        show(HOSTILE)
        show(f"note: {HOSTILE}")
    assert f"note: {SHOWN}\n" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()
    assert "\u202e" not in screen.getvalue()


def test_log_lines_are_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    escape_log_lines()
    last = logging.lastResort
    assert last is not None
    last.handle(logging.LogRecord("compileflow", logging.WARNING, "", 0, "%s was lost", (HOSTILE,), None))
    assert capsys.readouterr().err == f"{SHOWN} was lost\n"


def test_question_to_a_person_has_no_line_of_the_registry(settings: Settings, hostile: str) -> None:
    version = open_registry(settings.resolved_registry_uri(), settings).get("ner", 1)
    lines = approval_markdown(version, "production", settings).split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("proven") for line in lines)


def test_only_the_module_of_output_prints() -> None:
    """Elsewhere, a text could reach the terminal as a stranger wrote it."""
    calls = {
        f"{path.name}: {ast.unparse(node.func)}"
        for folder in FOLDERS
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    }
    printing = {
        call for call in calls if call.split(": ")[1] in ("print", "typer.echo", "click.echo", "sys.stdout.write")
    }
    assert printing == {"output.py: typer.echo"}


def test_titles_of_columns_are_text_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["8 x\x1b]0;pwn\x07[/]", "[link=https://evil.example]OK[/link]"], [["a", "b"]])
    printed = capsys.readouterr().out
    assert r"8 x\x1b]0;pwn\x07[/]" in printed
    assert "[link=https://evil.example]OK[/link]" in printed
