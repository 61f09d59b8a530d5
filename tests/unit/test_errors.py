"""The exception tree: every error crosses process boundaries, prints as one line, and says whether to retry."""

from __future__ import annotations

import json
import pickle
import time
import traceback
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from compileflow import errors
from compileflow.errors import (
    CompileflowError,
    field_problem,
    first_line,
    hide,
    in_words,
    redacted,
    without_secrets,
)

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CompileflowError)]


@pytest.mark.parametrize("kind", TREE)
def test_error_survives_pickling(kind: type[CompileflowError]) -> None:
    more = {"hint": "what to do", "log_path": "/logs/1.log", "report_uri": "file:///store/manifests/1.json"}
    error = pickle.loads(pickle.dumps(kind("what was found", **more)))
    assert type(error) is kind
    assert (error.message, error.hint, error.log_path) == ("what was found", "what to do", "/logs/1.log")
    assert error.report_uri == "file:///store/manifests/1.json"


@pytest.mark.parametrize("kind", TREE)
def test_error_survives_json(kind: type[CompileflowError]) -> None:
    sent = kind("found", hint="do", log_path="/logs/1.log").to_dict()
    error = CompileflowError.from_dict(json.loads(json.dumps(sent)))
    assert type(error) is kind
    assert (error.message, error.hint, error.log_path) == ("found", "do", "/logs/1.log")


def test_only_places_that_did_not_answer_and_lost_runs_are_worth_a_retry() -> None:
    assert {kind.__name__ for kind in TREE if kind.retryable} == {
        "SourceUnavailableError",
        "StoreUnavailableError",
        "RegistryUnavailableError",
        "RunLostError",
    }


def test_error_of_an_unknown_kind_becomes_the_base_class() -> None:
    error = CompileflowError.from_dict({"type": "NoSuchError", "message": "found"})
    assert type(error) is CompileflowError
    assert str(error) == "found"


def test_error_of_a_third_party_keeps_its_kind() -> None:
    class ThirdPartyError(errors.StoreUnavailableError):
        pass

    error = CompileflowError.from_dict(ThirdPartyError("found").to_dict())
    assert type(error) is ThirdPartyError
    assert error.retryable


def test_message_and_hint_are_one_line() -> None:
    error = CompileflowError("a\n  b\tc", hint="d\r\ne")
    assert str(error) == "a b c d e"
    assert repr(error) == "CompileflowError('a b c d e')"


def test_error_without_hint_ends_with_its_message() -> None:
    assert str(CompileflowError("found")) == "found"


def test_error_with_a_log_says_where_it_is() -> None:
    error = CompileflowError("found", hint="do", log_path="/logs/1.log")
    assert str(error) == "found do Log: /logs/1.log"
    assert str(CompileflowError("found", log_path="/logs/1.log")) == "found Log: /logs/1.log"
    assert CompileflowError.from_dict({"type": "CompileError", "message": "found"}).log_path == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n  the graph is broken.\nat line 7", "the graph is broken"),
        ("refused:\n  why", "refused"),
        ("", "ValueError"),
        ("x" * 400, "x" * 300),
        (
            "The following operation failed in the TorchScript interpreter.\nTraceback:\nRuntimeError: none.\n",
            "RuntimeError: none",
        ),
    ],
)
def test_first_line_is_short_and_has_no_full_stop(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


def test_first_line_of_a_systems_error_has_neither_number_nor_path() -> None:
    assert first_line(FileNotFoundError(2, "No such file or directory", "/m")) == "No such file or directory"
    assert first_line(OSError("Can't load the model")) == "Can't load the model"


class Part(BaseModel, extra="forbid"):
    """A part of a message."""

    text: Annotated[str, Field(max_length=3)]


class Letter(BaseModel, extra="forbid"):
    """Fields with a choice of types."""

    words: str | Annotated[list[str | Part], Field(min_length=1)]
    copies: Literal[1] = 1
    is_urgent: Literal[False] | None = None


@pytest.mark.parametrize(
    ("content", "path", "problem"),
    [
        ({}, "words", "a value is required"),
        ({"words": 5}, "words", "expected text or a list, got 5"),
        ({"words": None}, "words", "expected text or a list, got null"),
        ({"words": []}, "words", "expected at least 1 item, got []"),
        ({"words": ["a", 5]}, "words.1", "expected text or an object, got 5"),
        ({"words": [{}]}, "words.0.text", "a value is required"),
        ({"words": [{"text": "abcd"}]}, "words.0.text", 'expected at most 3 characters, got "abcd"'),
        ({"words": "a", "copies": 2}, "copies", "expected 1, got 2"),
        ({"words": "a", "is_urgent": True}, "is_urgent", "expected false, got true"),
        ({"words": "a", "list": 1}, "list", "this name is not known"),
        ({"words": {"b" * 80: "\n"}}, "words", f'expected text or a list, got {{"{"b" * 58}...'),
        ([], "", "expected an object, got []"),
    ],
)
def test_problem_of_a_field_with_several_types_names_the_field_once(content: Any, path: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Letter.model_validate(content)
    assert field_problem(caught.value.errors(), content) == (path, problem)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        ("abc", "'abc'"),
        (["a"], "['a']"),
        (print, "a value of the type builtin_function_or_method"),
    ],
)
def test_value_in_words(value: Any, words: str) -> None:
    assert in_words(value) == words
    assert in_words("x" * 100) == f"'{'x' * 59}..."


