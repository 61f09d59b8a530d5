"""AutoCompiler: HyperDex's call that compiles a decoder in five phases, for any target that generates text."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import SecretStr, ValidationError

from compileflow._process.folders import check_writable, os_errors
from compileflow.artifact.attestations.envelopes import stored_envelopes, write_bundle
from compileflow.artifact.manifest import INSTRUCTIONS_FOLDER, read_manifest
from compileflow.catalog import get_target, open_store
from compileflow.contracts import Target
from compileflow.contracts.digests import list_files
from compileflow.errors import SpecError, StoreError, first_problem, hide
from compileflow.local.api import LOCAL_TARGETS, local_target, prove
from compileflow.local.source import with_scheme
from compileflow.settings import Settings, get_settings
from compileflow.sources.files import kind_of
from compileflow.sources.gguf_file import is_gguf
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source, scheme_of
from compileflow.steps.preflight import check_hub_model, check_request
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import Progress
from compileflow.steps.summary import artifact_line, source_line, verdict_line
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact

logger = logging.getLogger(__name__)
# In order of preference.
_TARGETS = ("hyperdex", *LOCAL_TARGETS)
# Parts of the output: the source model, the compiled components, and the artifact.
_CHECKPOINT, _PARAMETERS = "ckpt", "param"
_PARTS = {_CHECKPOINT, _PARAMETERS, INSTRUCTIONS_FOLDER}
# Lists what AutoCompiler wrote, so that a later compile removes nothing else.
_LISTING = f"{_PARAMETERS}/files.json"
_TASK = HfTask.TEXT_GENERATION


@dataclass(frozen=True)
class CompiledFolder:
    """What AutoCompiler made.

    Attributes:
        folder: Folder with ckpt, param and inst, which `CompiledModel.from_pretrained` loads.
        target: Target of the compile.
        source: The source model in the artifact store.
        artifact: The artifact in the artifact store.
        validated: Verdict on the artifact.
    """

    folder: Path
    target: str
    source: FetchedSource
    artifact: CompiledArtifact
    validated: ValidatedArtifact


class AutoCompiler:
    """Compiles decoders with the call of HyperDex's AutoCompiler, and proves what it makes."""

    def compile(
        self,
        model_id: str | Path,
        num_device: int = 1,
        max_length: int | None = None,
        low_memory_usage: bool = False,
        token: str | None = None,
        target: str | None = None,
        precision: Precision | str | None = None,
        fast_compile: bool | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        target_options: Mapping[str, Any] | None = None,
        examples: str | Path | None = None,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> CompiledFolder:
        """Check, download, convert, map and write the instructions of a decoder.

        The result is in the folder CACHE/hub/OWNER/NAME: `ckpt` holds the source model, `inst` the artifact, and
        `param` links to the compiled components in it. Nothing is written there before the verdict.

        Args:
            model_id: Hub id, or a folder. A folder with a model is only read, and its last two names are the id.
                Of any other folder, the last two names are a Hub id, and the result is written into that folder.
            num_device: Number of devices that share the model. Targets for the CPU take 1.
            max_length: Longest row in tokens, prompt included. None: 1,024, or fewer if the model has fewer
                positions.
            low_memory_usage: Leave no weights in `ckpt`. An LPU-GPU system needs them.
            token: Token of the Hub. None: the setting HF_TOKEN.
            target: Name of a target. None: the first that works here of hyperdex, openvino, onnx-runtime and
                aot-inductor.
            precision: Precision of the compiled model. None: the first one of the target, fp32 on a CPU.
            fast_compile: Compile faster, which is the default of hyperdex. Other targets ignore it and say so.
            revision: Branch, tag or commit of a Hub model.
            trust_remote_code: Run Python files that come with the model, with your rights.
            target_options: Further options of the target.
            examples: Text file with your own examples for the validation.
            cache_dir: Folder in the place of CACHE. None: the home folder of compileflow.
            progress: Display of the phases. None logs them, on standard error unless logging is configured.

        Raises:
            SpecError, SourceError: The model or a setting does not suit; found from config.json alone.
            TargetUnavailableError: The target cannot compile here, or no target can.
            CompileError: The toolchain refused the model.
            VerdictError: The compiled model does not answer like the source model. Nothing was written.
            StoreError: The folder holds a file that AutoCompiler did not write, or cannot be written.
        """
        settings = get_settings()
        if isinstance(token, str):
            hide([token])
            settings = settings.model_copy(update={"hub_token": SecretStr(token)})
        with _logged_phases() if progress is None else nullcontext(progress) as phases:
            with phases.step("0 check") as show:
                if not isinstance(token, str | None):
                    kind = type(token).__name__
                    raise SpecError(f"Expected token as a text, got {kind}.", hint="Correct that argument.")
                _check_types(
                    model_id=(model_id, str | Path),
                    num_device=(num_device, int),
                    max_length=(1 if max_length is None else max_length, int),
                    low_memory_usage=(low_memory_usage, bool),
                    fast_compile=(True if fast_compile is None else fast_compile, bool),
                    trust_remote_code=(trust_remote_code, bool),
                    target=(target, str | None),
                    cache_dir=(cache_dir, str | Path | None),
                )
                cache = settings.home_dir if cache_dir is None else Path(cache_dir).expanduser().absolute()
                model, folder = _places(model_id, cache)
                show(f"reading config.json of {model}")
                chosen_target = get_target(target or self.best_target(precision))
                device = {"num_device": num_device, "low_memory_usage": low_memory_usage}
                if fast_compile is not None:
                    device["fast_compile"] = fast_compile
                    if "fast_compile" not in chosen_target.Options.model_fields:
                        show(f"{chosen_target.name} ignores fast_compile: only hyperdex has it")
                request = _request(
                    chosen_target,
                    {
                        "model": model,
                        "revision": revision,
                        "precision": precision,
                        "max_sequence_length": max_length,
                        "trust_remote_code": trust_remote_code,
                        "target_options": target_options or {},
                        "validation": {"examples_path": None if examples is None else str(examples)},
                    },
                    device,
                )
                _check_folder(folder)
                check_request(request, settings)
                if scheme_of(model) == "hf":
                    check_hub_model(request, settings, files=("config.json",))
                show(f"{request.target} can compile {model} at {request.precision.value}")
            return _run(request, folder, settings, phases, keeps_weights=not low_memory_usage)

    def best_target(self, precision: Precision | str | None = None) -> str:
        """Return the best target for text generation on this machine, and log the reason.

        Args:
            precision: Precision that the target must have; None for any.

        Raises:
            TargetUnavailableError: No target compiles and runs here.
        """
        known_precision = None if precision is None else _precision(precision)
        return local_target(_TASK, known_precision, names=_TARGETS, chooser="AutoCompiler")


def _run(
    request: CompileRequest, folder: Path, settings: Settings, phases: Progress, *, keeps_weights: bool
) -> CompiledFolder:
    """Run the phases after the check."""
    store_uri = settings.resolved_store_uri()
    with phases.step("1 download") as show:
        source = fetch_source(
            request.model, request.revision, store_uri=store_uri, settings=settings, on_progress=show
        )
        show(source_line(source))
    with phases.step("2 convert") as show:
        artifact = compile_artifact(source, request, store_uri=store_uri, settings=settings, on_progress=show)
        show(artifact_line(artifact))
    with phases.step("3 map") as show:
        show(f"placing the model on its device for {request.target}, and comparing it with the checkpoint")
        validated = prove(source, artifact, request, settings, on_progress=show)
        show(verdict_line(validated))
    with phases.step("4 instructions") as show:
        show(f"writing {', '.join(sorted(_PARTS))} into {folder}")
        with os_errors(folder, "write to"):
            _write(folder, source, artifact, settings, keeps_weights=keeps_weights)
        show(f"the model is compiled: {folder}")
    return CompiledFolder(folder, request.target, source, artifact, validated)


def _check_types(**arguments: tuple[Any, Any]) -> None:
    """Check the types of arguments, given as pairs of a value and its type; a text must not be empty.

    Raises:
        SpecError: A value has another type, or is empty.
    """
    for name, (value, kind) in arguments.items():
        is_number = kind is int and not isinstance(value, bool) and isinstance(value, int) and value >= 1
        if value == "" or not (is_number if kind is int else isinstance(value, kind)):
            words = {int: "a whole number of at least 1", bool: "True or False"}.get(kind, "a text or a path")
            raise SpecError(f"Expected {name} as {words}, got {value!r}.", hint="Correct that argument.")


def _places(model_id: str | Path, cache: Path) -> tuple[str, Path]:
    """Return the location of a model, and the folder of its result.

    Raises:
        SpecError: The id is neither a Hub id nor a folder.
    """
    file = Path(model_id).expanduser().absolute()
    if is_gguf(file):
        return str(file), cache / "hub" / file.parent.name / file.stem
    model = with_scheme(str(model_id))
    scheme = scheme_of(model)
    if scheme == "hf":
        return model, cache / "hub" / model.removeprefix("hf://").strip("/")
    path = Path(model).expanduser().absolute()
    if scheme != "file" or "://" in model or len(path.parts) < 3:
        raise SpecError(f"Expected a Hub id or a folder, got {str(model_id)!r}.", hint="Give owner/name.")
    name = "/".join(path.parts[-2:])
    if path.is_dir() and {entry.name for entry in path.iterdir()} - _PARTS:
        return str(path), cache / "hub" / name
    logger.info("%s holds no model: taking %s from the Hub, and writing there", path, name)
    return f"hf://{name}", path


def _request(target: Target, fields: dict[str, Any], device: Mapping[str, Any]) -> CompileRequest:
    """Return the request of a compile.

    Args:
        target: Target to compile for.
        fields: Fields of the request. No precision means the first one of the target.
        device: Arguments that only targets for several devices have as options.

    Raises:
        SpecError: A value is wrong, or the target has one device.
    """
    if "num_device" in target.Options.model_fields:
        fields["target_options"] = {**device, **fields["target_options"]}
    elif device["num_device"] != 1:
        raise SpecError(
            f"{target.name} compiles for one device, got num_device={device['num_device']!r}.",
            hint="Leave num_device out, or choose the target hyperdex.",
        )
    if fields["precision"] is None:
        fields["precision"] = target.capabilities.precisions_for(_TASK)[0]
    steps = {"register": False}
    try:
        return CompileRequest.model_validate({**fields, "target": target.name, "hf_task": _TASK, "steps": steps})
    except ValidationError as error:
        problem = first_problem(error, show_input=True).replace("max_sequence_length", "max_length")
        raise SpecError(f"{problem}.", hint="Correct that argument of AutoCompiler.compile.") from error


def _precision(name: Precision | str) -> Precision:
    try:
        return Precision(name)
    except ValueError as error:
        raise SpecError(
            f"Expected precision as one of {', '.join(Precision)}, got {name!r}.", hint="Correct it."
        ) from error


def _check_folder(folder: Path) -> None:
    """Check that a folder can hold the result: it is absent or empty, or holds an earlier one and nothing else.

    Raises:
        StoreError: It holds a file that AutoCompiler did not write, or cannot be written.
    """
    with os_errors(folder, "write to"):
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is not a folder.", hint="Move it, or give another cache_dir.")
        other_files = set(_files_below(folder)) - _listed_files(folder)
        if other_files:
            raise StoreError(
                f"{folder} holds a file that AutoCompiler did not write: {min(other_files)}.",
                hint="Move it, or give another cache_dir; the result would replace the folder.",
            )
        check_writable(folder.parent)


def _files_below(folder: Path) -> Iterator[str]:
    """Yield the relative paths of the files and links below a folder."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def _listed_files(folder: Path) -> set[str]:
    """Return what an earlier result lists; nothing if there is none, or if its listing cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return {*json.loads((folder / _LISTING).read_text("utf-8")), _LISTING}
    return set()


def _write(
    folder: Path, source: FetchedSource, artifact: CompiledArtifact, settings: Settings, *, keeps_weights: bool
) -> None:
    """Write the result beside its place, and move it there in the end; an earlier result is replaced."""
    store = open_store(settings.resolved_store_uri(), settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        result, instructions = Path(work) / "new", Path(work) / "new" / INSTRUCTIONS_FOLDER
        with store.open_folder(source.digest) as checkpoint:
            for record in list_files(checkpoint):
                if keeps_weights or kind_of(record.path) != "weights":
                    copy = result / _CHECKPOINT / record.path
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(checkpoint / record.path, copy)
        store.get_folder(artifact.digest, instructions)
        write_bundle(instructions, stored_envelopes(store, artifact.digest))
        (result / _PARAMETERS).mkdir()
        for name, component in read_manifest(instructions).components.items():
            # Relative links, so that the weights are stored once and the result can be moved.
            link = Path("..", INSTRUCTIONS_FOLDER, component.folder)
            (result / _PARAMETERS / name).symlink_to(link, target_is_directory=True)
        (result / _LISTING).write_text(json.dumps(sorted(_files_below(result)), indent=1) + "\n", "utf-8")
        # The compile took minutes, in which a file may have been added.
        _check_folder(folder)
        if folder.exists():
            folder.rename(Path(work) / "old")
        result.rename(folder)


class _LoggedPhases:
    """Phases in the log of this module."""

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Log the start of a phase, and each of its lines."""
        logger.info("%s ...", name)
        yield lambda line: logger.info("%s: %s", name, line)


@contextmanager
def _logged_phases() -> Iterator[Progress]:
    """Log the phases, on standard error if the program has not configured logging."""
    package_logger = logging.getLogger(__package__)
    if package_logger.hasHandlers():
        yield _LoggedPhases()
        return
    handler, level = logging.StreamHandler(sys.stderr), package_logger.level
    package_logger.addHandler(handler)
    package_logger.setLevel(logging.INFO)
    try:
        yield _LoggedPhases()
    finally:
        package_logger.removeHandler(handler)
        package_logger.setLevel(level)
