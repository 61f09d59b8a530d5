"""autocompile: compile a decoder in the five phases of AutoCompiler."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compileflow.cli.common import AsJson, one_line_errors
from compileflow.cli.output import say, say_json
from compileflow.cli.request_fields import target_options_of


@one_line_errors
def autocompile(
    model_id: Annotated[str, typer.Argument(help="A Hub id (owner/name), or a folder.")],
    num_device: Annotated[int, typer.Option(help="Number of devices that share the model; 1 on a CPU.")] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Longest row in tokens, prompt included. Default: 1,024, or fewer if the model has fewer "
            "positions."
        ),
    ] = None,
    low_memory_usage: Annotated[
        bool,
        typer.Option(
            "--low-memory-usage",
            help="Leave no weights in the folder ckpt. An LPU-GPU system needs them.",
            show_default=False,
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="Target. Default: the first that works here of hyperdex, openvino, onnx-runtime, aot-inductor."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision. Default: the first one of the target, fp32 on a CPU.")
    ] = None,
    fast_compile: Annotated[
        bool | None,
        typer.Option(
            help="Compile faster, the default of hyperdex. Other targets ignore it and say so.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(help="Run Python files that come with the model, with your rights.", show_default=False),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Target option, as for compile. Repeatable."),
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="Text file with your own examples for the validation.")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Folder of the result. Default: COMPILEFLOW_HOME.")] = None,
    progress: Annotated[bool, typer.Option(help="Show the progress of each phase.", show_default=False)] = True,
    as_json: AsJson = False,
) -> None:
    """Compile a decoder for text generation in five phases: check, download, convert, map, instructions.

    The result is in CACHE_DIR/hub/OWNER/NAME. The token of the Hub is the setting HF_TOKEN.
    """
    from compileflow.cli.progress import progress_display
    from compileflow.local.auto_compiler import AutoCompiler

    settings: dict[str, Any] = {
        "num_device": num_device,
        "max_length": max_length,
        "low_memory_usage": low_memory_usage,
        "target": target,
        "precision": precision,
        "fast_compile": fast_compile,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "target_options": target_options_of(option or ()),
        "examples": examples,
        "cache_dir": cache_dir,
    }
    with progress_display(progress) as display:
        result = AutoCompiler().compile(model_id, **settings, progress=display)
    if as_json:
        values = {
            "folder": str(result.folder),
            "target": result.target,
            "source": result.source.model_dump(mode="json"),
            "artifact": result.artifact.model_dump(mode="json"),
            "validated": result.validated.model_dump(mode="json"),
        }
        say_json(values)
    else:
        say(f"{result.target}: {result.validated.reason}; the compiled model is in {result.folder}")
