"""The one way from serving up to compiling: what `from_model` and `from_pipeline` need of `local`."""

from __future__ import annotations

from types import ModuleType


def in_memory() -> ModuleType:
    """Return `compileflow.local.in_memory`.

    `CompiledModel.from_model` and `CompiledPipeline.from_pipeline` compile, as they did in the older library, and
    compiling stands above serving. The import is lazy, because a service that only loads compiled models needs
    nothing of what compiling imports.
    """
    from compileflow.local import in_memory

    return in_memory
