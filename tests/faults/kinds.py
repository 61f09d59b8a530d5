"""The kinds of faults. Each one is a context around a run, whose value is called once the run has started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

from compileflow.contracts.digests import json_digest
from tests.faults.runs import Run, watched
from tests.faults.world import CHANGING, MODELS, WEIGHTS, World
from tests.services.fault_proxy import Answer, Corrupt, CutRequest, CutResponse, Fault, Hang, LoseReply

During = Callable[[Run], None]
_HTML = b"<html><head><title>Sign in</title></head><body>Sign in to continue.</body></html>"


def _s3_error(status: int, code: str) -> Answer:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>'
    return Answer(status, body.encode(), {"Content-Type": "application/xml"})


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        make: Takes the world and a source of randomness.
        is_new: Whether the run's request is new; None leaves that to chance.
        damages: Whether it damages the store; such a run needs one that is not empty.
    """

    make: Callable[[World, Random], AbstractContextManager[During]]
    is_new: bool | None = None
    damages: bool = False


def _nothing(run: Run) -> None:
    """Leave a run alone."""


@contextmanager
def none(world: World, random: Random) -> Iterator[During]:
    """No fault."""
    yield _nothing


@contextmanager
def killed_run(world: World, random: Random) -> Iterator[During]:
    """The process of the run is killed."""
    delay_s = random.uniform(0, world.duration_s)

    def during(run: Run) -> None:
        run.sleep(delay_s)
        run.kill()

    yield during


@contextmanager
def killed_at_write(world: World, random: Random) -> Iterator[During]:
    """The process of the run is killed just before or after it moves a file into place."""
    number, is_after = random.randrange(40), random.random() < 0.5
    replace, count = os.replace, 0

    def deadly(*arguments: object, **options: object) -> None:
        nonlocal count
        count += 1
        if count == number and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments, **options)  # type: ignore[arg-type]
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    # The fork of the run inherits it.
    os.replace = deadly  # type: ignore[assignment]
    try:
        yield lambda run: setattr(os, "replace", replace)
    finally:
        os.replace = replace


@contextmanager
def killed_child(world: World, random: Random) -> Iterator[During]:
    """A child process, in which a step runs, is killed."""
    delay_s, number = random.uniform(0, world.duration_s / 2), random.choice([signal.SIGKILL, signal.SIGSEGV])
    is_second = random.random() < 0.5

    def during(run: Run) -> None:
        first: psutil.Process | None = None
        for _ in watched(run):
            for child in run.children():
                first = first or child
                if is_second and child == first:
                    continue
                run.sleep(delay_s)
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(number)
                return

    yield during


@contextmanager
def s3_faults(world: World, random: Random) -> Iterator[During]:
    """The server or the network fails several times."""
    assert world.proxy is not None
    for _ in range(random.randint(1, 5)):
        world.proxy.inject(
            _network_fault(random),
            method=random.choice([None, "GET", "PUT", "PUT", "HEAD", "POST", "DELETE"]),
            path=random.choice([None, "/blobs/", "/manifests/", "/records/", "/locks/"]),
            times=random.choice([1, 1, 2, 4, 8, 50]),
            skip=random.randrange(12),
        )
    try:
        yield _nothing
    finally:
        world.proxy.heal()


def _network_fault(random: Random) -> Fault:
    size = random.randrange(1, 5000)
    faults: list[Fault] = [
        _s3_error(503, "SlowDown"), _s3_error(500, "InternalError"), _s3_error(403, "AccessDenied"),
        _s3_error(404, "NoSuchKey"), _s3_error(409, "OperationAborted"), Answer(200, _HTML), Answer(200),
        Answer(502, _HTML), CutRequest(size), CutResponse(size), LoseReply(), Corrupt(), Hang(0.2),
    ]  # fmt: skip
    return random.choice(faults)


@contextmanager
def full_disk(world: World, random: Random) -> Iterator[During]:
    """The disk of home folder, store and temporary files is nearly full, from the start or from later."""
    filler = world.folder / "filler"
    room = int(2 ** random.uniform(11, 23))
    delay_s = random.choice([0.0, random.uniform(0, world.duration_s)])

    def during(run: Run) -> None:
        if delay_s and run.sleep(delay_s):
            _fill(filler, room)

    if not delay_s:
        _fill(filler, room)
    try:
        yield during
    finally:
        filler.unlink(missing_ok=True)


