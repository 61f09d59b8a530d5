"""shrunken_config: a configuration of any model type with sizes that build and run in milliseconds.

Most fields are found by their names, which transformers' families share. special_cases.yaml lists the rest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

VOCABULARY = 256
POSITIONS = 128
IMAGE_SIDE = 64
# Integer fields by name: the first pattern that fits gives the value, which is used if the default is larger.
_SIZES = [
    (re.compile(pattern), value)
    for pattern, value in (
        (r"(?!type_|task_type_).*vocab_size(_per_layer_input)?|head_out_channels", VOCABULARY),
        (r".*(key_value|kv)_heads", 2),
        (r".*(linear|mamba|ssm)_?(num_)?(key|value|v|k|n)_heads", 4),
        (r"(.*_)?(num_|n_)?(attention_|self_attention_|cross_attention_|query_)?heads?", 4),
        (r".*(qk_rope|rotary|rope)_(head_)?dim", 4),
        (r"(.*_)?head_(dim|size)|d_kv|d_head|kv_channels|dim_head|attention_head_size|qk_nope_head_dim", 8),
        (
            r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|d_ff|dff|mlp_dim|n_inner|d_inner"
            r"|feed_?forward_(size|dim|hidden_size)|dim_feedforward|(moe|expert)_.*(size|dim)|feedforward_dim)",
            32,
        ),
        (r"(.*_)?lora_rank", 8),
        (r"(.*_)?(n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts)", 4),
        (r"n_group|topk_group", 1),
        (r"num_experts_per_tok|top_k_experts|moe_(topk|k)", 2),
        (
            r"(.*_)?(max_(2d_)?position_embeddings|n_positions|max_(source|target)_positions|context_length"
            r"|max_seq_len|max_sequence_length|seq_length|block_size)",
            POSITIONS,
        ),
        (r"(.*_)?(sliding_window(_size)?|local_attention|attention_chunk_size|chunk_size)", 16),
        (r"(.*_)?image_size", IMAGE_SIDE),
        (r"(.*_)?patch_size", 16),
        (
            r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embd?_dim|embed_dim|embedding_(size|dim)|dim|d_latents"
            r"|projection_(dim|size)|proj_size|output_dim|pooler_output_size|hidden_channels|num_filters"
            r"|out_channels|mask_feature_size|head_hidden_size|proj_dim|cross_attention_dim|entity_emb_size)",
            32,
        ),
        (r"num_queries|entity_vocab_size|num_latents", 8),
    )
]
_LAYERS = re.compile(
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|depth|(en|de)coder_layers|num_self_attends_per_block"
    r"|num_(en|de)coder_layers)"
)
# Sequences of integers by name, scaled down together so that the smallest becomes this size.
_WIDTHS = re.compile(r"(.*_)?(hidden_sizes|embed_dims?|channels|conv_dim|widths|dims|tdnn_dim|out_channels)")
_SMALLEST_WIDTH = 16
_DEPTHS = re.compile(r"(.*_)?(depths|block_repeats|num_blocks|num_block_repeats|numb_of_layers)")
_HEADS = re.compile(r"(.*_)?(num_)?(attention_)?heads")
_TOKENS = re.compile(r".*_(token_id|token_index|token_ids)|pad_index|bos_index|eos_index|unk_index|mask_index")

_CASES: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "special_cases.yaml").read_text("utf-8")
)


def special_case(model_type: str, part: str) -> Any:
    """Return one part of a model type's entry in special_cases.yaml: config, tokenizer, processor or inputs."""
    return (_CASES.get(model_type) or {}).get(part) or {}


def shrunken_config(config_class: Any, values: Mapping[str, Any], *, layers: int) -> Any:
    """Return a small configuration.

    Args:
        config_class: Configuration class of transformers.
        values: Fields that are set, where the class has them, for example token ids and labels.
        layers: Largest number of layers.
    """
    return _shrunken(config_class, None, values, layers)


def _shrunken(config_class: Any, template: Any, values: Mapping[str, Any], layers: int) -> Any:
    """Return a small configuration; `template` gives what a parent sets in its nested configurations."""
    case = dict(special_case(config_class.model_type, "config"))
    nested_cases = {name: case.pop(name) for name in list(case) if isinstance(case[name], dict)}
    fields: dict[str, Any] = {}
    free_token = VOCABULARY - 1
    for field in dataclasses.fields(config_class):
        default = _default(field)
        value = default if default is None else _value(template, field.name, default)
        if field.name in values:
            fields[field.name] = values[field.name]
        elif _TOKENS.fullmatch(field.name) and isinstance(value, int) and value >= VOCABULARY:
            fields[field.name] = free_token
            free_token -= 1
        else:
            small = _small(field.name, value, layers)
            if small != default:
                fields[field.name] = small
    if "kv_lora_rank" in fields:
        # Latent attention has as many heads for keys and values as for queries.
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= case
    # A case with a model type is a whole configuration; another one changes the family's own nested configuration.
    whole_cases = {name for name, nested in nested_cases.items() if "model_type" in nested}
    nested_names = [
        name for name in config_class.sub_configs or {} if name not in case and name not in whole_cases
    ]
    if nested_names:
        default_config = config_class()
        for name in nested_names:
            nested = getattr(default_config, name, None)
            if nested is not None and dataclasses.is_dataclass(nested):
                nested_values = {**values, **nested_cases.pop(name, {})}
                fields[name] = _shrunken(type(nested), nested, nested_values, layers)
    fields |= nested_cases
    return config_class(**fields)


def _value(template: Any, name: str, default: Any) -> Any:
    try:
        return getattr(template, name, default)
    except RuntimeError:
        # It differs between layers.
        return default


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _small(name: str, value: Any, layers: int) -> Any:
    if name == "vocab_size":
        return VOCABULARY
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and _LAYERS.fullmatch(name):
        return min(value, layers)
    if isinstance(value, int):
        limit = next((size for pattern, size in _SIZES if pattern.fullmatch(name)), None)
        return value if limit is None else min(value, limit)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if _DEPTHS.fullmatch(name):
            return type(value)(1 for _ in value)
        if _HEADS.fullmatch(name):
            return type(value)(min(item, 2) for item in value)
        if name.endswith("image_size"):
            return type(value)(IMAGE_SIDE for _ in value)
        if _WIDTHS.fullmatch(name) and min(value) > _SMALLEST_WIDTH:
            return type(value)(item * _SMALLEST_WIDTH // min(value) // 8 * 8 for item in value)
    return value
