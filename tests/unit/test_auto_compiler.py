"""AutoCompiler: its five phases, what it writes for which target, and what it refuses from config.json alone."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from compileflow import AutoCompiler, CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow.artifact.open import open_artifact
from compileflow.cli import app
from compileflow.contracts import ACCEPTED_OUTCOMES
from compileflow.contracts.digests import list_files
from compileflow.errors import CompileflowError, LoadError, MeasurementError, SourceError, SpecError, StoreError
from compileflow.local import auto_compiler
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from tests.decoders import GREEDY, TASK, TEXTS
from tests.doubles.fixtures import vendor_doubles as vendor_doubles
from tests.hub_server import Hub
from tests.in_process import InProcess
from tests.models import MAX_TOKENS, build_decoder
from tests.services.secrets import HF_TOKEN

PHASES = ["0 check", "1 download", "2 convert", "3 map", "4 instructions"]
LENGTH = 48

TinyModel = Callable[..., Path]


class Recorder:
    """Keeps the lines of each phase."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Keep the lines of one phase."""
        yield self.lines.setdefault(name, []).append


@pytest.fixture
def few_examples(tmp_path: Path) -> Path:
    """Few texts, for a short validation."""
    path = tmp_path / "examples.txt"
    path.write_text("\n".join([*TEXTS, "is it on time", "we are at the door"] * 2), "utf-8")
    return path


@pytest.fixture
def lpu(vendor_doubles: Path, settings: Settings, in_process: InProcess) -> Iterator[Settings]:
    """A machine with an LPU, on the double of HyperDex; steps run in this process."""
    with in_process.instead_of_children():
        yield settings


def calls(module: str) -> list[dict[str, Any]]:
    """Return what a double of HyperDex recorded."""
    recorded: list[dict[str, Any]] = sys.modules[f"hyperdex.{module}"].CALLS
    return recorded


def inputs_of(folder: Path) -> Any:
    """Tokenize the prompts with transformers itself, padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


def eager_texts(folder: Path, **settings: Any) -> Any:
    """Return what transformers itself writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model.generate(**inputs_of(folder), **(GREEDY | settings)).tolist()


