"""Several registries in one run: a failure does not stop the others, and the next run completes it."""

from __future__ import annotations

from pathlib import Path

from compileflow.catalog import open_registry
from compileflow.errors import RegistryError
from compileflow.spec import HfTask
from flows.compile_model import compile_model
from tests.conftest import ModelFactory
from tests.steps import Pipeline


def test_next_run_completes_the_registry_that_failed(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "folder"
    in_the_way.write_text("a file where a folder should be")
    uris = [f"sqlite:///{in_the_way / 'registry.db'}", f"sqlite:///{tmp_path / 'whole.db'}"]
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews", registry_uris=uris)

    state = compile_model(request, return_state=True)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, RegistryError)
    assert error.message.startswith(f"Registered in {uris[1]}, but not in {uris[0]}: Cannot write the registry")
    assert "run again" in error.hint
    whole_version = open_registry(uris[1]).get("reviews", 1)

    in_the_way.unlink()
    result = compile_model(request, return_state=True).result()
    assert result.versions == {uris[0]: open_registry(uris[0]).get("reviews", 1), uris[1]: whole_version}
    assert result.version == result.versions[uris[0]]
    assert pipeline.counts == {"compile": 1, "validate": 1}
