"""Command line of the measurement of the gates: python -m benchmarks.mutation --help."""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # A thread that sends usage data would not survive the fork.
    "ORT_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)

from benchmarks.forked_checks import COMPILE_MODULES, read_results, run_checks  # noqa: E402 - after the environment
from benchmarks.mutation.check import FaultCheck, HonestCheck  # noqa: E402
from benchmarks.mutation.faults import FAULTS  # noqa: E402
from benchmarks.mutation.honest import honest_compiles  # noqa: E402
from benchmarks.mutation.page import missed_limits, newest, page  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "mutation.md"
_MODULES = ("compileflow.steps.prove", "great_expectations", "matplotlib.pyplot", *COMPILE_MODULES)
# A few faults and honest compiles, each of another kind, which take seconds.
SAMPLE = (
    "mask is ignored",
    "labels are rotated",
    "batches of 17 rows and more are wrong",
    "one attention head is zero",
    "answers depend on the call before",
    "capitals are kept",
    "first token is pooled",
    "bert spread, text-classification, torchscript, fp32",
    "one label, text-classification, torchscript, fp32",
    "vit spread, image-classification, torchscript, fp32",
    "bert spread, text-classification, torchscript, bf16",
)


def main() -> int:
    """Make the checks, as far as the time allows, and return 0 if all are made and no limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / ".mutation" / "results.jsonl")
    parser.add_argument(
        "--check", choices=("fault", "honest"), help="only the faults, or only the honest compiles"
    )
    parser.add_argument("--name", action="append", default=[], help="name of a check, or a part of it")
    parser.add_argument("--sample", action="store_true", help="only a few checks, which take seconds")
    parser.add_argument("--again", default="", help="outcomes to check again, separated by commas")
    parser.add_argument("--children", type=int, default=1, help="checks at a time")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument(
        "--page", action="store_true", help="write the page from the results so far, and judge them"
    )
    arguments = parser.parse_args()
    shared_dir = arguments.results.parent / "shared"
    checks = [
        *(FaultCheck(fault, shared_dir) for fault in FAULTS.values()),
        *(HonestCheck(name, healthy, shared_dir) for name, healthy in honest_compiles().items()),
    ]
    if not arguments.page:
        chosen = [
            check
            for check in checks
            if arguments.check in (None, check.labels["check"])
            and (not arguments.sample or check.labels["name"] in SAMPLE)
            and (not arguments.name or any(part in check.labels["name"] for part in arguments.name))
        ]
        # In an order that mixes all kinds, so that a run that is cut short has some of each.
        chosen.sort(key=lambda check: zlib.crc32(check.labels["name"].encode()))
        shared_dir.mkdir(parents=True, exist_ok=True)
        left = run_checks(
            chosen,
            arguments.results,
            modules=_MODULES,
            children=arguments.children,
            stop_after_s=arguments.stop_after,
            again=tuple(filter(None, arguments.again.split(","))),
        )
        if left:
            sys.stderr.write(f"{left} checks are left; run the command again.\n")
            return 1
        checks = chosen
    results = read_results(arguments.results)
    lines = {
        check.key: newest(check.labels["check"], check.labels["name"], check.key, results) for check in checks
    }
    if arguments.page:
        PAGE.write_text(page(lines), "utf-8")
    missed = missed_limits([line for line in lines.values() if line])
    for problem in missed:
        sys.stderr.write(f"{problem}\n")
    return 1 if missed or None in lines.values() else 0


if __name__ == "__main__":
    sys.exit(main())
