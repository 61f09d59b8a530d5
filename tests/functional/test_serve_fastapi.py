"""examples/serve_fastapi.py in its own process: many concurrent callers, bad input, and the end by SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from threading import Barrier
from typing import Any

import httpx
import pytest
import transformers

from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import sentences
from tests.services.example_process import FOLDER, WAIT_S, ExampleProcess

TEXTS = sentences()
SCORE_ATOL = 1e-4
# Longer than any test: a request waits until the call is full or the service stops.
FOREVER_MS = 1000 * WAIT_S

Body = dict[str, Any]


class Service(ExampleProcess):
    """A running service and its log."""

    def client(self) -> httpx.Client:
        """Return a client that uses no proxy and has a connection for each caller."""
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(base_url=self.url(), trust_env=False, timeout=WAIT_S, limits=limits)

    @contextmanager
    def ready(self) -> Iterator[httpx.Client]:
        """Give a client when the model is loaded."""
        with self.client() as client:
            self.poll(lambda: client.get("/ready").status_code == 200)
            yield client

    def metrics(self, client: httpx.Client) -> dict[str, int]:
        return dict(client.get("/metrics").json())

    def at_once(self, bodies: Sequence[Body]) -> list[httpx.Response]:
        """Send each request from its own thread; return the responses in order."""
        barrier = Barrier(len(bodies))

        def send(body: Body) -> httpx.Response:
            barrier.wait(WAIT_S)
            return client.post("/predict", json=body)

        with self.client() as client, ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(send, bodies))

    def ended(self) -> dict[str, int]:
        """Wait for the process to exit with 0; return its last counts."""
        assert self.process.wait(WAIT_S) == 0, self.log.read_text("utf-8")
        stopped = re.search(r"stopped: (\{.*\})", self.log.read_text("utf-8"))
        assert stopped is not None, self.log.read_text("utf-8")
        return dict(json.loads(stopped[1]))


@pytest.fixture(scope="module")
def model(tiny_model: ModelFactory) -> Path:
    return tiny_model(HfTask.TEXT_CLASSIFICATION)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    """The source model in transformers' pipeline, with the truncation that compileflow does by default."""
    return partial(transformers.pipeline("text-classification", model=str(model)), truncation=True)


