"""The JSON schema of the compile request: the order of the form, and rules between fields.

Prefect's server checks a request against this schema before a worker starts, so that a contradiction is refused at
once. The rules stand in `dependentSchemas`, which the forms of Prefect's UIs do not draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compileflow.catalog import get_target, target_names
from compileflow.contracts import Capabilities
from compileflow.errors import CompileflowError
from compileflow.spec import TARGET_ALIASES, TASK_ALIASES

AUTO = "auto"
# A form asks for model and target first; its sections come last.
_FORM_ORDER = (
    "model", "target", "precision", "name", "hf_task", "revision", "max_sequence_length", "shape_buckets",
    "components", "target_options", "trust_remote_code", "allow_warn", "auto", "validation", "calibration",
    "steps", "timeouts", "store_uri", "registry_uris", "aws_credentials_block",
)  # fmt: skip
# Only the Hub has revisions.
_NOT_ON_THE_HUB = r"^(/|~|\.|file:|registry:|mlflow:|neptune:)"
_NULL = {"type": "null"}


def complete_schema(schema: dict[str, Any]) -> None:
    """Add the order of the form, the refusal of unknown fields, and the rules between fields."""
    properties = schema["properties"]
    for position, name in enumerate(_FORM_ORDER):
        properties[name]["position"] = position
    schema["additionalProperties"] = False
    default = properties["target"]["default"]
    schema["dependentSchemas"] = {
        "components": {
            "if": {"properties": {"components": {"minItems": 1}}},
            "then": {"properties": {"max_sequence_length": _NULL, "shape_buckets": {"maxItems": 0}}},
        },
        "revision": {
            "if": {"properties": {"model": {"pattern": _NOT_ON_THE_HUB}}},
            "then": {"properties": {"revision": _NULL}},
        },
        "target": {
            "if": {"properties": {"target": {"const": AUTO}}},
            "then": {
                "properties": {
                    "target_options": {"maxProperties": 0},
                    "steps": {"properties": {"validate": {"const": True}}},
                }
            },
        },
        "precision": {"allOf": _target_rules("precision", default)},
        "hf_task": {"allOf": _target_rules("hf_task", default)},
    }


def list_targets(schema: dict[str, Any]) -> None:
    """Put the known targets, including those of third parties, into the JSON schema as an enum."""
    schema["enum"] = [AUTO, *target_names(), *TARGET_ALIASES]


def _target_rules(field: str, default_target: str) -> list[dict[str, Any]]:
    """Return one rule for each target: the values of a field that the target supports on any machine."""
    rules = []
    for target, capabilities in _all_capabilities().items():
        names = [target, *(alias for alias, name in TARGET_ALIASES.items() if name == target)]
        condition: dict[str, Any] = {"properties": {"target": {"enum": names}}}
        if target != default_target:
            # Without this, the condition would hold for a request that names no target.
            condition["required"] = ["target"]
        rules.append({"if": condition, "then": {"properties": {field: {"enum": _values(field, capabilities)}}}})
    return rules


def _values(field: str, capabilities: Capabilities) -> list[str | None]:
    if field == "precision":
        return [precision.value for precision in capabilities.all_precisions]
    tasks = [task.value for task in capabilities.hf_tasks]
    return [*tasks, *(alias for alias, task in TASK_ALIASES.items() if task in tasks), None]


def _all_capabilities() -> Mapping[str, Capabilities]:
    capabilities = {}
    for name in target_names():
        try:
            capabilities[name] = get_target(name).capabilities
        except CompileflowError:
            # The run says why the class of a third party cannot be imported.
            continue
    return capabilities
