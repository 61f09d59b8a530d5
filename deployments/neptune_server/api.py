"""The operations of the API, and the swagger documents from which the client makes its methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.neptune_server import operations
from deployments.neptune_server.definitions import DEFINITIONS, Schema, array, reference

APIS = {
    "backend": "/api/backend/v1",
    "leaderboard": "/api/leaderboard/v1",
    "artifacts": "/api/artifacts/v1",
}


@dataclass(frozen=True)
class Operation:
    """One call of the API.

    Attributes:
        name: The client's name for it.
        api: Which of the three documents it is in.
        method: GET or POST.
        path: Below the API's own path.
        parameters: As swagger has them.
        answer: Schema of the answer; None: no JSON.
        does: What it does, for the documentation.
    """

    name: str
    api: str
    method: str
    path: str
    parameters: tuple[Schema, ...]
    answer: Schema | None
    does: str

    @property
    def route(self) -> tuple[str, str]:
        """HTTP method and whole path."""
        return self.method, APIS[self.api] + self.path


def swagger(api: str) -> Schema:
    """Return the swagger 2.0 document of one API."""
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS.values():
        if operation.api == api:
            answer = {} if operation.answer is None else {"schema": operation.answer}
            paths.setdefault(operation.route[1], {})[operation.method.lower()] = {
                "operationId": operation.name,
                "tags": ["api"],
                "parameters": list(operation.parameters),
                "responses": {"200": {"description": "ok", **answer}},
            }
    return {
        "swagger": "2.0",
        "info": {"title": "compileflow registry server", "version": "1"},
        "consumes": ["application/json"],
        "produces": ["application/json"],
        "paths": paths,
        "definitions": DEFINITIONS,
    }


def _read(text: str) -> Iterator[Operation]:
    """Read the three lines of each operation."""
    lines = iter(text.strip().splitlines())
    api = ""
    for line in lines:
        if line.endswith(":"):
            api = line[:-1]
            continue
        called, given, does = line, next(lines).strip(), next(lines).strip()
        kinds = operations.READABLE if "{type}" in called else ("",)
        for kind in kinds:
            method, path, name = _for_type(called, kind).split()
            names, _, answer = _for_type(given, kind).partition("-> ")
            parameters = tuple(_parameter(one) for one in names.split())
            yield Operation(name, api, method.upper(), path, parameters, _answer(answer), does)


def _for_type(text: str, kind: str) -> str:
    return text.replace("{type}", kind).replace("{Type}", kind[:1].upper() + kind[1:])


def _parameter(word: str) -> Schema:
    name = word.strip("#*@{}[]")
    given: Schema = {"name": name, "in": "query", "required": False, "type": "string"}
    if word[0] == "{":
        return {"name": name, "in": "body", "required": False, "schema": {"type": "object"}}
    if word[0] == "[":
        return {"name": name, "in": "body", "required": False, "schema": array({})}
    if word[0] == "*":
        return {**given, "type": "array", "items": {"type": "string"}, "collectionFormat": "multi"}
    return given | {"#": {"type": "integer"}, "@": {"in": "header"}}.get(word[0], {})


def _answer(text: str) -> Schema | None:
    if text == "-":
        return None
    return array(text[1:-1]) if text.startswith("[") else reference(text)


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _read(operations.OPERATIONS)}
ROUTES = {operation.route: operation for operation in OPERATIONS.values()}
