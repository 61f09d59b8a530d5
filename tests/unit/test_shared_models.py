"""Loaded models in threads, in forked processes, in pickles and in copies."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask
from compileflow.errors import InputError, LoadError
from compileflow.local.optimized_model import as_source_class
from compileflow.testing.pipelines import assert_same_result
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles as vendor_doubles
from tests.in_process import InProcess
from tests.models import sentences

TEXTS = sentences()
CLASSIFY, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.SENTENCE_SIMILARITY

Loaded = Callable[[str, HfTask], CompiledPipeline]


@pytest.fixture
def folder(tiny_model: ModelFactory, in_process: InProcess) -> Callable[[str, HfTask], Path]:
    """Return the folder of a shared artifact: `folder(target, task)`."""
    return lambda target, task: in_process.compiled(tiny_model(task.graph_task), target, task.graph_task)


@pytest.fixture
def classifier(folder: Callable[[str, HfTask], Path]) -> CompiledPipeline:
    return CompiledPipeline.from_pretrained(folder("torchscript", CLASSIFY))


def test_threads_that_share_a_tokenizer_get_the_results_of_their_own_settings(
    classifier: CompiledPipeline,
) -> None:
    tokenizer = classifier.tokenizer
    calls: list[Callable[[str], Any]] = [
        lambda text: tokenizer(text)["input_ids"],
        lambda text: tokenizer(text, max_length=5)["input_ids"],
        lambda text: tokenizer(text, padding="max_length", max_length=40, return_tensors="pt")["input_ids"].shape,
        lambda text: tokenizer.encode(text, truncation=True, max_length=7),
        lambda text: tokenizer.tokenize(text),
    ]
    expected = [[call(text) for text in TEXTS[:40]] for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            results = list(threads.map(lambda call: [call(text) for text in TEXTS[:40]], calls * 4))
    finally:
        sys.setswitchinterval(interval)
    assert results == expected * 4


class TestFork:
    def test_component_is_loaded_again_in_a_forked_process(
        self, classifier: CompiledPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = classifier(TEXTS[:3])
        runner = classifier.model.graph._runner
        process_id = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process_id + 1)

        assert classifier(TEXTS[:3]) == expected
        reloaded_runner = classifier.model.graph._runner
        assert reloaded_runner is not runner
        classifier(TEXTS[0])
        assert classifier.model.graph._runner is reloaded_runner

    def test_closed_component_stays_closed_in_a_forked_process(
        self, classifier: CompiledPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process_id = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process_id + 1)
        classifier.model.close()
        with pytest.raises(InputError, match="was closed"):
            classifier(TEXTS[0])

    @pytest.mark.usefixtures("vendor_doubles")
    def test_device_that_no_forked_process_can_use_is_refused(
        self, folder: Callable[[str, HfTask], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = CompiledModel.from_pretrained(folder("neuron", CLASSIFY))
        process_id = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: process_id + 1)
        with pytest.raises(InputError, match=f"loaded in another process, {process_id}") as caught:
            model([[5, 6]])
        assert caught.value.hint == "Load it after the fork, in each process."

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["torchscript", "onnx-runtime", "openvino", "aot-inductor"])
    def test_worker_that_was_forked_after_a_call_answers_and_ends(
        self, folder: Callable[[str, HfTask], Path], target: str
    ) -> None:
        # A process of its own with several threads: those of the tests must not be forked.
        code = """
            import os, signal, sys
            from compileflow import CompiledPipeline
            embed = CompiledPipeline.from_pretrained(sys.argv[1], task="sentence-similarity", threads=2)
            texts = ["It arrived on time, and we had to go back to the house by the river. " * 3] * 16
            expected = embed(texts)
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                assert abs(embed(texts) - expected).max() < 1e-4
                sys.exit(7)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == 7, code
        """
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        finished = subprocess.run(
            [sys.executable, "-c", dedent(code), str(folder(target, HfTask.FEATURE_EXTRACTION))],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr


def copied(pipeline: CompiledPipeline, how: str) -> CompiledPipeline:
    if how == "pickle":
        unpickled: CompiledPipeline = pickle.loads(pickle.dumps(pipeline))
        return unpickled
    return copy.deepcopy(pipeline)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
class TestCopies:
    @pytest.mark.parametrize("task", [CLASSIFY, EMBED, HfTask.QUESTION_ANSWERING])
    def test_copy_of_a_pipeline_answers_and_outlives_the_original(
        self, folder: Callable[[str, HfTask], Path], task: HfTask, how: str
    ) -> None:
        settings = {"top_k": None} if task is CLASSIFY else {}
        pipeline = CompiledPipeline.from_pretrained(folder("torchscript", task), task=task, **settings)
        question = {"question": "When did it arrive?", "context": "It arrived on time."}
        inputs = question if task is HfTask.QUESTION_ANSWERING else TEXTS[:5]
        expected = pipeline(inputs)
        pipeline_copy = copied(pipeline, how)
        pipeline.model.close()

        assert type(pipeline_copy.pipeline) is type(pipeline.pipeline)
        assert_same_result(pipeline_copy(inputs), expected, atol=1e-6)

    def test_copy_of_a_model_keeps_what_it_was_loaded_with(
        self, folder: Callable[[str, HfTask], Path], how: str
    ) -> None:
        artifact = folder("torchscript", CLASSIFY)
        bucket = CompiledModel.from_pretrained(artifact).graph.record.shape_buckets[0]
        model = CompiledModel.from_pretrained(artifact, threads=1, buckets=[bucket])
        model_copy = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)

        assert type(model_copy).__name__ == type(model).__name__
        assert model_copy.graph.record == model.graph.record
        assert np.array_equal(model_copy([[5, 6]]).logits, model([[5, 6]]).logits)

    def test_copy_of_an_optimized_model_answers(self, folder: Callable[[str, HfTask], Path], how: str) -> None:
        model = as_source_class(CompiledModel.from_pretrained(folder("torchscript", CLASSIFY)))
        model_copy = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)

        assert type(model_copy).__mro__[2] is type(model).__mro__[2]
        ids = np.array([[5, 6]])
        assert np.array_equal(model_copy(input_ids=ids).logits, model(input_ids=ids).logits)


class TestPicklesElsewhere:
    def test_pickle_without_its_artifact_says_what_to_copy(
        self, folder: Callable[[str, HfTask], Path], tmp_path: Path
    ) -> None:
        moved = shutil.copytree(folder("torchscript", CLASSIFY), tmp_path / "artifact")
        data = pickle.dumps(CompiledPipeline.from_pretrained(moved))
        shutil.rmtree(moved)
        with pytest.raises(LoadError, match=f"needs the artifact in {moved}, which this machine does not have"):
            pickle.loads(data)

    def test_altered_artifact_is_refused(self, folder: Callable[[str, HfTask], Path], tmp_path: Path) -> None:
        moved = shutil.copytree(folder("torchscript", CLASSIFY), tmp_path / "artifact")
        data = pickle.dumps(CompiledTokenizer.from_pretrained(moved))
        (moved / "tokenizer_config.json").write_text("{}")
        with pytest.raises(Exception, match="was altered"):
            pickle.loads(data)
