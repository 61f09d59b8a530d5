"""Python files of an artifact run only if the caller trusts them; the artifact cannot decide it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow.artifact.open import open_artifact
from compileflow.errors import CompileflowError, LoadError
from compileflow.settings import Settings
from compileflow.stores.local import LocalStore
from tests.unit.malformed import reseal
from tests.unit.proving import validate_here

SOUND = Path(__file__).parents[1] / "artifacts" / "v1-torchscript"
KINDS = (CompiledTokenizer, CompiledModel, CompiledPipeline)
REFUSAL = r"brings its own Python code \(.*\.py\), and trust_remote_code is off\. Read that code; .*=True\."


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def write_code(folder: Path, mark: Path) -> None:
    """Add Python files to a model or an artifact; each leaves a trace in the file `mark` when it runs."""
    trace = f"with open({str(mark)!r}, 'a') as trace:\n    trace.write(__name__)\n"
    (folder / "configuration_odd.py").write_text(
        f"{trace}from transformers import BertConfig\n\n\nclass OddConfig(BertConfig):\n    model_type = 'odd'\n"
    )
    (folder / "tokenization_odd.py").write_text(
        f"{trace}from transformers import PreTrainedTokenizerFast\n\n\n"
        "class OddTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "modeling_odd.py").write_text(
        f"{trace}from transformers.modeling_outputs import SequenceClassifierOutput\n\n\n"
        "class OddOutput(SequenceClassifierOutput):\n    pass\n"
    )
    edit(folder / "config.json", model_type="odd", auto_map={"AutoConfig": "configuration_odd.OddConfig"})
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OddTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_odd.OddTokenizer"]},
    )


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers a folder for its copies of remote code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def artifact(tmp_path: Path, mark: Path) -> Path:
    """An artifact whose manifest asks for its own code to run."""
    folder = Path(shutil.copytree(SOUND, tmp_path / "artifact"))
    write_code(folder, mark)
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_text("utf-8"))
    data["spec"]["trust_remote_code"] = True
    manifest.write_text(json.dumps(data), "utf-8")
    reseal(folder, *(path.name for path in folder.glob("*.py")), "config.json", "tokenizer_config.json")
    return folder


def manifest_says(artifact: Path, trust_remote_code: bool, **component: Any) -> None:
    data = json.loads((artifact / "manifest.json").read_text("utf-8"))
    data["spec"]["trust_remote_code"] = trust_remote_code
    data["components"]["default"] |= component
    (artifact / "manifest.json").write_text(json.dumps(data), "utf-8")


@pytest.mark.parametrize("manifest_trusts", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_code_of_an_artifact_does_not_run_whatever_the_manifest_says(
    artifact: Path, mark: Path, kind: Any, manifest_trusts: bool
) -> None:
    manifest_says(artifact, manifest_trusts)
    with pytest.raises(LoadError, match=REFUSAL):
        kind.from_pretrained(artifact)
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_trust_in_altered_files_is_not_trust_in_code(artifact: Path, mark: Path, kind: Any) -> None:
    edit(artifact / "config.json", name_or_path="altered")
    with pytest.raises(LoadError, match=REFUSAL):
        kind.from_pretrained(artifact, trust=True)
    assert not mark.exists()


def test_code_runs_when_the_caller_trusts_it(artifact: Path, mark: Path) -> None:
    manifest_says(artifact, True, output_class="transformers_modules.model.modeling_odd:OddOutput")
    pipeline = CompiledPipeline.from_pretrained(artifact, trust_remote_code=True)
    assert pipeline("the end") == CompiledPipeline.from_pretrained(SOUND)("the end")
    assert type(pipeline.model.config).__name__ == "OddConfig"
    outputs = pipeline.model(input_ids=[[2, 5, 3]])
    assert type(outputs).__name__ == "OddOutput"
    assert all(part in mark.read_text() for part in ("configuration_odd", "modeling_odd"))
    assert CompiledTokenizer.from_pretrained(artifact, trust_remote_code=True)("the end")["input_ids"]


def test_consent_holds_for_stored_artifacts_as_well(
    artifact: Path, mark: Path, settings: Settings, tmp_path: Path
) -> None:
    uri = LocalStore((tmp_path / "store").as_uri(), settings).put_folder(artifact).uri
    with pytest.raises(LoadError, match=REFUSAL):
        CompiledPipeline.from_pretrained(uri)
    assert not mark.exists()
    assert CompiledPipeline.from_pretrained(uri, trust_remote_code=True)("the end")


def test_opening_and_inspecting_run_no_code(artifact: Path, mark: Path) -> None:
    assert set(open_artifact(artifact).manifest.python_files) == {
        "configuration_odd.py",
        "modeling_odd.py",
        "tokenization_odd.py",
    }
    assert not mark.exists()


def test_saved_tokenizer_neither_runs_its_code_nor_asks(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOUND / name, folder)
    write_code(folder, mark)
    with pytest.raises(LoadError, match=REFUSAL):
        CompiledTokenizer.from_pretrained(folder)
    assert not mark.exists()
    assert CompiledTokenizer.from_pretrained(folder, trust_remote_code=True)("the end")["input_ids"]


@pytest.mark.parametrize(
    "path",
    [
        "transformers_modules.model.modeling_odd:OddOutput",
        "transformers.pipelines:pipeline",
        "transformers.modeling_utils:PreTrainedModel",
        "transformers.models.bert.modeling_bert:BertModel",
        "transformers.modeling_outputs:torch",
        "transformers.modeling_outputs:Missing",
        "transformers.models.bert.modeling_missing:Missing",
        "transformers.modeling_outputs",
        "subprocess:Popen",
        "",
    ],
)
def test_output_class_of_a_manifest_is_one_of_transformers(tmp_path: Path, path: str) -> None:
    folder = Path(shutil.copytree(SOUND, tmp_path / "artifact"))
    manifest_says(folder, False, output_class=path)
    with pytest.raises(LoadError, match=r"output class|Python code"):
        CompiledModel.from_pretrained(folder)


def test_validation_runs_code_with_the_consent_of_the_run(artifact: Path, mark: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileflowError, match=REFUSAL):
        validate_here(artifact, artifact, tmp_path / "report")
    assert not mark.exists()
