"""honest_compiles: compiles without a fault, of many architectures, targets, precisions, sizes and weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from benchmarks.mutation.fault import Healthy
from benchmarks.mutation.faults.healthy import MASKED
from benchmarks.mutation.sources import Source, Weights
from compileflow.spec import HfTask, Precision

_TARGETS = ("torchscript", "onnx-runtime", "openvino")
_LABELS = ("contradiction", "neutral", "entailment")
_TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
_TEXT_TASKS = (
    HfTask.TEXT_CLASSIFICATION,
    HfTask.TOKEN_CLASSIFICATION,
    HfTask.QUESTION_ANSWERING,
    HfTask.FEATURE_EXTRACTION,
    HfTask.FILL_MASK,
)
_TEXT_TYPES = (
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "electra",
    "mpnet",
    "deberta-v2",
    "xlm-roberta",
    "camembert",
    "modernbert",
    "mobilebert",
    "roformer",
)
_SIGNAL_MODELS = (
    (HfTask.IMAGE_CLASSIFICATION, "vit"),
    (HfTask.IMAGE_CLASSIFICATION, "deit"),
    (HfTask.IMAGE_CLASSIFICATION, "swin"),
    (HfTask.IMAGE_CLASSIFICATION, "convnext"),
    (HfTask.IMAGE_CLASSIFICATION, "resnet"),
    (HfTask.IMAGE_CLASSIFICATION, "mobilenet_v2"),
    (HfTask.IMAGE_FEATURE_EXTRACTION, "dinov2"),
    (HfTask.AUDIO_CLASSIFICATION, "wav2vec2"),
    (HfTask.AUDIO_CLASSIFICATION, "hubert"),
    (HfTask.AUDIO_CLASSIFICATION, "audio-spectrogram-transformer"),
    (HfTask.SPEECH_RECOGNITION, "wav2vec2"),
    (HfTask.SPEECH_RECOGNITION, "hubert"),
    (HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION, "clip"),
)
# Models that limits have judged wrongly: scales, sizes and numbers of labels at the ends of their ranges.
_EXTREMES: dict[str, Source] = {
    "logits times 100": Source(HfTask.TEXT_CLASSIFICATION, weights="large logits"),
    "tags times 100": Source(HfTask.TOKEN_CLASSIFICATION, "distilbert", "large logits", labels=_TAGS),
    "spans times 100": Source(HfTask.QUESTION_ANSWERING, "roberta", "large logits"),
    "logits all zero": Source(HfTask.TEXT_CLASSIFICATION, weights="equal logits"),
    "one label": Source(HfTask.TEXT_CLASSIFICATION, labels=("score",)),
    "two labels": Source(HfTask.TEXT_CLASSIFICATION, "electra", labels=("no", "yes"), seed=4),
    "500 labels": Source(HfTask.TEXT_CLASSIFICATION, labels=tuple(f"label {number}" for number in range(500))),
    "at most 8 tokens": Source(HfTask.TEXT_CLASSIFICATION, longest=8),
    "at most 8 tokens, tags": Source(HfTask.TOKEN_CLASSIFICATION, labels=_TAGS, longest=8),
    "12 layers": Source(HfTask.FEATURE_EXTRACTION, config=(("num_hidden_layers", 12),)),
    "12 layers, tags": Source(HfTask.TOKEN_CLASSIFICATION, "roberta", config=(("num_hidden_layers", 12),)),
    "width 128": Source(HfTask.TEXT_CLASSIFICATION, config=(("hidden_size", 128), ("intermediate_size", 512))),
    "width 16": Source(HfTask.FEATURE_EXTRACTION, config=(("hidden_size", 16),)),
    "30,522 words": Source(HfTask.FILL_MASK, vocabulary="english", longest=128),
    "30,522 words, 512 tokens": Source(HfTask.TEXT_CLASSIFICATION, vocabulary="english", longest=512),
    "several labels": Source(HfTask.TEXT_CLASSIFICATION, config=(("problem_type", "multi_label_classification"),)),
    "entailment": Source(HfTask.ZERO_SHOT_CLASSIFICATION, labels=_LABELS),
    "sentences": Source(HfTask.SENTENCE_SIMILARITY, vocabulary="english", longest=128),
    "all-MiniLM-L6-v2": Source(HfTask.SENTENCE_SIMILARITY, "minilm"),
}


def honest_compiles() -> dict[str, Healthy]:
    """Return the compiles by name."""
    compiles: dict[str, Healthy] = {}
    for name, healthy in _compiles():
        full_name = f"{name}, {healthy.source.hf_task.value}, {healthy.target}, {healthy.precision.value}"
        compiles[full_name] = healthy
    return compiles


def _compiles() -> Iterator[tuple[str, Healthy]]:
    # torchscript compiles in a moment, so that it compiles everything; the others share what is left.
    for number, (model_type, target) in enumerate(product(_TEXT_TYPES, _TARGETS)):
        kinds: tuple[Weights, ...] = ("spread", "initial", "trained")
        for turn, weights in enumerate(kinds):
            if target == "torchscript" or (number + turn) % 3:
                task = _TEXT_TASKS[(number + 2 * turn) % len(_TEXT_TASKS)]
                yield f"{model_type} {weights}", Healthy(Source(task, model_type, weights, seed=turn), target)
    for (task, model_type), target in product(_SIGNAL_MODELS, _TARGETS):
        source = _signal_source(task, model_type)
        yield f"{model_type} spread", Healthy(source, target)
        if target == "torchscript" and task is not HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION:
            yield f"{model_type} trained", Healthy(source.differing(weights="trained", seed=1), target)
    for number, (name, source) in enumerate(_EXTREMES.items()):
        yield name, Healthy(source, "torchscript")
        yield name, Healthy(source, ("onnx-runtime", "openvino")[number % 2])
    for seed, task, precision in product((10, 11), _TEXT_TASKS, (Precision.FP32, Precision.BF16)):
        source = Source(task, "bert", "trained", seed=seed)
        yield f"bert seed {seed}", Healthy(source, "torchscript", precision)
    yield from _lower_precisions()


def _signal_source(task: HfTask, model_type: str) -> Source:
    # torchscript pads sounds to its buckets, which needs a model that reads a mask.
    return Source(task, model_type, config=MASKED if model_type in ("wav2vec2", "hubert") else ())


def _lower_precisions() -> Iterator[tuple[str, Healthy]]:
    for number, model_type in enumerate(_TEXT_TYPES[:10]):
        task = _TEXT_TASKS[number % len(_TEXT_TASKS)]
        for target in ("torchscript", "openvino"):
            source = Source(task, model_type, "trained" if target == "openvino" else "spread", seed=2)
            yield f"{model_type} {source.weights}", Healthy(source, target, Precision.BF16)
        for target in ("onnx-runtime", "openvino"):
            source = Source(task, model_type, "trained", seed=2)
            yield f"{model_type} trained", Healthy(source, target, Precision.INT8)
    for task, model_type in (_SIGNAL_MODELS[0], _SIGNAL_MODELS[3], _SIGNAL_MODELS[7], _SIGNAL_MODELS[10]):
        for target in ("torchscript", "openvino"):
            source = _signal_source(task, model_type).differing(weights="trained")
            yield f"{model_type} trained", Healthy(source, target, Precision.BF16)
    sentences = _EXTREMES["all-MiniLM-L6-v2"]
    for target, precision in (
        ("torchscript", Precision.BF16),
        ("openvino", Precision.BF16),
        ("onnx-runtime", Precision.INT8),
        ("openvino", Precision.INT8),
    ):
        yield "all-MiniLM-L6-v2", Healthy(sentences, target, precision)
