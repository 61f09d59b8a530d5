"""Hub tasks and architectures: which model class serves which task, and which task a class serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compileflow.spec import HfTask, Modality

if TYPE_CHECKING:
    pass

AUTO_CLASSES: Mapping[HfTask, str] = {
    HfTask.FEATURE_EXTRACTION: "AutoModel",
    HfTask.SENTENCE_SIMILARITY: "AutoModel",
    HfTask.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.ZERO_SHOT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    HfTask.FILL_MASK: "AutoModelForMaskedLM",
    HfTask.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
    HfTask.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
    HfTask.AUDIO_CLASSIFICATION: "AutoModelForAudioClassification",
    HfTask.SPEECH_RECOGNITION: "AutoModelForCTC",
}
# Endings of class names in config.json's "architectures", for reading the task off a model.
HEADS: Mapping[str, HfTask] = {
    "ForSequenceClassification": HfTask.TEXT_CLASSIFICATION,
    "ForTokenClassification": HfTask.TOKEN_CLASSIFICATION,
    "ForMaskedLM": HfTask.FILL_MASK,
    "ForQuestionAnswering": HfTask.QUESTION_ANSWERING,
    "ForImageClassification": HfTask.IMAGE_CLASSIFICATION,
    "ForAudioClassification": HfTask.AUDIO_CLASSIFICATION,
    "ForCTC": HfTask.SPEECH_RECOGNITION,
    "Model": HfTask.FEATURE_EXTRACTION,
}
# Speech encoders call a classifier of whole recordings ForSequenceClassification, as text models do.
_SPEECH_ENCODERS = ("Data2VecAudio", "Hubert", "SEW", "UniSpeech", "Wav2Vec2", "WavLM")
# What a model's main input says about it.
_MODALITIES: Mapping[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
}


def tasks_of(config: Any) -> tuple[HfTask, ...]:
    """Return the tasks that an architecture has a head for."""
    import transformers

    found = []
    for task, auto_class in AUTO_CLASSES.items():
        heads = getattr(transformers, auto_class)._model_mapping
        if auto_class in getattr(config, "auto_map", {}):
            found.append(task)
        elif type(config) in heads:
            # Speech encoders and vision models have an AutoModel, too; it takes no text.
            head = heads[type(config)]
            main_input = (head[0] if isinstance(head, tuple) else head).main_input_name
            if _MODALITIES.get(main_input) == task.modality:
                found.append(task)
    return tuple(found)


def task_of_architecture(name: str) -> HfTask | None:
    """Read the task off the name of a model class; None when its ending is unknown."""
    if name.startswith(_SPEECH_ENCODERS) and name.endswith("ForSequenceClassification"):
        return HfTask.AUDIO_CLASSIFICATION
    if name.endswith(("HeadModel", "HeadsModel")):
        # GPT2LMHeadModel generates; it has no hidden states to give.
        return None
    return next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
