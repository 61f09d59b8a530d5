"""int8 that changes too many decisions is refused, and its report lists the examples that flipped."""

from __future__ import annotations

from pathlib import Path

from compileflow.catalog import open_registry
from compileflow.errors import VerdictError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.report_file import export_report, read_report
from flows.compile_model import compile_model
from tests.conftest import ModelFactory
from tests.steps import Pipeline


def test_static_int8_calibrated_on_two_words_is_refused_with_the_examples_that_flipped(
    settings: Settings, pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    # Ranges from two words do not hold for sentences: what lies beyond is cut off.
    narrow = tmp_path / "narrow.txt"
    narrow.write_text("the\nand\n")
    request = pipeline.request(
        tiny_model(HfTask.TOKEN_CLASSIFICATION),
        target="openvino",
        precision="int8",
        target_options={"quantization": "static"},
        calibration={"examples_path": str(narrow)},
    )
    state = compile_model(request, return_state=True)
    assert state.is_failed()
    assert state.message.startswith("The verdict is fail: ")
    error = state.result(raise_on_failure=False)
    assert isinstance(error, VerdictError)
    assert list(open_registry(pipeline.registry_uri).versions()) == []
    uri = error.hint.rpartition(" ")[2]
    report = read_report(uri)
    assert report.verdict.outcome == "fail"
    assert report.flips_count > 0
    for flip in report.flips:
        assert flip.text
        assert flip.before != flip.after
    page = export_report(uri, settings).read_text("utf-8")
    assert "Flipped examples" in page
    assert report.flips[0].after in page
