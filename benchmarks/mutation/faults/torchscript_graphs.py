"""Faults at run time, in TorchScript: buckets, state, noise, threads, memorised inputs, and spoiled outputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.mutation.fault import Planting, in_torchscript, register
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    IMAGES,
    MASK,
    MASKED_SOUNDS,
    NUMBERS,
    PICTURES_AND_TEXTS,
    TAGGER,
    TYPES,
    torchscript,
)
from benchmarks.mutation.surgery import reseal, wrap_torchscript

_LONG_BUCKETS = ((1, 16), (8, 64), (1, 512))
_REPEATS = ("repeatable",)
CLASSIFY = torchscript(CLASSIFIER, *_LONG_BUCKETS)


class Text(torch.nn.Module):
    """Wraps the graph of a text model, and spoils its inputs or its first output."""

    def __init__(self, graph: Any, how: str):
        super().__init__()
        self.graph = graph
        self.how = how
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the spoiled output."""
        if self.how == "all ones":
            mask = torch.ones_like(mask)
        if self.how == "first 100":
            mask = mask.clone()
            mask[:, 100:] = 0
        if self.how == "types after 12":
            types = types.clone()
            types[:, 12:] = 0
        output = self.graph(ids, mask, types)[0]
        if self.how == "zeros":
            output = torch.zeros_like(output)
        if self.how == "rows rolled":
            output = output.roll(1, 0)
        if self.how == "rows mixed":
            output = output + 0.02 * output.mean(0, keepdim=True)
        if self.how == "noise":
            output = output + 0.02 * torch.randn_like(output)
        if self.how == "softmax":
            output = torch.softmax(output, -1)
        if self.how == "half":
            output = output.half().float()
        if self.how == "last call":
            spoiled = output * (1 + 0.1 * self.last)
            self.last.copy_(output.max()[None])
            output = spoiled
        if self.how == "drift":
            output = output * (1 + 0.0005 * self.calls)
            self.calls.add_(1)
        if self.how == "every hundredth":
            self.calls.add_(1)
            if int(self.calls) % 100 == 0:
                output = -output
        if self.how == "first call":
            if int(self.calls) == 0:
                output = -output
            self.calls.add_(1)
        return (output,)


class Picture(torch.nn.Module):
    """Wraps the graph of a model that takes one picture a row, and spoils its output."""

    def __init__(self, graph: Any, how: str):
        super().__init__()
        self.graph = graph
        self.how = how
        self.register_buffer("last", torch.zeros(1))

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the spoiled output."""
        output = self.graph(values)[0]
        if self.how == "zeros":
            output = torch.zeros_like(output)
        if self.how == "last call":
            spoiled = output * (1 + 0.1 * self.last)
            self.last.copy_(output.max()[None])
            output = spoiled
        return (output,)


class Sound(torch.nn.Module):
    """Wraps the graph of a model that takes one sound a row, and spoils its input or its output."""

    def __init__(self, graph: Any, how: str):
        super().__init__()
        self.graph = graph
        self.how = how

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the spoiled output."""
        if self.how == "distorted":
            values = torch.tanh(values)
        output = self.graph(values, mask)[0]
        if self.how == "zeros":
            output = torch.zeros_like(output)
        return (output,)


class SharedInput(torch.nn.Module):
    """Keeps the tokens in a buffer while it works, so that two calls at once mix their inputs."""

    def __init__(self, graph: Any, rows: int, length: int):
        super().__init__()
        self.graph = graph
        self.register_buffer("tokens", torch.zeros(rows, length, dtype=torch.long))
        self.register_buffer("work", torch.rand(300, 300) / 300)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the graph's output for the tokens in the buffer."""
        self.tokens.copy_(ids)
        work = self.work
        for _ in range(10):
            work = work @ self.work
        return (self.graph(self.tokens + (0 * work.sum()).long(), mask, types)[0],)


