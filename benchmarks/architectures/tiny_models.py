"""write_model: a small random model of one class in a folder, with a tokenizer or processor of its family."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.architectures.shrink import IMAGE_SIDE, POSITIONS, shrunken_config, special_case
from compileflow.source_model.tasks import model_class_of
from compileflow.spec import HfTask

# Short, ordinary and long rows: models that cut rows into chunks of 64 tokens get two.
TEXTS = (
    "it was on time.",
    "no",
    "the train from the city was late, and the coffee was cold; we had to go back to the house",
    "she said that the film was long, but the music was good, and so they went home by the river. " * 4,
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Special tokens in the order of their ids: BERT's, and those of families whose pad token has the id 1.
_BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_ROBERTA = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
_LABELS = ("red", "green", "blue")
_WITHOUT_LABELS = ("Model", "MaskedLM", "CausalLM", "CTC", "QuestionAnswering", "MultipleChoice")


@dataclass(frozen=True)
class ModelClass:
    """One class of the sweep.

    Attributes:
        hf_task: Task that the class is compiled for.
        auto_class: Auto class of transformers that maps to it.
        model_type: Key in the auto class's mapping.
        name: Name of the model class.
    """

    hf_task: HfTask
    auto_class: str
    model_type: str
    name: str


def write_model(model_class: ModelClass, folder: Path, *, seed: int = 0) -> None:
    """Write a model with fixed random weights and its tokenizer or processor, as save_pretrained does.

    Args:
        model_class: The class.
        folder: Folder to write.
        seed: Seed of a decoder's weights.

    Raises:
        Exception: transformers cannot build the class from a small configuration.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    mapping = getattr(transformers, model_class.auto_class)._model_mapping
    config_class = mapping._load_attr_from_module(
        model_class.model_type, mapping._config_mapping[model_class.model_type]
    )
    tokenizer = None
    generates = model_class.hf_task.generates
    values: dict[str, Any] = (
        dict(special_case(model_class.model_type, "decoder")) if generates else {"use_cache": False}
    )
    if model_class.hf_task.modality != "audio" or model_class.hf_task is HfTask.SPEECH_RECOGNITION:
        tokenizer = _tokenizer(config_class, model_class)
        values |= _token_ids(tokenizer)
    if not model_class.auto_class.endswith(_WITHOUT_LABELS):
        values |= {
            "id2label": dict(enumerate(_LABELS)),
            "label2id": {label: number for number, label in enumerate(_LABELS)},
            "num_labels": len(_LABELS),
        }
    # Heads need one layer, because the family's base model is checked with two. A decoder has a cache for each.
    layers = 2 if model_class.auto_class == "AutoModel" or generates else 1
    config = shrunken_config(config_class, values, layers=layers)
    if tokenizer is not None and getattr(config, "is_encoder_decoder", False):
        # Checkpoints have it in their config.json, although it is not a field of every class.
        config.decoder_start_token_id = tokenizer.eos_token_id
    # First, because an error that names a missing library says more than one of a default configuration.
    processor = None if model_class.hf_task.modality == "text" else _processor(model_class, config)
    if generates:
        # A configuration of several parts is that of a decoder with an encoder of images or sound.
        model = transformers.AutoModelForCausalLM.from_config(config)
        _spread_decoder(model, seed)
    else:
        model = built_class(config, model_class)(config)
        spread_weights(model)
    if model_class.hf_task.takes_text:
        tokenizer.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        if model_class.hf_task.modality == "image":
            _settle_batch_norms(model, processor)
        if model_class.hf_task is HfTask.SPEECH_RECOGNITION:
            _write_letters(folder)
    model.eval().save_pretrained(folder)


def built_class(config: Any, model_class: ModelClass) -> Any:
    """Return the class that the sweep builds: the encoder of a model that AutoModel loads with its decoder."""
    import transformers

    encoder_or_auto = model_class_of(config, model_class.hf_task)
    if encoder_or_auto.__name__.startswith("Auto"):
        return getattr(transformers, model_class.name)
    return encoder_or_auto


def spread_weights(model: Any, *, seed: int = 0, width: float = 1.5) -> None:
    """Widen weights, so that masks, positions, token types and labels change the answers visibly.

    Args:
        model: The model.
        seed: Seed of the weights.
        width: How far a matrix stretches its inputs, roughly.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                scale = 0.5 if "embed" in name and parameter.ndim == 2 else width / fan_in**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias") and parameter.numel() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _spread_decoder(model: Any, seed: int) -> None:
    """Widen weights, and let the layers outweigh the embeddings: otherwise, tied weights repeat the last token."""
    import torch

    spread_weights(model, seed=seed, width=2.5)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)


def _settle_batch_norms(model: Any, processor: Any) -> None:
    """Let batch norms measure pictures: otherwise, the signal dies out in deep convolutional models."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None
        same_size = [picture.resize((64, 64)) for picture in pictures()]
        # A feature map of one element has no variance.
        with torch.no_grad(), suppress(ValueError):
            model.train()(**processor(images=same_size, return_tensors="pt"))


