"""Double of torch_blade.config: the documented settings of Config, with their defaults and checks."""

from __future__ import annotations

from typing import Any

_PIPELINES = ("DISC", "TensorRT")
_DEFAULTS: dict[str, Any] = {
    "annotate_args": [],
    "customize_jit_passes": [],
    "customize_onnx_opset_version": None,
    "customize_op_black_list": [],
    "customize_op_white_list": [],
    "disable_optimization_for_inference": False,
    "disc_cluster_max_iter_count": 10,
    "disc_compile_for_multi_cuda_targets": True,
    "disc_cpu_fast_math_level": 4,
    "dynamic_tuning_inputs": {},
    "dynamic_tuning_shapes": {},
    "enable_force_to_cuda": False,
    "enable_fp16": False,
    "enable_int8": False,
    "enable_mlir_amp": False,
    "enable_onnx_shape_white_list": True,
    "enable_static_shape": False,
    "experimental_subgraph_conversion_parallelism": 1,
    "extra_dynamic_tuning_shapes": {},
    "force_gpu_constants_to_device": "",
    "fp16_fallback_op_ratio": 0.0,
    "freeze_module": True,
    "optimization_pipeline": "DISC",
    "preserved_attributes": [],
}


class Config:
    """A configuration that is active within `with`."""

    _active: list[Config] = []  # noqa: RUF012 - shared by all instances, as in the real module

    def __init__(self) -> None:
        for name, value in _DEFAULTS.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _DEFAULTS:
            raise AttributeError(f"Config has no setting {name!r}")
        kind = type(_DEFAULTS[name])
        if kind is not type(None):
            assert isinstance(value, kind), f"{name} should be {kind.__name__}, got {type(value)}"
        if name == "fp16_fallback_op_ratio":
            assert 0 <= value <= 1.0, f"{name} should be in range [0, 1], got {value}"
        if name == "optimization_pipeline":
            assert value in _PIPELINES, f"The pipeline {value} haven't been registered"
        object.__setattr__(self, name, value)

    def __enter__(self) -> Config:
        self._active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._active.pop()

    @classmethod
    def get_current_context_or_new(cls) -> Config:
        """Return the innermost configuration, or a default one."""
        return cls._active[-1] if cls._active else cls()

    def as_dict(self) -> dict[str, Any]:
        """Return every setting, for the tests; the real class has no such method."""
        return {name: getattr(self, name) for name in _DEFAULTS}
