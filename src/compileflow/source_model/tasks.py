"""Hub tasks and architectures: the model class of each task, and the task of each model class."""

from __future__ import annotations

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
    HfTask.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
    HfTask.AUDIO_CLASSIFICATION: "AutoModelForAudioClassification",
    HfTask.SPEECH_RECOGNITION: "AutoModelForCTC",
}
# Endings of the class names in config.json's "architectures", with the task that each stands for.
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
# Modality of a model by the name of its main input.
_MODALITIES: Mapping[str, Modality] = {
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
            # Speech encoders and vision models also have an AutoModel, but it does not take text.
            classes = model_classes[type(config)]
            main_input = (classes[0] if isinstance(classes, tuple) else classes).main_input_name
            if _MODALITIES.get(main_input) == task.modality:
                tasks.append(task)
    return tuple(tasks)


def task_of_architecture(name: str) -> HfTask | None:
    """Return the task that the name of a model class stands for; None when its ending is unknown."""
    if name.startswith(_SPEECH_ENCODERS) and name.endswith("ForSequenceClassification"):
        return HfTask.AUDIO_CLASSIFICATION
    if name.endswith(("HeadModel", "HeadsModel")):
        # GPT2LMHeadModel generates text. It returns no hidden states.
        return None
    return next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
