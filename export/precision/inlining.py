"""A model as one flat graph, to be changed."""

import onnx
import onnx.inliner
from onnx import ModelProto


def inlined(model: ModelProto) -> ModelProto:
    """A copy of `model` without functions of its own: what they do stands in the graph."""
    if model.functions:
        return onnx.inliner.inline_local_functions(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
