"""Find the model of pipeline() and optimize() by task, folder, Hub id or in memory, and put it into the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compileflow._process.folders import work_folder
from compileflow.catalog import open_store
from compileflow.contracts.digests import list_files
from compileflow.errors import SpecError
from compileflow.local.in_memory import save_model
from compileflow.serving.tokenizer import write_tokenizer
from compileflow.settings import Settings
from compileflow.sources.files import kind_of
from compileflow.spec import TASK_ALIASES, HfTask
from compileflow.steps.fetch import fetch_source
from compileflow.steps.values import FetchedSource


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


def default_model(hf_task: HfTask) -> tuple[str, str]:
    """Return the Hub id and the revision of transformers' default model for a task.

    Raises:
        SpecError: transformers has no default model for the task.
    """
    from transformers.pipelines import SUPPORTED_TASKS

    default = SUPPORTED_TASKS.get(hf_task.value, {}).get("default")
    if default is None:
        raise SpecError(f"transformers has no default model for {hf_task.value}.", hint="Pass model=.")
    name, revision = default["model"]
    return name, revision


def fetch_local(
    model: Any, tokenizer: Any, revision: str | None, settings: Settings, *, trust_remote_code: bool = False
) -> FetchedSource:
    """Put a model's files into the local store, optionally with another tokenizer.

    Args:
        model: Folder, Hub id, or a transformers model in memory.
        tokenizer: A tokenizer, its folder or Hub id. None: the tokenizer of the model.
        revision: Branch, tag or commit of a Hub model.
        settings: Settings of the store, the work folder and the Hub.
        trust_remote_code: Run Python files of a tokenizer that is given by its folder or Hub id.

    Raises:
        SourceError: The model does not exist, or its files are incomplete.
        SpecError: The model is in memory, and the tokenizer is missing.
    """
    store_uri = settings.resolved_store_uri()
    if isinstance(model, str | Path):
        source = fetch_source(str(model), revision, store_uri=store_uri, settings=settings)
        # Many services pass the model's location as the tokenizer.
        if tokenizer is None or str(tokenizer) == str(model):
            return source
        uri = source.uri
    elif tokenizer is None:
        raise SpecError("A model in memory has no tokenizer.", hint="Pass tokenizer=.")
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
        write_tokenizer(_loaded(tokenizer, trust_remote_code), folder)
        stored_folder = open_store(store_uri).put_folder(folder)
    return FetchedSource(
        uri=uri,
        revision=source.revision if source else stored_folder.digest,
        stored_uri=stored_folder.uri,
        digest=stored_folder.digest,
        size_bytes=stored_folder.size_bytes,
        cached=False,
    )


def _loaded(tokenizer: Any, trust_remote_code: bool) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)


def _copy_all_but_tokenizer(source_folder: Path, folder: Path) -> None:
    for record in list_files(source_folder):
        if kind_of(record.path) != "tokenizer":
            (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_folder / record.path, folder / record.path)
