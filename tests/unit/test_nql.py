"""NQL queries on a small table: which versions a query finds, and which queries are refused."""

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
    """Versions 1 to 4 with scores 0.1 to 0.4 and counts 1 to 4. Some have more fields."""
    database = Database(tmp_path_factory.mktemp("nql") / "registry.db")
    with database.writing() as db:
        project = containers.create_project(db, "tests/nql")
        model = containers.create_model(db, project, "KEY")
        for number in range(1, 5):
            version = containers.create_model_version(db, project, model.id)
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


def versions(table: tuple[Database, Project], query: str, **options: object) -> str:
    """Return the numbers of the versions that a query finds."""
    database, project = table
    request = {
        "query": {"query": query},
        "sorting": {"sortBy": {"name": "sys/id"}, "dir": "ascending"},
        "pagination": {"offset": 0, "limit": 100},
        **options,
    }
    page = search.search(database.reading, project, ["modelVersion"], request)
    numbers = []
    for entry in page["entries"]:
        fields_by_name = {field["name"]: field for field in entry["attributes"]}
        numbers.append(fields_by_name["sys/id"]["stringProperties"]["value"][-1])
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
        # A comparison looks only at fields of its type.
        ("mixed:string = 1", "3"),
        ("mixed:int = 1", "4"),
        # Only NOT finds a version without the field.
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
    assert versions(table, query) == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("score", "expected ':', got the end of the query"),
        ("score:float", "expected an operator, got the end of the query"),
        ("score:float =", "expected a value, got the end of the query"),
        ("score:float = 1 2", "expected AND, OR or the end of the query, got '2'"),
        ("(score:float = 1", "expected ')', got the end of the query"),
        ("score:float = 1)", "got ')'"),
        ("AND", "expected ':', got the end of the query"),
        ("score:number = 1", "unknown type 'number', use one of string, int"),
        ("score:float = text", "'text' is not a float"),
        ("score:float CONTAINS 1", "float does not support CONTAINS, use one of ="),
        ("even:bool = 1", "'1' is not a bool"),
        ("at:datetime > yesterday", "'yesterday' is not a datetime"),
        ("text:string =~ '('", "'(' is not a pattern"),
        (
            "median(loss:floatSeries) > 1",
            "expected one of last, min, max, average of a floatSeries, got median of floatSeries",
        ),
        ("last(score:float) > 1", "got last of float"),
        ('text:string = "open', "expected a name, an operator or a value, got"),
        ("(" * 200 + "score:float = 1" + ")" * 200, "at most 100 deep"),
        (" AND ".join(["score:float = 1"] * 501), "at most 500 comparisons"),
        ("x" * 70_000, "at most 65536 characters"),
    ],
)
def test_invalid_query_is_refused_with_a_message(query: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        compile_query(query)
    # The client recognizes a wrong query by this title.
    assert (caught.value.status, caught.value.title) == (400, "Syntax error")
    assert message in caught.value.detail


def test_query_at_the_limits_runs(table: tuple[Database, Project]) -> None:
    assert versions(table, " OR ".join(["count:int = 1"] * 500)) == "1"
    assert versions(table, "(" * 90 + "NOT " * 8 + "count:int = 1" + ")" * 90) == "1"


def test_sql_in_a_value_is_not_executed(table: tuple[Database, Project]) -> None:
    assert versions(table, 'text:string = "\' OR 1=1 --"') == ""
    assert versions(table, "`x' OR '1'='1`:string = x") == ""


@pytest.mark.parametrize(
    ("direction", "column", "expected"),
    [
        ("ascending", "score", "1234"),
        ("descending", "score", "4321"),
        # Versions without the field come last in both directions, the newest of them first if descending.
        ("ascending", "text", "3124"),
        ("descending", "text", "3421"),
        ("descending", "sys/trashed", "4321"),
    ],
)
def test_table_is_sorted_by_any_field(
    table: tuple[Database, Project], direction: str, column: str, expected: str
) -> None:
    assert versions(table, "", sorting={"sortBy": {"name": column}, "dir": direction}) == expected


def test_pages_together_are_the_whole_table(table: tuple[Database, Project]) -> None:
    pages = [versions(table, "", pagination={"offset": offset, "limit": 3}) for offset in (0, 3, 6)]
    assert pages == ["123", "4", ""]
    with pytest.raises(ApiError, match="Bad request"):
        versions(table, "", pagination={"offset": 0, "limit": 10_001})


def test_table_has_the_requested_columns(
    table: tuple[Database, Project],
) -> None:
    database, project = table
    request = {"attributeFilters": [{"path": "score"}]}
    (entry, *_) = search.search(database.reading, project, ["modelVersion"], request)["entries"]
    assert [field["name"] for field in entry["attributes"]] == ["score"]


def test_types_of_system_fields_are_known_in_an_empty_project(table: tuple[Database, Project]) -> None:
    database, project = table
    assert search.column_types(database.reading, project, ["modelVersion"], "mixed") == ["int", "string"]
    with database.writing() as db:
        empty_project = containers.create_project(db, "tests/empty")
    types = search.column_types(database.reading, empty_project, ["modelVersion"], "sys/creation_time")
    assert types == ["datetime"]


def test_database_of_another_version_of_the_server_is_refused(tmp_path: Path) -> None:
    database = Database(tmp_path / "registry.db")
    database.reading.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ValueError, match="expected schema version 1, got 99"):
        Database(tmp_path / "registry.db")
