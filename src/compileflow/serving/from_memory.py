"""The only import from serving to local, for `from_model` and `from_pipeline`."""

from __future__ import annotations

from types import ModuleType


def in_memory() -> ModuleType:
    """Return `compileflow.local.in_memory`.

    `CompiledModel.from_model` and `CompiledPipeline.from_pipeline` compile, as in the older library, and compiling
    is a layer above serving. The import is lazy, because a service that only loads compiled models does not need
    the packages that compiling imports.
    """
    from compileflow.local import in_memory

    return in_memory
