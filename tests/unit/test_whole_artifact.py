"""Faults outside the graph: each is found by a gate that names it, and a healthy artifact has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from compileflow import CompiledModel, CompiledPipeline
from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.artifact.open import OpenArtifact, open_artifact
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model
from compileflow.source_model.tasks import UNMASKED_TASKS
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision
from compileflow.steps.claims import claimed_length, expected_claims
from compileflow.validation.cases import raw
from compileflow.validation.judge import gates_for
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.interface import Claims, measure_claims, measure_files
from compileflow.validation.whole_artifact import WholeArtifact
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import reseal, validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

CLASSIFY, TAG, SIMILAR = HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION, HfTask.SENTENCE_SIMILARITY
SPEECH, ANSWER, ENTAIL = HfTask.SPEECH_RECOGNITION, HfTask.QUESTION_ANSWERING, HfTask.ZERO_SHOT_CLASSIFICATION
Edit = Callable[[Any], Any]


@dataclass(frozen=True)
class Compiled:
    """A healthy, read-only compile and its source model."""

    source_dir: Path
    artifact_dir: Path
    hf_task: HfTask


Compile = Callable[[HfTask], Compiled]


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare fewer texts, which still hold the whole vocabulary of the small models, and fewer pictures."""
    monkeypatch.setattr(raw, "_TEXTS", 400)
    monkeypatch.setattr(raw, "_SIGNALS", 12)


