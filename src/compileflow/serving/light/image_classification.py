"""Image classification: labels of an image with their scores."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import Arrays
from compileflow.serving.light.image_processor import LightImageProcessor, read_image
from compileflow.serving.light.label_scores import check_function, labelled_scores
from compileflow.serving.light.model import LightModel
from compileflow.serving.light.task import LightTask, Settings, checked_top_k
from compileflow.serving.padding import complete_inputs
from compileflow.serving.rows import PreparedItem
from compileflow.spec import HfTask

_TOP_K = 5


class ImageClassification(LightTask):
    """Classifies images: paths of files, images in base64, or images of Pillow. Each has a list of labels.

    Attributes:
        image_processor: Image processor of the model.
    """

    hf_task = HfTask.IMAGE_CLASSIFICATION
    load_settings = ("batch_size", "top_k", "function_to_apply")

    def __init__(self, model: LightModel, image_processor: LightImageProcessor, **settings: Any):
        self.image_processor = image_processor
        super().__init__(model, **settings)

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Classify an image, a list, or the images of an iterator; see `LightTask`."""
        # As in transformers, None leaves a setting as it is.
        return super().__call__(inputs, **{name: value for name, value in settings.items() if value is not None})

    def check(self, settings: Settings) -> None:
        """Check top_k and function_to_apply."""
        checked_top_k(_top_k(settings), none_is_all=False)
        check_function(settings.get("function_to_apply"))

    def prepare(self, item: Any, settings: Settings) -> PreparedItem[None]:
        """Read an image, and turn it into the input of the component."""
        pixels = self.image_processor(read_image(item))
        return PreparedItem([complete_inputs(self.model.graph.record, {"pixel_values": pixels})], None)

    def answer(self, settings: Settings, details: None, row_outputs: list[Arrays]) -> Any:
        """Return the best labels with their scores."""
        logits = row_outputs[0]["logits"][0]
        return labelled_scores(self.model.config, logits, settings.get("function_to_apply"))[: _top_k(settings)]


def _top_k(settings: Settings) -> Any:
    top_k = settings.get("top_k")
    return _TOP_K if top_k is None else top_k
