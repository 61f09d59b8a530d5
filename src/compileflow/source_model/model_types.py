"""Model types that transformers knows, read from its source: importing it with torch takes many seconds."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compileflow.source_model.tasks import AUTO_CLASSES, MODALITIES, SIGNALS
from compileflow.spec import HfTask, Modality


@dataclass(frozen=True)
class ModelTypes:
    """Tables of transformers' auto classes.

    Attributes:
        configs: Class of the configuration of each model type.
        heads: For each auto class, the class of the model of each model type.
        modules: Name of the module of each model type that is not named like its module.
        other_types: Source that adds types to `configs`.
        folder: Folder of transformers' models.
        version: Version of transformers.
    """

    configs: Mapping[str, str]
    heads: Mapping[str, Mapping[str, Any]]
    modules: Mapping[str, str]
    other_types: str
    folder: Path
    version: str

    def knows(self, model_type: str) -> bool:
        """Return whether transformers may have a configuration of this type."""
        # Some types stand outside the table.
        return model_type in self.configs or f'"{model_type}"' in self.other_types

    def tasks(self, model_type: str) -> tuple[HfTask, ...] | None:
        """Return the tasks for which a model type has a head; None if the source does not tell."""
        if model_type not in self.configs or self.heads.keys() != set(AUTO_CLASSES.values()):
            return None
        # transformers looks a head up by the class of the configuration, which some types share.
        types = {name for name, config in self.configs.items() if config == self.configs[model_type]}
        modality = self._modality(model_type)
        if modality is None and types & self.heads["AutoModel"].keys():
            return None
        return tuple(
            task
            for task, auto_class in AUTO_CLASSES.items()
            if types & self.heads[auto_class].keys()
            and (auto_class != "AutoModel" or modality == task.modality)
            # Encoders have a causal head as well, for the decoder of a model of two parts.
            and not (task.generates and types & self.heads[AUTO_CLASSES[HfTask.FILL_MASK]].keys())
        )

    def two_parts(self, model_type: str) -> tuple[str, str] | None:
        """Return the model that takes text and another input together, and that input; None for other models."""
        name, classes = self._model_class(model_type)
        methods = {part.name for part in classes[name].body if isinstance(part, ast.FunctionDef)} if name else ()
        signals = [signal for signal in SIGNALS if f"get_{signal}_features" in methods]
        return (name, signals[0]) if signals and "get_text_features" in methods else None

    def is_stateful(self, model_type: str) -> bool:
        """Return whether transformers says that the models of a type carry a state from token to token."""
        name, classes = self._model_class(model_type)
        return _constant(classes, name, "_is_stateful", inherited=False) is True

    def has_class(self, model_type: str, name: str) -> bool:
        """Return whether the module of a model type has a class."""
        return name in self._model_class(model_type)[1]

    def _modality(self, model_type: str) -> Modality | None:
        """Return what the model of a type takes without a head; None if its source does not tell."""
        name, classes = self._model_class(model_type)
        return MODALITIES.get(_constant(classes, name, "main_input_name", inherited="input_ids") or "")

    def _model_class(self, model_type: str) -> tuple[str, Mapping[str, ast.ClassDef]]:
        """Return the name of the class without a head, and the classes of its module; "" if it is not there."""
        names = self.heads["AutoModel"].get(model_type)
        # transformers takes the first, where it has several.
        name = names[0] if isinstance(names, tuple) else names
        module = self.modules.get(model_type, model_type.replace("-", "_"))
        for path in sorted((self.folder / module).glob("modeling_*.py")):
            classes = _classes_of(path)
            if isinstance(name, str) and name in classes:
                return name, classes
        return "", {}


@cache
def _classes_of(path: Path) -> Mapping[str, ast.ClassDef]:
    """Return the classes of a source file; {} if the file cannot be read."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def model_types() -> ModelTypes | None:
    """Read the tables of the installed transformers; None if they are not where they are expected."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "models"
    tables: dict[str, Mapping[str, Any]] = {}
    mappings: dict[str, str] = {}
    other_types = ""
    with suppress(OSError, SyntaxError, ValueError):
        for name in ("auto_mappings", "modeling_auto"):
            for node in ast.parse((folder / "auto" / f"{name}.py").read_text("utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    _add_table(tables, node)
                elif isinstance(node, ast.ClassDef):
                    for part in node.body:
                        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Name):
                            mappings[node.name] = f"{part.value.id}_NAMES"
        other_types = (folder / "auto" / "configuration_auto.py").read_text("utf-8")
    heads = {name: tables[mappings[name]] for name in AUTO_CLASSES.values() if mappings.get(name) in tables}
    configs, modules = tables.get("CONFIG_MAPPING_NAMES"), tables.get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})
    if not configs or not other_types:
        return None
    return ModelTypes(configs, heads, modules, other_types, folder, version("transformers"))


def _constant(classes: Mapping[str, ast.ClassDef], name: str, attribute: str, *, inherited: Any) -> Any:
    """Return the constant that a model class has as an attribute; None if it is unknown.

    Args:
        classes: Classes of the module.
        name: Name of the class.
        attribute: Name of the attribute.
        inherited: The constant of PreTrainedModel.
    """
    if name == "PreTrainedModel":
        return inherited
    if name not in classes:
        return None
    for part in classes[name].body:
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == attribute for target in targets):
            value = getattr(part, "value", None)
            return value.value if isinstance(value, ast.Constant) else None
    bases = (_constant(classes, ast.unparse(base), attribute, inherited=inherited) for base in classes[name].bases)
    return next((constant for constant in bases if constant), None)


def _add_table(tables: dict[str, Mapping[str, Any]], node: ast.Assign) -> None:
    """Add a table that is written as NAME = OrderedDict([...])."""
    assert isinstance(node.value, ast.Call)  # noqa: S101 - for the type checker
    target = node.targets[0]
    if isinstance(target, ast.Name) and node.value.args:
        with suppress(ValueError, TypeError):
            tables[target.id] = dict(ast.literal_eval(node.value.args[0]))
