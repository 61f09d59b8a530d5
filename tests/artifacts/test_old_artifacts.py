"""Artifacts with an older manifest schema still open, verify, load and answer as before.

The compileflow of its time wrote each artifact, and a file beside it holds the answers of that time. The debug
records of the TorchScript file were removed, because they hold paths of the machine that compiled it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow.artifact.manifest import SCHEMA_VERSION, ArtifactManifest, verify_folder
from compileflow.artifact.open import open_artifact
from compileflow.spec import Precision

FOLDER = Path(__file__).parent
NAMES = sorted(path.name for path in FOLDER.glob("v*-*") if path.is_dir())
ATOL = 1e-5


def calls_of(name: str) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["calls"]
    return calls


def test_every_older_schema_that_can_be_read_has_an_artifact_here() -> None:
    older = set(get_args(ArtifactManifest.model_fields["schema_version"].annotation)) - {SCHEMA_VERSION}
    assert {int(name[1:].partition("-")[0]) for name in NAMES} == older


@pytest.mark.parametrize("name", NAMES)
def test_old_artifact_verifies_and_has_todays_defaults(name: str) -> None:
    manifest, files = verify_folder(FOLDER / name)
    component = manifest.components["default"]
    assert f"v{manifest.schema_version}-{manifest.target.name}" == name
    assert len(files) == len(manifest.files) + 1
    assert component.precision is Precision.FP32
    assert (component.load_options == {}) is (manifest.schema_version == 1)
    assert component.frame_convolutions == ()
    assert manifest.calibration is None


@pytest.mark.parametrize("name", NAMES)
def test_old_artifact_answers_as_it_did(name: str) -> None:
    model = CompiledModel.from_pretrained(FOLDER / name)
    for call in calls_of(name):
        logits = model(**{key: torch.tensor(value) for key, value in call["inputs"].items()}).logits.numpy()
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits, call["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_old_artifact_tokenizes_and_labels_as_it_did(name: str) -> None:
    call = next(call for call in calls_of(name) if "texts" in call)
    encoded = CompiledTokenizer.from_pretrained(FOLDER / name)(call["texts"])
    assert dict(encoded) == call["inputs"]
    pipeline = CompiledPipeline.from_pretrained(FOLDER / name)
    labels = pipeline.model.config.id2label
    expected = [labels[int(np.argmax(row))] for row in call["logits"]]
    assert [answer["label"] for answer in pipeline(call["texts"])] == expected


@pytest.mark.parametrize("name", NAMES)
def test_old_artifact_contains_no_path_of_the_machine_that_compiled_it(name: str) -> None:
    assert open_artifact(FOLDER / name).manifest.source.uri == "file:///models/tiny"
    for path in (FOLDER / name).rglob("*"):
        body = path.read_bytes() if path.is_file() else b""
        assert [part for part in (b"site-packages", b"/tmp/", b"/home/") if part in body] == []
