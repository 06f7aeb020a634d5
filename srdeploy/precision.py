"""The precisions that a graph can be deployed in, and what goes with what."""

from collections.abc import Mapping
from typing import Literal, get_args

from srdeploy.errors import UserError

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
"""Of the arithmetic inside; what goes in and comes out keeps its type. tf32 is an engine's: the
graph's types are those of fp32."""
Target = Literal["tensorrt", "cpu"]
"""For whom int8 is written: symmetric without quantised biases (TensorRT), or u8s8 (runtimes on
CPUs)."""
HalfPrecision = Literal["fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRECISION_KEY = "srdeploy.precision"
TARGET_KEY = "srdeploy.target"
"""Keys of the metadata: the precision that was asked for, and for int8 the target."""


def precision_of(metadata: Mapping[str, str]) -> Precision:
    """The precision that a graph's metadata name; float32 where they name none."""
    named = metadata.get(PRECISION_KEY)
    return next((one for one in PRECISIONS if one == named), "fp32")


def require_fitting(precision: Precision, target: Target | None, *, engine: bool) -> Target | None:
    """The target that int8 is written for; None for other precisions.

    engine: whether TensorRT builds an engine from the graph. Raises UserError for a combination
    that could not work, with the reason.
    """
    if precision != "int8":
        if target is not None:
            raise UserError(f"--target goes with --precision int8 alone, not with {precision}")
        if precision == "tf32" and not engine:
            raise UserError(
                "tf32 is a way of computing inside a TensorRT engine, not a type of a graph: "
                "add --trt, or use --precision fp32"
            )
        return None
    if engine and target == "cpu":
        raise UserError(
            "--target cpu quantises biases and activations without sign, which TensorRT does not "
            "parse: use --target tensorrt with --trt"
        )
    return target or ("tensorrt" if engine else "cpu")
