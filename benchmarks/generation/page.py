"""page: docs/reference/generation-speed.md with its picture, and the goals that the figures are judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled import markdown_table
from compileflow.contracts import ACCEPTED_OUTCOMES

# Goals of speed: multiples of eager at fp32 and int8, multiples of openvino_genai, shares of the limit.
LEAST_FP32, LEAST_INT8, LEAST_OF_PEER, LEAST_OF_LIMIT = 2.5, 5.0, 0.95, 0.7
# Goals of memory: a compile by the fp32 weights and further bytes, a load by the size of the artifact.
MOST_OF_WEIGHTS, FURTHER_BYTES, MOST_OF_ARTIFACT = 1.5, 1e9, 1.15
Figures = Mapping[str, Any]
Rows = list[tuple[str, ...]]


def contender_rows(results: Figures) -> Rows:
    """Return the table of the speeds of one model, header first."""
    rows: Rows = [
        (
            "contender",
            "tokens/s",
            "times as fast as eager",
            "times as fast as its peer",
            "first token",
            "share of the limit",
            "equal tokens",
        )
    ]
    for name, figures in results["contenders"].items():
        peer = figures.get("peer")
        equal = figures["equal_tokens"]
        rows.append(
            (
                name,
                _spread(figures["tokens_per_s"], ".1f"),
                _spread(figures["times_as_fast"], ".2f"),
                _spread(figures["times_as_fast_as_peer"], ".2f") if peer else "",
                f"{figures['first_token_s'][1] * 1e3:.0f} ms",
                f"{figures['share_of_limit']:.0%} of {figures['limit_tokens_per_s']:.0f}",
                f"all {sum(equal)}"
                if min(equal) == max(equal) == results["new_tokens"]
                else f"from {min(equal)} to {max(equal)} of {results['new_tokens']}",
            )
        )
    return rows


def memory_rows(results: Figures) -> Rows:
    """Return the table of the memory and the cost of one model, header first."""
    rows: Rows = [
        (
            "contender",
            "size",
            "read per token",
            "load",
            "largest memory",
            "compile",
            "largest memory of the compile",
            "verdict",
        )
    ]
    for name, figures in results["contenders"].items():
        cost = figures["cost"]
        rows.append(
            (
                name,
                _megabytes(figures["size_bytes"]),
                _megabytes(figures["bytes_per_token"]),
                f"{_load(figures):.2f} times the size",
                _megabytes(figures["peak_bytes"]),
                f"{cost['compile_s']:.0f} s" if cost else "",
                _megabytes(cost["peak_bytes"]) if cost else "",
                (cost["verdict"] or "not validated") if cost else "",
            )
        )
    return rows


def goal_rows(results: Figures) -> Rows:
    """Return the table of the goals, header first: each goal, the figures, and whether all of them meet it."""
    contenders = results["contenders"]
    compiled = {name: figures for name, figures in contenders.items() if figures["cost"]}
    rows: Rows = [("goal", "measured", "met")]

    def judge(goal: str, names: Sequence[str], value: Callable[[str], tuple[str, bool]]) -> None:
        values = {name: value(name) for name in names}
        measured = ", ".join(f"{name}: {words}" for name, (words, _) in values.items())
        missing = [name for name, (_, is_met) in values.items() if not is_met]
        met = "not measured" if not values else f"no: {', '.join(missing)}" if missing else "yes"
        rows.append((goal, measured, met))

    def named(precision: str) -> list[str]:
        return [name for name in compiled if name.endswith(f" {precision}")]

    def times(name: str) -> float:
        return float(compiled[name]["times_as_fast"][1])

    def int8(name: str) -> tuple[str, bool]:
        outcome = compiled[name]["cost"]["verdict"]
        return f"{times(name):.2f}, {outcome or 'not validated'}", (
            times(name) >= LEAST_INT8 and outcome in ACCEPTED_OUTCOMES
        )

    def int4(name: str) -> tuple[str, bool]:
        ratio = times(name) / times(name.replace("int4", "int8"))
        return f"{ratio:.2f} times int8", ratio > 1

    def of_peer(name: str) -> tuple[str, bool]:
        ratio = compiled[name]["times_as_fast_as_peer"][1]
        return f"{ratio:.2f}", ratio >= LEAST_OF_PEER

    def of_limit(name: str) -> tuple[str, bool]:
        share = compiled[name]["share_of_limit"]
        return f"{share:.0%}", share >= LEAST_OF_LIMIT

    def of_weights(name: str) -> tuple[str, bool]:
        cost = compiled[name]["cost"]
        limit = MOST_OF_WEIGHTS * cost["weights_bytes"] + FURTHER_BYTES
        return f"{_megabytes(cost['peak_bytes'])} of {_megabytes(limit)}", cost["peak_bytes"] <= limit

    judge(
        f"fp32 at least {LEAST_FP32} times as fast as eager",
        named("fp32"),
        lambda name: (f"{times(name):.2f}", times(name) >= LEAST_FP32),
    )
    judge(f"int8 at least {LEAST_INT8:g} times as fast as eager, and accepted by its verdict", named("int8"), int8)
    judge(
        "int4 faster than int8", [name for name in named("int4") if name.replace("int4", "int8") in compiled], int4
    )
    judge(
        f"at least {LEAST_OF_PEER} times as fast as openvino_genai",
        [name for name in compiled if compiled[name].get("peer", "").startswith("openvino_genai")],
        of_peer,
    )
    judge(f"at least {LEAST_OF_LIMIT:.0%} of the limit", list(compiled), of_limit)
    judge(
        f"a compile takes at most {MOST_OF_WEIGHTS} times the fp32 weights and {FURTHER_BYTES / 1e9:.0f} GB",
        list(compiled),
        of_weights,
    )
    judge(
        f"a load takes at most {MOST_OF_ARTIFACT} times the artifact",
        list(compiled),
        lambda name: (f"{_load(compiled[name]):.2f}", _load(compiled[name]) <= MOST_OF_ARTIFACT),
    )
    return rows


def write_page(answer: Figures, path: Path) -> None:
    """Write the page as Markdown, and beside it the picture."""
    picture_path = path.with_suffix(".svg")
    _draw(answer, picture_path)
    machine = ", ".join(f"{name} {value}" for name, value in answer["environment"].items())
    parts = [
        _INTRODUCTION.format(prompt=answer["prompt_tokens"], tokens=answer["new_tokens"], rounds=answer["rounds"]),
        f"Machine and versions: {machine}.\n",
        f"![Tokens per second of each contender, beside the limit of the memory]({picture_path.name})\n",
    ]
    for model, results in answer["results"].items():
        bandwidth = results["bandwidth_bytes_per_s"] / 1e9
        parts += [
            f"## {_TITLES.get(model, model)}\n",
            *([f"**Measured on a busy machine:** {results['busy']}.\n"] if results["busy"] else []),
            f"The memory moves {bandwidth:.1f} GB a second.\n",
            "### Speed\n",
            markdown_table(contender_rows(results)),
            *(f"Left out: {name}: {reason}\n" for name, reason in results["left_out"].items()),
            "### Memory and cost\n",
            markdown_table(memory_rows(results)),
            "### Goals\n",
            markdown_table(goal_rows(results)),
        ]
    path.write_text("\n".join(parts).rstrip() + "\n", "utf-8")


_TITLES = {"llama-8x512": "A random Llama of 8 layers and 512 hidden features"}
_INTRODUCTION = """# Speed of text generation

