"""openvino passes the conformance suite for targets."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, ClassVar

from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.spec import HfTask
from compileflow.testing.processes import at_once, say
from compileflow.testing.targets import TargetConformance


class TestOpenVino(TargetConformance):
    target_name: ClassVar[str] = "openvino"

    def test_process_handles_signals_after_its_models_ended_in_the_order_of_their_beginning(
        self, artifact: Callable[[HfTask], OpenArtifact]
    ) -> None:
        """A service exchanges its model so, and is then stopped."""
        folder = artifact(HfTask.TEXT_CLASSIFICATION).folder
        assert at_once(f"{__name__}:exchange_a_model", (str(folder),)) == ["Terminated"]


def exchange_a_model(folder: str) -> None:
    """Load a model twice, close the first one, then the second one, and get a signal."""
    artifact = open_artifact(folder, require_signature=False)
    models: list[Any] = [artifact.load(artifact.component("default"), device="cpu", threads=1) for _ in range(2)]
    while models:
        models.pop(0).close()
    signal.signal(signal.SIGTERM, lambda number, _: say(signal.strsignal(number)))
    signal.raise_signal(signal.SIGTERM)
