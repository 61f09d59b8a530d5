"""Small source models for the tests: random weights with fixed seeds, and a fixed vocabulary."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import GRAPH_TASKS, HfTask

ARCHITECTURES = ("bert", "distilbert", "roberta")
LABELS = {
    HfTask.TEXT_CLASSIFICATION: ("negative", "neutral", "positive"),
    HfTask.ZERO_SHOT_CLASSIFICATION: ("contradiction", "neutral", "entailment"),
    HfTask.TOKEN_CLASSIFICATION: ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    HfTask.IMAGE_CLASSIFICATION: ("cat", "dog", "bird", "boat"),
    HfTask.IMAGE_SEGMENTATION: ("sky", "road", "tree"),
    HfTask.OBJECT_DETECTION: ("cat", "dog", "bird", "boat"),
    HfTask.AUDIO_FRAME_CLASSIFICATION: ("first speaker", "second speaker"),
    HfTask.AUDIO_CLASSIFICATION: ("yes", "no", "stop"),
}
_LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'")
MAX_TOKENS = 64
# Graphs that answer in one call; tests/unit/test_generation.py has the one that goes on.
TEXT_GRAPHS = tuple(task for task in GRAPH_TASKS if task.modality == "text" and not task.generates)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}answer : {% endif %}"
)
SIGNAL_TASKS = tuple(task for task in HfTask if task.modality != "text")
_VOCAB_SIZE = 600


def sentences() -> list[str]:
    """Return the natural sentences that are built into the library."""
    text = (files("compileflow.validation") / "data" / "sentences_en.txt").read_text("utf-8")
    return text.splitlines()


def build_model(
    folder: Path, hf_task: HfTask, *, architecture: str = "bert", seed: int = 0, max_tokens: int | None = None
) -> Path:
    """Write a random model with its tokenizer or processor, as save_pretrained does, and return the folder.

    Weights are larger than the default ones, so that masks, token types and labels matter. Image models are ViT,
    audio models are wav2vec2 with an attention mask.
    """
    import torch
    import transformers

    if hf_task.modality == "image-text":
        return _build_clip(folder, seed)
    if hf_task.modality != "text":
        return _build_signal_model(folder, hf_task, seed)
    if hf_task.generates:
        return build_decoder(folder, seed=seed)
    torch.manual_seed(seed)
    tokenizer = _tokenizer(architecture)
    labels = LABELS.get(hf_task, ("LABEL_0", "LABEL_1"))
    model = getattr(transformers, AUTO_CLASSES[hf_task]).from_config(
        _config(architecture, tokenizer, labels, max_tokens or MAX_TOKENS)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3 if "embeddings" in name else 0.15)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_decoder(
    folder: Path,
    *,
    model_type: str = "llama",
    seed: int = 0,
    template: str | None = CHAT_TEMPLATE,
    max_tokens: int = MAX_TOKENS,
    **settings: Any,
) -> Path:
    """Write a random decoder with its tokenizer, and return the folder.

    The weights are so large that two tokens are hardly ever equally likely.

    Args:
        folder: Folder to write.
        model_type: Family of the decoder, as transformers names it.
        seed: Seed of the weights.
        template: Template of chats; None for a tokenizer without one.
        max_tokens: Number of positions.
        **settings: Fields of the configuration.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = _decoder_tokenizer()
    tokenizer.chat_template = template
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.AutoConfig.for_model(
        model_type,
        **ids,
        **(size | {"num_key_value_heads": 2, "initializer_range": 0.4} | settings),
        vocab_size=len(tokenizer),
        max_position_embeddings=max_tokens,
    )
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _build_signal_model(folder: Path, hf_task: HfTask, seed: int) -> Path:
    import torch
    import transformers

    torch.manual_seed(seed)
    labels = LABELS.get(hf_task, ("LABEL_0",))
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if hf_task.modality == "image":
        config, processor = _image_parts(hf_task, size, named)
    else:
        config = transformers.Wav2Vec2Config(
            **size,
            **named,
            vocab_size=len(_LETTERS),
            feat_extract_norm="layer",
            conv_dim=(16, 16, 16),
            conv_kernel=(10, 3, 3),
            conv_stride=(5, 4, 4),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=32,
            do_stable_layer_norm=True,
            tdnn_dim=(16, 16, 16, 16, 32),
            xvector_output_dim=16,
        )
        processor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model = getattr(transformers, AUTO_CLASSES[hf_task]).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if hf_task is HfTask.SPEECH_RECOGNITION:
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps({letter: n for n, letter in enumerate(_LETTERS)}), "utf-8")
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def _build_clip(folder: Path, seed: int) -> Path:
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = _tokenizer("roberta")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size["projection_dim"] = 16
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = transformers.CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3 if "embedding" in name else 0.15)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=pixels).save_pretrained(folder)
    return folder


