"""Parameters that the server stored for an older version of a flow still fit, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from compileflow.errors import SpecError
from compileflow.spec import Precision
from deployments.deploy import _form_schema
from flows.compile_model import compile_model

# All parameters of a run, as the server stores them. Add a file when a field is added; never change one.
STORED = sorted((Path(__file__).parent / "flow_parameters").glob("v*.json"))


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_stored_parameters_fit_the_form_and_the_flow(path: Path) -> None:
    parameters = json.loads(path.read_text("utf-8"))
    validate(parameters, _form_schema(parameter_schema(compile_model).model_dump()), raise_on_error=True)
    request = compile_model.validate_parameters(parameters)["request"]
    assert (request.model, request.precision) == ("/srv/models/reviews", Precision.INT8)
    assert [component.name for component in request.components] == ["word", "document"]


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"request": {"model": "m", "quantize": True}}, "request.quantize: Extra inputs are not permitted"),
        ({"request": {}}, "request.model: Field required"),
        (
            {"source": "m"},
            "Function expects parameters ['request', 'max_lateness_s', 'announcement'] but was provided with "
            "parameters ['source']",
        ),
        (
            {"request": {"model": "m", "steps": {"prove": True}}, "max_lateness_s": 0},
            "request.steps.prove: Unexpected keyword argument; max_lateness_s: Input should be greater than or "
            "equal to 1",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused_in_one_line(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError) as raised:
        compile_model.validate_parameters(parameters)
    assert str(raised.value) == (
        f"The parameters do not fit this version of the flow compile-model: {reason}. "
        "Correct them, or start a new run from the deployment."
    )