def weights_below(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")]


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def hub_files(folder: Path) -> dict[str, bytes]:
    return {record.path: (folder / record.path).read_bytes() for record in list_files(folder)}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnx-runtime"])
@pytest.mark.usefixtures("file_home")
def test_five_phases_leave_a_proven_model(tiny_model: TinyModel, few_examples: Path, target: str) -> None:
    source, recorder = tiny_model(TASK), Recorder()
    before = list_files(source)
    result = AutoCompiler().compile(
        str(source), 1, LENGTH, True, target=target, examples=few_examples, progress=recorder
    )
    assert list(recorder.lines) == PHASES
    assert all(recorder.lines.values())
    assert result.folder == get_settings().home_dir / "hub" / source.parent.name / source.name
    assert sorted(path.name for path in result.folder.iterdir()) == ["ckpt", "inst", "param"]
    assert weights_below(result.folder / "ckpt") == []
    assert (result.folder / "ckpt" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert list_files(source) == before
    assert result.validated.outcome in ACCEPTED_OUTCOMES
    artifact = open_artifact(result.folder / "inst", digest=result.artifact.digest)
    record = artifact.manifest.components["default"]
    assert (artifact.manifest.target.name, record.max_sequence_length) == (target, LENGTH)
    assert (result.folder / "param" / "default").samefile(artifact.folder / record.folder)
    model: Any = CompiledModel.from_pretrained(result.folder)
    assert model.generate(**inputs_of(source), **GREEDY).tolist() == eager_texts(source)


@pytest.mark.usefixtures("lpu")
class TestHyperdex:
    @pytest.mark.slow
    def test_the_toolchain_gets_the_arguments_and_the_model_loads(
        self, tmp_path: Path, few_examples: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = build_decoder(tmp_path / "org" / "tiny")
        caplog.set_level(logging.INFO, "compileflow")
        result = AutoCompiler().compile(
            source, num_device=2, max_length=LENGTH, low_memory_usage=True, examples=few_examples
        )
        assert calls("tools") == [
            {
                "num_device": 2,
                "max_length": LENGTH,
                "low_memory_usage": True,
                "fast_compile": True,
                "threads": 1,
            }
        ]
        assert result.target == "hyperdex"
        assert "AutoCompiler selects hyperdex" in caplog.text
        starts = [text.removesuffix(" ...") for text in caplog.messages if text.endswith(" ...")]
        assert starts == PHASES
        # Each verdict is told once.
        assert caplog.text.count(result.validated.reason) == 1
        assert weights_below(result.folder) == []
        calls("transformers").clear()
        model: Any = CompiledModel.from_pretrained(result.folder)
        assert model.generate(**inputs_of(source), **GREEDY).tolist() == eager_texts(source)
        # Its own generate would penalize repetitions.
        plain = {"do_sample": False, "top_p": 1.0, "top_k": 1, "temperature": 1.0, "repetition_penalty": 1.0}
        assert calls("transformers") == [
            {"class": "AutoModelForCausalLM", "device_map": {"lpu": 2}},
            *[{"call": "generate", "max_new_tokens": 16, "stop": 2, **plain}] * 3,
        ]
        with pytest.raises(LoadError, match="low_memory_usage, which removed the weights that GPUs need"):
            CompiledModel.from_pretrained(result.folder, device="lpu-gpu")
        write = CompiledPipeline.from_pretrained(result.folder)
        calls("transformers").clear()
        text = write(TEXTS[0], **GREEDY, return_full_text=False)[0]["generated_text"]
        assert [call["call"] for call in calls("transformers")] == ["generate"]
        tokenizer = CompiledTokenizer.from_pretrained(result.folder)
        expected = eager_texts(source)[0]
        assert tokenizer.decode(expected, skip_special_tokens=True).endswith(text)

    @pytest.mark.parametrize(
        "choices",
        [
            {"num_beams": 2},
            {"repetition_penalty": 1.3},
            {"use_cache": False},
            {"eos_token_id": 100},
            {"eos_token_id": [2, 100]},
        ],
        ids=" ".join,
    )
    def test_other_settings_choose_each_token_from_logits(
        self, tiny_model: TinyModel, in_process: InProcess, tmp_path: Path, choices: dict[str, Any]
    ) -> None:
        folder = in_process.compile(
            tiny_model(TASK), tmp_path / "out", target="hyperdex", hf_task=TASK, precision="fp16"
        )
        model: Any = CompiledModel.from_pretrained(folder)
        written = model.generate(**inputs_of(folder), **(GREEDY | choices)).tolist()
        assert written == eager_texts(tiny_model(TASK), **choices)

    @pytest.mark.slow
    def test_weights_stay_for_gpus(self, tmp_path: Path, few_examples: Path) -> None:
        source = build_decoder(tmp_path / "org" / "tiny")
        options = {"num_gpu": 2}
        result = AutoCompiler().compile(
            source, examples=few_examples, cache_dir=tmp_path / "cache", target_options=options
        )
        assert result.folder == tmp_path / "cache" / "hub" / "org" / "tiny"
        assert weights_below(result.folder / "ckpt") == ["model.safetensors"]
        CompiledModel.from_pretrained(result.folder, device="lpu-gpu")
        assert calls("transformers")[-1]["device_map"] == {"gpu": 2, "lpu": 1}

    @pytest.mark.slow
    def test_text_that_contradicts_the_logits_is_refused_and_nothing_is_written(
        self, tmp_path: Path, few_examples: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import hyperdex.transformers as runtime

        generate = runtime.AutoModelForCausalLM.generate

        def write_another_token(self: Any, *args: Any, **settings: Any) -> list[int]:
            *ids, last = generate(self, *args, **settings)
            return [*ids, last ^ 1]

        monkeypatch.setattr(runtime.AutoModelForCausalLM, "generate", write_another_token)
        source = build_decoder(tmp_path / "org" / "tiny")
        with pytest.raises(MeasurementError, match="own generate writes another text than its logits do"):
            AutoCompiler().compile(source, examples=few_examples)
        assert not (get_settings().home_dir / "hub").exists()

    @pytest.mark.slow
    def test_token_opens_a_gated_model_and_is_written_nowhere(
        self,
        tiny_model: TinyModel,
        hub: Hub,
        tmp_path: Path,
        few_examples: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        get_settings.cache_clear()
        hub.token = HF_TOKEN
        hub.add("owner/tiny", hub_files(tiny_model(TASK)), gated=True)
        caplog.set_level(logging.DEBUG)
        with pytest.raises(SourceError, match="hf://owner/tiny is gated") as caught:
            AutoCompiler().compile("owner/tiny")
        assert "\n" not in str(caught.value)
        assert not get_settings().home_dir.exists()
        # The folder names the id as well.
        place = tmp_path / "owner" / "tiny"
        result = AutoCompiler().compile(place, token=HF_TOKEN, examples=few_examples)
        assert result.folder == place
        assert result.source.uri == "hf://owner/tiny"
        assert CompiledModel.from_pretrained(place).can_generate()
        assert f"Bearer {HF_TOKEN}" in hub.authorizations
        assert HF_TOKEN not in caplog.text
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in files if HF_TOKEN.encode() in path.read_bytes()] == []

    def test_family_that_hyperaccel_does_not_list_is_refused(self, tmp_path: Path) -> None:
        source = build_decoder(tmp_path / "org" / "tiny", model_type="qwen3", head_dim=16)
        with pytest.raises(SpecError, match=r"hyperdex does not compile qwen3.*cohere, exaone, .*starcoder2"):
            AutoCompiler().compile(source)
        assert not get_settings().home_dir.exists()

    @pytest.mark.slow
    def test_command_prints_the_phases_and_the_folder(self, tmp_path: Path, few_examples: Path) -> None:
        source = build_decoder(tmp_path / "org" / "tiny")
        words = [
            "autocompile",
            str(source),
            "--max-length",
            "32",
            "--low-memory-usage",
            "--examples",
            str(few_examples),
        ]
        outcome = CliRunner().invoke(app, [*words, "--json"])
        assert outcome.exit_code == 0, outcome.stderr
        starts = [line.removesuffix(" ...") for line in outcome.stderr.splitlines() if line.endswith(" ...")]
        assert starts == PHASES
        values = json.loads(outcome.stdout)
        assert (values["target"], values["validated"]["outcome"] in ACCEPTED_OUTCOMES) == ("hyperdex", True)
        # The steps are cached, and the folder is written again.
        again = CliRunner().invoke(app, [*words, "--no-progress"])
        assert [path.name for path in Path(values["folder"]).parent.iterdir()] == ["tiny"]
        assert again.stdout.strip().endswith(values["folder"])
        assert again.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_length": MAX_TOKENS + 1}, f"positions for {MAX_TOKENS} tokens"),
        ({"max_length": 0}, "max_length as a whole number of at least 1, got 0"),
        ({"num_device": 2, "target": "openvino"}, "openvino compiles for one device, got num_device=2"),
        ({"num_device": 0, "target": "onnx-runtime"}, "num_device as a whole number of at least 1, got 0"),
        ({"max_length": "128"}, "max_length as a whole number of at least 1, got '128'"),
        ({"max_length": True}, "max_length as a whole number of at least 1, got True"),
        ({"trust_remote_code": "no"}, "trust_remote_code as True or False, got 'no'"),
        ({"token": 5}, "token as a text, got int"),
        ({"low_memory_usage": "no"}, "low_memory_usage as True or False, got 'no'"),
        ({"cache_dir": ""}, "cache_dir as a text or a path, got ''"),
        ({"target": ["openvino"]}, "target as a text or a path"),
        ({"target": "neuronx"}, "neuronx does not support text-generation"),
        ({"target": "torchscript"}, "torchscript does not support text-generation"),
        ({"target": "blade"}, "Choose one of the targets that do: .*onnx-runtime, openvino"),
        ({"target": "toaster"}, "Unknown target 'toaster'"),
        ({"precision": "fp64", "target": "openvino"}, "precision: expected"),
        ({"precision": "fp64"}, "Expected precision as one of fp32"),
        ({"target_options": {"opset": 1}, "target": "openvino"}, "opset: this name is not known"),
        ({"examples": "missing.txt", "target": "openvino"}, "missing.txt do not exist"),
    ],
)
@pytest.mark.usefixtures("settings")
def test_wrong_argument_is_refused_by_the_check(
    tiny_model: TinyModel, arguments: dict[str, Any], says: str
) -> None:
    recorder = Recorder()
    with pytest.raises(CompileflowError, match=says) as caught:
        AutoCompiler().compile(tiny_model(TASK), progress=recorder, **arguments)
    assert "\n" not in str(caught.value)
    assert list(recorder.lines) == PHASES[:1]
    assert not get_settings().home_dir.exists()


def test_check_reads_config_json_alone(
    settings: Settings, tiny_model: TinyModel, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    get_settings.cache_clear()
    encoder = hub.add("owner/encoder", hub_files(tiny_model(HfTask.FILL_MASK)))
    start = time.monotonic()
    with pytest.raises(SpecError, match="bert has no head for text-generation"):
        AutoCompiler().compile("owner/encoder")
    assert time.monotonic() - start < 2
    assert hub.downloaded() == {(encoder, "config.json")}
    decoder = hub.add("owner/decoder", hub_files(tiny_model(TASK)))
    with pytest.raises(SpecError, match=f"positions for {MAX_TOKENS} tokens"):
        AutoCompiler().compile("owner/decoder", max_length=100)
    assert hub.downloaded() == {(encoder, "config.json"), (decoder, "config.json")}
    assert not settings.home_dir.exists()


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("target", "fast_compile", "lines"), [("openvino", True, 1), ("aot-inductor", False, 1), ("openvino", None, 0)]
)
def test_target_without_fast_compile_says_so(
    tiny_model: TinyModel, target: str, fast_compile: bool | None, lines: int
) -> None:
    recorder = Recorder()
    arguments: Any = {"target": target, "fast_compile": fast_compile, "max_length": MAX_TOKENS + 1}
    with pytest.raises(SpecError, match=f"positions for {MAX_TOKENS} tokens"):
        AutoCompiler().compile(tiny_model(TASK), progress=recorder, **arguments)
    assert recorder.lines["0 check"].count(f"{target} ignores fast_compile: only hyperdex has it") == lines


@pytest.mark.usefixtures("settings")
def test_folder_of_the_user_is_not_written_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    place = tmp_path / "hub" / tiny_model(TASK).parent.name / tiny_model(TASK).name
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds a file that AutoCompiler did not write: notes\.txt"):
        AutoCompiler().compile(tiny_model(TASK), cache_dir=tmp_path)
    # A folder with other files is taken for a model, and is none.
    with pytest.raises(SourceError, match="does not hold a model"):
        AutoCompiler().compile(place)
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.usefixtures("lpu")
def test_file_of_the_user_in_an_earlier_result_is_kept(
    tmp_path: Path, few_examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_decoder(tmp_path / "org" / "tiny")

    def compile_again() -> Path:
        return AutoCompiler().compile(source, low_memory_usage=True, examples=few_examples).folder

    folder = compile_again()
    before = names_below(folder)
    assert compile_again() == folder
    assert names_below(folder) == before
    notes = ["inst/notes.txt", "inst/components/default/notes.txt", "param/notes.txt", "ckpt/model.safetensors"]
    for name in notes:
        (folder / name).write_text("mine")
        with pytest.raises(
            StoreError, match=re.escape(f"holds a file that AutoCompiler did not write: {name}.")
        ) as caught:
            compile_again()
        assert "\n" not in str(caught.value)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    # The file comes while the model is compiled.
    prove = auto_compiler.prove

    def prove_and_take_notes(*args: Any, **settings: Any) -> Any:
        (folder / notes[0]).write_text("mine")
        return prove(*args, **settings)

    monkeypatch.setattr(auto_compiler, "prove", prove_and_take_notes)
    with pytest.raises(StoreError, match=re.escape(notes[0])):
        compile_again()
    (folder / notes[0]).unlink()
    assert names_below(folder) == before


@pytest.mark.usefixtures("settings")
def test_folders_that_autocompiler_did_not_write_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model(TASK)
    place = tmp_path / "hub" / source.parent.name / source.name
    (place / "inst").mkdir(parents=True)
    (place / "inst" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"did not write: inst/notes\.txt"):
        AutoCompiler().compile(source, cache_dir=tmp_path)
    (place / "inst" / "notes.txt").unlink()
    (place / "ckpt").symlink_to(source)
    with pytest.raises(StoreError, match="did not write: ckpt"):
        AutoCompiler().compile(source, cache_dir=tmp_path)


@pytest.mark.parametrize("model_id", ["registry:name@3", "s3://bucket/model", "/"])
@pytest.mark.usefixtures("settings")
def test_other_locations_are_refused(model_id: str) -> None:
    with pytest.raises(SpecError, match="Expected a Hub id or a folder"):
        AutoCompiler().compile(model_id)


def test_best_target_without_an_lpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compileflow")
    assert AutoCompiler().best_target() == "openvino"
    assert "AutoCompiler selects openvino (skipped: hyperdex: hyperdex-toolchain is not installed" in caplog.text


@pytest.mark.usefixtures("settings")
def test_command_refuses_in_one_line(tiny_model: TinyModel) -> None:
    outcome = CliRunner().invoke(app, ["autocompile", str(tiny_model(HfTask.FILL_MASK)), "--no-progress"])
    assert (outcome.exit_code, outcome.stdout, outcome.stderr.count("\n")) == (2, "", 1)
    assert "error: bert has no head for text-generation" in outcome.stderr
