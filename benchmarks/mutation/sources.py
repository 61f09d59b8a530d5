"""Source: a recipe for one small source model, and write_source, which writes its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.architectures.tiny_models import ModelClass, built_class, pictures, spread_weights, write_model
from compileflow.cli.demo import demo_model
from compileflow.contracts.digests import json_digest
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import HfTask
from compileflow.testing.shared import make_once
from compileflow.validation.cases import load_examples

Weights = Literal["spread", "initial", "trained", "large logits", "equal logits"]
_TRAINING_STEPS = 25
_TRAINING_ROWS = 16
# Parts of the names of the last layers of a model with a head.
_HEADS = (
    "classifier",
    "qa_outputs",
    "lm_head",
    "score",
    "logits_proj",
    "predictions.decoder",
    "cls.predictions.bias",
)


@dataclass(frozen=True)
class Source:
    """A recipe for one source model.

    Attributes:
        hf_task: Task of the model.
        model_type: Model type of transformers; "minilm" is all-MiniLM-L6-v2 itself.
        weights: spread: large random weights, so that masks, positions and types matter. initial: as transformers
            initialises a model. trained: spread, and then trained for a few steps. large logits: a head that is
            100 times as large. equal logits: a head of zeros.
        seed: Seed of the weights.
        config: Fields of the configuration that differ from those of the small model.
        labels: Names of the labels; () for those of the small model.
        vocabulary: small: letters and a few words. english: the 30,522 pieces of all-MiniLM-L6-v2, for BERT.
        longest: Longest row in tokens; 0 for the small model's.
    """

    hf_task: HfTask
    model_type: str = "bert"
    weights: Weights = "spread"
    seed: int = 0
    config: tuple[tuple[str, Any], ...] = ()
    labels: tuple[str, ...] = ()
    vocabulary: Literal["small", "english"] = "small"
    longest: int = 0

    def folder(self, parent: Path) -> Path:
        """Return the folder of the model below `parent`, and write it if it is not there."""
        if self.model_type == "minilm":
            return demo_model()
        name = f"{self.model_type}-{self.hf_task.value}-{json_digest(repr(self))[:12]}"
        return make_once(parent / name, lambda folder: write_source(self, folder))

    def differing(self, **changes: Any) -> Source:
        """Return the recipe with some fields changed."""
        return replace(self, **changes)


def write_source(source: Source, folder: Path) -> None:
    """Write the model with its tokenizer or processor, as save_pretrained does."""
    import torch
    import transformers

    task = source.hf_task.graph_task
    mapping = getattr(transformers, AUTO_CLASSES[task])._model_mapping._model_mapping
    names = mapping[source.model_type]
    name = names[0] if isinstance(names, (tuple, list)) else names
    model_class = ModelClass(task, AUTO_CLASSES[task], source.model_type, name)
    write_model(model_class, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    for field, value in source.config:
        setattr(config, field, value)
    if source.labels:
        config.id2label = dict(enumerate(source.labels))
        config.label2id = {label: number for number, label in enumerate(source.labels)}
    if source.vocabulary == "english":
        _take_english_tokenizer(folder, config)
    if source.longest:
        # RoBERTa numbers positions from the padding token on.
        config.max_position_embeddings = source.longest + 4
        _edit(folder / "tokenizer_config.json", model_max_length=source.longest)
    if dict(source.config).get("feat_extract_norm") == "layer":
        # These speech encoders read a mask, those with a group norm do not.
        _edit(folder / "preprocessor_config.json", return_attention_mask=True)
    has_other_weights = source.weights != "spread" or source.seed
    if has_other_weights or source.config or source.labels or source.longest or source.vocabulary == "english":
        torch.manual_seed(source.seed)
        model = built_class(config, model_class)(config).eval()
        if source.weights != "initial":
            spread_weights(model, seed=source.seed)
        if source.weights == "trained":
            _train(model, folder, task)
        _change_head(model, source.weights)
        model.eval().save_pretrained(folder)
    if source.hf_task is HfTask.SENTENCE_SIMILARITY:
        _write_sentence_modules(folder, int(config.hidden_size))


def _take_english_tokenizer(folder: Path, config: Any) -> None:
    from transformers import AutoTokenizer

    for path in folder.glob("*token*.json"):
        path.unlink()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id


def _edit(path: Path, **changes: Any) -> None:
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(settings | changes), "utf-8")


def _change_head(model: Any, weights: Weights) -> None:
    import torch

    factor = {"large logits": 100.0, "equal logits": 0.0}.get(weights)
    if factor is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(head in name for head in _HEADS):
                    parameter.mul_(factor)


def _train(model: Any, folder: Path, task: HfTask) -> None:
    """Fit the model to random answers: labels where it has logits, values of a normal distribution elsewhere."""
    import torch

    inputs = {name: torch.as_tensor(value) for name, value in _training_inputs(model, folder, task).items()}
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wanted: Any = None
    for _ in range(_TRAINING_STEPS):
        output = model(**inputs)[0]
        if wanted is None:
            wanted = torch.randn(output.shape, generator=generator)
        loss = torch.nn.functional.cross_entropy(output.flatten(0, -2), wanted.flatten(0, -2).argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _training_inputs(model: Any, folder: Path, task: HfTask) -> dict[str, Any]:
    import numpy as np
    import transformers

    if task.modality == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        return dict(processor(images=[picture.resize((64, 64)) for picture in pictures()], return_tensors="np"))
    if task.modality == "audio":
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        sounds = list(np.random.default_rng(0).standard_normal((4, 16_000), dtype=np.float32))
        return dict(extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="np"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [example["text"] for example in load_examples(HfTask.FILL_MASK, None, _TRAINING_ROWS)[0]]
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="np"))


def _write_sentence_modules(folder: Path, size: int) -> None:
    """Write the files of sentence-transformers: mean of the tokens, scaled to length 1."""
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(names)
    ]
    pooling = {
        "word_embedding_dimension": size,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), "utf-8")
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    settings = {"max_seq_length": 64, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings), "utf-8")
