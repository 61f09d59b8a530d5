"""A string that names a module is an import: it resolves, and it points the same way as the other imports."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PLUGINS = {"registries", "sources", "stores", "targets"}
# "module:attribute", and the code that a child process starts with.
FORMS = (
    re.compile(r"\b(compileflow(?:\.\w+)+):([A-Za-z_]\w*)"),
    re.compile(r"^from (compileflow(?:\.\w+)+) import (\w+);"),
)


def import_strings(code: str) -> Iterator[tuple[str, str]]:
    """Yield module and attribute of each import string in a module's code, also from the parts of f-strings."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for form in FORMS:
                yield from form.findall(node.value)


def read_bands() -> list[set[str]]:
    """Return the bands of packages that import-linter checks, the highest band first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("exhaustive")]
    return [{package.strip() for package in re.split("[|:]", layer)} for layer in layers]


def direction_problem(holder: str, module: str, bands: list[set[str]]) -> str:
    """Say why a module must not name another one in a string; "" if it may."""
    holder_package, package = (name.split(".")[1] for name in (f"{holder}.__init__", module))
    if holder_package == "testing":
        return ""
    if holder_package == "catalog" and package not in PLUGINS:
        return f"{holder} names {module}, which is not a plugin"
    band_numbers = {name: number for number, band in enumerate(bands) for name in band}
    # The package itself stands above all bands; `testing` stands outside, and nothing may lean on it.
    holder_band, band = band_numbers.get(holder_package, -1), band_numbers.get(package, -2)
    return f"{holder} names {module}, which is above it" if band < holder_band else ""


def all_import_strings() -> list[tuple[str, str, str]]:
    strings = []
    for path in sorted(SOURCE.rglob("*.py")):
        holder = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        strings += [(holder, *string) for string in import_strings(path.read_text("utf-8"))]
    return strings


STRINGS = all_import_strings()


def test_strings_of_plugins_and_children_are_among_the_checked_ones() -> None:
    assert {
        ("compileflow.catalog", "compileflow.stores.s3.store", "S3Store"),
        ("compileflow.steps.compile", "compileflow.steps.build", "build_artifact"),
        ("compileflow._process.run_in_child", "compileflow._process.run_in_child", "child_main"),
    } <= set(STRINGS)


@pytest.mark.parametrize(("module", "attribute"), sorted({string[1:] for string in STRINGS}))
def test_import_string_resolves(module: str, attribute: str) -> None:
    assert hasattr(import_module(module), attribute)


def test_import_strings_point_downwards() -> None:
    bands = read_bands()
    problems = [direction_problem(holder, module, bands) for holder, module, _ in STRINGS]
    assert list(filter(None, problems)) == []


@pytest.mark.parametrize(
    ("holder", "module", "problem"),
    [
        ("compileflow.steps.validate", "compileflow.steps.prove", ""),
        ("compileflow.steps.validate", "compileflow.serving.pipeline", ""),
        ("compileflow.serving.pipeline", "compileflow.steps.validate", "is above it"),
        ("compileflow.errors", "compileflow.cli", "is above it"),
        ("compileflow.catalog", "compileflow.stores.local", ""),
        ("compileflow.catalog", "compileflow.settings", "is not a plugin"),
        ("compileflow.cli", "compileflow.testing.stores", "is above it"),
        ("compileflow", "compileflow.cli", ""),
        ("compileflow.testing.stores", "compileflow.steps.build", ""),
    ],
)
def test_string_that_points_upwards_is_a_problem(holder: str, module: str, problem: str) -> None:
    text = direction_problem(holder, module, read_bands())
    assert problem in text
    assert bool(problem) == bool(text)


def test_strings_are_found_in_every_form() -> None:
    code = """
_CHILD = "compileflow.steps.build:build_artifact"
_ENTRY = "from compileflow._process.run_in_child import child_main; child_main()"
name = f"{folder} compileflow.cli.common:app {rest}"
other = "compileflow: a library", "from compileflow import load", "flows.compile:main"
"""
    assert sorted(import_strings(code)) == [
        ("compileflow._process.run_in_child", "child_main"),
        ("compileflow.cli.common", "app"),
        ("compileflow.steps.build", "build_artifact"),
    ]
