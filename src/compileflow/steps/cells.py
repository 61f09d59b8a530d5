"""Cells: targets and precisions that several models are compiled for, and the fields that all requests share."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from compileflow.catalog import get_target
from compileflow.errors import CompileflowError, first_problem
from compileflow.spec import Precision, TargetName
from compileflow.steps.request import AUTO, CompileRequest

_OWN_FIELDS = ("model", "target", "precision", "auto")


class Cells(BaseModel):
    """Targets and precisions; each combination is one compile of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={"additionalProperties": False})

    targets: tuple[TargetName, ...] = Field(
        min_length=1,
        title="Targets",
        description="Targets to compile for.",
        json_schema_extra={"position": 1},
    )
    precisions: tuple[Precision, ...] = Field(
        (Precision.FP32,),
        min_length=1,
        title="Precisions",
        description="Number formats to compile to.",
        json_schema_extra={"position": 2},
    )
    shared: dict[str, JsonValue] = Field(
        default_factory=dict,
        title="Shared fields",
        description='Further fields of every compile request, for example {"allow_warn": true}.',
        json_schema_extra={"position": 3},
    )

    @model_validator(mode="after")
    def _cells_are_requests(self) -> Self:
        if AUTO in self.targets:
            raise ValueError(f"a target is {AUTO}, which stands for all of them; name each one instead")
        for target in self.targets:
            try:
                get_target(target)
            except CompileflowError as error:
                raise ValueError(str(error).rstrip(".")) from error
        if own_fields := sorted(set(self.shared).intersection(_OWN_FIELDS)):
            raise ValueError(f"shared cannot hold {own_fields[0]!r}, which each cell decides")
        try:
            self.requests_for("any/model")
        except ValidationError as error:
            raise ValueError(f"shared.{first_problem(error)}") from error
        return self

    def requests_for(self, model: str) -> list[CompileRequest]:
        """Return one request of a model for each target and precision."""
        return [
            CompileRequest.model_validate(
                {**self.shared, "model": model, "target": target, "precision": precision}
            )
            for target in dict.fromkeys(self.targets)
            for precision in dict.fromkeys(self.precisions)
        ]