This page is generated by `benchmarks/exp_generation.py`. Each contender reads a prompt of {prompt} tokens and
writes {tokens} more, greedily, in a process of its own. All take turns in each of {rounds} rounds, with new
prompts in each round. A figure is the median over the rounds; the range behind it is that of the quartiles.

- **tokens/s** counts the tokens after the first one. Their time is that of a whole text less that of the **first
  token** after another prompt of the same length.
- **Times as fast** compares times of the same round. The **peer** of an `openvino` artifact is openvino_genai on
  the artifact's own IR, with the same formats and without a cache of prefixes. The peer of an `onnx-runtime`
  artifact is onnxruntime-genai on what its own builder makes of the source model; its int4 weights are not those
  of the artifact.
- **Share of the limit**: each new token reads the weights once, so the bandwidth of the memory, divided by the
  bytes of the weights, limits the tokens per second. The bandwidth is the best of several runs of `a = b + 3 c` in
  PyTorch on the same threads, counted as STREAM does. The bytes are those of all weights, scales and zero points
  in the compiled files, except a table of embeddings from which only rows are looked up. At bf16, OpenVINO halves
  the weights when it loads them. The cache of keys and values is not counted.
- **Equal tokens** are those before the first one that differs from eager's, in the texts of all rounds.
- **Load** is the memory that a load needs beyond that of the imported libraries, compared with the size of what is
  loaded. **Largest memory** is that of the process, with its libraries, until the last text.
"""


def _draw(answer: Figures, path: Path) -> None:
    """Draw the tokens per second of each contender as bars, and the limit of each as a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    models = answer["results"]
    most = max(len(results["contenders"]) for results in models.values())
    # Without a salt and a date, the file would change although the figures do not.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "generation", "font.size": 8}):
        figure = Figure(figsize=(4.2 * len(models) + 0.6, 0.25 * most + 1), layout="constrained")
        for axes, (model, results) in zip(
            figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True
        ):
            contenders = results["contenders"]
            places = range(len(contenders))
            axes.barh(places, [figures["tokens_per_s"][1] for figures in contenders.values()], label="measured")
            limits = [figures["limit_tokens_per_s"] for figures in contenders.values()]
            axes.plot(limits, places, "|", color="black", markersize=11, label="limit of the memory")
            axes.set_yticks(places, contenders)
            axes.invert_yaxis()
            axes.set_xlabel("tokens per second")
            axes.set_title(model)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _load(figures: Figures) -> float:
    return float(figures["load_peak_bytes"] / figures["size_bytes"])


def _spread(quartiles: Sequence[float], form: str) -> str:
    low, median, high = quartiles
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"
