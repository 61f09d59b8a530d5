"""check_pattern: a regular expression of a tokenizer that cannot take exponential time.

Tokenizers match with Oniguruma, which backtracks. A pattern takes exponential time if a repeated part can match
the same text in several ways, as in (a+)+, and polynomial time if parts of variable length follow one another. The
patterns of public models repeat single characters and classes, at most two of them in a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST = 20_000
_DEEPEST = 20
# Parts without an upper limit that follow one another: the degree of the polynomial.
_MOST_UNLIMITED = 3
# Parts of variable length, and alternatives, that follow one another.
_MOST_VARIABLE = 12
# Repeating a part this often counts as unlimited.
_UNLIMITED = 100
# Characters of the pattern after its counted repetitions are written out.
_LARGEST = 20_000
_QUANTIFIER = re.compile(r"[?*+]|\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\?(?::|=|!|>|<=|<!|P?<[A-Za-z_]\w*>|[a-zA-Z-]+:)")
_SWITCH = re.compile(r"\?[a-zA-Z-]+\)")
# References to groups and calls of groups, and \K and \X, which have a variable length.
_REFUSED_ESCAPES = "123456789kgKX"


@dataclass
class _Part:
    """Shape of a part of a pattern: shortest match, parts of variable length in a row, size when written out."""

    shortest: int = 0
    unlimited: int = 0
    variable: int = 0
    size: int = 1


def check_pattern(pattern: str) -> int:
    """Check a pattern, and return the number of characters of its shortest match.

    Raises:
        ValueError: The pattern can take too long, or has a construct that is not checked; the text says which.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"has {len(pattern)} characters, and {_LONGEST} are the most")
    parser = _Parser(pattern)
    part = parser.alternatives(0)
    if parser.position < len(pattern):
        raise ValueError("has a parenthesis too many")
    return part.shortest


class _Parser:
    """Reads a pattern from left to right; it raises ValueError at what it refuses."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.position = 0

    def alternatives(self, depth: int) -> _Part:
        if depth > _DEEPEST:
            raise ValueError(f"has more than {_DEEPEST} groups in one another")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return _Part(
            shortest=min(branch.shortest for branch in branches),
            unlimited=max(branch.unlimited for branch in branches),
            variable=max(branch.variable for branch in branches) + (len(branches) > 1 and depth > 0),
            size=sum(branch.size for branch in branches),
        )

    def _sequence(self, depth: int) -> _Part:
        total = _Part(size=0)
        while self.position < len(self.pattern) and self.pattern[self.position] not in "|)":
            part = self._repeated(self._atom(depth))
            total.shortest += part.shortest
            total.unlimited += part.unlimited
            total.variable += part.variable
            total.size += part.size
            if total.unlimited > _MOST_UNLIMITED or total.variable > _MOST_VARIABLE:
                raise ValueError(
                    f"has {total.variable} parts of variable length in a row, {total.unlimited} of them without a "
                    f"limit; {_MOST_VARIABLE} and {_MOST_UNLIMITED} are the most"
                )
            if total.size > _LARGEST:
                raise ValueError(f"has more than {_LARGEST} parts when its repetitions are written out")
        return total

    def _repeated(self, part: _Part) -> _Part:
        while (match := _QUANTIFIER.match(self.pattern, self.position)) and match.group() not in ("{}", "{,}"):
            self.position = match.end()
            # Lazy and possessive forms.
            self._take("?") or self._take("+")
            least, most = _counts(match)
            if most > 1 and part.variable:
                raise ValueError("repeats a part of variable length, which can take exponential time")
            part = _Part(
                shortest=part.shortest * least,
                unlimited=part.unlimited + (most > _UNLIMITED and most != least),
                variable=part.variable + (most != least),
                size=part.size * max(1, most if most <= _LARGEST else least),
            )
        return part

    def _atom(self, depth: int) -> _Part:
        character = self.pattern[self.position]
        self.position += 1
        if character == "\\":
            return self._escape()
        if character == "[":
            self._class(0)
            return _Part(shortest=1)
        if character == "(":
            return self._group(depth)
        return _Part(shortest=int(character not in "^$"))

    def _escape(self) -> _Part:
        if self.position == len(self.pattern):
            raise ValueError("ends in a backslash")
        character = self.pattern[self.position]
        if character in _REFUSED_ESCAPES:
            raise ValueError(f"has \\{character}, which is not supported")
        self.position += 1
        if character in "pPxou" and self._take("{"):
            self._until("}")
        return _Part(shortest=int(character not in "bBAzZGRhHyYO" or character in "hHRO"))

    def _class(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"has more than {_DEEPEST} classes in one another")
        self._take("^")
        # A bracket that comes first is a member.
        self._take("]")
        while not self._take("]"):
            if self.position >= len(self.pattern):
                raise ValueError("has a class without an end")
            if self._take("["):
                self._class(depth + 1)
            else:
                self.position += 1 + (self.pattern[self.position] == "\\")

    def _group(self, depth: int) -> _Part:
        if self.pattern.startswith("?#", self.position):
            self._until(")")
            return _Part()
        if match := _SWITCH.match(self.pattern, self.position):
            self.position = match.end()
            return _Part()
        is_look = self.pattern.startswith(("?=", "?!", "?<=", "?<!"), self.position)
        if match := _GROUP.match(self.pattern, self.position):
            self.position = match.end()
        elif self.pattern.startswith(("?", "*"), self.position):
            raise ValueError("has a kind of group that is not supported")
        part = self.alternatives(depth + 1)
        if not self._take(")"):
            raise ValueError("has a group without an end")
        if is_look:
            part.shortest = 0
        return part

    def _take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.position):
            self.position += len(text)
            return True
        return False

    def _until(self, text: str) -> None:
        end = self.pattern.find(text, self.position)
        if end < 0:
            raise ValueError(f"lacks {text!r}")
        self.position = end + 1


def _counts(match: re.Match[str]) -> tuple[int, int]:
    """Return the least and the most repetitions of a quantifier."""
    if match.group() in ("?", "*", "+"):
        return {"?": (0, 1), "*": (0, 2**31), "+": (1, 2**31)}[match.group()]
    least, comma, most = match.groups()
    return int(least or 0), int(most) if most else 2**31 if comma else int(least)
