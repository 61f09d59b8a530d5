"""NQL, Neptune's query language, compiled to a condition in SQL.

    query      = and { OR and }
    and        = not { AND not }
    not        = [ NOT ] ( "(" query ")" | comparison )
    comparison = ( name ":" type | aggregate "(" name ":" type ")" ) operator value
    name       = `any text` | word
    aggregate  = last | min | max | average, of a floatSeries

`=` and `!=` compare all types except stringSet. `<`, `<=`, `>` and `>=` compare numbers, times and strings.
CONTAINS looks for a part of a string or a member of a stringSet. `=~` looks for a regular expression anywhere in a
string, in the syntax of RE2. If an object does not have the field, or has it with another type, the comparison is
false and NOT of it is true. A time is in ISO 8601, or it is a span before now such as "-2h" or "-7d".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from deployments.neptune_server.containers import iso_time
from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.patterns import compiled

_MAX_CHARACTERS = 1 << 16
_MAX_DEPTH = 100
_MAX_COMPARISONS = 500
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
    """A condition on a row `c` of the table `container`, and the values for its question marks."""

    sql: str
    values: tuple[object, ...] = ()


@dataclass(frozen=True)
class _Type:
    stored_types: tuple[str, ...]
    operators: tuple[str, ...]
    convert: Callable[[str], object]


def compile_query(text: str) -> Condition:
    """Return the condition of a query. The condition of an empty query is always true.

    Raises:
        ApiError: 400, "Syntax error"; the detail says what was expected and what came.
    """
    if len(text) > _MAX_CHARACTERS:
        raise _syntax_error(f"expected at most {_MAX_CHARACTERS} characters, got {len(text)}")
    parser = _Parser(_tokens(text))
    if parser.at_end:
        return Condition("1")
    condition = parser.query(0)
    if not parser.at_end:
        raise parser.expected("AND, OR or the end of the query")
    return condition


Token = tuple[str, str]


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _syntax_error(f"expected a name, an operator or a value, got {text[position : position + 20]!r}")
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind]))
        position = match.end()
    return tokens


class _Parser:
    def __init__(self, tokens: list[Token]):
        self._tokens = tokens
        self._position = 0
        self._comparisons = 0

    @property
    def at_end(self) -> bool:
        return self._position == len(self._tokens)

    def query(self, depth: int) -> Condition:
        return self._joined("OR", lambda: self._joined("AND", lambda: self._not(depth)))

    def expected(self, what: str) -> ApiError:
        token = "the end of the query" if self.at_end else repr(self._tokens[self._position][1])
        return _syntax_error(f"expected {what}, got {token}")

    def _joined(self, word: str, part: Callable[[], Condition]) -> Condition:
        parts = [part()]
        while self._take("word", word):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        values = tuple(value for condition in parts for value in condition.values)
        return Condition("(" + f" {word} ".join(condition.sql for condition in parts) + ")", values)

    def _not(self, depth: int) -> Condition:
        if depth > _MAX_DEPTH:
            raise _syntax_error(f"expected parentheses at most {_MAX_DEPTH} deep, got more")
        if self._take("word", "NOT"):
            inner = self._not(depth + 1)
            return Condition(f"NOT {inner.sql}", inner.values)
        if self._take("mark", "("):
            inner = self.query(depth + 1)
            self._need("mark", ")")
            return inner
        return self._comparison()

    def _comparison(self) -> Condition:
        self._comparisons += 1
        if self._comparisons > _MAX_COMPARISONS:
            raise _syntax_error(f"expected at most {_MAX_COMPARISONS} comparisons, got more")
        name = self._name()
        aggregate = None
        if self._take("mark", "("):
            aggregate, name = name.lower(), self._name()
        self._need("mark", ":")
        kind = self._next("word", f"a type, one of {', '.join(_TYPES)}")
        if aggregate is not None:
            self._need("mark", ")")
        operator = self._operator()
        if self.at_end or self._tokens[self._position][0] not in ("quoted", "word"):
            raise self.expected("a value")
        value = _value(*self._tokens[self._position])
        self._position += 1
        return _compare(name, kind, operator, value, aggregate)

    def _name(self) -> str:
        if not self.at_end and self._tokens[self._position][0] == "name":
            return self._next("name", "a name")[1:-1]
        return self._next("word", "a field's name")

    def _operator(self) -> str:
        if self._take("word", "CONTAINS"):
            return "CONTAINS"
        return self._next("operator", "an operator")

    def _take(self, kind: str, text: str) -> bool:
        if not self.at_end and (self._tokens[self._position][0], self._tokens[self._position][1].upper()) == (
            kind,
            text,
        ):
            self._position += 1
            return True
        return False

    def _need(self, kind: str, text: str) -> None:
        if not self._take(kind, text):
            raise self.expected(repr(text))

    def _next(self, kind: str, what: str) -> str:
        if self.at_end or self._tokens[self._position][0] != kind:
            raise self.expected(what)
        self._position += 1
        return self._tokens[self._position - 1][1]


def _compare(name: str, kind: str, operator: str, text: str, aggregate: str | None) -> Condition:
    if kind not in _TYPES:
        raise _syntax_error(f"unknown type {kind!r}, use one of {', '.join(_TYPES)}")
    field_type = _TYPES[kind]
    if operator not in field_type.operators:
        operators = ", ".join(field_type.operators)
        raise _syntax_error(f"{kind} does not support {operator}, use one of {operators}")
    if aggregate is not None and (aggregate not in _AGGREGATES or kind != "floatSeries"):
        aggregates = ", ".join(_AGGREGATES)
        raise _syntax_error(f"expected one of {aggregates} of a floatSeries, got {aggregate} of {kind}")
    try:
        value = _pattern(text) if operator == "=~" else field_type.convert(text)
    except (ValueError, OverflowError) as error:
        raise _syntax_error(f"{text!r} is not a {'pattern' if operator == '=~' else kind}") from error
    if kind == "string" and operator == "=":
        # Begins with the few fields of this value, where EXISTS would look at every object.
        return Condition(
            "c.id IN (SELECT container FROM attribute WHERE path = ? AND type = 'string' "
            "AND substr(value, 1, 64) = substr(?, 1, 64) AND value = ?)",
            (name, value, value),
        )
    function = _AGGREGATES.get(aggregate or "last")
    operand = "a.value"
    if function:
        operand = f"(SELECT {function}(value) FROM point p WHERE p.container = a.container AND p.path = a.path)"  # noqa: S608
    if kind == "stringSet":
        test = "EXISTS(SELECT 1 FROM json_each(a.value) WHERE json_each.value = ?)"
    elif operator == "CONTAINS":
        test = "instr(a.value, ?) > 0"
    elif operator == "=~":
        test = "regexp(?, a.value)"
    else:
        test = f"{operand} {operator} ?"
    placeholders = ", ".join("?" * len(field_type.stored_types))
    sql = (
        "EXISTS(SELECT 1 FROM attribute a WHERE a.container = c.id AND a.path = ? "  # noqa: S608 - no text of the client
        f"AND a.type IN ({placeholders}) AND {test})"
    )
    return Condition(sql, (name, *field_type.stored_types, value))


def _value(kind: str, text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "quoted" else text


def _flag(text: str) -> int:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return int(text.lower() == "true")


def _time(text: str) -> str:
    match = _AGO.fullmatch(text)
    if match:
        hours = int(match[1]) * {"h": 1, "d": 24}[match[2]]
        return iso_time(datetime.now(UTC) - timedelta(hours=hours))
    moment = datetime.fromisoformat(text)
    return iso_time(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _pattern(text: str) -> str:
    compiled(text)
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
