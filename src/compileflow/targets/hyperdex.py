"""hyperdex: HyperAccel's HyperDex toolchain compiles a model's folder for LPUs.

Written from HyperAccel's documentation, which covers only decoders (AutoModelForCausalLM, generate). The compiler
takes the folder of a Hugging Face model, and the documentation describes the runtime as compatible with
transformers. This target therefore calls the class that transformers has for the task, and refuses to compile
where HyperDex lacks that class.

The runtime writes whole texts by its own `generate`. It has no documented call that goes on from what was read, so
anything else than plain greedy generation reads the whole row again for each token.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compileflow.contracts import (
    Arrays,
    Availability,
    Capabilities,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Device,
    Runner,
    TargetOptions,
)
from compileflow.contracts.digests import list_files
from compileflow.contracts.toolkit import (
    installed_versions,
    load_error,
    report_progress,
    require_open,
    torch_threads,
)
from compileflow.errors import CompileError, InputError, LoadError, SpecError
from compileflow.source_model import AUTO_CLASSES, HEADS, load_config, load_source_model
from compileflow.spec import TEXT_TASKS, HfTask, Precision
from compileflow.targets._vendor.toolchain import VendorToolchain, vendor_call

_FOLDER = "model"
_DECODER_CLASS = AUTO_CLASSES[HfTask.TEXT_GENERATION]
# GPUs that read the prompt beside LPUs that write.
_HYBRID: Device = "lpu-gpu"
_MODULES = {"hyperdex": ("hyperdex-toolchain",)}
_TOOLCHAIN = VendorToolchain(
    compiler=_MODULES,
    runtime=_MODULES,
    install="pip install -i https://pypi.hyperaccel.ai/simple hyperdex-toolchain",
    note="the index needs an account from HyperAccel",
    device="xfpga*",
    device_hint="use a server with an LPU, and install XRT and the device package as HyperAccel describes",
)


class HyperdexOptions(TargetOptions):
    """Options of the hyperdex target, with the names of AutoCompiler.compile."""

    num_device: int = Field(1, ge=1, description="Number of LPUs that share the model.")
    max_length: int | None = Field(
        None, ge=1, description="Longest input in tokens. null: the maximum sequence length of the component."
    )
    low_memory_usage: bool = Field(
        False,
        description="AutoCompiler removes the checkpoint's weights after it has converted them. A system of LPUs "
        "and GPUs needs them.",
    )
    fast_compile: bool = Field(True, description="Compile faster; HyperAccel's examples always do.")
    num_gpu: int = Field(1, ge=1, description="Number of GPUs that a load with device lpu-gpu uses.")


class HyperdexTarget:
    """Compile with HyperDex, for rows of any length; the LPU takes one row at a time."""

    name: ClassVar[str] = "hyperdex"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = (
        "HyperAccel's HyperDex for LPUs; rows of any length; compiles decoders; encoders too, although HyperAccel "
        "documents only decoders"
    )
    Options: ClassVar[type[TargetOptions]] = HyperdexOptions
    # The LPU computes in FP16; HyperDex has no argument for it. The documentation requires a device to compile.
    capabilities: ClassVar[Capabilities] = Capabilities(
        # HyperDex compiles the class that the model was saved as, which has an axis for choices.
        hf_tasks=(
            *(task for task in TEXT_TASKS if task is not HfTask.MULTIPLE_CHOICE),
            HfTask.TEXT_GENERATION,
        ),
        precisions=(Precision.FP16,),
        devices=("lpu", _HYBRID),
        dynamic_axes=True,
        compile_needs_device=True,
        # The documentation does not mention other versions.
        runtime={"hyperdex-toolchain": "=={minor}.*"},
        runtime_install="pip install -i https://pypi.hyperaccel.ai/simple {}",
    )
    # HyperAccel's list of supported models.
    supported_model_types: ClassVar[Mapping[HfTask, tuple[str, ...]]] = {
        HfTask.TEXT_GENERATION: (
            "cohere", "exaone", "falcon", "gemma", "gpt2", "gpt_bigcode", "gptj", "gpt_neox", "llama", "mistral",
            "qwen2", "opt", "olmo", "phi", "phi3", "stablelm", "starcoder2",
        ),
    }  # fmt: skip

    def probe(self) -> Availability:
        """Check for the toolchain and an LPU, without importing anything."""
        return _TOOLCHAIN.probe(compile_needs_device=self.capabilities.compile_needs_device)

    def toolchain(self) -> dict[str, str]:
        """Return the versions of the HyperDex toolchain, torch and transformers."""
        return installed_versions(("hyperdex-toolchain", "torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): the code runs on the LPU."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Copy the model's folder, and let HyperDex compile the copy.

        The artifact holds the whole folder, because HyperAccel does not document which files the runtime reads.
        """
        options = HyperdexOptions.model_validate(dict(component.options))
        longest = options.max_length or component.max_sequence_length
        if longest < component.max_sequence_length:
            raise SpecError(
                f"hyperdex: max_length is {longest}, but the component takes {component.max_sequence_length}.",
                hint="Omit max_length, or request a shorter max_sequence_length.",
            )
        _check_head(source_dir, component)
        tools = _TOOLCHAIN.import_module("hyperdex.tools")
        auto_class = AUTO_CLASSES[component.hf_task]
        if not hasattr(_TOOLCHAIN.import_module("hyperdex.transformers"), auto_class):
            raise CompileError(
                f"hyperdex.transformers has no {auto_class}, which {component.hf_task.value} needs.",
                hint="Choose another target: HyperAccel documents only AutoModelForCausalLM.",
            )
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        folder = out_dir / _FOLDER
        source_files = list_files(source_dir)
        for record in source_files:
            # copytree would also copy the file modes of the source, which may forbid writing.
            (folder / record.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, folder / record.path)
        report_progress("compiling with HyperDex")
        with torch_threads(component.threads), vendor_call("AutoCompiler.compile"):
            tools.AutoCompiler().compile(
                model_id=str(folder),
                num_device=options.num_device,
                max_length=longest,
                low_memory_usage=options.low_memory_usage,
                fast_compile=options.fast_compile,
            )
        if list_files(folder) == source_files:
            raise CompileError(
                "AutoCompiler.compile wrote nothing into the model's folder.",
                hint="Find out where this HyperDex version writes its files: an artifact must hold them.",
            )
        return source_model.compiled_to(
            [record.path for record in list_files(out_dir)],
            {
                "auto_class": auto_class,
                "num_device": options.num_device,
                "num_gpu": options.num_gpu,
                "low_memory_usage": options.low_memory_usage,
            },
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the compiled folder onto as many LPUs as it was compiled for, and onto GPUs if the device has them.

        Raises:
            LoadError: GPUs are requested, but the checkpoint's weights, which they need, were removed.
        """
        runtime = _TOOLCHAIN.import_module("hyperdex.transformers")
        load_option = component.load_option
        auto_class = load_option("auto_class")
        if auto_class not in AUTO_CLASSES.values():
            raise LoadError(f"{auto_class!r} is not a class that loads a model.", hint="Compile the model again.")
        device_map = {"lpu": load_option("num_device")}
        if device == _HYBRID:
            if load_option("low_memory_usage"):
                raise LoadError(
                    "The model was compiled with low_memory_usage, which removed the weights that GPUs need, so "
                    "it does not load on LPUs and GPUs together.",
                    hint="Load it with device='lpu', or compile it without low_memory_usage.",
                )
            device_map = {"gpu": load_option("num_gpu"), **device_map}
        try:
            model = getattr(runtime, str(auto_class)).from_pretrained(
                model_id=str(component_dir / _FOLDER), device_map=device_map
            )
        except Exception as error:
            raise load_error(_FOLDER, "hyperdex.transformers", error) from error
        return (_HyperdexDecoder if auto_class == _DECODER_CLASS else _HyperdexRunner)(model, component)


class _HyperdexRunner:
    """Gives rows to the LPU one at a time, as HyperAccel requires; concurrent calls queue."""

    def __init__(self, model: Any, component: ComponentRecord):
        self._model = model
        self._component = component
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        model = require_open(self._model)
        arrays = {record.name: inputs[record.name] for record in self._component.inputs}
        rows = range(len(next(iter(arrays.values()))))
        with self._lock:
            answers = [model(**{name: value[row : row + 1] for name, value in arrays.items()}) for row in rows]
        return {
            record.name: np.concatenate(
                [np.asarray(getattr(answer, record.name), np.float32) for answer in answers]
            )
            for record in self._component.outputs
        }

    def close(self) -> None:
        self._model = None


class _HyperdexDecoder(_HyperdexRunner):
    """Gives rows to the LPU without their padding, because no documented argument numbers the tokens beside it."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].astype(bool)
        (record,) = self._component.outputs
        logits = np.zeros((*ids.shape, int(record.axes[-1])), np.float32)
        for row, counted in enumerate(mask):
            if counted.any():
                bare_ids = ids[row : row + 1, counted]
                arrays = {"input_ids": bare_ids, "attention_mask": np.ones_like(bare_ids)}
                logits[row, counted] = super().run(arrays)[record.name][0]
        return {record.name: logits}

    def start(self) -> _RowsReadAgain:
        """Begin with rows without tokens."""
        require_open(self._model)
        return _RowsReadAgain(self)

    def write(self, prompt: NDArray[Any], *, new_tokens: int, end_id: int | None) -> NDArray[Any]:
        """Write on from one prompt with HyperDex's own `generate`, taking the likeliest token each time."""
        model = require_open(self._model)
        # Its defaults sample, and penalize repetitions.
        settings = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "top_p": 1.0,
            "top_k": 1,
            "temperature": 1.0,
            "repetition_penalty": 1.0,
            # By default the one of the model's configuration. The model never writes the id after its last one.
            "stop": self._component.vocab_size if end_id is None else end_id,
        }
        with self._lock:
            ids = np.asarray(model.generate(prompt[None], **settings), np.int64).reshape(-1)
        if not np.array_equal(ids[: len(prompt)], prompt):
            raise InputError(
                "hyperdex.transformers returned a text that does not begin with its prompt.",
                hint="Report the version of HyperDex: compileflow expects the prompt first, as in transformers.",
            )
        return ids[len(prompt) :]


