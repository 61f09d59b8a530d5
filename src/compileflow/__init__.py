"""Compile Hugging Face transformers models, prove the result, and load it with the transformers interface.

Importing this package loads neither torch nor the client of any service. A public name imports its module on first
use.
"""

from __future__ import annotations

# Not from typing, whose import takes milliseconds, in which a signal would end the command line with a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from compileflow.artifact.manifest import ArtifactManifest
    from compileflow.errors import CompileflowError
    from compileflow.local.api import optimize, pipeline
    from compileflow.local.auto_compiler import AutoCompiler
    from compileflow.serving.light.pipeline import LightPipeline
    from compileflow.serving.model import CompiledModel
    from compileflow.serving.pipeline import CompiledPipeline
    from compileflow.serving.streaming import TextStreamer
    from compileflow.serving.tokenizer import CompiledTokenizer
    from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket

__version__ = "0.1.0"

_MODULES = {
    "ArtifactManifest": "compileflow.artifact.manifest",
    "AutoCompiler": "compileflow.local.auto_compiler",
    "CompileSpec": "compileflow.spec",
    "CompiledModel": "compileflow.serving.model",
    "CompiledPipeline": "compileflow.serving.pipeline",
    "CompiledTokenizer": "compileflow.serving.tokenizer",
    "CompileflowError": "compileflow.errors",
    "ComponentSpec": "compileflow.spec",
    "HfTask": "compileflow.spec",
    "LightPipeline": "compileflow.serving.light.pipeline",
    "Precision": "compileflow.spec",
    "ShapeBucket": "compileflow.spec",
    "TextStreamer": "compileflow.serving.streaming",
    "optimize": "compileflow.local.api",
    "pipeline": "compileflow.local.api",
}

__all__ = [
    "ArtifactManifest",
    "AutoCompiler",
    "CompileSpec",
    "CompiledModel",
    "CompiledPipeline",
    "CompiledTokenizer",
    "CompileflowError",
    "ComponentSpec",
    "HfTask",
    "LightPipeline",
    "Precision",
    "ShapeBucket",
    "TextStreamer",
    "optimize",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'compileflow' has no attribute {name!r}")
