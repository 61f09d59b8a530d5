"""Whole runs with random faults: python -m tests.faults [--seed N] [--runs N].

A story is a world with a few runs, one after the other. The seed of a story decides its store, its requests and
its faults; the moments at which they happen also depend on the machine. Stories have the seeds N, N + 1, ...
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COMPILEFLOW_THREADS": "1",
    "MPLBACKEND": "agg",
    "PYTHONWARNINGS": "ignore",
}.items():
    os.environ.setdefault(_name, _value)

from compileflow.spec import HfTask  # noqa: E402 - after the environment
from tests.faults.check import acknowledged, check_all, check_version  # noqa: E402
from tests.faults.kinds import KINDS, Kind  # noqa: E402
from tests.faults.runs import Manner, call_in_fork, import_once, start  # noqa: E402
from tests.faults.world import CHANGING, MODELS, Request, World  # noqa: E402
from tests.models import build_model  # noqa: E402
from tests.services.fault_proxy import FaultProxy  # noqa: E402
from tests.services.moto_server import Moto, serve_moto  # noqa: E402
from tests.unit.attested_artifacts import make_keys  # noqa: E402

RUNS_OF_A_STORY = 5
# Of the third run of a story. Stories are on local stores and on S3 in turn.
_MANNERS: tuple[Manner, ...] = ("fork", "fork", "flow", "process", "fork", "fork", "process", "flow")
# Models, logs and reports of one story take a tenth of it.
_DISK = "400m"


class Story:
    """A world with a few runs.

    Args:
        seed: Seed of all choices.
        base: Folder of all stories.
        moto: The S3 server.
        disk: A small disk that may be filled; None without the right to mount one.
    """

    def __init__(self, seed: int, base: Path, moto: Moto, disk: Path | None) -> None:
        self.seed = seed
        self._random = Random(seed)
        self._base = base
        self._moto = moto
        self._disk = disk
        self._answers: set[tuple[str, str]] = set()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []

    def tell(self, runs: int) -> None:
        """Make the runs. Stores are local and on S3 in turn; a few runs are no forks."""
        parent = self._disk or self._base
        folder = parent / f"story-{self.seed}-{os.getpid()}"
        if self._disk and not (parent / "models").exists():
            shutil.copytree(self._base / "models", parent / "models")
        with ExitStack() as stack:
            proxy = stack.enter_context(FaultProxy(self._moto.url)) if self.seed % 2 else None
            world = World.make(
                folder, parent / "models", is_signed=self._random.random() < 0.5, proxy=proxy, moto=self._moto,
                can_fill=self._disk is not None,
            )  # fmt: skip
            for number in range(1, runs + 1):
                self._run(world, number, _MANNERS[self.seed % len(_MANNERS)] if number == 3 else "fork")
        shutil.rmtree(folder, ignore_errors=True)

    def _run(self, world: World, number: int, manner: Manner) -> None:
        name = self._kind(world, number, manner)
        kind = KINDS[name]
        is_new = kind.is_new if kind.is_new is not None else self._random.random() < 0.7
        request = world.request(self._random, is_new=is_new)
        if name == "changing source":
            request = Request(CHANGING, request.length)
        title = f"seed {self.seed}, run {number}: {_place(world)}, {manner}, {request.name}, {name}"
        began = time.monotonic()
        try:
            words = self._with_fault(world, request, kind, manner)
            if words.startswith("error") or words == "killed":
                words += f"; again: {self._without_fault(world, request, manner)}"
            count = check_all(world, answers_of=self._answers)
            if request not in world.asked:
                world.asked.append(request)
            print(f"{title}: {words}; {count} versions right, {time.monotonic() - began:.0f} s", flush=True)
            self.outcomes[
                name, "registered" if words == "registered" else "refused or killed, then registered"
            ] += 1
        except AssertionError as error:
            self.problems.append(f"{title}: {error}")
            self.outcomes[name, "WRONG"] += 1
            print(f"{title}: WRONG: {error}\nagain: make faults SEED={self.seed} RUNS={number}", flush=True)
        if name == "no fault":
            world.duration_s = time.monotonic() - began

    def _kind(self, world: World, number: int, manner: Manner) -> str:
        """Choose a kind that this run can have. The first one of a story fills the world."""
        names = [
            name
            for name, kind in KINDS.items()
            if (name != "S3 faults" or world.proxy is not None)
            and (name != "full disk" or world.can_fill)
            and (name != "killed at a write" or manner == "fork")
            # Without a key, nothing tells a record from a forged one.
            and (name != "forged records" or world.is_signed)
            and (name != "no fault" or number == 1)
            and (not kind.damages or world.asked)
        ]
        return "no fault" if number == 1 and self._random.random() < 0.5 else self._random.choice(names)

    def _with_fault(self, world: World, request: Request, kind: Kind, manner: Manner) -> str:
        """Run a request with a fault, and return its outcome in words.

        Raises:
            AssertionError: The run ended in a third way.
        """
        with kind.make(world, self._random) as during:
            run = start(world.words(request), world.environment, self._base / "run.out", manner=manner)
            during(run)
            problem = run.wait()
            assert not problem, problem
            if run.exit_code == -9:
                return "killed"
            err = run.err.read_text("utf-8", "replace")
            lines = err.splitlines()
            shown = f"exit code {run.exit_code}\n{err[-3000:]}"
            assert "Traceback" not in err, shown
            if run.exit_code == 0:
                version = acknowledged(world, request, run.out)
                # Before the damage is mended.
                lost = "has lost the report" in err
                check_version(world, version, answers_of=self._answers, has_lost_report=lost)
                return "registered"
            errors = [line for line in lines if line.startswith("error: ")]
            assert run.exit_code in (1, 2), shown
            assert len(errors) == 1, shown
            return errors[0][:300]

    def _without_fault(self, world: World, request: Request, manner: Manner) -> str:
        again = self._with_fault(world, request, KINDS["no fault"], manner)
        assert again == "registered", f"the next run, without a fault: {again}"
        return again


def _place(world: World) -> str:
    return f"{'S3' if world.proxy else 'local'}{', signed' if world.is_signed else ''}"


def _make_models(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(MODELS):
        build_model(folder / name, HfTask.TEXT_CLASSIFICATION, architecture="distilbert", seed=number)
    make_keys(folder)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """Give a small disk, where this user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        print("no disk is filled: that needs root, to mount a small one", flush=True)
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    """Tell the stories, and return 0 if every run ended well."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, help="seed of the first story; a random one without it")
    parser.add_argument("--runs", type=int, default=100, help="number of runs with faults")
    arguments = parser.parse_args()
    seed = Random().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}, {arguments.runs} runs", flush=True)
    # Servers and the disk end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import_once()
    outcomes: Counter[tuple[str, str]] = Counter()
    problems = []
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        problem = call_in_fork(lambda: _make_models(base / "models"), os.environ.copy(), base / "models.txt")
        assert not problem, problem
        moto = stack.enter_context(serve_moto(base / "moto"))
        disk = stack.enter_context(_small_disk(base / "disk"))
        for number in range(0, arguments.runs, RUNS_OF_A_STORY):
            story = Story(seed + number // RUNS_OF_A_STORY, base, moto, disk)
            story.tell(min(RUNS_OF_A_STORY, arguments.runs - number))
            outcomes += story.outcomes
            problems += story.problems
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{count:4} {name}: {outcome}")
    print(f"{len(problems)} of {outcomes.total()} runs were wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
