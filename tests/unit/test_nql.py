"""NQL against a small table: which versions a query finds, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.neptune_server import containers, fields, search
from deployments.neptune_server.containers import Project
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.nql import compile_query

DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Project]]:
    """Versions 1 to 4: score 0.1 to 0.4, count 1 to 4; some have more."""
    database = Database(tmp_path_factory.mktemp("nql") / "registry.db")
    with database.writing() as db:
        project = containers.make_project(db, "tests/nql")
        model = containers.make_model(db, project, "KEY")
        for number in range(1, 5):
            version = containers.make_model_version(db, project, model.id)
            operations: list[dict[str, object]] = [
                {"path": "score", "assignFloat": {"value": number / 10}},
                {"path": "count", "assignInt": {"value": number}},
                {"path": "even", "assignBool": {"value": number % 2 == 0}},
                {"path": "at", "assignDatetime": {"valueMilliseconds": number * DAY_MS}},
                {"path": "a name/with spaces", "assignString": {"value": f"v{number}"}},
                {"path": "sys/tags", "insertStrings": {"values": ["all", f"tag {number}"]}},
            ]
            if number == 3:
                entries = [{"value": value, "step": None, "timestampMilliseconds": 0} for value in (3.0, 1.0, 2.0)]
                operations += [
                    {"path": "text", "assignString": {"value": 'say "hi" AND (go)'}},
                    {"path": "mixed", "assignString": {"value": "1"}},
                    {"path": "loss", "logFloats": {"entries": entries}},
                ]
            if number == 4:
                operations += [{"path": "mixed", "assignInt": {"value": 1}}]
            assert fields.execute(db, version, operations) == []
    yield database, project
    database.close()


def found(table: tuple[Database, Project], query: str, **given: object) -> str:
    database, project = table
    asked = {"query": {"query": query}, "sorting": {"sortBy": {"name": "sys/id"}, "dir": "ascending"}, **given}
    answer = search.search(database.reading, project, ["modelVersion"], asked)
    numbers = []
    for entry in answer["entries"]:
        named = {one["name"]: one for one in entry["attributes"]}
        numbers.append(named["sys/id"]["stringProperties"]["value"][-1])
    return "".join(numbers)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "1234"),
        ("  ", "1234"),
        ("(`score`:float = 0.3)", "3"),
        ("score:float > 0.2", "34"),
        ("score : float >= 0.2", "234"),
        ('`score`:float < "0.2"', "1"),
        ("score:float != 0.2", "134"),
        ("count:int <= 2", "12"),
        ("count:integer = 2.0", "2"),
        ("`count`:float > 3", "4"),
        ("even:bool = true", "24"),
        ("even:boolean != TRUE", "13"),
        ('at:datetime > "1970-01-03T00:00:00.000Z"', "34"),
        ('at:datetime = "1970-01-03T01:00:00+01:00"', "2"),
        ('sys/creation_time:datetime > "-1h"', "1234"),
        ('sys/creation_time:datetime < "-2d"', ""),
        ('`a name/with spaces`:string = "v2"', "2"),
        ("`a name/with spaces`:string = v2", "2"),
        ("`a name/with spaces`:string CONTAINS 'v'", "1234"),
        ('`a name/with spaces`:string =~ "v[23]$"', "23"),
        ('`a name/with spaces`:string = "v["', ""),
        ('text:string = "say \\"hi\\" AND (go)"', "3"),
        ("text:string CONTAINS 'AND (go)'", "3"),
        ('sys/tags:stringSet CONTAINS "tag 4"', "4"),
        ('sys/tags:stringSet CONTAINS "tag"', ""),
        ("sys/state:experimentState = running", "1234"),
        ("loss:floatSeries = 2", "3"),
        ("(last(loss:floatSeries) = 2)", "3"),
        ("min(`loss`:floatSeries) = 1 AND max(`loss`:floatSeries) = 3", "3"),
        ("average(loss:floatSeries) > 2", ""),
        # Another type is another field.
        ("mixed:string = 1", "3"),
        ("mixed:int = 1", "4"),
        # Who has no such field is found by NOT alone.
        ("text:string != x", "3"),
        ("NOT (text:string CONTAINS hi)", "124"),
        ("NOT NOT count:int = 1", "1"),
        # AND binds more tightly than OR, NOT than both.
        ("count:int = 1 OR count:int = 2 AND even:bool = false", "1"),
        ("(count:int = 1 OR count:int = 2) AND even:bool = false", "1"),
        ("count:int = 1 or (count:int = 2 and even:bool = true)", "12"),
        ("NOT even:bool = true AND count:int > 1", "3"),
        ("((((count:int = 4))))", "4"),
    ],
)
def test_query_finds(table: tuple[Database, Project], query: str, expected: str) -> None:
    assert found(table, query) == expected


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("score", "expected ':', found the end"),
        ("score:float", "expected an operator, found the end"),
        ("score:float =", "expected a value, found the end"),
        ("score:float = 1 2", "expected AND, OR or the end, found '2'"),
        ("(score:float = 1", "expected ')', found the end"),
        ("score:float = 1)", "found ')'"),
        ("AND", "expected ':', found the end"),
        ("score:number = 1", "unknown type 'number', use one of string, int"),
        ("score:float = text", "'text' is no float"),
        ("score:float CONTAINS 1", "float has no CONTAINS, use one of ="),
        ("even:bool = 1", "'1' is no bool"),
        ("at:datetime > yesterday", "'yesterday' is no datetime"),
        ("text:string =~ '('", "'(' is no string"),
        ("median(loss:floatSeries) > 1", "median() is one of last, min"),
        ("last(score:float) > 1", "last() is one of"),
        ('text:string = "open', "cannot read"),
        ("(" * 200 + "score:float = 1" + ")" * 200, "at most 100 deep"),
        (" AND ".join(["score:float = 1"] * 501), "at most 500 comparisons"),
        ("x" * 70_000, "at most 65536 characters"),
    ],
)
def test_query_that_is_none_is_refused_with_what_was_expected(query: str, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        compile_query(query)
    # The client makes its own error of exactly this title.
    assert (caught.value.status, caught.value.title) == (400, "Syntax error")
    assert said in caught.value.detail


def test_longest_query_that_is_taken_runs(table: tuple[Database, Project]) -> None:
    assert found(table, " OR ".join(["count:int = 1"] * 500)) == "1"
    assert found(table, "(" * 90 + "NOT " * 8 + "count:int = 1" + ")" * 90) == "1"


def test_value_that_looks_like_sql_is_a_value(table: tuple[Database, Project]) -> None:
    assert found(table, 'text:string = "\' OR 1=1 --"') == ""
    assert found(table, "`x' OR '1'='1`:string = x") == ""


@pytest.mark.parametrize(
    ("way", "column", "expected"),
    [
        ("ascending", "score", "1234"),
        ("descending", "score", "4321"),
        # Who has no such field comes last, whichever way; the newest of them first when descending.
        ("ascending", "text", "3124"),
        ("descending", "text", "3421"),
        ("descending", "sys/trashed", "4321"),
    ],
)
def test_table_is_sorted_by_any_field(
    table: tuple[Database, Project], way: str, column: str, expected: str
) -> None:
    assert found(table, "", sorting={"sortBy": {"name": column}, "dir": way}) == expected


def test_pages_join_into_the_whole_table(table: tuple[Database, Project]) -> None:
    pages = [found(table, "", pagination={"offset": offset, "limit": 3}) for offset in (0, 3, 6)]
    assert pages == ["123", "4", ""]
    with pytest.raises(ApiError, match="Bad request"):
        found(table, "", pagination={"offset": 0, "limit": 10_001})


def test_columns_are_those_asked_for_and_types_are_known_in_an_empty_project(
    table: tuple[Database, Project],
) -> None:
    database, project = table
    asked = {"attributeFilters": [{"path": "score"}]}
    (first, *_) = search.search(database.reading, project, ["modelVersion"], asked)["entries"]
    assert [one["name"] for one in first["attributes"]] == ["score"]
    types = search.column_types(database.reading, project, ["modelVersion"], "mixed")
    assert [one["type"] for one in types] == ["int", "string"]
    with database.writing() as db:
        empty = containers.make_project(db, "tests/empty")
    assert search.column_types(database.reading, empty, ["modelVersion"], "sys/creation_time") == [
        {"name": "sys/creation_time", "type": "datetime"}
    ]


def test_file_of_another_version_of_the_server_is_refused(tmp_path: Path) -> None:
    database = Database(tmp_path / "registry.db")
    database.reading.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ValueError, match="has schema 99, this server knows 1"):
        Database(tmp_path / "registry.db")