@pytest.fixture(scope="module")
def serve(model: Path, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Start services with settings by name; kill those that still run at the end."""
    artifact = in_process.compiled(model, "torchscript", HfTask.TEXT_CLASSIFICATION)

    @contextmanager
    def start(**settings: Any) -> Iterator[Service]:
        variables = {"ARTIFACT": str(artifact)} | {
            name if name == "ARTIFACT" else f"SERVE_{name}": str(value) for name, value in settings.items()
        }
        with Service.started("serve_fastapi.py", tmp_path_factory.mktemp("service"), variables) as service:
            yield service

    return start


@pytest.fixture(scope="module")
def started(serve: Callable[..., Any]) -> Iterator[Service]:
    """A ready service, shared by tests that leave it running, because a start takes seconds."""
    with serve(MAX_BATCH=16, MAX_WAIT_MS=20) as service:
        with service.ready():
            pass
        yield service


def assert_answers(responses: Sequence[httpx.Response], expected: Sequence[Any]) -> None:
    for response, outputs in zip(responses, expected, strict=True):
        assert response.status_code == 200, response.text
        answer = response.json()["outputs"]
        rows = [(answer, outputs)] if isinstance(outputs, dict) else list(zip(answer, outputs, strict=True))
        for candidate, source in rows:
            assert candidate["label"] == source["label"]
            assert candidate["score"] == pytest.approx(source["score"], abs=SCORE_ATOL)


def test_200_callers_at_once_get_the_source_models_answers_in_few_calls(
    started: Service, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = TEXTS[:200]
    with started.client() as client:
        earlier_counts = started.metrics(client)
        responses = started.at_once([{"inputs": text} for text in texts])
        counts = {name: count - earlier_counts[name] for name, count in started.metrics(client).items()}

    assert_answers(responses, reference(texts))
    sizes = [int(response.headers["x-batch-size"]) for response in responses]
    # Each text reports the size of its call, so this sum is the number of calls.
    calls = sum(1 / size for size in sizes)
    assert calls == pytest.approx(counts["calls"])
    assert counts == {"accepted": len(texts), "answered": len(texts), "calls": counts["calls"]}
    assert max(sizes) <= 16
    assert calls < len(texts) / 2
    p50_ms = median(response.elapsed.total_seconds() for response in responses) * 1e3
    with capsys.disabled():
        sys.stdout.write(f"\n{len(texts)} callers at once: p50 {p50_ms:.0f} ms, {calls:.0f} calls of the model\n")


def test_requests_with_other_parameters_and_lists_keep_their_own_answers(started: Service, reference: Any) -> None:
    texts = TEXTS[:24]
    kinds: list[Body] = [{}, {"top_k": 2}, {"top_k": None, "function_to_apply": "sigmoid"}]
    bodies: list[Body] = [
        {"inputs": text, "parameters": kinds[number % len(kinds)]} for number, text in enumerate(texts)
    ]
    expected = [reference([body["inputs"]], **body["parameters"])[0] for body in bodies]
    bodies += [{"inputs": texts[:5]}, {"inputs": texts[:1]}]
    responses = started.at_once(bodies)

    assert_answers(responses[:-2], expected[: len(texts)])
    assert_answers(responses[-2:], [reference(texts[:5]), reference(texts[:1])])


def test_wrong_requests_get_one_line_and_take_no_other_with_them(
    serve: Callable[..., Any], reference: Any
) -> None:
    malformed: list[tuple[Body, str]] = [
        ({}, "inputs: a value is required."),
        ({"inputs": 5}, "inputs: expected text, an object or a list, got 5."),
        ({"inputs": []}, "inputs: expected at least 1 item, got []."),
        ({"inputs": ["a", 5]}, "inputs.1: expected text or an object, got 5."),
        (
            {"inputs": "a", "parameters": {"num_workers": 4}},
            "parameters.num_workers: expected 'aggregation_strategy',",
        ),
        ({"inputs": "a", "more": 1}, "more: this name is not known."),
        ({"inputs": {"path": "a"}}, "inputs.path: expected 'text', 'text_pair', 'question' or 'context', got"),
        ({"inputs": [{"path": "a"}]}, "inputs.0.path: expected 'text', 'text_pair', 'question' or 'context', got"),
    ]
    good_texts = TEXTS[:7]
    # These requests fill exactly one call, and the last one makes it fail.
    bodies: list[Body] = [{"inputs": text} for text in good_texts] + [{"inputs": {"question": "no text"}}]
    limits = {"QUEUE_LIMIT": 64, "MAX_BODY_BYTES": 100_000}
    with serve(MAX_BATCH=len(bodies), MAX_WAIT_MS=FOREVER_MS, **limits) as service:
        with service.ready() as client:
            for body, says in malformed:
                response = client.post("/predict", json=body)
                assert response.status_code == 422, body
                assert response.json()["error"].startswith(says), body
                assert "\n" not in response.json()["error"]
            too_large = client.post("/predict", content=b"x" * 100_001)
            assert too_large.status_code == 413
            assert too_large.json()["error"] == "The body has more than 100000 bytes."
            too_many = client.post("/predict", json={"inputs": ["a"] * 65})
            assert too_many.status_code == 400
            assert too_many.json() == {"error": "The request has 65 texts.", "hint": "Send at most 64 at once."}
            bad_parameter = {"inputs": ["a"] * len(bodies), "parameters": {"function_to_apply": "no such"}}
            refused = client.post("/predict", json=bad_parameter)
            assert refused.status_code == 400
            assert "no such" in refused.json()["error"]
            bad_task = client.post(
                "/predict", json={"inputs": ["a"] * len(bodies), "parameters": {"targets": "b"}}
            )
            assert bad_task.status_code == 400
            assert "no setting 'targets'" in bad_task.json()["error"]
        responses = service.at_once(bodies)

    assert_answers(responses[:-1], reference(good_texts))
    assert {response.headers["x-batch-size"] for response in responses[:-1]} == {"1"}
    assert responses[-1].status_code == 400
    assert responses[-1].json()["error"]


@pytest.mark.slow
def test_service_is_alive_before_it_is_ready(serve: Callable[..., Any]) -> None:
    with serve() as service, service.client() as client:
        first = client.get("/ready")
        assert first.status_code == 503
        assert first.headers["retry-after"]
        assert first.json()["error"] == "The model is being loaded."
        assert client.get("/live").status_code == 200
        assert client.post("/predict", json={"inputs": "a"}).status_code in (200, 503)
        service.poll(lambda: client.get("/ready").status_code == 200)


def test_artifact_that_cannot_be_loaded_ends_the_service_with_one_line(
    serve: Callable[..., Any], tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    with serve(ARTIFACT=tmp_path / "absent") as service:
        assert service.process.wait(WAIT_S) == 1
        assert "absent" in service.log.read_text("utf-8").splitlines()[-1]
        assert "Traceback" not in service.log.read_text("utf-8")
    images = in_process.compiled(
        tiny_model(HfTask.IMAGE_CLASSIFICATION), "onnx-runtime", HfTask.IMAGE_CLASSIFICATION
    )
    with serve(ARTIFACT=images) as service:
        assert service.process.wait(WAIT_S) == 1
        assert "classifies images" in service.log.read_text("utf-8").splitlines()[-1]
    with serve(ARTIFACT="") as service:
        assert service.process.wait(WAIT_S) == 1
        assert service.log.read_text("utf-8") == "ARTIFACT: a value is required.\n"


@pytest.mark.slow
def test_full_queue_refuses_and_sigterm_answers_all_that_wait(serve: Callable[..., Any], reference: Any) -> None:
    texts = TEXTS[:50]
    with serve(MAX_BATCH=64, MAX_TOKENS=10_000, MAX_WAIT_MS=FOREVER_MS, QUEUE_LIMIT=len(texts)) as service:
        with ThreadPoolExecutor(1) as thread, service.ready() as client:
            future = thread.submit(service.at_once, [{"inputs": text} for text in texts])
            service.poll(lambda: service.metrics(client)["accepted"] == len(texts))
            full = client.post("/predict", json={"inputs": "one more"})
            assert full.status_code == 503
            assert full.headers["retry-after"]
            assert service.metrics(client) == {"accepted": len(texts), "answered": 0, "calls": 0}
            service.process.send_signal(signal.SIGTERM)
            responses = future.result(WAIT_S)
        assert service.ended() == {"accepted": len(texts), "answered": len(texts), "calls": 1}
    assert_answers(responses, reference(texts))


@pytest.mark.slow
def test_nothing_accepted_is_lost_when_sigterm_meets_50_busy_callers(
    serve: Callable[..., Any], reference: Any
) -> None:
    texts = TEXTS[:50]

    def until_closed(call: Callable[[], httpx.Response]) -> list[httpx.Response]:
        """Repeat a call until the service closes the connection; return the responses."""
        answers = []
        with suppress(httpx.TransportError):
            while True:
                answers.append(call())
        return answers

    with serve(MAX_BATCH=8, MAX_WAIT_MS=1) as service:
        with service.ready() as client, ThreadPoolExecutor(len(texts) + 1) as threads:
            calls = [partial(client.post, "/predict", json={"inputs": text}) for text in texts]
            futures = [threads.submit(until_closed, call) for call in calls]
            service.poll(lambda: service.metrics(client)["answered"] > 2 * len(texts))
            readiness = threads.submit(until_closed, partial(client.get, "/ready"))
            service.process.send_signal(signal.SIGTERM)
            responses_of_callers = [future.result(WAIT_S) for future in futures]
            statuses = [response.status_code for response in readiness.result(WAIT_S)]
        counts = service.ended()

    answers_of_callers = [
        [response for response in responses if response.status_code != 503] for responses in responses_of_callers
    ]
    assert counts["accepted"] == counts["answered"] == sum(map(len, answers_of_callers))
    assert counts["accepted"] > 2 * len(texts)
    for answers, expected in zip(answers_of_callers, reference(texts), strict=True):
        assert_answers(answers, [expected] * len(answers))
    # A service that is no longer ready stays so.
    assert statuses == sorted(statuses)
    assert set(statuses) <= {200, 503}


@pytest.mark.slow
def test_call_is_full_at_its_tokens(serve: Callable[..., Any], reference: Any) -> None:
    # 100 characters count as 27 tokens: the third request does not fit beside two others.
    texts = [(f"{number} " + TEXTS[number] * 9)[:100] for number in range(6)]
    settings = {"MAX_TOKENS": 80, "MAX_WAIT_MS": FOREVER_MS}
    with serve(**settings) as service, ThreadPoolExecutor(1) as thread, service.ready() as client:
        future = thread.submit(service.at_once, [{"inputs": text} for text in texts])
        service.poll(lambda: service.metrics(client)["answered"] == 4)
        # The last two would wait for a third until the service stops.
        service.process.send_signal(signal.SIGTERM)
        responses = future.result(WAIT_S)
    assert_answers(responses, reference(texts))
    assert {response.headers["x-batch-size"] for response in responses} == {"2"}


WORKERS = {
    "uvicorn": [
        "--app-dir",
        str(FOLDER),
        "--factory",
        "serve_fastapi:create_app",
        "--workers",
        "2",
        "--port",
        "0",
    ],
    "gunicorn": [
        *("--preload", "--chdir", str(FOLDER), "-k", "uvicorn.workers.UvicornWorker", "-w", "2"),
        *("--bind", "127.0.0.1:0", "serve_fastapi:create_app()"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("server", WORKERS)
def test_server_starts_workers_from_the_factory(
    model: Path, in_process: InProcess, tmp_path: Path, server: str
) -> None:
    pytest.importorskip(server)
    artifact = in_process.compiled(model, "onnx-runtime", HfTask.TEXT_CLASSIFICATION)
    log = tmp_path / "service.log"
    environment = os.environ | {"ARTIFACT": str(artifact), "COMPILEFLOW_HOME": str(tmp_path / "home")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", server, *WORKERS[server]], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        service = Service(process, log)
        try:
            service.poll(lambda: log.read_text("utf-8").count("ready: ") == 2)
            with service.ready() as client:
                answers = [client.post("/predict", json={"inputs": text}) for text in TEXTS[:8]]
            process.terminate()
            process.wait(WAIT_S)
        finally:
            process.kill()
            process.wait(WAIT_S)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert log.read_text("utf-8").count("stopped: ") == 2
