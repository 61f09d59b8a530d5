"""Faults in interface files: configuration, tokenizer, processor and modules of the artifact."""

from __future__ import annotations

from typing import Any

from benchmarks.mutation.fault import in_file
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    ENGLISH_CLASSIFIER,
    FILLER,
    IMAGES,
    MASKED_SPEECH,
    PICTURES_AND_TEXTS,
    READER,
    SENTENCES,
    SOUNDS,
    SPEECH,
    TAGGER,
    ZERO_SHOT,
    onnx,
    openvino,
    torchscript,
)

FILES = ("interface_files", "token_ids", "processor_outputs", "pipeline_answers")
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
PROCESSOR = "preprocessor_config.json"


@in_file(CONFIG, onnx(CLASSIFIER), *FILES)
def names_of_labels_are_rotated(config: dict[str, Any]) -> None:
    names = config["id2label"]
    config["id2label"] = {key: names[str((int(key) + 1) % len(names))] for key in names}


@in_file(CONFIG, openvino(TAGGER), *FILES)
def beginnings_and_insides_of_names_are_exchanged(config: dict[str, Any]) -> None:
    names = config["id2label"]
    names["1"], names["2"] = names["2"], names["1"]


@in_file(CONFIG, torchscript(CLASSIFIER), *FILES)
def scores_are_those_of_several_labels(config: dict[str, Any]) -> None:
    config["problem_type"] = "multi_label_classification"


@in_file(CONFIG, torchscript(ZERO_SHOT), *FILES)
def entailment_is_another_label(config: dict[str, Any]) -> None:
    config["label2id"] = {"entailment": 0, "contradiction": 1, "neutral": 2}


@in_file(TOKENIZER_CONFIG, torchscript(ENGLISH_CLASSIFIER), *FILES)
def capitals_are_kept(config: dict[str, Any]) -> None:
    config["do_lower_case"] = False


@in_file(TOKENIZER_CONFIG, onnx(SENTENCES), *FILES)
def accents_are_kept(config: dict[str, Any]) -> None:
    config["strip_accents"] = False


@in_file(TOKENIZER, torchscript(CLASSIFIER), *FILES)
def capitals_are_unknown(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"]["lowercase"] = False


@in_file(TOKENIZER, openvino(ENGLISH_CLASSIFIER), *FILES)
def vocabulary_is_cut(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number for word, number in words.items() if number < 6_000}


@in_file(TOKENIZER, torchscript(SENTENCES), *FILES)
def two_rare_words_are_exchanged(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    words["volcano"], words["cathedral"] = words["cathedral"], words["volcano"]


@in_file(TOKENIZER, onnx(CLASSIFIER), *FILES)
def special_tokens_are_not_added(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = None


@in_file(TOKENIZER, onnx(CLASSIFIER), *FILES)
def long_words_are_unknown(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["max_input_chars_per_word"] = 7


@in_file(TOKENIZER, torchscript(TAGGER), *FILES)
def pieces_of_words_are_unknown(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["continuing_subword_prefix"] = "@@"


@in_file(TOKENIZER, onnx(READER), *FILES)
def contexts_have_the_type_of_questions(tokenizer: dict[str, Any]) -> None:
    for part in tokenizer["post_processor"]["pair"]:
        next(iter(part.values()))["type_id"] = 0


@in_file(TOKENIZER_CONFIG, onnx(ENGLISH_CLASSIFIER), *FILES)
def texts_are_cut_at_24_tokens(config: dict[str, Any]) -> None:
    config["model_max_length"] = 24


@in_file(TOKENIZER_CONFIG, torchscript(CLASSIFIER, (1, 16), (8, 64)), *FILES)
def texts_are_cut_at_their_beginning(config: dict[str, Any]) -> None:
    config["truncation_side"] = "left"


@in_file(TOKENIZER_CONFIG, torchscript(FILLER), *FILES)
def mask_token_is_another(config: dict[str, Any]) -> None:
    config["mask_token"] = "[UNK]"  # noqa: S105 - a token of a vocabulary


@in_file("1_Pooling/config.json", torchscript(SENTENCES), *FILES)
def first_token_is_pooled(pooling: dict[str, Any]) -> None:
    pooling.update(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)


@in_file("1_Pooling/config.json", openvino(SENTENCES), *FILES)
def largest_values_are_pooled(pooling: dict[str, Any]) -> None:
    pooling.update(pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True)


@in_file("modules.json", onnx(SENTENCES), *FILES)
def embeddings_are_not_normalised(modules: list[Any]) -> None:
    modules.pop()


@in_file("sentence_bert_config.json", torchscript(SENTENCES), *FILES)
def sentences_are_cut_at_8_tokens(settings: dict[str, Any]) -> None:
    settings["max_seq_length"] = 8


@in_file(PROCESSOR, torchscript(IMAGES), *FILES)
def means_of_colours_are_others(processor: dict[str, Any]) -> None:
    processor["image_mean"] = [0.2, 0.5, 0.8]


@in_file(PROCESSOR, onnx(IMAGES), *FILES)
def pictures_are_scaled_without_smoothing(processor: dict[str, Any]) -> None:
    processor["resample"] = 0


@in_file(PROCESSOR, openvino(IMAGES), *FILES)
def pictures_are_twice_as_bright(processor: dict[str, Any]) -> None:
    processor["rescale_factor"] = 2 / 255


@in_file(PROCESSOR, openvino(SOUNDS), *FILES)
def sounds_are_not_normalised(processor: dict[str, Any]) -> None:
    processor["do_normalize"] = False


@in_file(PROCESSOR, torchscript(MASKED_SPEECH), *FILES)
def speech_is_not_normalised(processor: dict[str, Any]) -> None:
    processor["do_normalize"] = False


@in_file("vocab.json", torchscript(MASKED_SPEECH), *FILES)
def letters_are_permuted(letters: dict[str, int]) -> None:
    letters.update({"a": letters["e"], "e": letters["a"], "<pad>": letters["|"], "|": letters["<pad>"]})


@in_file(TOKENIZER_CONFIG, openvino(SPEECH), *FILES)
def words_are_not_separated(config: dict[str, Any]) -> None:
    config["word_delimiter_token"] = "'"  # noqa: S105 - a token of a vocabulary


@in_file(PROCESSOR, onnx(PICTURES_AND_TEXTS), *FILES)
def deviations_of_colours_are_others(processor: dict[str, Any]) -> None:
    processor["image_std"] = [1.0, 1.0, 1.0]


@in_file(TOKENIZER, openvino(PICTURES_AND_TEXTS), *FILES)
def labels_of_pictures_lose_their_last_token(tokenizer: dict[str, Any]) -> None:
    single = tokenizer["post_processor"]["single"]
    tokenizer["post_processor"]["single"] = single[:-1]


@in_file(TOKENIZER, onnx(CLASSIFIER), *FILES)
def tokenizer_splits_texts_at_spaces_only(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
