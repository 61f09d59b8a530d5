"""A plugin of pytest with fixtures for the project's own tests: pipelines, inputs, predictions and tolerances.

A test that uses a pipeline runs once for each component of the artifact. A file in the folder of tests takes
precedence over the same file that is registered with the source version. Importing this module imports pytest, so
only the process that runs the tests does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays
from compileflow.contracts.sources import INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE
from compileflow.serving.component import LoadedComponent
from compileflow.serving.model import CompiledModel
from compileflow.serving.pipeline import CompiledPipeline, check_pipeline
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model, load_tokenizer
from compileflow.validation.judge.suite import load_suite
from compileflow.validation.registered_tests import read_registered_tests


@dataclass(frozen=True)
class ModelsUnderTest:
    """What the fixtures are made of, as a plugin of pytest that hands itself to them.

    Attributes:
        artifact: The artifact.
        source_dir: Folder of the source model.
        folder: Folder of tests.
        registered_dir: Folder with the files that are registered with the source version; None without any.
        threads: Threads of the compiled model.
    """

    artifact: OpenArtifact
    source_dir: Path
    folder: Path
    registered_dir: Path | None
    threads: int

    def pytest_configure(self, config: pytest.Config) -> None:
        """Run before the tests are collected."""
        config.stash[_MODELS] = self

    def file(self, name: str) -> Any:
        """Return the value of a test file; None without it."""
        path = self.folder / name
        if path.is_file():
            return json.loads(path.read_bytes())
        if self.registered_dir is None or (self.folder / INPUTS_FILE).is_file():
            # Registered predictions belong to the registered inputs.
            return None
        tests = read_registered_tests(self.registered_dir)
        values = {
            INPUTS_FILE: tests.inputs,
            PARAMETERS_FILE: tests.parameters,
            PREDICTIONS_FILE: tests.predictions,
        }
        return values[name]


_MODELS = pytest.StashKey[ModelsUnderTest]()


@dataclass(frozen=True)
class _SourceRunner:
    """The source model in the place of a compiled graph."""

    source_model: SourceModel

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        return self.source_model.run(dict(inputs))

    def close(self) -> None:
        """Do nothing: the process ends after the tests."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each component."""
    if "component" in metafunc.fixturenames:
        components = metafunc.config.stash[_MODELS].artifact.manifest.spec.components
        metafunc.parametrize("component", [component.name for component in components], scope="session")


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config) -> ModelsUnderTest:
    """What the other fixtures are made of."""
    return pytestconfig.stash[_MODELS]


@pytest.fixture(scope="session")
def compiled_pipeline(models: ModelsUnderTest, component: str) -> CompiledPipeline:
    """The pipeline that a service loads."""
    return CompiledPipeline.from_pretrained(
        models.artifact.folder,
        component=component,
        threads=models.threads,
        require_signature=False,
        trust_remote_code=models.artifact.trust_remote_code,
    )


@pytest.fixture(scope="session")
def reference_pipeline(models: ModelsUnderTest, component: str) -> Any:
    """The source model's pipeline in fp32, which cuts texts where the component does."""
    artifact, source_dir = models.artifact, models.source_dir
    task, trust = artifact.manifest.hf_task, artifact.trust_remote_code
    record = artifact.component(component)
    check_pipeline(task)
    if task.pipeline_owner == "compileflow":
        runner = _SourceRunner(load_source_model(source_dir, task, trust_remote_code=trust))
        loaded = LoadedComponent(replace(artifact, folder=source_dir), component, record, runner)
        return CompiledPipeline.from_model(CompiledModel.from_component(loaded))
    import torch
    from transformers import pipeline

    parts: dict[str, Any] = {}
    if task.modality == "text" and not task.generates:
        tokenizer = load_tokenizer(source_dir, trust_remote_code=trust)
        settings = {"padding": True, "truncation": True, "max_length": record.max_sequence_length}
        parts["tokenizer"] = CompiledTokenizer(tokenizer, settings)
    return pipeline(
        task.value,
        model=str(source_dir),
        device="cpu",
        dtype=torch.float32,
        trust_remote_code=trust,
        **parts,
    )


@pytest.fixture(scope="session")
def test_inputs(models: ModelsUnderTest) -> list[Any]:
    """Inputs of the pipelines, from inputs.json."""
    inputs = models.file(INPUTS_FILE)
    if inputs is None:
        pytest.fail(f"Add {INPUTS_FILE} to the folder of tests, or a fixture test_inputs to conftest.py.")
    return list(inputs)


@pytest.fixture(scope="session")
def inference_params(models: ModelsUnderTest) -> dict[str, Any]:
    """Keyword arguments of each call, from inference_params.json."""
    return dict(models.file(PARAMETERS_FILE) or {})


@pytest.fixture(scope="session")
def expected_predictions(
    models: ModelsUnderTest,
    reference_pipeline: Any,
    test_inputs: list[Any],
    inference_params: dict[str, Any],
) -> list[Any]:
    """One answer for each input: predictions.json, else the answers of the source model."""
    predictions = models.file(PREDICTIONS_FILE)
    return list(predictions or reference_pipeline(test_inputs, **inference_params))


@pytest.fixture(scope="session")
def tolerances(models: ModelsUnderTest) -> dict[str, float]:
    """Relative and absolute tolerance for numbers: the limit of rel_l2 at the artifact's precision."""
    limit = load_suite().limits["rel_l2"][models.artifact.manifest.spec.precision]
    return {"rtol": limit, "atol": limit}
