"""A target that compiles without its device: compile on one machine, settle the verdict on the one that has it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow.admin.collect import collect_garbage
from compileflow.admin.promote import promote_version
from compileflow.artifact.attestations.envelopes import put_statement
from compileflow.artifact.attestations.statements import verdict_statement
from compileflow.artifact.verify import last_result
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import Arrays
from compileflow.errors import RegistryError, SignatureError, SpecError, TargetUnavailableError, VerdictError
from compileflow.selection.matrix import measured_cell
from compileflow.serving.component import LoadedComponent
from compileflow.spec import HfTask
from compileflow.steps.register import check_verdict
from compileflow.steps.report_file import read_report
from compileflow.steps.settle import Settled, register_settled, settle_artifact
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles
from tests.steps import Pipeline
from tests.unit.attested_artifacts import judged, make_keys

__all__ = ["vendor_doubles"]


def settle(pipeline: Pipeline, artifact_uri: str) -> Settled:
    return settle_artifact(artifact_uri, settings=pipeline.settings, timeout_s=600)


@pytest.mark.parametrize("target", ["neuron", pytest.param("neuronx", marks=pytest.mark.slow)])
def test_artifact_is_validated_and_registered_where_the_device_is(
    pipeline: Pipeline, tiny_model: ModelFactory, vendor_doubles: Path, tmp_path: Path, target: str
) -> None:
    model = tmp_path / "reviews"
    shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), model)
    request = pipeline.request(model, target=target, name="reviews")
    (vendor_doubles / "neuron0").unlink()
    artifact = pipeline.compile(request)
    pending = pipeline.validate(request, artifact)
    assert pending.outcome == "pending-device"
    assert pending.reason.startswith(f"pending-device: {target} cannot run here: this machine has no device")
    assert read_report(pending.report_uri, pipeline.settings).verdict.outcome == "pending-device"

    # Neither registered nor promoted, and recorded once.
    with pytest.raises(VerdictError, match="pending-device") as refusal:
        check_verdict(pending, allow_warn=True)
    assert f"compileflow settle {artifact.digest}" in refusal.value.hint
    cell, _ = measured_cell(request, refusal.value, pipeline.settings)
    assert (cell.candidate.outcome, cell.error) == ("pending-device", "")
    with pytest.raises(VerdictError, match="pending-device"):
        pipeline.run(request)
    with pytest.raises(RegistryError):
        promote_version(
            "reviews", 1, "staging", registry_uris=[pipeline.registry_uri], settings=pipeline.settings, who="ann"
        )
    with pytest.raises(TargetUnavailableError, match="has no device"):
        settle(pipeline, artifact.uri)
    assert pipeline.counts == {"compile": 1, "validate": 1}

    # The machine with the device has the store, but not the source model.
    (vendor_doubles / "neuron0").touch()
    shutil.rmtree(model)
    store = open_store(pipeline.store_uri)
    with store.open_folder(pending.report_digest) as bundle:
        assert not list(bundle.rglob("source/*.safetensors"))
    # Nobody signed the recorded answers.
    signing = pipeline.settings.model_copy(update={"signing_key": make_keys(tmp_path).private})
    with pytest.raises(SignatureError, match="neither this run's key nor a trusted key signed"):
        settle_artifact(artifact.uri, settings=signing, timeout_s=600)
    # A validation that asked for more refused the artifact in the meantime.
    earlier = judged("fail")
    later = replace(earlier, finished=datetime.now(UTC))
    put_statement(store, artifact.digest, verdict_statement(artifact.digest, later), None)
    with pytest.raises(SignatureError, match="a later validation has the result FAILED"):
        settle(pipeline, artifact.uri)
    put_statement(store, artifact.digest, verdict_statement(artifact.digest, earlier), None)
    settled = settle(pipeline, artifact.uri)
    assert settled.validated.outcome == "pass", settled.validated.reason
    assert settled.validated.figures["label_agreement"] == 1.0
    # Until it is registered, it can be settled again, for example after the registry failed.
    broken = pipeline.settings.model_copy(update={"registry_uri": "sqlite:////proc/no-such-folder/r.db"})
    with pytest.raises(RegistryError):
        register_settled(settled, broken)
    (version,) = register_settled(settle(pipeline, artifact.uri), pipeline.settings).values()
    assert (version.name, version.target, version.verdict) == ("reviews", target, "pass")
    with pytest.raises(SpecError, match="has the verdict pass"):
        settle(pipeline, artifact.uri)

    # The first machine gets the verdict for the same request, and records again for another one.
    shutil.copytree(tiny_model(HfTask.TEXT_CLASSIFICATION), model)
    (vendor_doubles / "neuron0").unlink()
    proven = pipeline.validate(request, artifact)
    assert proven.outcome == "pass"
    # What the record of the verdict says is read from the report.
    recorded = proven.model_dump(mode="json")
    store.put_record("report-of", artifact.digest, recorded | {"reason": "forged", "figures": {"rel_l2": 0.0}})
    assert pipeline.validate(request, artifact) == proven
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    other = pipeline.request(
        model, target=target, name="reviews", validation={"strict": True}, registry_uris=[elsewhere]
    )
    assert pipeline.validate(other, artifact).outcome == "pending-device"
    collect_garbage(pipeline.store_uri, [pipeline.registry_uri], settings=pipeline.settings, min_age_s=0)
    (vendor_doubles / "neuron0").touch()
    # The store names a registry that this machine does not: whoever wrote that would get its credentials.
    with pytest.raises(SpecError, match=r"elsewhere\.db, which the settings here do not name") as unknown:
        settle(pipeline, artifact.uri)
    assert "--registry" in unknown.value.hint
    settled = settle_artifact(
        artifact.uri, settings=pipeline.settings, timeout_s=600, registry_uris=[pipeline.registry_uri]
    )
    assert settled.validated.outcome in ("pass", "warn")
    assert settled.request.registry_uris == (pipeline.registry_uri,)
    assert open_registry(pipeline.registry_uri).get("reviews", 1).artifact_digest == artifact.digest


@pytest.mark.slow
def test_wrong_answers_of_the_device_fail_when_they_are_settled(
    pipeline: Pipeline, tiny_model: ModelFactory, vendor_doubles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="neuron")
    (vendor_doubles / "neuron0").unlink()
    artifact = pipeline.compile(request)
    assert pipeline.validate(request, artifact).outcome == "pending-device"
    (vendor_doubles / "neuron0").touch()
    right = LoadedComponent.run

    def wrong(component: LoadedComponent, inputs: Mapping[str, Any]) -> Arrays:
        return {name: np.flip(answer, axis=-1).copy() for name, answer in right(component, inputs).items()}

    monkeypatch.setattr(LoadedComponent, "run", wrong)
    settled = settle(pipeline, artifact.uri)
    assert settled.validated.outcome == "fail"
    with pytest.raises(VerdictError, match="fail: "):
        register_settled(settled, pipeline.settings)
    assert last_result(artifact.uri, pipeline.settings) == "FAILED"
