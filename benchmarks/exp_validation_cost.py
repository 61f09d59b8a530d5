"""Cost of a validation in wall time, processor time and memory, by phase. JSON on standard output.

python benchmarks/exp_validation_cost.py [--model FOLDER] [--among TARGET ...] [--runs NAME ...]

The runs are those of one source model with several candidates: "alone" is a fresh process that keeps no answer of
the source model, as before the answers were shared; "first" computes and keeps them; "further" is each other
candidate, which finds them. As for target auto, the last two are forks of a process that has imported Great
Expectations. A phase is the time between two kinds of progress lines. On a busy machine, compare processor times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import print_rows
from compileflow._process.folders import work_folder
from compileflow._process.run_in_child import run_in_child, warm_processes
from compileflow.catalog import open_store
from compileflow.cli.demo import demo_model
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import IMPORTS
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.report import environment

_CHILD = "compileflow.steps.prove:prove_artifact"
_START = "starting the process"


class Phases:
    """Seconds of each phase of a child, as its progress lines tell."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._name, self._since = _START, time.perf_counter()

    def enter(self, line: str) -> None:
        """End the phase before this line. The lines of one phase differ after the first word of a case."""
        now = time.perf_counter()
        self.seconds[self._name] += now - self._since
        self._name, self._since = line.split(" case ")[0], now


def proved(
    artifact: CompiledArtifact, source: FetchedSource, request: CompileRequest, reference_dir: Path | None
) -> dict[str, Any]:
    """Prove an artifact in a child process; return the cost."""
    settings = get_settings()
    store = open_store(settings.resolved_store_uri(), settings)
    phases, before = Phases(), _processor_s()
    with (
        store.open_folder(source.digest) as source_dir,
        store.open_folder(artifact.digest) as artifact_dir,
        work_folder(settings.work_dir, label="cost") as work,
    ):
        (work / "report").mkdir()
        result = run_in_child(
            _CHILD,
            {
                "source_dir": str(source_dir),
                "source_digest": source.digest,
                "reference_dir": str(reference_dir) if reference_dir else None,
                "artifact_dir": str(artifact_dir),
                "artifact_uri": artifact.uri,
                "report_dir": str(work / "report"),
                "validation": request.validation.model_dump(mode="json"),
                "threads": settings.threads,
            },
            work_dir=work,
            log_path=settings.log_path("cost"),
            threads=settings.threads,
            imports=() if reference_dir is None else IMPORTS,
            on_progress=phases.enter,
        )
        model_bytes = sum(file.stat().st_size for file in source_dir.glob("*.safetensors"))
    phases.enter("")
    return {
        "outcome": result.value["outcome"],
        "wall_s": round(result.duration_s, 1),
        "processor_s": round(_processor_s() - before, 1),
        "peak_rss_mb": round(result.peak_rss_bytes / 1e6),
        "peak_limit_mb": round(2.5 * model_bytes / 1e6 + 1200),
        "phases_s": {name: round(seconds, 1) for name, seconds in phases.seconds.items()},
    }


def _processor_s() -> float:
    """Return the processor time of all children so far, and of what they have forked."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            # Fields 14 to 17 of proc(5): user and system time of the process, and of its children that ended.
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
            seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return seconds


def compiled(model: Path, target: str, source: FetchedSource, settings: Settings) -> tuple[Any, CompileRequest]:
    """Compile for a target, or take the artifact from the cache."""
    request = CompileRequest.model_validate(
        {"model": str(model), "target": target, "hf_task": HfTask.FEATURE_EXTRACTION}
    )
    artifact = compile_artifact(source, request, store_uri=settings.resolved_store_uri(), settings=settings)
    return artifact, request


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="folder of a model; default: that of the demo")
    parser.add_argument("--among", nargs="+", default=["onnx-runtime", "torchscript"], metavar="TARGET")
    parser.add_argument("--runs", nargs="+", default=["alone", "first", "further"])
    arguments = parser.parse_args()
    settings, model = get_settings(), arguments.model or demo_model()
    source = fetch_source(str(model), None, store_uri=settings.resolved_store_uri(), settings=settings)
    candidates = {target: compiled(model, target, source, settings) for target in arguments.among}
    first, *others = arguments.among
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=settings.home_dir) as folder, warm_processes():
        plan = {
            "alone": [(first, None)],
            "first": [(first, Path(folder))],
            "further": [(target, Path(folder)) for target in others],
        }
        for run in arguments.runs:
            for target, reference_dir in plan[run]:
                artifact, request = candidates[target]
                name = f"{run}: {target}"
                print(f"validating {name}", file=sys.stderr, flush=True)
                results[name] = proved(artifact, source, request, reference_dir)
        kept_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    rows = [["validation", "outcome", "wall s", "processor s", "peak MB", "limit MB"]]
    for name, result in results.items():
        numbers = (result[key] for key in ("wall_s", "processor_s", "peak_rss_mb", "peak_limit_mb"))
        rows.append([name, result["outcome"], *map(str, numbers)])
    print_rows(rows)
    answer = {
        "question": "cost of one validation, with and without the kept answers of the source model",
        "environment": environment(settings.threads),
        "load": os.getloadavg()[0],
        "answers_mb": round(kept_bytes / 1e6),
        "results": results,
    }
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
