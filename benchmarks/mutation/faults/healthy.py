"""Healthy compiles that several files of faults plant into, and the gates that may name a kind of fault."""

from benchmarks.mutation.fault import Healthy
from benchmarks.mutation.sources import Source
from compileflow.spec import HfTask

TORCHSCRIPT, ONNX, OPENVINO = "torchscript", "onnx-runtime", "openvino"

# Differences of numbers or of the decisions that follow from them.
NUMBERS = (
    "max_abs_diff",
    "peak_error",
    "rel_l2",
    "one_minus_cosine",
    "typical_error",
    "special_token_error",
    "gain_error",
    "response_error",
    "probability_shift",
    "every_shape",
)
DECISIONS = ("label_order", "label_agreement", "confident_flips", "exact_span", "exact_transcript", "entity_f1")
MASK, TYPES = ("mask_respected", "mask_obeyed"), ("token_types_respected",)

LONGEST = 512
CLASSIFIER = Source(HfTask.TEXT_CLASSIFICATION, longest=LONGEST, config=(("num_hidden_layers", 2),))
ENGLISH_CLASSIFIER = CLASSIFIER.differing(vocabulary="english")
EMBEDDER = Source(HfTask.FEATURE_EXTRACTION, longest=128)
SENTENCES = Source(HfTask.SENTENCE_SIMILARITY, vocabulary="english", longest=128)
TAGGER = Source(HfTask.TOKEN_CLASSIFICATION, longest=128, labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))
READER = Source(HfTask.QUESTION_ANSWERING, longest=128)
FILLER = Source(HfTask.FILL_MASK, longest=128)
ZERO_SHOT = Source(HfTask.ZERO_SHOT_CLASSIFICATION, longest=128, labels=("contradiction", "neutral", "entailment"))
IMAGES = Source(HfTask.IMAGE_CLASSIFICATION, "vit")
SOUNDS = Source(HfTask.AUDIO_CLASSIFICATION, "wav2vec2")
SPEECH = Source(HfTask.SPEECH_RECOGNITION, "wav2vec2", config=(("vocab_size", 32),))
# torchscript pads sounds to its buckets, which needs a model that reads a mask.
MASKED = (("feat_extract_norm", "layer"), ("do_stable_layer_norm", True))
MASKED_SOUNDS = SOUNDS.differing(config=MASKED)
MASKED_SPEECH = SPEECH.differing(config=(*SPEECH.config, *MASKED))
PICTURES_AND_TEXTS = Source(HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION, "clip")


def torchscript(source: Source, *buckets: tuple[int, int]) -> Healthy:
    """Return a compile for torchscript, with the usual shape buckets if none is given."""
    return Healthy(source, TORCHSCRIPT, buckets=buckets)


def onnx(source: Source) -> Healthy:
    """Return a compile for onnx-runtime."""
    return Healthy(source, ONNX)


def openvino(source: Source) -> Healthy:
    """Return a compile for openvino."""
    return Healthy(source, OPENVINO)
