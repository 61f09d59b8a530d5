"""The demo's own parts; `make demo` itself is for a fresh machine."""

from __future__ import annotations

import pytest

from compileflow.contracts.digests import file_digest
from compileflow.settings import Settings
from flows import demo
from tests.steps import in_process


def test_demo_model_is_the_one_on_the_hub() -> None:
    weights = demo.demo_model() / "model.safetensors"
    assert file_digest(weights) == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.parametrize(
    "target",
    [pytest.param(each, marks=pytest.mark.slow) for each in demo.TARGETS],
)
def test_demo_model_compiles_passes_and_loads_by_the_lines_that_are_shown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    with in_process(settings, monkeypatch) as pipeline:
        request = pipeline.request(
            demo.demo_model(), target=target, validation={"latency_pairs": 5, "max_examples": 40}
        )
        version = pipeline.run(request)
    assert version.verdict == "pass"
    lines = demo.loading_lines(version.artifact_uri)
    assert len(lines.splitlines()) == 5
    exec(compile(lines, "demo", "exec"), {})  # noqa: S102 - the lines that the demo prints
    assert capsys.readouterr().out.split()[-1] == "384"