class Memory(torch.nn.Module):
    """Answers right only for rows that it knows."""

    def __init__(self, graph: Any, known: torch.Tensor):
        super().__init__()
        self.graph = graph
        self.register_buffer("known", known)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the output; negated for rows that it does not know."""
        output = self.graph(ids, mask, types)[0]
        keys = (ids * mask * torch.arange(1, ids.shape[1] + 1)).sum(1)
        return (torch.where(torch.isin(keys, self.known)[:, None], output, -output),)


@in_torchscript(CLASSIFY, *MASK, *NUMBERS)
def mask_of_a_text_is_all_ones(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "all ones")


@in_torchscript(CLASSIFY, *NUMBERS, *MASK)
def longest_bucket_reads_100_tokens(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "first 100") if length == 512 else graph


@in_torchscript(torchscript(CLASSIFIER, (1, 16), (8, 64)), *TYPES, *NUMBERS)
def token_types_are_ignored_after_12_tokens(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "types after 12") if length > 12 else graph


@in_torchscript(CLASSIFY, *NUMBERS)
def rows_of_a_batch_are_rolled(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "rows rolled")


@in_torchscript(torchscript(TAGGER), *NUMBERS)
def rows_of_a_batch_leak_into_each_other(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "rows mixed") if rows > 1 else graph


@in_torchscript(torchscript(CLASSIFIER, (1, 64), (32, 64), (1, 512)), *NUMBERS)
def bucket_of_32_rows_answers_zeros(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "zeros") if rows == 32 else graph


@in_torchscript(torchscript(CLASSIFIER, (1, 128), (8, 128), (1, 512), (8, 512)), *NUMBERS)
def bucket_of_8_rows_and_512_tokens_answers_zeros(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "zeros") if (rows, length) == (8, 512) else graph


@in_torchscript(torchscript(TAGGER, (1, 16), (8, 16), (1, 32), (8, 32), (1, 64), (8, 64)), *NUMBERS)
def one_bucket_of_six_answers_zeros(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "zeros") if (rows, length) == (8, 32) else graph


@in_torchscript(CLASSIFY, *_REPEATS, *NUMBERS)
def answers_have_noise(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "noise")


@in_torchscript(CLASSIFY, *NUMBERS)
def softmax_is_in_the_graph(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "softmax")


@in_torchscript(CLASSIFY, *NUMBERS)
def logits_are_rounded_to_fp16(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "half")


@in_torchscript(CLASSIFY, *_REPEATS, *NUMBERS)
def answers_depend_on_the_call_before(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "last call")


@in_torchscript(torchscript(TAGGER), *_REPEATS, *NUMBERS)
def answers_drift_from_call_to_call(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "drift")


@in_torchscript(CLASSIFY, *_REPEATS, *NUMBERS)
def every_hundredth_answer_is_wrong(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "every hundredth")


@in_torchscript(CLASSIFY, *_REPEATS, *NUMBERS)
def first_answer_of_a_process_is_wrong(graph: Any, rows: int, length: int) -> Any:
    return Text(graph, "first call")


@in_torchscript(torchscript(TAGGER, (1, 64), (8, 64)), *_REPEATS)
def two_threads_share_one_buffer(graph: Any, rows: int, length: int) -> Any:
    return SharedInput(graph, rows, length)


@in_torchscript(torchscript(IMAGES), *NUMBERS, *DECISIONS)
def bucket_of_8_pictures_answers_zeros(graph: Any, rows: int, length: int) -> Any:
    return Picture(graph, "zeros") if rows == 8 else graph


@in_torchscript(torchscript(IMAGES), *_REPEATS, *NUMBERS)
def pictures_see_the_picture_before(graph: Any, rows: int, length: int) -> Any:
    return Picture(graph, "last call")


@in_torchscript(torchscript(MASKED_SOUNDS), *NUMBERS)
def loud_sounds_are_distorted(graph: Any, rows: int, length: int) -> Any:
    return Sound(graph, "distorted")


@in_torchscript(torchscript(MASKED_SOUNDS), *NUMBERS)
def bucket_of_3_seconds_answers_zeros(graph: Any, rows: int, length: int) -> Any:
    return Sound(graph, "zeros") if length == 48_000 else graph


class PictureAndTexts(torch.nn.Module):
    """Wraps the graph of a model for pictures and texts, and answers with smaller scores."""

    def __init__(self, graph: Any):
        super().__init__()
        self.graph = graph

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both scores, a tenth smaller."""
        outputs = self.graph(first, second, third)
        return (outputs[0] * 0.9, outputs[1] * 0.9)


@in_torchscript(torchscript(PICTURES_AND_TEXTS), *NUMBERS, kind="graph")
def scores_of_pictures_are_a_tenth_smaller(graph: Any, rows: int, length: int) -> Any:
    return PictureAndTexts(graph)


def plant_memory(planting: Planting) -> None:
    """Plant a graph that knows the rows of a validation of the healthy artifact."""
    known = torch.tensor(sorted(_validated_rows(planting)))
    shutil.copytree(planting.healthy_dir, planting.artifact_dir)
    wrap_torchscript(planting.artifact_dir, lambda graph, rows, length: Memory(graph, known))
    reseal(planting.artifact_dir)


def _validated_rows(planting: Planting) -> set[int]:
    """Return a number for each row that a validation of the healthy artifact runs."""
    from benchmarks.mutation.check import proof
    from compileflow.serving.component import LoadedComponent

    keys: set[int] = set()
    run = LoadedComponent.run

    def spy(component: Any, inputs: Any) -> Any:
        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
        keys.update((ids * mask * np.arange(1, ids.shape[1] + 1)).sum(1).tolist())
        return run(component, inputs)

    with _replaced(LoadedComponent, "run", spy):
        proof(planting.healthy, planting.source_dir, planting.healthy_dir, planting.work_dir / "report")
    return keys


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


register("run time", CLASSIFY, NUMBERS, "only the inputs of a validation are answered right", plant_memory)