def _fill(filler: Path, room: int) -> None:
    size = shutil.disk_usage(filler.parent).free - room
    with filler.open("wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, size))


@contextmanager
def changing_source(world: World, random: Random) -> Iterator[During]:
    """Training writes new weights while the run reads the model."""
    weights = world.folder / CHANGING / WEIGHTS
    states = [(world.folder.parent / "models" / name / WEIGHTS).read_bytes() for name in MODELS[2:]]
    is_over = threading.Event()
    pause_s, vanishes = random.choice([0.0005, 0.005, 0.05]), random.random() < 0.3

    def train() -> None:
        number = 0
        while not is_over.wait(pause_s):
            number += 1
            part = weights.with_suffix(".part")
            part.write_bytes(states[number % 2])
            if vanishes:
                weights.unlink()
            part.replace(weights)

    def during(run: Run) -> None:
        trainer = threading.Thread(target=train)
        trainer.start()
        run.sleep(world.duration_s / 4)
        is_over.set()
        trainer.join()

    try:
        yield during
    finally:
        is_over.set()


@contextmanager
def swapped_records(world: World, random: Random) -> Iterator[During]:
    """Two records of one kind exchange their contents."""
    one, two = _two(world, random, "records/")
    with _damaged(world, {one: world.objects.read(two), two: world.objects.read(one)}):
        yield _nothing


@contextmanager
def swapped_blobs(world: World, random: Random) -> Iterator[During]:
    """Two blobs, or two listings, exchange their contents."""
    one, two = _two(world, random, random.choice(["blobs/", "manifests/"]))
    with _damaged(world, {one: world.objects.read(two), two: world.objects.read(one)}):
        yield _nothing


@contextmanager
def forged_records(world: World, random: Random) -> Iterator[During]:
    """Two records of a step exchange their values, and their checksums are right again."""
    names = [name for name in world.objects.names() if name.startswith(("records/compile/", "records/fetch/"))]
    names += [name for name in world.objects.names() if name.startswith("records/validate/")]
    one = random.choice(names)
    step = one.split("/")[1]
    two = random.choice([name for name in names if name.startswith(f"records/{step}/")])
    records = {name: json.loads(world.objects.read(name) or b"{}") for name in (one, two)}
    if all("value" in record and "parts" in record for record in records.values()):
        bodies = {}
        for name, other in ((one, two), (two, one)):
            content = {"parts": records[name]["parts"], "value": records[other]["value"]}
            bodies[name] = json.dumps(content | {"checksum": json_digest([step, content])}).encode()
        with _damaged(world, bodies):
            yield _nothing
    else:
        yield _nothing


@contextmanager
def flipped(world: World, random: Random) -> Iterator[During]:
    """One bit of some objects is wrong."""
    with _damaged(world, {name: _flip(world.objects.read(name), random) for name in _some(world, random)}):
        yield _nothing


@contextmanager
def cut(world: World, random: Random) -> Iterator[During]:
    """Some objects end too early, some at their start."""
    bodies = {}
    for name in _some(world, random):
        body = world.objects.read(name) or b""
        bodies[name] = body[: random.choice([0, random.randrange(len(body) + 1)])]
    with _damaged(world, bodies):
        yield _nothing


@contextmanager
def removed(world: World, random: Random) -> Iterator[During]:
    """Some objects are gone."""
    with _damaged(world, dict.fromkeys(_some(world, random))):
        yield _nothing


@contextmanager
def _damaged(world: World, bodies: Mapping[str, bytes | None]) -> Iterator[None]:
    """Write other objects, and afterwards those blobs and listings again that no run wrote meanwhile.

    A record stays as it is: it is only a cache, which later runs have to see through.
    """
    originals = {name: world.objects.read(name) for name in bodies}
    for name, body in bodies.items():
        _put(world, name, body)
    try:
        yield
    finally:
        for name, body in originals.items():
            if not name.startswith("records/") and world.objects.read(name) == bodies[name]:
                _put(world, name, body)


def _put(world: World, name: str, body: bytes | None) -> None:
    if body is None:
        world.objects.delete(name)
    else:
        world.objects.write(name, body)


def _flip(body: bytes | None, random: Random) -> bytes:
    flipped_body = bytearray(body or b"\0")
    flipped_body[random.randrange(len(flipped_body))] ^= 1 << random.randrange(8)
    return bytes(flipped_body)


def _two(world: World, random: Random, prefix: str) -> tuple[str, str]:
    """Return two objects below the same folder, where there are two."""
    names = [name for name in world.objects.names() if name.startswith(prefix)]
    one = random.choice(names)
    parent = "blobs/" if one.startswith("blobs/") else one.rpartition("/")[0]
    return one, random.choice([name for name in names if name.startswith(parent) and name != one] or [one])


def _some(world: World, random: Random) -> list[str]:
    """Return one to four objects: records, blobs and listings are equally likely."""
    names = world.objects.names()
    by_prefix = [[name for name in names if name.startswith(p)] for p in ("blobs/", "manifests/", "records/")]
    return list({random.choice(random.choice(by_prefix)) for _ in range(random.choice([1, 1, 2, 4]))})


KINDS: Mapping[str, Kind] = {
    "no fault": Kind(none),
    "killed run": Kind(killed_run, is_new=True),
    "killed at a write": Kind(killed_at_write, is_new=True),
    "killed child": Kind(killed_child, is_new=True),
    "S3 faults": Kind(s3_faults),
    "full disk": Kind(full_disk),
    "changing source": Kind(changing_source),
    "swapped records": Kind(swapped_records, is_new=False, damages=True),
    "forged records": Kind(forged_records, is_new=False, damages=True),
    "swapped blobs": Kind(swapped_blobs, is_new=False, damages=True),
    "flipped": Kind(flipped, is_new=False, damages=True),
    "cut": Kind(cut, is_new=False, damages=True),
    "removed": Kind(removed, is_new=False, damages=True),
}
