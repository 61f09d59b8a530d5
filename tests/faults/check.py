"""What must hold after every run: each version is what was asked, byte by byte, and answers as its source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from compileflow.catalog import open_registry
from compileflow.contracts import ModelVersion
from compileflow.settings import get_settings
from tests.faults.runs import call_in_fork
from tests.faults.world import Request, World

_TEXTS = ("the train was late and it rained", "No", "where is my order today, and why is it late?")
_LARGEST_DIFFERENCE = 1e-4


def registered(world: World) -> list[ModelVersion]:
    """Return all versions, newest first."""
    path = world.folder / "home" / "registry.db"
    return list(open_registry(f"sqlite:///{path}").versions())


def check_version(
    world: World, version: ModelVersion, *, answers_of: set[tuple[str, str]], has_lost_report: bool = False
) -> None:
    """Check one version from its bytes.

    Args:
        world: The world.
        version: The version.
        answers_of: Artifact and model of the answers that were compared before; the check adds to them.
        has_lost_report: The run said that the store has lost the report. A report cannot be written again.

    Raises:
        AssertionError: It is not what its name asks for.
    """
    model, _, length = version.name.rpartition("-")
    request = Request(model, int(length))
    source_files = world.listing(version.source_digest)
    states = [name for name, hashes in world.states(model).items() if hashes == source_files]
    assert states, f"{version.name}: the source {version.source_digest[:12]} is not {model}"
    manifest = json.loads(world.read_file(version.artifact_digest, "manifest.json"))
    assert manifest["source"]["digest"] == version.source_digest, (
        f"{version.name} was compiled from another source"
    )
    for spec in (manifest["spec"], version.spec):
        shapes = [component["shape_buckets"] for component in spec["components"]]
        assert shapes == [[{"batch_size": 1, "sequence_length": request.length}]], f"{version.name}: {shapes}"
    if not has_lost_report:
        report = json.loads(world.read_file(version.report_digest, "report.json"))
        assert report["verdict"]["outcome"] == version.verdict, f"{version.name}: {report['verdict']}"
    assert version.artifact_digest in version.artifact_uri
    assert version.report_digest in version.report_uri
    if (version.artifact_digest, states[0]) not in answers_of:
        problem = call_in_fork(
            lambda: _compare(world, version, world.folder.parent / "models" / states[0]),
            world.environment,
            world.folder.parent / "answers.txt",
        )
        assert not problem, f"{version.name}: {problem}"
        answers_of.add((version.artifact_digest, states[0]))


def check_all(world: World, *, answers_of: set[tuple[str, str]]) -> int:
    """Check every registered version, and that no acknowledged one is lost; return how many there are.

    Raises:
        AssertionError: One is lost or wrong.
    """
    versions = registered(world)
    numbered = {(version.name, version.version): version.artifact_digest for version in versions}
    for place, digest in world.acknowledged.items():
        assert numbered.get(place) == digest, f"version {place} of {digest[:12]} is lost"
    for version in versions:
        check_version(world, version, answers_of=answers_of)
    return len(versions)


def acknowledged(world: World, request: Request, out: Path) -> ModelVersion:
    """Read what a run that succeeded printed, and return the version.

    Raises:
        AssertionError: The registry does not have it.
    """
    (result,) = json.loads(out.read_text("utf-8"))
    version = ModelVersion.model_validate(result["version"])
    assert version.name == request.name, f"asked for {request.name}, registered {version.name}"
    world.acknowledged[version.name, version.version] = version.artifact_digest
    return version


def _compare(world: World, version: ModelVersion, source: Path) -> None:
    """In a fork: compare the answers of the registered model with those of its source."""
    import torch
    import transformers

    from compileflow import CompiledPipeline

    if world.is_signed:
        _check_signature(version)
    torch.set_num_threads(1)
    compiled = CompiledPipeline.from_pretrained(version.artifact_uri, task="text-classification")
    eager = transformers.pipeline("text-classification", model=str(source), device="cpu")
    length = int(version.name.rpartition("-")[2])
    # Half as many words as tokens, because a word may have several.
    texts = [" ".join(text.split()[: max(1, length // 8)]) for text in _TEXTS]
    for text in texts:
        scores: Sequence[dict[str, float]] = [
            {answer["label"]: answer["score"] for answer in pipeline(text, top_k=None)}
            for pipeline in (compiled, eager)
        ]
        assert scores[0].keys() == scores[1].keys()
        difference = max(abs(scores[0][label] - scores[1][label]) for label in scores[0])
        assert difference < _LARGEST_DIFFERENCE, f"{text!r}: {scores}"


def _check_signature(version: ModelVersion) -> None:
    from compileflow.artifact.verify import verify_artifact

    verification = verify_artifact(
        version.artifact_uri, settings=get_settings(), require_signature=True, version=version
    )
    assert not verification.problems, verification.problems