class _RowsReadAgain:
    """The tokens of rows, which the LPU reads from their beginning each time."""

    def __init__(self, decoder: _HyperdexDecoder):
        self.length = 0
        self._decoder = decoder
        self._ids: NDArray[Any] | None = None

    def read(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        *,
        last: bool = False,
    ) -> NDArray[Any]:
        """Read the rows with their next tokens; the positions follow from the mask."""
        self._ids = input_ids if self._ids is None else np.concatenate([self._ids, input_ids], axis=1)
        self.length = self._ids.shape[1]
        (logits,) = self._decoder.run({"input_ids": self._ids, "attention_mask": attention_mask}).values()
        return logits[:, -1:] if last else logits[:, -input_ids.shape[1] :]

    def reorder(self, rows: NDArray[Any]) -> None:
        """Replace the rows by copies of some of them."""
        assert self._ids is not None  # noqa: S101 - rows are read before a beam search chooses among them
        self._ids = self._ids[rows]

    def close(self) -> None:
        """Forget the rows."""
        self._ids = None


def _check_head(source_dir: Path, component: ComponentPlan) -> None:
    """Check that the task is the one that the model was saved for: the compiler has no argument for a task.

    Raises:
        SpecError: config.json names the architecture of another task.
    """
    config = load_config(source_dir, trust_remote_code=component.trust_remote_code)
    for name in getattr(config, "architectures", None) or ():
        saved_task = next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
        if saved_task is not component.hf_task.graph_task:
            raise SpecError(
                f"hyperdex cannot compile {name} for {component.hf_task.value}: it compiles a model only for the "
                "task that the model was saved for.",
                hint=f"Request {saved_task}."
                if saved_task in HyperdexTarget.capabilities.hf_tasks
                else "Choose another target.",
            )