def _image_parts(hf_task: HfTask, size: dict[str, int], named: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configuration of an image model and its processor: ViT, or another one with the task's head."""
    import transformers

    pixels = {"height": 32, "width": 32}
    if hf_task is HfTask.IMAGE_SEGMENTATION:
        config = transformers.SegformerConfig(
            **named,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
        )
        return config, transformers.SegformerImageProcessor(size=pixels)
    if hf_task is HfTask.OBJECT_DETECTION:
        sides = {"height": 32, "width": 48}
        config = transformers.YolosConfig(
            **size, **named, image_size=list(sides.values()), patch_size=8, num_detection_tokens=12
        )
        return config, transformers.YolosImageProcessor(size=sides, do_pad=False)
    if hf_task is HfTask.DEPTH_ESTIMATION:
        config = transformers.DPTConfig(
            **(size | {"num_hidden_layers": 4}),
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            is_hybrid=False,
        )
        return config, transformers.DPTImageProcessor(size=pixels)
    config = transformers.ViTConfig(**size, **named, image_size=32, patch_size=8)
    return config, transformers.ViTImageProcessor(size=pixels)


def _tokenizer(architecture: str) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if architecture == "roberta":
        names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
        first, last = "<s>", "</s>"
    else:
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        first, last = "[CLS]", "[SEP]"
    core = Tokenizer(models.WordPiece(_vocabulary(list(names.values())), unk_token=names["unk"]))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, core.token_to_id(token)) for token in (first, last)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=ids
    )
    special = {f"{kind}_token": token for kind, token in names.items()}
    if architecture == "roberta":
        special |= {"cls_token": first, "sep_token": last}
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if architecture == "bert" else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=MAX_TOKENS, model_input_names=inputs, **special
    )


def _decoder_tokenizer() -> Any:
    """Return a tokenizer that adds no token after a text, as those of decoders."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    core = Tokenizer(models.WordPiece(_vocabulary(list(names.values())), unk_token=names["unk"]))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{kind}_token": token for kind, token in names.items()},
    )


def _vocabulary(special: list[str]) -> dict[str, int]:
    """Return special tokens, characters and frequent words: the same in each run, unlike a trained vocabulary."""
    text = " ".join(sentences()).lower()
    letters = sorted(set(re.findall(r"[a-z0-9]", text)))
    marks = sorted(set(re.findall(r"[^\w\s]", text)))
    counts = Counter(re.findall(r"[a-z]{2,}", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = [*special, *letters, *marks, *(f"##{letter}" for letter in letters), *words]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens[:_VOCAB_SIZE]))}


def _config(architecture: str, tokenizer: Any, labels: tuple[str, ...], max_tokens: int) -> Any:
    import transformers

    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if architecture == "bert":
        return transformers.BertConfig(**common, **size, max_position_embeddings=max_tokens)
    if architecture == "roberta":
        return transformers.RobertaConfig(
            **common,
            **size,
            # Positions are numbered from pad_token_id + 1.
            max_position_embeddings=max_tokens + tokenizer.pad_token_id + 1,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return transformers.DistilBertConfig(
        **common, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=max_tokens
    )
