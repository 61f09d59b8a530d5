"""The compile specification and the request: defaults, refusals with their place, one spec from both."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compileflow.catalog import get_target
from compileflow.cli.request_fields import checked_request
from compileflow.errors import SpecError
from compileflow.sources.files import card_task
from compileflow.spec import TASK_ALIASES, CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.request import CompileRequest

FIELDS: dict[str, Any] = {"target": "onnx-runtime", "hf_task": "text-classification"}


def test_defaults_are_one_component_in_fp32_without_remote_code() -> None:
    spec = CompileSpec.model_validate(FIELDS)
    assert spec.precision is Precision.FP32
    assert [component.name for component in spec.components] == ["default"]
    assert spec.trust_remote_code is False


def test_spec_survives_json() -> None:
    spec = CompileSpec(
        target="onnx-runtime",
        hf_task=HfTask.TOKEN_CLASSIFICATION,
        precision=Precision.INT8,
        components=(
            ComponentSpec(name="word", max_sequence_length=32),
            ComponentSpec(name="document", shape_buckets=(ShapeBucket(batch_size=1, sequence_length=64),)),
        ),
        target_options={"optimization_level": 2},
    )
    assert CompileSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "wrong",
    [
        {"precison": "fp16"},
        {"precision": "fp8"},
        {"hf_task": "translate"},
        {"components": []},
        {"components": [{"name": "Upper case"}]},
        {"components": [{"name": "../up"}]},
        {"components": [{"max_sequence_length": 0}]},
        {"components": [{"shape_buckets": [{"batch_size": 0, "sequence_length": 8}]}]},
        {"components": [{"shape_buckets": [{"batch_size": 1, "sequence_length": 10_000_001}]}]},
    ],
)
def test_wrong_value_is_refused_with_its_place(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompileSpec.model_validate(FIELDS | wrong)
    assert caught.value.errors()[0]["loc"][0] == next(iter(wrong))


def test_two_components_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="two components have the name 'word'; rename one of them"):
        CompileSpec.model_validate(FIELDS | {"components": [{"name": "text"}, {"name": "word"}, {"name": "word"}]})


def test_longest_bucket_must_be_the_maximum() -> None:
    buckets = [{"batch_size": 1, "sequence_length": length} for length in (16, 64)]
    with pytest.raises(ValidationError, match=r"longest shape bucket is 64 tokens, max_sequence_length is 128"):
        ComponentSpec.model_validate({"max_sequence_length": 128, "shape_buckets": buckets})
    assert ComponentSpec.model_validate({"max_sequence_length": 64, "shape_buckets": buckets})
    assert ComponentSpec.model_validate({"shape_buckets": buckets}).max_sequence_length is None


def test_spec_cannot_be_changed() -> None:
    spec = CompileSpec.model_validate(FIELDS)
    with pytest.raises(ValidationError, match="frozen"):
        spec.target = "torchscript"  # type: ignore[misc]


def test_bucket_reads_as_batch_by_length() -> None:
    assert str(ShapeBucket(batch_size=4, sequence_length=128)) == "4x128"


def test_target_of_an_older_spec_keeps_its_meaning() -> None:
    spec = CompileSpec(target="generic", hf_task=HfTask.FILL_MASK)
    assert spec.target == "torchscript"
    assert CompileRequest(model="m", target="generic").target == "torchscript"
    assert get_target("generic").name == "torchscript"


def test_request_and_spec_declare_their_common_fields_once() -> None:
    """Title, constraint and default are equal, because both use the same annotated type."""
    request, spec, component = (
        kind.model_json_schema()["properties"] for kind in (CompileRequest, CompileSpec, ComponentSpec)
    )
    # Only the request has a form.
    in_form = {name: field.pop("position") for name, field in request.items()}
    assert sorted(in_form, key=in_form.__getitem__)[:2] == ["model", "target"]
    for name in ("precision", "target_options", "trust_remote_code"):
        assert request[name] == spec[name]
    for name in ("max_sequence_length", "shape_buckets"):
        assert request[name] == component[name]


def test_request_becomes_the_spec_of_its_fields() -> None:
    buckets = ({"batch_size": 1, "sequence_length": 64},)
    request = CompileRequest.model_validate(
        {
            "model": "m", "target": "generic", "precision": "bf16", "shape_buckets": buckets,
            "max_sequence_length": 64, "trust_remote_code": True,
        }
    )  # fmt: skip
    assert request.spec_for(HfTask.FILL_MASK).model_dump(mode="json") == {
        "target": "torchscript", "hf_task": "fill-mask", "precision": "bf16",
        "components": [{"name": "default", "max_sequence_length": 64, "shape_buckets": list(buckets)}],
        "target_options": {}, "trust_remote_code": True,
    }  # fmt: skip
    components = [{"name": "word", "max_sequence_length": 16}, {"name": "document"}]
    several = CompileRequest.model_validate({"model": "m", "components": components})
    assert [c.name for c in several.spec_for(HfTask.FILL_MASK).components] == ["word", "document"]


def test_contradiction_in_a_request_is_one_line() -> None:
    buckets = ({"batch_size": 1, "sequence_length": 64},)
    request = CompileRequest.model_validate({"model": "m", "max_sequence_length": 128, "shape_buckets": buckets})
    with pytest.raises(SpecError, match="longest shape bucket is 64 tokens") as caught:
        request.spec_for(HfTask.FILL_MASK)
    assert caught.value.hint == "Correct the request."


@pytest.mark.parametrize(
    ("group", "name"),
    [("validation", "examples_path"), ("validation", "suite_path"), ("calibration", "examples_path")],
)
def test_empty_path_in_a_request_is_refused(group: str, name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{group}\.{name}\n  String should have at least 1 character"):
        CompileRequest.model_validate({"model": "m", group: {name: ""}})


def test_aliases_of_tasks_are_those_of_transformers() -> None:
    from transformers.pipelines import TASK_ALIASES as ALIASES_OF_TRANSFORMERS

    tasks = {task.value for task in HfTask}
    assert {alias: task for alias, task in ALIASES_OF_TRANSFORMERS.items() if task in tasks} == TASK_ALIASES


@pytest.mark.parametrize("alias", sorted(TASK_ALIASES))
def test_alias_stands_for_its_task_in_specs_requests_cards_and_schemas(alias: str) -> None:
    task = HfTask(TASK_ALIASES[alias])

    assert HfTask(alias) is task
    assert CompileSpec(target="torchscript", hf_task=alias).hf_task is task
    assert CompileSpec.model_validate_json(f'{{"target": "torchscript", "hf_task": "{alias}"}}').hf_task is task
    request = CompileRequest(model="./m", hf_task=alias)
    assert request.hf_task is task
    assert request.model_dump(mode="json")["hf_task"] == task.value
    assert alias in CompileRequest.model_json_schema()["$defs"]["HfTask"]["enum"]
    assert card_task({"model_params": {"huggingface_pipeline_task": alias}}, "neptune://a/b/C-1") is task
    assert checked_request({"model": "./m", "hf_task": alias}).hf_task is task
