"""Helpers for targets, built in or third-party: probing, progress, threads, CPU features and errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from compileflow._process.child_process import report_progress
from compileflow._process.cpu import cpu_features, lacking_precisions
from compileflow._process.failures import compile_error, failure_of
from compileflow._process.memory import released_pages
from compileflow._process.packages import installed_versions
from compileflow._process.state import environment, torch_threads, undisturbed_process
from compileflow.contracts.targets import Availability
from compileflow.errors import CompileflowError, InputError, LoadError, first_line
from compileflow.spec import Precision

__all__ = [
    "INSTALL_TORCH",
    "cpu_features",
    "environment",
    "in_parts",
    "installed_versions",
    "lacking_precisions",
    "library_errors",
    "load_error",
    "probe_installed",
    "refusal",
    "released_pages",
    "report_progress",
    "require_open",
    "torch_threads",
    "undisturbed_process",
]

# Of targets that need torch alone.
INSTALL_TORCH = "pip install 'compileflow[hf]'"
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def probe_installed(
    compile_needs: Sequence[str],
    run_needs: Sequence[str],
    *,
    install: str,
    runtime_install: str = "",
    lacking: Mapping[Precision, str] | None = None,
) -> Availability:
    """Answer `Target.probe` for a toolchain that consists of Python distributions alone.

    Args:
        compile_needs: Distributions that a compile imports.
        run_needs: Distributions that a loaded component imports.
        install: Command that installs them.
        runtime_install: Command that installs what a loaded component imports; "" for the same command.
        lacking: Precisions that this machine cannot run, each with the reason.
    """
    versions = installed_versions((*compile_needs, *run_needs))
    missing_packages = [name for name in dict.fromkeys((*run_needs, *compile_needs)) if name not in versions]
    if not missing_packages:
        return Availability(can_compile=True, can_run=True, lacking=lacking or {})
    return Availability(
        can_compile=versions.keys() >= set(compile_needs),
        can_run=versions.keys() >= set(run_needs),
        reason=_not_installed(missing_packages),
        hint=install,
        lacking=lacking or {},
        run_reason=_not_installed([name for name in missing_packages if name in run_needs]),
        run_hint=runtime_install,
    )


def _not_installed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed" if names else ""


def refusal(
    compiler: str, error: BaseException, *, model: str = "the model", reason: str = "", hint: str = ""
) -> CompileflowError:
    """Return the error for a model that a compiler refused, or ran out of memory or disk on.

    Args:
        compiler: The compiler, as the subject of a sentence.
        error: What it raised.
        model: The model, as the object of a sentence.
        reason: The part of the error's text that explains it; empty for the first line.
        hint: What to do about a failure without a class; empty for "try another target".
    """
    problem = f"{type(error).__name__}: {reason or first_line(error)}"
    failure = failure_of(error)
    if failure is not None and failure.kind == "operator":
        # Some toolchains list every step that failed for lack of the operator, and the operator last.
        detail = problem if failure.operator.rpartition(".")[2] in problem else type(error).__name__
        problem = f"it does not have the operator {failure.operator} ({detail})"
    kind = failure.kind if failure is not None else ""
    verb = {"memory": "ran out of memory", "disk": "found the disk full"}.get(kind, f"refused {model}")
    hint = hint or "Try another target; `compileflow targets` lists them."
    return compile_error(f"{compiler} {verb}: {problem}.", error, hint=hint)


def violated_size(error: BaseException) -> str:
    """Return the first size of torch.export's list that cannot vary; "" without such a list."""
    items = [line.strip() for line in str(error).splitlines() if line.strip().startswith("- ")]
    if not items or "Constraints violated" not in str(error):
        return ""
    # Advice on dynamic_shapes follows.
    return items[0].removeprefix("- ").partition(". If ")[0][:300].rstrip(".")


def load_error(name: str, runtime: str, error: BaseException, *, reason: str = "") -> LoadError:
    """Return the error for a file that a runtime cannot load.

    Args:
        name: Name of the file.
        runtime: The runtime with its version.
        error: What it raised.
        reason: The part of the error's text that explains it; empty for the first line.
    """
    failure = failure_of(error)
    is_memory = failure is not None and failure.kind == "memory"
    return LoadError(
        f"{name} cannot be loaded by {runtime}: {reason or first_line(error)}.",
        hint="Load it on a machine with more memory, or load fewer shape buckets."
        if is_memory
        else "Use the versions that the manifest names, or compile again.",
    )


@contextmanager
def library_errors(problem: str, *, hint: str) -> Iterator[None]:
    """Turn whatever a library raises about a file that a stranger may have written into a LoadError of one line.

    Args:
        problem: First part of the error: what cannot be done.
        hint: What to do.
    """
    try:
        yield
    except CompileflowError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoadError(f"{problem}: {type(error).__name__}: {first_line(error)}.", hint=hint) from error


def in_parts(items: Sequence[Item], parts: int) -> Iterator[Sequence[Item]]:
    """Split items into at most `parts` parts of nearly equal size, in order."""
    size = max(1, -(-len(items) // parts))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def require_open(loaded: Loaded | None) -> Loaded:
    """Return what a runner has loaded.

    Raises:
        InputError: The runner was closed, and set it to None.
    """
    if loaded is None:
        raise InputError("This compiled model was closed.", hint="Load it again.")
    return loaded
