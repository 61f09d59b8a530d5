"""Regular expressions of queries, in an engine whose time grows with the text alone: any client may send one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from deployments.neptune_server.errors import bad_request


@lru_cache(maxsize=64)
def compiled(pattern: str) -> Any:
    """Compile a pattern in the syntax of RE2, which has neither look-around nor references to groups.

    Raises:
        ValueError: The pattern is not in that syntax.
        ApiError: 400, the engine is not installed.
    """
    try:
        import re2
    except ImportError as error:
        raise bad_request("=~ needs the package google-re2 on the server. Run: pip install google-re2") from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError(pattern) from error
