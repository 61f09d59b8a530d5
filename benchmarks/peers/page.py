"""page: docs/reference/performance.md with its picture, and the goals that the figures are judged by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compiled import markdown_table

# Goals: shares of the limit, and multiples of the fastest peer that keeps as many neighbours.
LEAST_OF_LIMIT = {"fp32": 0.9, "bf16": 0.8}
LEAST_OF_PEER = 1.5
# Overlaps of neighbours that differ by less count as equal.
_SAME_OVERLAP = 0.005
_LISTS = ("sentences", "paragraphs")
_HEADERS = {"single": "one at a time", "sentences": "list of sentences", "paragraphs": "list of paragraphs"}
Figures = Mapping[str, Any]
Rows = list[tuple[str, ...]]


def contestant_rows(answer: Figures) -> Rows:
    """Return the table of the contestants, header first; the last rows are the limits."""
    rows: Rows = [("texts per second", *_HEADERS.values(), "same neighbours", "load", "after load", "largest")]
    for name, figures in answer["contestants"].items():
        rows.append(
            (
                name,
                *(_spread(figures[column]) if figures[column] else "" for column in _HEADERS),
                f"{figures['neighbours']:.3f}",
                f"{figures['load_s']:.1f} s",
                f"{figures['load_bytes'] / 1e6:.0f} MB",
                f"{figures['peak_bytes'] / 1e6:.0f} MB",
            )
        )
    for precision in LEAST_OF_LIMIT:
        limits = (f"{limit(answer, precision, column):.0f}" for column in _LISTS)
        rows.append((f"limit of matrix products, {precision}", "", *limits, "", "", "", ""))
    return rows


def goal_rows(answer: Figures) -> Rows:
    """Return the table of the goals, header first: each goal, what was measured, and whether it is met."""
    contestants = answer["contestants"]
    compiled = {name: figures for name, figures in contestants.items() if not figures["is_peer"]}
    rows: Rows = [("goal", "contestant", "sentences", "paragraphs", "met")]
    for name, figures in compiled.items():
        precision = figures["limit"]
        if precision:
            least = LEAST_OF_LIMIT[precision]
            shares = [figures[column][1] / limit(answer, precision, column) for column in _LISTS]
            words = [f"{share:.0%}" for share in shares]
            rows.append((f"at least {least:.0%} of the limit", name, *words, _met(min(shares) >= least)))
    for name, figures in compiled.items():
        ratios, words = [], []
        for column in _LISTS:
            peer, rate = max(
                (
                    (peer, other[column][1])
                    for peer, other in contestants.items()
                    if other["is_peer"] and other[column] and _keeps(other, figures)
                ),
                key=lambda pair: pair[1],
            )
            ratios.append(figures[column][1] / rate)
            words.append(f"{ratios[-1]:.2f} times {peer}")
        goal = f"at least {LEAST_OF_PEER} times the fastest peer with as many neighbours"
        rows.append((goal, name, *words, _met(min(ratios) >= LEAST_OF_PEER)))
    return rows


def limit(answer: Figures, precision: str, column: str) -> float:
    """Return the texts per second of a column that plain matrix products of a precision allow."""
    operations = answer["operations_per_token"] * answer["tokens"][column]["mean"]
    return float(answer["products_per_s"][precision] / operations)


def write_page(answer: Figures, path: Path) -> None:
    """Write the page as Markdown, and beside it the picture."""
    picture_path = path.with_suffix(".svg")
    _draw(answer, picture_path)
    machine, versions = (
        ", ".join(f"{name} {value}" for name, value in answer[part].items()) for part in ("environment", "peers")
    )
    products = " and ".join(
        f"{rate / 1e9:.0f} billion operations a second at {precision}"
        for precision, rate in answer["products_per_s"].items()
    )
    texts = {name: f"{counts['texts']} {name}" for name, counts in answer["tokens"].items()}
    parts = [
        _INTRODUCTION.format(
            rounds=answer["rounds"],
            sentence_tokens=f"{answer['tokens']['sentences']['median']:.0f}",
            paragraph_tokens=f"{answer['tokens']['paragraphs']['median']:.0f}",
            **texts,
        ),
        *([f"**Measured on a busy machine:** {answer['busy']}.\n"] if answer["busy"] else []),
        f"Machine and versions: {machine}.\n",
        f"Versions in the environment of the peers: {versions}.\n",
        f"Plain matrix products ran {products}.\n",
        f"![Texts per second of each contestant on lists, beside the limits]({picture_path.name})\n",
        "## Speed and memory\n",
        markdown_table(contestant_rows(answer)),
        *(f"Left out: {name}: {reason}\n" for name, reason in answer["left_out"].items()),
        "## Goals\n",
        markdown_table(goal_rows(answer)),
    ]
    path.write_text("\n".join(parts).rstrip() + "\n", "utf-8")


_INTRODUCTION = """# Speed of sentence vectors beside other libraries

This page is generated by `make bench-peers`. The contestants embed texts with all-MiniLM-L6-v2, each in a process
of its own, with the defaults of its library on all processors. All take turns in each of {rounds} rounds, with the
same texts: sentences one at a time, a list of {sentences} with a median of {sentence_tokens} tokens, and a list of
{paragraphs} with a median of {paragraph_tokens}. A figure is the median over the rounds; the range behind it is
that of the quartiles.

- **Same neighbours** is the share of the ten nearest texts of each text that sentence-transformers finds with
  torch.
- **Load** is the time from the start of the process to the first answer. **After load** and **largest** are the
  largest memory of the process until then, and until the end.
- **The limit** is the best rate of a product of 2048 x 1536 and 1536 x 1536 matrices in PyTorch on the same
  threads in all rounds, divided by the operations that the weights of the model need for the texts. Attention,
  tokenization and padding are not counted, so that no contestant can reach it.
- sentence-transformers' `openvino` back end computes in bf16 where the CPU can, unless it is told not to.
- fastembed reads the ONNX file that sentence-transformers exports: its own file needs the Hugging Face Hub.
"""


def _draw(answer: Figures, path: Path) -> None:
    """Draw the texts per second of each contestant on both lists as bars, and the limits as lines."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    contestants = {name: figures for name, figures in answer["contestants"].items() if figures["sentences"]}
    # Without a salt and a date, the file would change although the figures do not.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 8}):
        figure = Figure(figsize=(9, 0.25 * len(contestants) + 1), layout="constrained")
        pair = figure.subplots(1, len(_LISTS), sharey=True)
        places = range(len(contestants))
        for axes, column in zip(pair, _LISTS, strict=True):
            colours = ["tab:gray" if figures["is_peer"] else "tab:blue" for figures in contestants.values()]
            axes.barh(places, [figures[column][1] for figures in contestants.values()], color=colours)
            for precision, style in zip(LEAST_OF_LIMIT, ("-", "--"), strict=True):
                value = limit(answer, precision, column)
                axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"limit at {precision}")
            axes.set_xlabel("texts per second")
            axes.set_title(_HEADERS[column])
        pair[0].set_yticks(places, contestants)
        pair[0].invert_yaxis()
        figure.legend(*pair[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _keeps(peer: Figures, figures: Figures) -> bool:
    return bool(peer["neighbours"] >= figures["neighbours"] - _SAME_OVERLAP)


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"


def _spread(quartiles: tuple[float, float, float]) -> str:
    low, median, high = quartiles
    return f"{median:.0f} ({low:.0f} to {high:.0f})"
