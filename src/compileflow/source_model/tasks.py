"""Hub tasks and architectures: the model class of each task, and the task of each model class."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from compileflow.spec import HfTask, Modality

AUTO_CLASSES: Mapping[HfTask, str] = {
    HfTask.FEATURE_EXTRACTION: "AutoModel",
    HfTask.SENTENCE_SIMILARITY: "AutoModel",
    HfTask.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.ZERO_SHOT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    HfTask.FILL_MASK: "AutoModelForMaskedLM",
    HfTask.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
    HfTask.MULTIPLE_CHOICE: "AutoModelForMultipleChoice",
    HfTask.TEXT_RANKING: "AutoModelForSequenceClassification",
    HfTask.TEXT_GENERATION: "AutoModelForCausalLM",
    HfTask.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION: "AutoModelForZeroShotImageClassification",
    HfTask.IMAGE_FEATURE_EXTRACTION: "AutoModel",
    HfTask.IMAGE_SEGMENTATION: "AutoModelForSemanticSegmentation",
    HfTask.OBJECT_DETECTION: "AutoModelForObjectDetection",
    HfTask.DEPTH_ESTIMATION: "AutoModelForDepthEstimation",
    HfTask.AUDIO_CLASSIFICATION: "AutoModelForAudioClassification",
    HfTask.AUDIO_FRAME_CLASSIFICATION: "AutoModelForAudioFrameClassification",
    HfTask.AUDIO_XVECTOR: "AutoModelForAudioXVector",
    HfTask.SPEECH_RECOGNITION: "AutoModelForCTC",
}
# Endings of the class names in config.json's "architectures", with the task that each stands for.
HEADS: Mapping[str, HfTask] = {
    "ForSequenceClassification": HfTask.TEXT_CLASSIFICATION,
    "ForTokenClassification": HfTask.TOKEN_CLASSIFICATION,
    "ForMaskedLM": HfTask.FILL_MASK,
    "ForQuestionAnswering": HfTask.QUESTION_ANSWERING,
    "ForMultipleChoice": HfTask.MULTIPLE_CHOICE,
    "ForCausalLM": HfTask.TEXT_GENERATION,
    "LMHeadModel": HfTask.TEXT_GENERATION,
    "ForImageClassification": HfTask.IMAGE_CLASSIFICATION,
    "ForSemanticSegmentation": HfTask.IMAGE_SEGMENTATION,
    "ForObjectDetection": HfTask.OBJECT_DETECTION,
    "ForDepthEstimation": HfTask.DEPTH_ESTIMATION,
    "ForAudioClassification": HfTask.AUDIO_CLASSIFICATION,
    "ForAudioFrameClassification": HfTask.AUDIO_FRAME_CLASSIFICATION,
    "ForXVector": HfTask.AUDIO_XVECTOR,
    "ForCTC": HfTask.SPEECH_RECOGNITION,
    "VisionModel": HfTask.IMAGE_FEATURE_EXTRACTION,
    "VisionModelWithProjection": HfTask.IMAGE_FEATURE_EXTRACTION,
    "TextModelWithProjection": HfTask.FEATURE_EXTRACTION,
    "Encoder": HfTask.FEATURE_EXTRACTION,
    "Model": HfTask.FEATURE_EXTRACTION,
}
# Tasks whose answer is a label of the configuration, by the number of the output.
LABELLED_TASKS = (
    HfTask.TEXT_CLASSIFICATION,
    HfTask.TOKEN_CLASSIFICATION,
    HfTask.IMAGE_CLASSIFICATION,
    HfTask.AUDIO_CLASSIFICATION,
)
# Tasks whose graph takes no attention mask, so that rows are never padded: x-vector heads average each row in a
# Python loop over the rows, which no graph keeps.
UNMASKED_TASKS = (HfTask.AUDIO_XVECTOR,)
# Speech encoders call a classifier of whole recordings ForSequenceClassification, as text models do.
_SPEECH_ENCODERS = ("Data2VecAudio", "Hubert", "SEW", "UniSpeech", "Wav2Vec2", "WavLM")
# Inputs that some models take beside text; such a model has a method get_<name>_features for each.
SIGNALS = ("image", "audio")
# Modality of a model by the name of its main input.
MODALITIES: Mapping[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
}


def tasks_of(config: Any) -> tuple[HfTask, ...]:
    """Return the tasks for which the architecture of a configuration has a head."""
    import transformers

    tasks = []
    for task, auto_class in AUTO_CLASSES.items():
        model_classes = getattr(transformers, auto_class)._model_mapping
        if auto_class in getattr(config, "auto_map", {}):
            tasks.append(task)
        elif type(config) in model_classes:
            if task.generates:
                # Encoders have a causal head as well, for the decoder of a model of two parts.
                if type(config) not in transformers.AutoModelForMaskedLM._model_mapping:
                    tasks.append(task)
                continue
            # Speech encoders and vision models also have an AutoModel, but it does not take text.
            main_input = _first_class(model_classes, config).main_input_name
            if auto_class != "AutoModel" or MODALITIES.get(main_input) == task.modality:
                tasks.append(task)
    return tuple(tasks)


def model_class_of(config: Any, hf_task: HfTask) -> Any:
    """Return the class that loads a model for a task: an auto class, a tower of CLIP, or an encoder.

    AutoModel leaves out the projection of a tower that was saved as CLIPVisionModelWithProjection, for example.
    """
    import transformers

    name = AUTO_CLASSES[hf_task]
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if name == "AutoModel" and architecture.endswith("WithProjection") and hasattr(transformers, architecture):
        name = architecture
    auto_class = getattr(transformers, name)
    return (_encoder_of(config, architecture) if name == "AutoModel" else None) or auto_class


def _first_class(mapping: Any, config: Any) -> Any:
    """Return the class that a mapping has for a configuration; the first, where it has several."""
    classes = mapping[type(config)]
    return classes[0] if isinstance(classes, tuple) else classes


def _encoder_of(config: Any, architecture: str) -> Any:
    """Return the class of an encoder without its decoder; None for models that do not have one.

    AutoModel is the whole T5Model, which needs token ids for its decoder; sentence-transformers always takes
    T5EncoderModel. Other families have such a class only where their encoder was saved alone.
    """
    import transformers

    mapping = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        return None
    whole_class = _first_class(mapping, config)
    names = [architecture] if architecture.endswith(("Encoder", "EncoderModel")) else []
    if getattr(config, "is_encoder_decoder", False):
        names.append(f"{whole_class.__name__.removesuffix('Model')}EncoderModel")
    module = sys.modules[whole_class.__module__]
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def task_of_architecture(name: str) -> HfTask | None:
    """Return the task that the name of a model class stands for; None when its ending is unknown."""
    if name.startswith(_SPEECH_ENCODERS) and name.endswith("ForSequenceClassification"):
        return HfTask.AUDIO_CLASSIFICATION
    if name.endswith(("DoubleHeadsModel", "WithLMHeadModel")):
        # GPT2DoubleHeadsModel answers two tasks at once, and FlaubertWithLMHeadModel fills masks or generates.
        return None
    return next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
