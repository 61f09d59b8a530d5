"""The language check reports every phrase that it knows, and lets plain English pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _language() -> ModuleType:
    # docs/ is a folder of pages, not a package.
    path = Path(__file__).parents[2] / "docs" / "language.py"
    module_spec = importlib.util.spec_from_file_location("language", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


LANGUAGE = _language()

# One sentence for each phrase, in the order of PHRASES.
TRANSLATED = (
    "'1by8' is no shape bucket.",
    "It has shape (1, 4); needed is (batch, sequence) of integers.",
    "Servers of one's own want path.",
    "Upload the artifact's files, too.",
    "        password: Its password.",
    "An error says what was asked.",
    "What the caller asked for was another digest.",
    "Last in, so that nobody waits long.",
    "Whoever can write the folder can write the manifest.",
    "Mend the target; everything is then made again.",
)
PLAIN = '''"""Open an artifact and check every file.

Args:
    password: Password of that user.
    folder: Folder of the artifact, which is no longer in the store.

Raises:
    SpecError: The target is unknown. Expected a name, got 3.
"""
# Two files are not too many. Its digest is the folder's own.
'''


def test_there_is_one_sentence_for_each_phrase() -> None:
    assert len(TRANSLATED) == len(LANGUAGE.PHRASES)


@pytest.mark.parametrize("number", range(len(TRANSLATED)))
def test_each_phrase_is_reported_with_its_line_and_advice(number: int) -> None:
    sentence = TRANSLATED[number]
    advice = list(LANGUAGE.PHRASES.values())[number]

    reported = list(LANGUAGE.problems(f"A plain sentence.\n{sentence}\n"))

    assert reported == [(2, sentence.strip(), advice)]


def test_plain_english_passes() -> None:
    assert list(LANGUAGE.problems(PLAIN)) == []


def test_the_list_of_exceptions_stays_short() -> None:
    assert len(LANGUAGE.EXCEPTIONS) <= 10
