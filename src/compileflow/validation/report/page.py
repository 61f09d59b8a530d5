"""Pages: a value as JSON, and as HTML that opens offline, with words for shares and sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_PACKAGE = "compileflow.validation.report"


def write_page(
    folder: Path,
    value: BaseModel,
    *,
    json_name: str,
    html_name: str,
    values: Mapping[str, Any],
    package: str = _PACKAGE,
) -> None:
    """Write a value as JSON, and as a page that opens offline.

    Args:
        folder: Existing folder.
        value: Content of the JSON file.
        json_name: Name of the JSON file.
        html_name: Name of the page; its template has this name and the ending `.j2`.
        values: Values for the template, besides the style.
        package: Package that holds the template.
    """
    import jinja2
    from markupsafe import Markup

    (folder / json_name).write_text(
        json.dumps(value.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8"
    )
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (files(package) / name).read_text("utf-8")),
    )
    template = environment.get_template(f"{html_name}.j2")
    # The style is this package's own file, and escaping would break its quotes.
    style = Markup((files(_PACKAGE) / "page.css").read_text("utf-8"))  # noqa: S704
    (folder / html_name).write_text(template.render(style=style, **values), "utf-8")


def percent(share: float) -> str:
    """Return a share as text, such as "1.5 %"."""
    return f"{share * 100:.3g} %"


def fraction(ratio: float) -> str:
    """Return a latency as a fraction of another one, with two significant digits at least.

    >>> fraction(0.8312), fraction(0.00418)
    ('0.83', '0.0042')
    """
    return f"{ratio:.2g}" if 0 < ratio < 0.1 else f"{ratio:.2f}"


def megabytes(size_bytes: float) -> str:
    """Return a size as text, in MB of 10**6 bytes."""
    return f"{size_bytes / 1e6:.1f} MB"