SCHEMES = ["https", "s3", "file", "sqlite", "mlflow:http", "neptune", "postgresql+asyncpg"]
# A quote or a space would end the URL.
PASSWORDS = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="/@:!$*+-_."))


@given(st.sampled_from(SCHEMES), PASSWORDS, st.sampled_from(["{}", "'{}'.", "see {}, then", "a,{},b", "({})"]))
def test_no_error_shows_the_user_or_the_query_of_a_url(scheme: str, password: str, sentence: str) -> None:
    password = f"xCANARY{password}"
    for url in (f"{scheme}://user:{password}@host/path", f"{scheme}://host/p?X-Amz-Signature={password}&x=1"):
        error = CompileflowError(f"Cannot read {sentence.format(url)}", hint=sentence.format(url))
        assert "CANARY" not in f"{error} {error!r} {error.to_dict()}"


def test_secret_that_the_process_knows_and_tokens_of_known_forms_are_hidden() -> None:
    hide(["a/secret=of mine", "short", None])
    assert without_secrets("see a/secret=of mine, file:///a/secret%3Dof%20mine/x and short") == (
        "see ***, file:///***/x and short"
    )
    tokens = ("hf_" + 34 * "x", "AKIAIOSFODNN7EXAMPLE", "eyJhcGlfYWRkcmVzcyI6Imh0dHBzOi8v==")
    for token in tokens:
        assert token not in without_secrets(f"The folder /srv/{token}/store does not exist.")


def test_causes_of_an_error_show_no_secret() -> None:
    url = "http://user:CANARY@host/x"
    try:
        try:
            raise ValueError(f"no answer from {url}", 5)
        except ValueError as inner:
            raise FileNotFoundError(2, "No such file", url) from inner
    except OSError as outer:
        error = CompileflowError("It failed.")
        error.__cause__ = redacted(outer)
    text = "".join(traceback.format_exception(error)).replace(url, "", 1)
    assert "no answer from http://***@host/x" in text
    assert "No such file: 'http://***@host/x'" in text


@pytest.mark.parametrize(
    "text",
    [
        f"commit {40 * 'c'} of hf_internal and /a/AKIA",
        "s3://bucket/folder@2, sqlite:////home/me/registry.db and file:///a/b@c",
        "http://127.0.0.1:4200/api@x does not answer. Is it there?",
        "registry:reviews@3 and hf://gpt2@main",
    ],
)
def test_text_without_secrets_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_long_text_of_a_stranger_is_searched_in_little_time() -> None:
    start = time.monotonic()
    for text in ("://a:" * 100_000, "?" * 500_000, "@" * 500_000):
        CompileflowError(text)
    assert time.monotonic() - start < 5
