"""LightModel: a compiled component with the few settings of its source model that pipelines read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compileflow.errors import LoadError
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.sentence_files import DAMAGED, read_file, typed

_FILE = "config.json"


@dataclass(frozen=True)
class LightConfig:
    """Settings of config.json, with the names and defaults of transformers' configurations.

    Attributes:
        model_type: Family of the model.
        id2label: Names of the classes by their number.
        label2id: Numbers of the classes by their name.
        problem_type: Kind of classification; None if unspecified.
        conv_kernel_size: Size of convolutions over the tokens; 0 without any.
        function_to_apply: Function that turns logits into scores; None if unspecified.
    """

    model_type: str = ""
    id2label: Mapping[int, str] = field(default_factory=dict)
    label2id: Mapping[str, int] = field(default_factory=dict)
    problem_type: str | None = None
    conv_kernel_size: int = 0
    function_to_apply: str | None = None

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.id2label)


@dataclass(frozen=True)
class LightModel:
    """What the pipelines need of a model.

    Attributes:
        graph: The loaded component.
        config: Settings of the source model.
    """

    graph: LoadedComponent
    config: LightConfig

    def close(self) -> None:
        """Release the component. A second call does nothing."""
        self.graph.close()


def read_config(folder: Path) -> LightConfig:
    """Read the settings from an artifact's config.json.

    Raises:
        LoadError: The file cannot be read, or a setting has the wrong type.
    """
    content = read_file(folder / _FILE, {})
    labels = typed(content, "id2label", dict, _FILE)
    if labels is None:
        # transformers does not write the default names of two labels.
        count = typed(content, "num_labels", int, _FILE)
        labels = {number: f"LABEL_{number}" for number in range(2 if count is None else count)}
    try:
        id2label = {int(number): str(label) for number, label in labels.items()}
        named = typed(content, "label2id", dict, _FILE)
        label2id = {label: number for number, label in id2label.items()} if named is None else named
        return LightConfig(
            model_type=typed(content, "model_type", str, _FILE) or "",
            id2label=id2label,
            label2id={str(label): int(number) for label, number in label2id.items()},
            problem_type=typed(content, "problem_type", str, _FILE),
            conv_kernel_size=int(content.get("conv_kernel_size") or 0),
            function_to_apply=typed(content, "function_to_apply", str, _FILE),
        )
    except (TypeError, ValueError) as error:
        raise LoadError(f"{_FILE} has labels without numbers: {error}.", hint=DAMAGED) from error
