"""NQL, Neptune's query language, turned into a condition of SQL.

    query      = and { OR and }
    and        = not { AND not }
    not        = [ NOT ] ( "(" query ")" | comparison )
    comparison = name ":" type operator value
    name       = `any text` | word | last(...) and the like of a floatSeries

`=` and `!=` go with every type but stringSet, `<` `<=` `>` `>=` with numbers, times and strings, CONTAINS with
strings (part of it) and sets of strings (member), `=~` (regular expression, anywhere) with strings. A comparison
with a field that an object has not, or has with another type, is false; NOT of it is true. Times are ISO 8601, or
"-2h", "-7d": so long ago.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from deployments.neptune_server.containers import iso_time
from deployments.neptune_server.errors import ApiError

_LONGEST = 1 << 16
_DEEPEST = 100
_MOST = 500
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<name>`[^`]+`)
      | (?P<operator>!=|>=|<=|=~|=|>|<)
      | (?P<mark>[():])
      | (?P<word>[^\s():=<>!~"'`]+)
    )""",
    re.VERBOSE,
)
_AGO = re.compile(r"-(\d+)([hd])")
_ORDER = ("=", "!=", "<", "<=", ">", ">=")
_AGGREGATES = {"last": None, "min": "MIN", "max": "MAX", "average": "AVG"}


@dataclass(frozen=True)
class Condition:
    """A condition on a row `c` of the table `container`, and the values of its question marks."""

    sql: str
    values: tuple[object, ...] = ()


@dataclass(frozen=True)
class _Type:
    stored: tuple[str, ...]
    operators: tuple[str, ...]
    convert: Callable[[str], object]


def compile_query(text: str) -> Condition:
    """Return the condition that a query stands for; an empty query is always true.

    Raises:
        ApiError: 400, "Syntax error", and where.
    """
    if len(text) > _LONGEST:
        raise _syntax_error(f"a query has at most {_LONGEST} characters")
    parser = _Parser(_tokens(text))
    if parser.at_end:
        return Condition("1")
    condition = parser.query(0)
    if not parser.at_end:
        raise parser.expected("AND, OR or the end")
    return condition


Token = tuple[str, str]


def _tokens(text: str) -> list[Token]:
    found: list[Token] = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise _syntax_error(f"cannot read {text[at : at + 20]!r}")
        kind = str(match.lastgroup)
        found.append((kind, match[kind]))
        at = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[Token]):
        self._tokens = tokens
        self._at = 0
        self._compared = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._tokens)

    def query(self, depth: int) -> Condition:
        return self._joined("OR", lambda: self._joined("AND", lambda: self._not(depth)))

    def expected(self, what: str) -> ApiError:
        found = "the end" if self.at_end else repr(self._tokens[self._at][1])
        return _syntax_error(f"expected {what}, found {found}")

    def _joined(self, word: str, part: Callable[[], Condition]) -> Condition:
        parts = [part()]
        while self._take("word", word):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        values = tuple(value for one in parts for value in one.values)
        return Condition("(" + f" {word} ".join(one.sql for one in parts) + ")", values)

    def _not(self, depth: int) -> Condition:
        if depth > _DEEPEST:
            raise _syntax_error(f"parentheses are at most {_DEEPEST} deep")
        if self._take("word", "NOT"):
            inner = self._not(depth + 1)
            return Condition(f"NOT {inner.sql}", inner.values)
        if self._take("mark", "("):
            inner = self.query(depth + 1)
            self._need("mark", ")")
            return inner
        return self._comparison()

    def _comparison(self) -> Condition:
        self._compared += 1
        if self._compared > _MOST:
            raise _syntax_error(f"a query has at most {_MOST} comparisons")
        name = self._name()
        aggregate = None
        if self._take("mark", "("):
            aggregate, name = name.lower(), self._name()
        self._need("mark", ":")
        kind = self._next("word", f"a type, one of {', '.join(_TYPES)}")
        if aggregate is not None:
            self._need("mark", ")")
        operator = self._operator()
        if self.at_end or self._tokens[self._at][0] not in ("quoted", "word"):
            raise self.expected("a value")
        value = _value(*self._tokens[self._at])
        self._at += 1
        return _compare(name, kind, operator, value, aggregate)

    def _name(self) -> str:
        if not self.at_end and self._tokens[self._at][0] == "name":
            return self._next("name", "a name")[1:-1]
        return self._next("word", "a field's name")

    def _operator(self) -> str:
        if self._take("word", "CONTAINS"):
            return "CONTAINS"
        return self._next("operator", "an operator")

    def _take(self, kind: str, text: str) -> bool:
        if not self.at_end and (self._tokens[self._at][0], self._tokens[self._at][1].upper()) == (kind, text):
            self._at += 1
            return True
        return False

    def _need(self, kind: str, text: str) -> None:
        if not self._take(kind, text):
            raise self.expected(repr(text))

    def _next(self, kind: str, what: str) -> str:
        if self.at_end or self._tokens[self._at][0] != kind:
            raise self.expected(what)
        self._at += 1
        return self._tokens[self._at - 1][1]


