"""Find the model of pipeline() and optimize() by task, folder, Hub id or in memory, and put it into the store."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from compileflow._process.folders import work_folder
from compileflow.catalog import open_store
from compileflow.contracts.digests import list_files
from compileflow.errors import SpecError, first_line
from compileflow.local.in_memory import save_model
from compileflow.serving.model import CompiledModel
from compileflow.serving.tokenizer import write_tokenizer
from compileflow.settings import Settings
from compileflow.sources.files import kind_of
from compileflow.spec import TASK_ALIASES, HfTask
from compileflow.steps.fetch import fetch_source, scheme_of
from compileflow.steps.values import FetchedSource

logger = logging.getLogger(__name__)
# Class of transformers that loads the tokenizer or processor of a model, by the model's main input.
_PREPROCESSORS = {
    "input_ids": "AutoTokenizer",
    "pixel_values": "AutoImageProcessor",
    "input_values": "AutoFeatureExtractor",
    "input_features": "AutoFeatureExtractor",
}


def known_task(task: str) -> HfTask:
    """Return a task by its name or its alias in transformers.

    Raises:
        SpecError: compileflow does not compile the task.
    """
    try:
        return HfTask(task)
    except ValueError as error:
        raise SpecError(
            f"compileflow does not compile the task {task!r}.",
            hint=f"Choose one of: {', '.join([*HfTask, *TASK_ALIASES])}.",
        ) from error


# transformers 5 has no pipeline for this task, and therefore no default model; this is the one of transformers 4.
_QUESTION_ANSWERING_MODEL = ("distilbert/distilbert-base-cased-distilled-squad", "564e9b5")


def default_model(hf_task: HfTask) -> tuple[str, str]:
    """Return the Hub id and the revision of transformers' default model for a task.

    Raises:
        SpecError: transformers has no default model for the task.
    """
    from transformers.pipelines import SUPPORTED_TASKS

    if hf_task is HfTask.QUESTION_ANSWERING:
        return _QUESTION_ANSWERING_MODEL
    default = SUPPORTED_TASKS.get(hf_task.value, {}).get("default")
    if default is None:
        raise SpecError(f"transformers has no default model for {hf_task.value}.", hint="Pass model=.")
    name, revision = default["model"]
    return name, revision


def fetch_local(
    model: Any,
    preprocessor: Any,
    revision: str | None,
    settings: Settings,
    *,
    trust_remote_code: bool = False,
) -> FetchedSource:
    """Put a model's files into the local store, optionally with another tokenizer or processor.

    Args:
        model: Folder, Hub id, or a transformers model in memory.
        preprocessor: A tokenizer or processor, or the folder or Hub id of a tokenizer. None: that of the model; a
            model in memory is stored without one.
        revision: Branch, tag or commit of a Hub model.
        settings: Settings of the store, the work folder and the Hub.
        trust_remote_code: Run Python files of a tokenizer that is given by its folder or Hub id.

    Raises:
        SourceError: The model does not exist, or its files are incomplete.
    """
    store_uri = settings.resolved_store_uri()
    if isinstance(model, str | Path):
        source = fetch_source(with_scheme(str(model)), revision, store_uri=store_uri, settings=settings)
        # Many services pass the model's location as the tokenizer.
        if preprocessor is None or str(preprocessor) == str(model):
            return source
        uri = source.uri
    else:
        source, uri = None, f"memory://{type(model).__name__}"
    with work_folder(settings.work_dir, label="source") as work:
        folder = work / "source"
        folder.mkdir()
        if source is None:
            save_model(model, folder)
        else:
            with open_store(store_uri).open_folder(source.digest) as source_folder:
                _copy_all_but_tokenizer(source_folder, folder)
        if preprocessor is not None:
            _write(loaded(preprocessor, trust_remote_code), folder)
        stored_folder = open_store(store_uri).put_folder(folder)
    return FetchedSource(
        uri=uri,
        revision=source.revision if source else stored_folder.digest,
        stored_uri=stored_folder.uri,
        digest=stored_folder.digest,
        size_bytes=stored_folder.size_bytes,
        cached=False,
    )


def is_compiled(model: Any) -> bool:
    """Return whether compileflow compiled a model: a CompiledModel, or what `optimize` returns."""
    return isinstance(getattr(model, "compiled", model), CompiledModel)


def preprocessor_of(model: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer or processor at the place that a model in memory was loaded from; None without one."""
    import transformers

    place = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    auto_class = _PREPROCESSORS.get(getattr(model, "main_input_name", ""))
    if not place or auto_class is None:
        return None
    try:
        preprocessor = getattr(transformers, auto_class).from_pretrained(
            place, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - transformers and the Hub's client raise many classes
        # The place may be gone, or on a Hub that does not answer; the model can be compiled without it.
        logger.info("%s has no %s: %s", place, auto_class, first_line(error))
        return None
    # Without tokenizer files, transformers returns a tokenizer that has only special tokens.
    if auto_class == "AutoTokenizer" and len(preprocessor) <= len(set(preprocessor.all_special_tokens)):
        return None
    return preprocessor


def with_scheme(model: str) -> str:
    """Return a Hub id without an owner, such as bert-base-uncased, as a URI: a folder of that name comes first."""
    is_hub_id = scheme_of(model) == "file" and "/" not in model and model not in ("", ".", "..", "~")
    return f"hf://{model}" if is_hub_id and not Path(model).exists() else model


def _write(preprocessor: Any, folder: Path) -> None:
    if hasattr(preprocessor, "tokenize"):
        write_tokenizer(getattr(preprocessor, "tokenizer", preprocessor), folder)
    else:
        preprocessor.save_pretrained(folder)


def loaded(preprocessor: Any, trust_remote_code: bool = False) -> Any:
    """Return a tokenizer or processor; a folder or a Hub id stands for the tokenizer there."""
    if not isinstance(preprocessor, str | Path):
        return preprocessor
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(preprocessor, trust_remote_code=trust_remote_code)


def _copy_all_but_tokenizer(source_folder: Path, folder: Path) -> None:
    for record in list_files(source_folder):
        if kind_of(record.path) != "tokenizer":
            (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_folder / record.path, folder / record.path)