@pytest.fixture(scope="module")
def compiled(tiny_model: ModelFactory, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile the small model of a task for torchscript, once."""

    @cache
    def compile_task(task: HfTask) -> Compiled:
        source_dir = tiny_model(task.graph_task if task is SIMILAR else task)
        if task is SIMILAR:
            source_dir = shutil.copytree(source_dir, tmp_path_factory.mktemp("modules") / "source")
            _write_modules(source_dir)
        out_dir = tmp_path_factory.mktemp("compiled") / "artifact"
        return Compiled(
            source_dir, in_process.compile(source_dir, out_dir, target="torchscript", hf_task=task), task
        )

    return compile_task


def _write_modules(folder: Path) -> None:
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules.items())
    ]
    _write(folder / "modules.json", entries)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"prompts": {"query": "a ", "document": ""}})
    _write(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    )
    dense = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.Identity"}
    _write(folder / "2_Dense" / "config.json", dense)
    random = np.random.default_rng(0)
    weights = {"linear.weight": (8, 32), "linear.bias": (8,)}
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()},
        folder / "2_Dense" / "model.safetensors",
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


@cache
def _source_model(source_dir: Path, task: HfTask) -> SourceModel:
    return load_source_model(source_dir, task)


def _claims(source_dir: Path, artifact: OpenArtifact, requested: CompileSpec | None = None) -> dict[str, Claims]:
    requested = requested or artifact.manifest.spec
    source_model = _source_model(source_dir, requested.hf_task)
    digest = folder_digest(list_files(source_dir))
    return expected_claims(artifact, source_model, source_dir, requested, source_digest=digest)


def _measured(
    source_dir: Path, artifact_dir: Path, component: str = "default", *, requested: CompileSpec | None = None
) -> Measurements:
    """Measure everything around the graph of an artifact."""
    artifact = open_artifact(artifact_dir)
    claims = _claims(source_dir, artifact, requested)
    longest = max(map(claimed_length, claims.values()))
    whole, measurements = WholeArtifact(artifact, source_dir), Measurements()
    loaded = LoadedComponent.load(artifact, component=component, threads=1)
    whole.measure_shared(measurements, max_length=longest)
    own_claims = claims[component]
    whole.measure_component(measurements, loaded, own_claims, max_length=claimed_length(own_claims))
    loaded.close()
    return measurements


def _first_gate(measurements: Measurements, task: HfTask) -> str:
    """Return the first gate of the suite that sees a difference; "" if none does."""
    metrics = [gate.entry.gate for gate in gates_for(Precision.FP32, task, {})]
    return next((name for name in metrics if measurements.scalars.get(name, 0) != 0), "")


def _edited(artifact_dir: Path, dest: Path, path: str, edit: Edit) -> Path:
    """Copy an artifact, let `edit` change the content of a JSON file in place, and seal the copy again."""
    folder = shutil.copytree(artifact_dir, dest)
    content = json.loads((folder / path).read_text("utf-8"))
    edit(content)
    (folder / path).write_text(json.dumps(content), "utf-8")
    if path != MANIFEST_NAME:
        reseal(folder)
    return folder


def _updated(**values: Any) -> Edit:
    return lambda content: content.update(values)


def _exchanged(first: str, second: str, *path: str) -> Edit:
    def exchange(content: Any) -> None:
        for name in path:
            content = content[name]
        content[first], content[second] = content[second], content[first]

    return exchange


def _cut_vocabulary(content: Any) -> None:
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < 100}


def _without_lowercase(content: Any) -> None:
    content["normalizer"]["lowercase"] = False


def _of_component(edit: Edit) -> Edit:
    return lambda content: edit(content["components"]["default"])


def _fewer_tokens(record: Any) -> None:
    record["shape_buckets"] = [{"batch_size": 1, "sequence_length": 16}]
    record["max_sequence_length"] = 16


def _exchanged_outputs(record: Any) -> None:
    first, second = record["outputs"]
    first["name"], second["name"] = second["name"], first["name"]


FILE_FAULTS = {
    "labels shifted": (CLASSIFY, "config.json", _exchanged("0", "1", "id2label"), "differs at id2label.0"),
    "sigmoid for softmax": (
        CLASSIFY, "config.json", _updated(problem_type="multi_label_classification"), "at problem_type",
    ),
    "entailment elsewhere": (
        ENTAIL, "config.json", _exchanged("entailment", "neutral", "label2id"), "at label2id.entailment",
    ),
    "case kept": (CLASSIFY, "tokenizer.json", _without_lowercase, "at normalizer.lowercase"),
    "vocabulary cut": (CLASSIFY, "tokenizer.json", _cut_vocabulary, "at model.vocab."),
    "words exchanged": (TAG, "tokenizer.json", _exchanged("the", "it", "model", "vocab"), "at model.vocab."),
    "no special tokens": (CLASSIFY, "tokenizer.json", _updated(post_processor=None), "at post_processor"),
    "other mean": (
        HfTask.IMAGE_CLASSIFICATION, "preprocessor_config.json", _updated(image_mean=[0, 0, 0]), "at image_mean",
    ),
    "loudness kept": (
        SPEECH, "preprocessor_config.json", _updated(do_normalize=False), "at do_normalize",
    ),
    "letters exchanged": (SPEECH, "vocab.json", _exchanged("a", "e"), "vocab.json differs at "),
    "other pooling": (
        SIMILAR, "1_Pooling/config.json",
        _updated(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True), "1_Pooling/config.json differs",
    ),
    "not normalised": (SIMILAR, "modules.json", lambda modules: modules.pop(), "modules.json differs"),
    "shorter texts": (SIMILAR, "sentence_bert_config.json", _updated(max_seq_length=8), "at max_seq_length"),
    "default prompt": (
        SIMILAR, "config_sentence_transformers.json", _updated(default_prompt_name="query"), "default_prompt_name",
    ),
}  # fmt: skip
# What the faults do to users: the gate that sees it, besides that of the files.
EFFECTS = {
    "labels shifted": "pipeline_answers",
    "sigmoid for softmax": "pipeline_answers",
    "entailment elsewhere": "pipeline_answers",
    "case kept": "token_ids",
    "vocabulary cut": "token_ids",
    "words exchanged": "token_ids",
    "no special tokens": "token_ids",
    "other mean": "processor_outputs",
    "loudness kept": "processor_outputs",
    "letters exchanged": "token_ids",
    "other pooling": "pipeline_answers",
    "not normalised": "pipeline_answers",
    "shorter texts": "pipeline_answers",
    "default prompt": "pipeline_answers",
}
CLAIM_FAULTS = {
    "fewer tokens": (CLASSIFY, _fewer_tokens, "max_sequence_length: expected 64, the manifest says 16"),
    "exchanged logits": (ANSWER, _exchanged_outputs, "outputs: expected start_logits"),
    "output dropped": (ANSWER, lambda record: record["outputs"].pop(), "outputs: expected start_logits"),
    "other class": (
        CLASSIFY, _updated(output_class="transformers.modeling_outputs:TokenClassifierOutput"), "output_class: ",
    ),
    "other padding": (CLASSIFY, _updated(padding="left"), "padding: expected right, the manifest says left"),
    "other pad token": (CLASSIFY, _updated(pad_token_id=7), "pad_token_id: expected 0, the manifest says 7"),
    "other precision": (CLASSIFY, _updated(precision="bf16"), "precision: expected fp32, the manifest says bf16"),
    "fewer words": (CLASSIFY, _updated(vocab_size=50), "vocab_size: expected"),
    "unknown attention": (CLASSIFY, _updated(attention="flash"), "attention: expected sdpa, the manifest says f"),
    "no attention": (CLASSIFY, _updated(attention=""), "attention: expected sdpa, the manifest says "),
}  # fmt: skip
SPEC_FAULTS = {
    "hf_task": ("text-ranking", "spec.hf_task: expected text-classification, the manifest says text-ranking"),
    "precision": ("bf16", "spec.precision: expected fp32, the manifest says bf16"),
    "target_options": ({"strict": True}, "spec.target_options: expected {}, the manifest says {'strict': True}"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_an_altered_file_is_named_and_its_effect_is_seen(compiled: Compile, tmp_path: Path, fault: str) -> None:
    task, path, edit, says = FILE_FAULTS[fault]
    healthy = compiled(task)
    artifact_dir = _edited(healthy.artifact_dir, tmp_path / "artifact", path, edit)
    measurements = _measured(healthy.source_dir, artifact_dir)
    assert _first_gate(measurements, task) == "interface_files"
    assert measurements.scalars["interface_files"] == 1
    assert says in measurements.details["interface_files"]
    assert measurements.scalars[EFFECTS[fault]] > 0, measurements


@pytest.mark.parametrize("fault", CLAIM_FAULTS)
def test_a_wrong_claim_of_the_manifest_is_named(compiled: Compile, tmp_path: Path, fault: str) -> None:
    task, edit, says = CLAIM_FAULTS[fault]
    healthy = compiled(task)
    artifact_dir = _edited(healthy.artifact_dir, tmp_path / "artifact", MANIFEST_NAME, _of_component(edit))
    measurements = _measured(healthy.source_dir, artifact_dir)
    assert _first_gate(measurements, task) == "manifest_claims"
    assert measurements.details["manifest_claims"].startswith(says), measurements.details


MANIFEST_FAULTS: dict[str, tuple[Edit, str]] = {
    "other source": (lambda manifest: manifest["source"].update(digest="0" * 64), "source.digest: expected "),
    "other toolchain": (
        lambda manifest: manifest["target"]["toolchain"].update(transformers="0.0.1"),
        "target.toolchain.transformers: expected ",
    ),
    "unknown toolchain": (
        lambda manifest: manifest["target"]["toolchain"].pop("transformers"),
        "target.toolchain.transformers: expected ",
    ),
    "other target version": (
        lambda manifest: manifest["target"].update(version=99), "target.version: expected 2, the manifest says 99",
    ),
    "other CPU": (
        lambda manifest: manifest["target"].update(cpu_features=["sse2"]), "target.cpu_features: expected ()",
    ),
    "further file": (
        lambda manifest: manifest["files"].append(
            {"path": "components/default/evil.so", "size_bytes": 1, "sha256": "0" * 64}
        ),
        "further files: expected none, the manifest says components/default/evil.so",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_wrong_claim_about_the_compile_is_named(compiled: Compile, tmp_path: Path, fault: str) -> None:
    edit, says = MANIFEST_FAULTS[fault]
    healthy = compiled(CLASSIFY)
    artifact_dir = _edited(healthy.artifact_dir, tmp_path / "artifact", MANIFEST_NAME, edit)
    measurements = Measurements()
    artifact = OpenArtifact(artifact_dir, read_manifest(artifact_dir), "", verified=False)
    measure_claims(measurements, _claims(healthy.source_dir, artifact)["default"])
    assert says in measurements.details["manifest_claims"]


def test_weights_that_no_module_reads_are_named(compiled: Compile, tmp_path: Path) -> None:
    healthy = compiled(CLASSIFY)
    folder = shutil.copytree(healthy.artifact_dir, tmp_path / "artifact")
    save_file({"weight": np.zeros(1)}, folder / "other.safetensors")
    reseal(folder)
    measurements = Measurements()
    measure_files(measurements, healthy.source_dir, open_artifact(folder))
    assert measurements.details["interface_files"] == "other.safetensors holds weights that no module reads"


@pytest.mark.parametrize("field", SPEC_FAULTS)
def test_an_artifact_of_another_request_is_named(compiled: Compile, tmp_path: Path, field: str) -> None:
    value, says = SPEC_FAULTS[field]
    healthy = compiled(CLASSIFY)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["spec"][field] = value

    artifact_dir = _edited(healthy.artifact_dir, tmp_path / "artifact", MANIFEST_NAME, edit)
    requested = open_artifact(healthy.artifact_dir).manifest.spec
    measurements = _measured(healthy.source_dir, artifact_dir, requested=requested)
    assert _first_gate(measurements, CLASSIFY) == "manifest_claims"
    assert says in measurements.details["manifest_claims"]


@pytest.mark.parametrize(
    "task",
    [
        *dict.fromkeys(task for task, *_ in (*FILE_FAULTS.values(), *CLAIM_FAULTS.values())),
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in HfTask
            if task not in UNMASKED_TASKS and not task.generates
        ),
    ],
)
def test_a_healthy_artifact_has_no_difference(compiled: Compile, task: HfTask) -> None:
    healthy = compiled(task)
    measurements = _measured(healthy.source_dir, healthy.artifact_dir)
    assert _first_gate(measurements, task) == "", measurements.details
    assert {"interface_files", "manifest_claims", "pipeline_answers"} <= measurements.scalars.keys()
    assert ("token_ids" in measurements.scalars) is (task.takes_text or task is SPEECH)
    assert ("processor_outputs" in measurements.scalars) is (task.modality != "text")


def test_the_verdict_names_the_file_that_differs(compiled: Compile, tmp_path: Path) -> None:
    healthy = compiled(CLASSIFY)
    path, edit = "config.json", _updated(problem_type="multi_label_classification")
    artifact_dir = _edited(healthy.artifact_dir, tmp_path / "artifact", path, edit)
    proof = validate_here(healthy.source_dir, artifact_dir, tmp_path / "report")
    assert proof.reason.startswith(
        "fail: interface_files measured 1, the limit is at most 0; config.json differs at problem_type"
    ), proof.reason
    assert [gate["gate"] for gate in proof.report["verdict"]["gates"] if gate["outcome"] == "fail"] == [
        "interface_files", "pipeline_answers",
    ]  # fmt: skip


def test_missing_and_added_files_are_named(compiled: Compile, tmp_path: Path) -> None:
    healthy = compiled(CLASSIFY)
    folder = shutil.copytree(healthy.artifact_dir, tmp_path / "artifact")
    (folder / "tokenizer_config.json").unlink()
    _write(folder / "added_tokens.json", {})
    reseal(folder)
    measurements = _measured(healthy.source_dir, folder)
    assert measurements.scalars["interface_files"] == 2
    assert measurements.details["interface_files"] == "the source model has no added_tokens.json"


def test_altered_weights_of_a_module_are_named(compiled: Compile, tmp_path: Path) -> None:
    healthy = compiled(SIMILAR)
    folder = shutil.copytree(healthy.artifact_dir, tmp_path / "artifact")
    path = folder / "2_Dense" / "model.safetensors"
    weights = {name: values.copy() for name, values in load_file(path).items()}
    weights["linear.bias"][0] += 1
    save_file(weights, path)
    reseal(folder)
    measurements = _measured(healthy.source_dir, folder)
    assert measurements.details["interface_files"] == "2_Dense: the weights differ"
    assert measurements.scalars["pipeline_answers"] > 0


def test_a_part_that_cannot_be_loaded_is_a_difference(compiled: Compile, tmp_path: Path) -> None:
    healthy = compiled(CLASSIFY)
    folder = shutil.copytree(healthy.artifact_dir, tmp_path / "artifact")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    reseal(folder)
    measurements = _measured(healthy.source_dir, folder)
    assert _first_gate(measurements, CLASSIFY) == "interface_files"
    for metric in ("token_ids", "pipeline_answers"):
        assert measurements.details[metric].startswith("the artifact's cannot be loaded: LoadError")


def test_rounding_changes_no_answer_of_the_interface(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    source_dir = tiny_model(TAG)
    artifact_dir = in_process.compile(
        source_dir, tmp_path / "artifact", target="torchscript", hf_task=TAG, precision=Precision.BF16
    )
    assert _first_gate(_measured(source_dir, artifact_dir), TAG) == ""


def test_every_component_is_compared(tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path) -> None:
    source_dir = tiny_model(CLASSIFY)
    components = [ComponentSpec(name="word", max_sequence_length=8), ComponentSpec(name="document")]
    artifact_dir = in_process.compile(
        source_dir, tmp_path / "artifact", target="torchscript", hf_task=CLASSIFY, components=components
    )
    for name in ("word", "document"):
        measurements = _measured(source_dir, artifact_dir, name)
        assert _first_gate(measurements, CLASSIFY) == "", measurements.details


def test_a_pipeline_from_memory_with_settings_of_its_own_has_no_difference(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    source = transformers.pipeline("text-classification", model=str(tiny_model(CLASSIFY)), device="cpu")
    with in_process.instead_of_children():
        pipeline = CompiledPipeline.from_pipeline(source, max_length=16, neuron=False)
    folder = pipeline.save_pretrained(tmp_path / "artifact")
    measurements = _measured(folder / "pipeline", folder)
    assert _first_gate(measurements, CLASSIFY) == "", measurements.details
    assert measurements.scalars["pipeline_answers"] == 0


def test_a_model_from_memory_without_a_tokenizer_is_compared_as_far_as_possible(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model(CLASSIFY)).eval()
    model.save_pretrained(tmp_path / "source")
    with in_process.instead_of_children():
        compiled_model = CompiledModel.from_model(model, max_length=16, neuron=False)
    measurements = _measured(tmp_path / "source", compiled_model.save_pretrained(tmp_path / "artifact"))
    assert _first_gate(measurements, CLASSIFY) == "", measurements.details
    assert "token_ids" not in measurements.scalars
    assert measurements.notes == ["The source model has no tokenizer, so tokens and answers were not compared."]