def _compare(name: str, kind: str, operator: str, text: str, aggregate: str | None) -> Condition:
    if kind not in _TYPES:
        raise _syntax_error(f"unknown type {kind!r}, use one of {', '.join(_TYPES)}")
    known = _TYPES[kind]
    if operator not in known.operators:
        raise _syntax_error(f"{kind} has no {operator}, use one of {', '.join(known.operators)}")
    if aggregate is not None and (aggregate not in _AGGREGATES or kind != "floatSeries"):
        raise _syntax_error(f"{aggregate}() is one of {', '.join(_AGGREGATES)}, of a floatSeries")
    try:
        value = _pattern(text) if operator == "=~" else known.convert(text)
    except ValueError as error:
        raise _syntax_error(f"{text!r} is no {kind}") from error
    function = _AGGREGATES.get(aggregate or "last")
    found = "a.value"
    if function:
        found = f"(SELECT {function}(value) FROM point p WHERE p.container = a.container AND p.path = a.path)"  # noqa: S608
    if kind == "stringSet":
        test = "EXISTS(SELECT 1 FROM json_each(a.value) WHERE json_each.value = ?)"
    elif operator == "CONTAINS":
        test = "instr(a.value, ?) > 0"
    elif operator == "=~":
        test = "regexp(?, a.value)"
    else:
        test = f"{found} {operator} ?"
    stored = ", ".join("?" * len(known.stored))
    sql = (
        "EXISTS(SELECT 1 FROM attribute a WHERE a.container = c.id AND a.path = ? "  # noqa: S608 - of our own pieces
        f"AND a.type IN ({stored}) AND {test})"
    )
    return Condition(sql, (name, *known.stored, value))


def _value(kind: str, text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "quoted" else text


def _flag(text: str) -> int:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return int(text.lower() == "true")


def _time(text: str) -> str:
    ago = _AGO.fullmatch(text)
    if ago:
        hours = int(ago[1]) * {"h": 1, "d": 24}[ago[2]]
        return iso_time(datetime.now(UTC) - timedelta(hours=hours))
    moment = datetime.fromisoformat(text)
    return iso_time(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(text) from error
    return text


def _syntax_error(detail: str) -> ApiError:
    return ApiError(400, "Syntax error", detail=f"NQL: {detail}.")


_NUMBER = _Type(("int", "float"), _ORDER, float)
_TYPES = {
    "string": _Type(("string",), (*_ORDER, "CONTAINS", "=~"), str),
    "int": _NUMBER,
    "integer": _NUMBER,
    "float": _NUMBER,
    "bool": _Type(("bool",), _ORDER[:2], _flag),
    "boolean": _Type(("bool",), _ORDER[:2], _flag),
    "datetime": _Type(("datetime",), _ORDER, _time),
    "stringSet": _Type(("stringSet",), ("CONTAINS",), str),
    "experimentState": _Type(("experimentState",), _ORDER[:2], str),
    "floatSeries": _Type(("floatSeries",), _ORDER, float),
    "stringSeries": _Type(("stringSeries",), (*_ORDER, "CONTAINS", "=~"), str),
    "artifact": _Type(("artifact",), _ORDER[:2], str),
}
