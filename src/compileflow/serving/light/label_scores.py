"""labelled_scores: the labels of one item with their scores, for texts and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.errors import InputError
from compileflow.serving.light.model import LightConfig
from compileflow.source_model.activations import Activation, softmax

_FUNCTIONS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "sigmoid": Activation("Sigmoid"),
    "softmax": softmax,
    "none": Activation("Identity"),
}


def check_function(name: Any) -> None:
    """Check the setting function_to_apply.

    Raises:
        InputError: No function has this name.
    """
    if name is not None and not (isinstance(name, str) and name.lower() in _FUNCTIONS):
        raise InputError(f"function_to_apply is {name!r}.", hint=f"Pass one of: {', '.join(_FUNCTIONS)}.")


def labelled_scores(config: LightConfig, logits: NDArray[Any], function: str | None) -> list[dict[str, Any]]:
    """Return all labels with their scores, the best first.

    Args:
        config: Settings of the model.
        logits: One number for each label, shape (labels,).
        function: Name of the function that turns logits into scores. None: the kind of problem decides.
    """
    if function is None:
        if config.problem_type == "regression":
            function = "none"
        elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
            function = "sigmoid"
        else:
            function = "softmax"
    scores = _FUNCTIONS[function.lower()](logits.astype(np.float32))
    results = [{"label": config.id2label[number], "score": score.item()} for number, score in enumerate(scores)]
    results.sort(key=lambda result: result["score"], reverse=True)
    return results
