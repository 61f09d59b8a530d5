"""Report phrases that this project avoids, with the line each one stands on: python docs/language.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = (
    "src",
    "flows",
    "tasks",
    "deployments",
    "docs",
    "examples",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
SUFFIXES = (".css", ".j2", ".md", ".py", ".svg", ".toml", ".yaml")

# A phrase that reads like a translation, and what to write instead.
PHRASES = {
    r"\b(?:is|are|was|were) no\b(?! longer)": 'write "is not a"',
    r"\bneeded (?:is|are)\b": 'write "expected A, got B"',
    r"\bone's own\b": 'say whose it is, or write "your own"',
    r", too[.,;:)]": 'write "also", or leave it out',
    r"^\s+\w+: (?:Its|Of the|Of a|Likewise|See there)\b": "name the thing that the entry describes",
    r"\bwhat (?:was|is) (?:asked|said|left|there)\b": "name the thing: the request, the statement",
    r"\basked for was\b": 'write "expected A, got B"',
    r"\bnobody\b": "name who acts, or use the passive voice",
    r"\bwhoever\b": "name who acts",
    r"\b(?:anew|mend(?:s|ed)?|half-made)\b": 'write "again", "fix", "partial"',
}
_PATTERNS = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in PHRASES.items()]

# Lines that may keep a phrase, for example a quotation: "path: text of the line". At most ten.
EXCEPTIONS: frozenset[str] = frozenset()


def problems(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number and text of each line that holds such a phrase, with advice."""
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern, advice in _PATTERNS:
            if pattern.search(line):
                yield number, line.strip(), advice


def files() -> Iterator[Path]:
    """Yield the files to read, this one aside."""
    for place in PLACES:
        path = ROOT / place
        candidates = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in candidates:
            if file.suffix in SUFFIXES and file != Path(__file__).resolve():
                yield file


def main() -> int:
    """Print each problem as file:line: text; return 1 if there is one."""
    clean = True
    for file in files():
        name = file.relative_to(ROOT).as_posix()
        for number, line, advice in problems(file.read_text("utf-8")):
            if f"{name}: {line}" not in EXCEPTIONS:
                sys.stdout.write(f"{name}:{number}: {line}  ({advice})\n")
                clean = False
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
