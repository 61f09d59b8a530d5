"""Changes to OpenVINO graphs, so that the CPU plugin computes what torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np

# OpenVINO's own mark of a division that must not become a product.
_KEPT_DIVISION = "nonconvertable_divide_0"
# Operations from a quotient to where it is rounded.
_PASS_QUOTIENTS = ("Add", "Broadcast", "Convert", "Divide", "Multiply", "Subtract")


def resize_as_torch(model: Any) -> None:
    """Let a resize to one pixel read the middle, as torch does; the converter's mode reads the first pixel."""
    for operation in model.get_ordered_ops():
        mode = operation.get_attributes().get("coordinate_transformation_mode")
        if operation.get_type_name() == "Interpolate" and mode == "pytorch_half_pixel":
            operation.set_attribute("coordinate_transformation_mode", "half_pixel")


def divide_as_torch(model: Any) -> None:
    """Replace each dividend by a multiple of its divisor, so that quotients of integers need no rounding.

    The CPU plugin rounds such a quotient to the nearest integer or towards zero, whatever the graph says. Sizes of
    tensors are divided as floating-point numbers, and bf16 lacks many of the integers above 256.
    """
    from openvino import opset13 as opset

    def multiple(dividend: Any, divisor: Any, rounding: str) -> Any:
        if rounding == "Ceiling":
            return opset.add(dividend, opset.floor_mod(opset.negative(dividend), divisor))
        remainder = opset.floor_mod if rounding == "Floor" else opset.mod
        return opset.subtract(dividend, remainder(dividend, divisor))

    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind not in ("Divide", "Convert") or not _is_integer(operation.output(0)):
            continue
        if kind == "Divide":
            dividend, divisor = operation.input_values()
            # The converter lets one division serve readers that round differently.
            for port in operation.output(0).get_target_inputs():
                if _rounds_down(port.get_node()):
                    floor = opset.divide(multiple(dividend, divisor, "Floor"), divisor)
                    port.replace_source_output(floor.output(0))
            operation.input(0).replace_source_output(multiple(dividend, divisor, "").output(0))
            continue
        quotient, rounding = operation.input_value(0).get_node(), ""
        if quotient.get_type_name() in ("Floor", "Ceiling"):
            quotient, rounding = quotient.input_value(0).get_node(), quotient.get_type_name()
        integers = _integers(quotient)
        if integers is not None:
            dividend, divisor = (opset.convert(integer, "i64") for integer in integers)
            exact = opset.divide(multiple(dividend, divisor, rounding), divisor)
            operation.input(0).replace_source_output(exact.output(0))
    model.validate_nodes_and_infer_types()


def keep_rounded_quotients(model: Any) -> None:
    """Let the CPU plugin divide where a quotient is rounded later, as torch does.

    Otherwise it multiplies by the inverse, and 15 * (x / x) in DeBERTa's positions becomes more than 15, which the
    graph rounds up to 16. A saved model does not keep the mark.
    """
    pending = [operation for operation in model.get_ordered_ops() if _rounds(operation)]
    seen: set[str] = set()
    while pending:
        for port in pending.pop().input_values():
            source = port.get_node()
            name, kind = source.get_friendly_name(), source.get_type_name()
            if name in seen or kind not in _PASS_QUOTIENTS:
                continue
            seen.add(name)
            pending.append(source)
            if kind == "Divide":
                source.get_rt_info()[_KEPT_DIVISION] = ""


def _rounds(operation: Any) -> bool:
    """Return whether an operation rounds floating-point numbers to integers."""
    kind = operation.get_type_name()
    return kind in ("Ceiling", "Floor", "Round") or (
        kind == "Convert"
        and _is_integer(operation.output(0))
        and operation.input_value(0).get_element_type().is_real()
    )


def _rounds_down(reader: Any) -> bool:
    """Return whether an operation is a floor, or a broadcast that a floor reads."""
    kind = reader.get_type_name()
    return kind == "Floor" or (
        kind == "Broadcast" and any(_rounds_down(port.get_node()) for port in reader.output(0).get_target_inputs())
    )


def _integers(quotient: Any) -> tuple[Any, Any] | None:
    """Return the integers that an operation divides as floating-point numbers; None if it does something else.

    The converter turns a division by a constant into a product with its inverse.
    """
    from openvino import opset13 as opset

    kind = quotient.get_type_name()
    if kind not in ("Divide", "Multiply"):
        return None
    sources = [port.get_node() for port in quotient.input_values()]
    if kind == "Multiply" and sources[0].get_type_name() == "Constant":
        sources.reverse()
    dividend, divisor = sources
    if not _is_converted_integer(dividend):
        return None
    if kind == "Divide" and _is_converted_integer(divisor):
        return dividend.input_value(0), divisor.input_value(0)
    if divisor.get_type_name() != "Constant" or np.size(divisor.data) != 1:
        return None
    constant = float(divisor.data.item())
    number = constant if kind == "Divide" else 1 / constant if constant else 0.0
    # An inverse in fp32 is right to 24 bits.
    if not np.isfinite(number) or round(number) == 0 or abs(number / round(number) - 1) > 2**-23:
        return None
    return dividend.input_value(0), opset.constant(np.int64(round(number)))


def _is_converted_integer(operation: Any) -> bool:
    return operation.get_type_name() == "Convert" and _is_integer(operation.input_value(0))


def _is_integer(port: Any) -> bool:
    kind = port.get_element_type()
    return bool(kind.is_integral() and kind.get_type_name() != "boolean")
