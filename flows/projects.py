"""Projects: the compile requests in deployments/projects, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError, model_validator

from compileflow.catalog import target_names
from compileflow.errors import SpecError, first_line, first_problem
from compileflow.spec import TARGET_ALIASES
from compileflow.steps.request import CompileRequest, StepSwitches

PROJECTS = Path(__file__).parents[1] / "deployments" / "projects"
_SUFFIX = ".yaml"
# Fields that hold the path of a file or folder.
_PATHS = (
    ("validation", "examples_path"),
    ("validation", "suite_path"),
    ("validation", "tests_path"),
    ("calibration", "examples_path"),
)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice; YAML's own would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key_node.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key_node.value} was given twice", problem_mark=key_node.start_mark
                )
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


class ProjectFile(CompileRequest):
    """The content of a project file: a compile request for one target, without the choice of steps."""

    model_config = ConfigDict(title="Project")

    @model_validator(mode="after")
    def _names_one_target(self) -> ProjectFile:
        targets = [*target_names(), *TARGET_ALIASES]
        if self.target not in targets:
            raise ValueError(f"target: expected one of {', '.join(targets)}, got {self.target!r}")
        if "steps" in self.model_fields_set:
            raise ValueError("steps: the command that runs the project chooses the steps; leave them out")
        return self


@dataclass(frozen=True)
class Project:
    """A project.

    Attributes:
        name: Name of the project: that of its file, without the suffix.
        path: File of the project.
        request: Request to compile it, with all steps on.
    """

    name: str
    path: Path
    request: CompileRequest

    def request_for(self, steps: StepSwitches, model: str | None = None) -> CompileRequest:
        """Return the request with some steps on.

        Args:
            steps: Steps that do work.
            model: Model in the place of the project's own, for example a folder with a copy of it. The revision
                of the file belongs to the file's model, and does not apply to it.
        """
        update: dict[str, Any] = {"steps": steps}
        if model is not None:
            update |= {"model": model, "revision": None}
        return self.request.model_copy(update=update)


def project_names() -> list[str]:
    """Return the names of the projects in deployments/projects."""
    return sorted(path.stem for path in PROJECTS.glob(f"*{_SUFFIX}"))


def load_project(name: str) -> Project:
    """Read a project.

    Args:
        name: Name of a file in deployments/projects, without the suffix; or the path of another project file.

    Raises:
        SpecError: The project does not exist, or its file is wrong.
    """
    is_path = name.endswith(_SUFFIX) or "/" in name
    path = Path(name) if is_path else PROJECTS / f"{name}{_SUFFIX}"
    if is_path and not path.is_file():
        raise SpecError(
            f"The project file {name} does not exist.", hint="Check the path; it starts at the current folder."
        )
    if not path.is_file():
        raise SpecError(
            f"Unknown project {name!r}.",
            hint=f"Choose one of: {', '.join(project_names())}; or give the path of a {_SUFFIX} file.",
        )
    try:
        values = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - a safe loader
        if not isinstance(values, dict):
            raise ValueError("expected fields such as model and target")
        values = {"name": path.stem} | _with_absolute_paths(values, path.absolute().parent)
        project_file = ProjectFile.model_validate(values)
    except ValidationError as error:
        place = error.errors(include_url=False, include_input=False)[0]
        hint = f"Known names are: {', '.join(_names_at(place['loc'][:-1]))}."
        raise SpecError(
            f"The project file {path} is wrong: {first_problem(error, show_input=place['type'] != 'missing')}.",
            hint=hint if place["type"] == "extra_forbidden" else "",
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        is_repeated = isinstance(error, yaml.constructor.ConstructorError)
        fault = "is wrong" if is_repeated else "is not YAML"
        raise SpecError(f"The project file {path} {fault}: {line}{error.problem}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"The project file {path} cannot be read: {first_line(error)}.") from error
    fields = project_file.model_dump(exclude_unset=True)
    return Project(path.stem, path, CompileRequest.model_validate(fields))


def _with_absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with paths that are relative to the folder of the file as absolute ones."""
    for section, field in _PATHS:
        fields = values.get(section)
        if isinstance(fields, dict) and isinstance(fields.get(field), str):
            values = values | {section: fields | {field: str(folder / fields[field])}}
    return values


def _names_at(place: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that a place in a project file may have."""
    schema = ProjectFile.model_json_schema()
    node = schema
    for part in place:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return [name for name in node["properties"] if place or name != "steps"]
