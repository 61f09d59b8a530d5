"""A target that compiles without its device: compile on one machine, validate on the one that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compileflow.catalog import open_registry
from compileflow.errors import LoadError
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles
from tests.steps import Pipeline

__all__ = ["vendor_doubles"]


@pytest.mark.parametrize("target", ["neuron", pytest.param("neuronx", marks=pytest.mark.slow)])
def test_artifact_is_validated_and_registered_where_the_device_is(
    pipeline: Pipeline, tiny_model: ModelFactory, vendor_doubles: Path, target: str
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target=target)
    (vendor_doubles / "neuron0").unlink()
    artifact = pipeline.compile(request)
    with pytest.raises(LoadError, match=f"{target} cannot run here: this machine has no device"):
        pipeline.validate(request, artifact)
    assert list(open_registry(pipeline.registry_uri).versions()) == []
    (vendor_doubles / "neuron0").touch()
    version = pipeline.run(request)
    assert (version.target, version.verdict) == (target, "pass")
    assert version.artifact_digest == artifact.digest
    assert pipeline.counts["compile"] == 1
