"""Command line of the sweep: python -m benchmarks.architectures --help."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

from benchmarks.architectures.classes import all_classes, decoder_classes  # noqa: E402 - after the environment is set
from benchmarks.architectures.decoder_page import decoder_page  # noqa: E402
from benchmarks.architectures.page import TARGETS, page  # noqa: E402
from benchmarks.architectures.sweep import DECODER_TARGETS, jobs, sweep  # noqa: E402
from benchmarks.forked_checks import read_results  # noqa: E402

PAGES = ROOT / "docs" / "reference"


def main() -> int:
    """Run the sweep, as far as the time allows, and return 0 if every class has a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / ".architectures" / "results.jsonl")
    parser.add_argument("--target", action="append", help="target; may be repeated; default: all four")
    parser.add_argument("--task", action="append", help="task; may be repeated; default: all")
    parser.add_argument("--model-type", action="append", help="model type; may be repeated; default: all")
    parser.add_argument("--class", action="append", dest="classes", metavar="TASK/MODEL_TYPE")
    parser.add_argument("--again", default="", help="outcomes to check again, separated by commas")
    parser.add_argument("--decoders", action="store_true", help="the decoders that generate, and their page")
    parser.add_argument("--page", action="store_true", help="write the page instead, from the results so far")
    parser.add_argument("--children", type=int, default=1, help="checks at a time")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    arguments = parser.parse_args()
    every_class = decoder_classes() if arguments.decoders else all_classes()
    if arguments.page:
        name, write = ("decoders.md", decoder_page) if arguments.decoders else ("architectures.md", page)
        (PAGES / name).write_text(write(every_class, read_results(arguments.results)), "utf-8")
        return 0
    classes = [
        model_class
        for model_class in every_class
        if (not arguments.task or model_class.hf_task.value in arguments.task)
        and (not arguments.model_type or model_class.model_type in arguments.model_type)
        and (not arguments.classes or f"{model_class.hf_task.value}/{model_class.model_type}" in arguments.classes)
    ]
    left = sweep(
        jobs(classes, arguments.target or (DECODER_TARGETS if arguments.decoders else TARGETS)),
        arguments.results,
        children=arguments.children,
        stop_after_s=arguments.stop_after,
        again=tuple(filter(None, arguments.again.split(","))),
    )
    if left:
        sys.stderr.write(f"{left} classes are left; run the command again.\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
