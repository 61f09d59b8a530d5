"""Pictures of the pages: matplotlib draws them as SVG that loads nothing and follows the page's colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from compileflow.validation.measure.contention import BUSY_MACHINE
from compileflow.validation.report.page import fraction

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compileflow.validation.measure.measurements import Latency

# matplotlib knows no CSS variables. Each colour stands for the variable of page.css that replaces it in the SVG.
COLOURS = {
    "ink": "#010001",
    "soft": "#010002",
    "line": "#010003",
    "paper": "#010004",
    "pass": "#010005",
    "fail": "#010006",
    "front": "#010007",
    "rest": "#010008",
}
# Narrow enough that the type stays readable on a phone; page.css limits how far it grows on a wide screen.
WIDTH = 380
_POINTS_PER_INCH = 72
_FONT_SIZE = 12


def new_picture(height: float) -> tuple[Figure, Axes]:
    """Return a figure of WIDTH x `height` with one set of axes, without frame and tick marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=_FONT_SIZE, labelcolor=COLOURS["soft"])
    # Clipping needs references inside the file, and nothing reaches beyond the axes on purpose.
    axes.grid(color=COLOURS["line"], linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    return figure, axes


def text_style(colour: str = "ink", **style: Any) -> dict[str, Any]:
    """Return matplotlib's keyword arguments for text in a colour of the page."""
    return {"color": COLOURS[colour], "fontsize": _FONT_SIZE, **style}


def svg(figure: Figure, *, name: str, title: str, description: str, titles: Mapping[str, str]) -> Markup:
    """Return a figure as an <svg> element for a page.

    Args:
        figure: Figure in the colours of COLOURS.
        name: Unique name of the picture on its page; the ids of title and description begin with it.
        title: What the picture shows, for screen readers.
        description: What it says, for screen readers.
        titles: Tooltip of each artist, by the artist's gid.
    """
    import matplotlib as mpl
    from markupsafe import Markup

    buffer = io.StringIO()
    # Text stays text, and the same figure gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib wrote it a moment ago
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
    # Metadata name hosts, and the only definition is a style, which would reach the rest of the page.
    for child in [child for child in root if child.tag in ("metadata", "defs")]:
        root.remove(child)
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-title {name}-description"
    }  # fmt: skip
    for group in root.iter("g"):
        tooltip = titles.get(group.attrib.pop("id", ""))
        if tooltip is not None:
            ElementTree.SubElement(group, "title").text = tooltip
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        label = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        label.text = text
        root.insert(position, label)
    body = ElementTree.tostring(root, encoding="unicode")
    for colour, placeholder in COLOURS.items():
        body = body.replace(placeholder, f"var(--{colour})")
    # ElementTree has escaped every text in it.
    return Markup(body)  # noqa: S704


def latency_picture(latencies: Sequence[Latency]) -> Markup | None:
    """Draw each shape's latency as a fraction of eager's, with its interval; None if nothing was timed."""
    if not latencies:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_picture(70 + 30 * len(latencies))
    axes.axvline(1.0, color=COLOURS["soft"], linewidth=1, linestyle=(0, (5, 4)), clip_on=False)
    for row, latency in enumerate(latencies):
        colour = COLOURS["pass"] if latency.ratio_high < 1 else COLOURS["fail"] if latency.ratio_low > 1 else None
        if latency.busy:
            colour = None
        style: dict[str, Any] = {"color": colour or COLOURS["soft"], "solid_capstyle": "butt", "clip_on": False}
        axes.plot([0, latency.ratio], [row, row], linewidth=9, alpha=0.35, **style)
        axes.plot([latency.ratio_low, latency.ratio_high], [row, row], linewidth=2, **style)
        axes.plot([latency.ratio] * 2, [row - 0.26, row + 0.26], linewidth=3, gid=f"latency-{row}", **style)
        end = max(latency.ratio_high, latency.ratio)
        axes.annotate(
            fraction(latency.ratio) + (" (busy machine)" if latency.busy else ""),
            (end, row),
            (6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            **text_style(),
        )
    axes.text(1.0, -0.75, "eager", ha="center", **text_style("soft"))
    axes.set_xlim(0, 1.15 * max(1.0, *(latency.ratio_high for latency in latencies)))
    axes.set_ylim(len(latencies) - 0.4, -0.6)
    axes.set_yticks(range(len(latencies)), [latency.shape for latency in latencies])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("fraction of eager's latency", **text_style("soft"))
    sentences = {
        f"latency-{row}": f"{latency.shape}: {fraction(latency.ratio)} of eager's latency, 95 % interval "
        f"{fraction(latency.ratio_low)} to {fraction(latency.ratio_high)}"
        + (f", {BUSY_MACHINE}" if latency.busy else "")
        for row, latency in enumerate(latencies)
    }
    return svg(
        figure,
        name="latency-picture",
        title="Latency of the compiled model as a fraction of eager PyTorch's, by shape",
        description=f"{'; '.join(sentences.values())}.",
        titles=sentences,
    )