def pictures() -> list[Any]:
    """Return three pictures of different sizes with large areas, which survive a smaller resolution."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    sizes = ((64, 64), (48, 64), (100, 40))
    patterns = [Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [pattern.resize(size) for pattern, size in zip(patterns, sizes, strict=True)]


def _tokenizer(config_class: Any, model_class: ModelClass) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    case = special_case(model_class.model_type, "tokenizer")
    family_class = _tokenizer_class(config_class)
    defaults = {
        field: getattr(config_class, field, None)
        for field in ("pad_token_id", "type_vocab_size", "is_encoder_decoder")
    }
    names = dict(_ROBERTA if defaults["pad_token_id"] == 1 or not defaults["type_vocab_size"] else _BERT)
    tokens = [
        *names.values(),
        *_LETTERS,
        *"0123456789",
        *".,;:!?'-",
        *(f"##{letter}" for letter in _LETTERS),
        *re.findall("[a-z]{2,}", " ".join(TEXTS)),
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk"]))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The tokenizer of a decoder adds no token after a prompt, and pads on the left.
    generates = model_class.hf_task.generates
    first, last = names.get("bos", names.get("cls")), names.get("eos", names.get("sep"))
    core.post_processor = processors.TemplateProcessing(
        single=case.get("single", "$A" if generates else f"{first} $A {last}"),
        pair=case.get("pair", f"{first} $A {last} $B:1 {last}:1"),
        special_tokens=[(token, vocabulary[token]) for token in names.values()],
    )
    special = {f"{kind}_token": token for kind, token in names.items()}
    special |= {"cls_token": first, "sep_token": last, "bos_token": first, "eos_token": last}
    inputs = case.get(
        "inputs",
        [
            name
            for name in getattr(family_class, "model_input_names", None) or ("input_ids", "attention_mask")
            if name in ("input_ids", "attention_mask", "token_type_ids")
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=case.get("model_max_length", POSITIONS - 4),
        model_input_names=inputs,
        padding_side="left"
        if generates
        else case.get("padding_side", getattr(family_class, "padding_side", "right")),
        **special,
    )


def _tokenizer_class(config_class: Any) -> Any:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    try:
        tokenizer_class = TOKENIZER_MAPPING[config_class]
        # A class whose library is missing raises when an attribute is read.
        return tokenizer_class if hasattr(tokenizer_class, "model_input_names") else None
    except (KeyError, ImportError):
        return None


def _token_ids(tokenizer: Any) -> dict[str, int]:
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    # XLM and Flaubert call them so.
    ids |= {f"{kind}_index": ids[f"{kind}_token_id"] for kind in ("pad", "bos", "eos", "mask", "unk")}
    return ids | {
        "decoder_start_token_id": ids["eos_token_id"],
        "forced_eos_token_id": ids["eos_token_id"],
        "question_token_id": ids["mask_token_id"],
    }


def _processor(model_class: ModelClass, config: Any) -> Any:
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    arguments = special_case(model_class.model_type, "processor")
    class_name = special_case(model_class.model_type, "processor_class")
    if model_class.hf_task.modality == "audio":
        audio_class = getattr(transformers, class_name) if class_name else FEATURE_EXTRACTOR_MAPPING[type(config)]
        return audio_class(**arguments)
    if class_name:
        image_class = getattr(transformers, class_name)
    else:
        backends = IMAGE_PROCESSOR_MAPPING[type(config)]
        image_class = backends.get("pil") or backends["torchvision"]
    return image_class(**{**_image_sizes(image_class, config), **arguments})


def _image_sizes(processor_class: Any, config: Any) -> dict[str, Any]:
    side = getattr(config, "image_size", None) or IMAGE_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    sizes = {}
    for name in ("size", "crop_size"):
        default = getattr(processor_class, name, None)
        if isinstance(default, dict):
            sizes[name] = {key: width if key == "width" else height for key in default}
    return sizes


def _write_letters(folder: Path) -> None:
    import transformers

    letters = ("<pad>", "<s>", "</s>", "<unk>", "|", *_LETTERS, "'")
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}), "utf-8")
    transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
