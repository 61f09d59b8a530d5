"""Prove an artifact, with what its pipeline answers to the test inputs of a registered source version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compileflow.errors import CompileflowError, MeasurementError, first_line
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
        return answers_to(tests, pipeline)

    return prove_artifact(request, predict)


def answers_to(tests: RegisteredTests, pipeline: Callable[..., Any]) -> list[Any]:
    """Return what a pipeline answers, one item an input.

    Raises:
        MeasurementError: it does not take these inputs or parameters, or answers more or less.
    """
    hint = "Correct inputs.json and inference_params.json of the source version."
    try:
        answers = plain(pipeline(list(tests.inputs), **tests.parameters))
    except CompileflowError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"The source version's test inputs cannot be answered: {type(error).__name__}: {first_line(error)}.",
            hint=hint,
        ) from error
    if isinstance(answers, list) and len(answers) == len(tests.inputs):
        return answers
    # A lone question's answer comes without a list.
    if len(tests.inputs) == 1:
        return [answers]
    raise MeasurementError(
        f"The source version's {len(tests.inputs)} test inputs do not have one answer each.", hint=hint
    )
