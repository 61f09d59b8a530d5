"""Prove an artifact, with what its pipeline answers to the test inputs of a registered source version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compileflow.serving.pipeline import CompiledPipeline
from compileflow.steps.prove import prove_artifact
from compileflow.validation.registered_tests import RegisteredTests, plain


def prove_with_predictions(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `prove_artifact` does, and answer the test inputs. Runs in a fresh process.

    An artifact of several components answers with the first of them that its spec names.
    """

    def predict(tests: RegisteredTests) -> list[Any]:
        from compileflow.loading.artifacts import open_artifact

        artifact = open_artifact(request["artifact_dir"], require_signature=False)
        pipeline = CompiledPipeline.from_pretrained(
            request["artifact_dir"],
            component=artifact.manifest.spec.components[0].name,
            threads=int(request["threads"]),
            require_signature=False,
        )
        answers = plain(pipeline(list(tests.inputs), **tests.parameters))
        # A lone question's answer comes without a list.
        return answers if isinstance(answers, list) and len(answers) == len(tests.inputs) else [answers]

    return prove_artifact(request, predict)
