"""The tiny graph and photo that `srdeploy doctor` tries everything on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srdeploy.spec import Spec

SIZE = (32, 32)
"""(height, width) of the photo."""


def tiny_spec() -> "Spec":
    """Three classes, one size."""
    from srdeploy.spec import InputPolicy, Spec

    return Spec(
        classes=("a", "b", "c"),
        palette=((0, 0, 0), (90, 0, 0), (0, 90, 0)),
        input=InputPolicy(smallest=SIZE, usual=SIZE, largest=SIZE),
    )


def tiny_photo() -> Any:
    """uint8 [1, 32, 32, 3]"""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)


def tiny_model() -> Any:
    """A graph of two convolutions, as our exports are: photos in, labels out."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from srdeploy.spec import ONNX_KEY

    rng = np.random.default_rng(0)
    kernels = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("stem.weight", (8, 3, 3, 3)), ("head.weight", (3, 8, 1, 1)))
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], name="Cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], name="Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem.weight"], ["x"], name="stem/Conv", pads=[1] * 4),
        helper.make_node("Relu", ["x"], ["features"], name="stem/Relu"),
        helper.make_node("Conv", ["features", "head.weight"], ["scores"], name="head/Conv"),
        helper.make_node("ArgMax", ["scores"], ["best"], name="ArgMax", axis=1, keepdims=0),
        helper.make_node("Cast", ["best"], ["labels"], name="labels", to=TensorProto.UINT8),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    labels = helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", "H", "W"])
    graph = helper.make_graph(nodes, "doctor", [images], [labels], kernels)
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    helper.set_model_props(model, {ONNX_KEY: tiny_spec().to_json()})
    return model


@contextmanager
def tiny_file() -> Iterator[Path]:
    """The graph as a file, for as long as it is needed."""
    import onnx

    with TemporaryDirectory(prefix="srdeploy-") as name:
        path = Path(name) / "model.onnx"
        onnx.save(tiny_model(), str(path))
        yield path
