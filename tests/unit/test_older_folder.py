"""Folders that the older library saved load with one warning, and import-older proves them."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask
from compileflow.artifact.open import open_artifact
from compileflow.cli import app
from compileflow.errors import LoadError, SpecError
from compileflow.settings import Settings
from compileflow.steps.import_older import import_older
from compileflow.testing.pipelines import assert_same_result
from compileflow.validation.settings import ValidationSettings
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles as vendor_doubles
from tests.in_process import InProcess
from tests.models import sentences

LENGTH, ROWS = 16, 2
# At most 16 tokens, because pipelines of transformers do not truncate.
TEXTS = [text[:12] for text in sentences()[:5]]
TRACING = {"strict": False}
OlderFolder = Callable[..., Path]


class Shifted(torch.nn.Module):
    """Answers otherwise than the model that it wraps."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any) -> dict[str, Any]:
        return {"logits": self.model(ids, mask).logits + 0.5}


class Plain(torch.nn.Module):
    """Answers with a tuple, as the models that the older library traced for Neuron."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any) -> tuple[Any, ...]:
        return (self.model(ids, mask).logits,)


@pytest.fixture
def neuron_trace(vendor_doubles: Path, tmp_path: Path) -> Callable[..., Any]:
    import torch_neuron

    (tmp_path / "compiler").mkdir()
    return partial(torch_neuron.trace, compiler_workdir=str(tmp_path / "compiler"))


@pytest.fixture
def older_folder(tiny_model: ModelFactory, tmp_path: Path) -> OlderFolder:
    """Write a folder in the layout of the older library, which traced on inputs of ones."""

    def write(
        task: str = "text-classification", *, trace: Any = None, wrap: Any = None, neuron: bool = False
    ) -> Path:
        root = tmp_path / "older"
        folder = tiny_model(HfTask(task))
        pipeline = transformers.pipeline(task, model=str(folder), device="cpu")
        pipeline.save_pretrained(root / "pipeline")
        (root / "pipeline_task.json").write_text(json.dumps({"task": task}))
        pipeline.tokenizer.save_pretrained(root / "compiled_tokenizer")
        settings = {"padding": "max_length", "truncation": True, "add_special_tokens": True, "max_length": LENGTH}
        (root / "compiled_tokenizer" / "tokenization_settings.json").write_text(json.dumps(settings))
        pipeline.model.config.save_pretrained(root / "compiled_model")
        ones = torch.ones((ROWS, LENGTH), dtype=torch.long)
        with warnings.catch_warnings():
            # torch.jit is deprecated, and its tracer reads attributes that transformers deprecates.
            warnings.simplefilter("ignore")
            model = wrap(pipeline.model) if wrap else pipeline.model
            graph = (trace or torch.jit.trace)(model, (ones, ones), strict=False)
            torch.jit.save(graph, str(root / "compiled_model" / "model.pt"))
        specs = {
            "tracing_kwargs": TRACING,
            "tracing__batch_size": ROWS,
            "tracing__max_length": LENGTH,
            "tracing__neuron": neuron,
        }
        (root / "compiled_model" / "compilation_specs.json").write_text(json.dumps(specs))
        return root

    return write


@pytest.fixture
def runs_here(in_process: InProcess, settings: Settings) -> Iterator[Settings]:
    """Run the steps in this process, with a store of the test."""
    with in_process.instead_of_children():
        yield settings


def reference(root: Path) -> Any:
    task = json.loads((root / "pipeline_task.json").read_text())["task"]
    return transformers.pipeline(task, model=str(root / "pipeline"), device="cpu")


class TestLoad:
    @pytest.mark.parametrize("task", ["sentiment-analysis", "ner", "feature-extraction"])
    def test_runs_unproven_with_one_warning(
        self, older_folder: OlderFolder, task: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = older_folder(task)
        original = reference(root)

        pipeline = CompiledPipeline.from_pretrained(root)

        records = [record for record in caplog.records if record.name.startswith("compileflow")]
        (warning,) = [record.message for record in records if record.levelno >= logging.WARNING]
        assert f"compileflow import-older {root}" in warning
        assert pipeline.original_pipeline_task == task
        assert not isinstance(pipeline.original_pipeline.model, CompiledModel)
        answers, expected = pipeline(TEXTS), original(TEXTS)
        if task == "feature-extraction":
            answers = [
                [row[: len(value[0])] for row in answer] for answer, value in zip(answers, expected, strict=True)
            ]
        assert_same_result(answers, expected)
        assert {
            name: pipeline.model.compilation_specs[name]
            for name in ("tracing_kwargs", "tracing__batch_size", "tracing__max_length", "tracing__neuron")
        } == json.loads((root / "compiled_model" / "compilation_specs.json").read_text())

    def test_parts_load_alone(self, older_folder: OlderFolder, caplog: pytest.LogCaptureFixture) -> None:
        root = older_folder()
        model = CompiledModel.from_pretrained(root / "compiled_model")
        tokenizer = CompiledTokenizer.from_pretrained(root / "compiled_tokenizer")
        inputs = tokenizer(TEXTS[:3], padding=False, return_tensors="pt")
        assert inputs["input_ids"].shape == (3, LENGTH)
        with torch.no_grad():
            expected = reference(root).model(inputs["input_ids"], inputs["attention_mask"]).logits

        torch.testing.assert_close(model(inputs["input_ids"], inputs["attention_mask"])[0], expected)
        assert isinstance(model, transformers.BertForSequenceClassification | transformers.PreTrainedModel)
        assert len(caplog.records) == 1

    def test_is_copied_whole(self, older_folder: OlderFolder, tmp_path: Path) -> None:
        root = older_folder()
        copy = CompiledPipeline.from_pretrained(root).save_pretrained(tmp_path / "copy")

        names = {path.relative_to(root) for path in root.rglob("*")}
        assert {path.relative_to(copy) for path in copy.rglob("*")} == names
        assert_same_result(CompiledPipeline.from_pretrained(copy)(TEXTS), reference(root)(TEXTS))

    def test_signature_is_still_required(self, older_folder: OlderFolder) -> None:
        with pytest.raises(SpecError, match="A signature is required"):
            CompiledPipeline.from_pretrained(older_folder(), require_signature=True)

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("compiled_model/compilation_specs.json", "{}", "does not hold the shape"),
            ("compiled_model/compilation_specs.json", "[]", "is not a JSON object"),
            ("compiled_model/model.pt", "x", r"model\.pt cannot be loaded"),
            ("compiled_model/config.json", "{", r"config\.json cannot be read"),
            (
                "pipeline_task.json",
                '{"task": "translation"}',
                "task 'translation', which compileflow does not serve",
            ),
        ],
    )
    def test_spoilt_folder_is_one_clear_error(
        self, older_folder: OlderFolder, name: str, content: str, says: str
    ) -> None:
        root = older_folder()
        (root / name).write_text(content)

        with pytest.raises(LoadError, match=says) as caught:
            CompiledPipeline.from_pretrained(root)
        assert "\n" not in str(caught.value)

    def test_neuron_folder_runs_on_the_neuron_runtime(self, older_folder: OlderFolder, neuron_trace: Any) -> None:
        root = older_folder(trace=neuron_trace, wrap=Plain, neuron=True)

        pipeline = CompiledPipeline.from_pretrained(root)
        assert pipeline.model.compilation_specs["tracing__neuron"] is True
        assert_same_result(pipeline(TEXTS), reference(root)(TEXTS))


class TestImport:
    QUICK = ValidationSettings(latency_pairs=5, max_examples=16)

    def test_artifact_holds_the_older_graph_and_a_verdict(
        self, older_folder: OlderFolder, runs_here: Settings
    ) -> None:
        root = older_folder()
        artifact, validated = import_older(root, settings=runs_here, validation=self.QUICK)

        assert validated.outcome in ("pass", "warn"), validated.reason
        assert validated.artifact_digest == artifact.digest
        opened = open_artifact(artifact.uri, settings=runs_here)
        assert opened.verified
        assert opened.manifest.source.uri == (root / "pipeline").as_uri()
        pipeline = CompiledPipeline.from_pretrained(artifact.uri)
        assert_same_result(pipeline(TEXTS), reference(root)(TEXTS))
        assert pipeline.tokenizer.tokenization_settings["padding"] == "max_length"

    def test_command_names_what_is_missing_or_unreadable_in_a_wrong_folder(
        self, older_folder: OlderFolder, runs_here: Settings
    ) -> None:
        root = older_folder()

        def refused(folder: Path) -> str:
            outcome = CliRunner().invoke(app, ["import-older", str(folder)])
            assert outcome.exit_code == 2, outcome.stderr
            return outcome.stderr.splitlines()[-1]

        assert f"{root / 'absent'} does not exist" in refused(root / "absent")
        assert "model.pt is not a folder" in refused(root / "compiled_model" / "model.pt")
        specs, graph = (root / "compiled_model" / name for name in ("compilation_specs.json", "model.pt"))
        sound_specs = specs.read_text()
        specs.write_text("{")
        assert f"{specs} cannot be read" in refused(root)
        specs.write_text("{}")
        assert f"{specs} does not hold the shape" in refused(root)
        specs.write_text(sound_specs)
        graph.write_bytes(graph.read_bytes()[:100])
        assert f"{graph} is damaged" in refused(root)
        for name, missing_name in (
            ("pipeline", "pipeline"),
            ("compiled_tokenizer", "compiled_tokenizer"),
            ("compiled_model", "compiled_model/compilation_specs.json"),
        ):
            shutil.rmtree(root / name)
            problem = f"is not a pipeline that the older library saved: {missing_name} is missing"
            assert problem in refused(root)

    @pytest.mark.slow
    def test_command_proves_and_copies(
        self, older_folder: OlderFolder, runs_here: Settings, tmp_path: Path
    ) -> None:
        root = older_folder()
        result = CliRunner().invoke(app, ["import-older", str(root), "--out", str(tmp_path / "out")])

        assert result.exit_code == 0, result.output
        assert "verdict: " in result.stdout
        assert_same_result(CompiledPipeline.from_pretrained(tmp_path / "out")(TEXTS), reference(root)(TEXTS))

    @pytest.mark.slow
    def test_graph_that_answers_otherwise_is_refused(self, older_folder: OlderFolder, runs_here: Settings) -> None:
        root = older_folder(wrap=Shifted)
        result = CliRunner().invoke(app, ["import-older", str(root)])

        assert result.exit_code == 1
        assert "does not answer like its uncompiled pipeline" in result.stderr
        assert "compileflow compile" in result.stderr

    @pytest.mark.slow
    def test_neuron_graph_is_imported_for_the_neuron_target(
        self, older_folder: OlderFolder, runs_here: Settings, neuron_trace: Any
    ) -> None:
        root = older_folder(trace=neuron_trace, wrap=Plain, neuron=True)
        artifact, validated = import_older(root, settings=runs_here, validation=self.QUICK)

        assert validated.outcome in ("pass", "warn"), validated.reason
        assert open_artifact(artifact.uri, settings=runs_here).manifest.target.name == "neuron"
