"""Inputs for any ONNX model: pictures where it takes images, else values by type and shape."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.helper import tensor_dtype_to_np_dtype
from PIL import Image

from srdeploy.data.synth import scene
from srdeploy.errors import UserError
from srdeploy.export.subgraph import real_inputs
from srdeploy.imaging import Pixels, normalise
from srdeploy.spec import Spec

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = dict[str, Array]
"""Input name -> value."""

SIZES = ((1, 64, 96), (1, 97, 131), (1, 160, 224), (2, 64, 96))
"""(N, H, W) tried where the graph leaves them open: an odd size and a batch among them."""
FALLBACKS = ((1, 224, 224), (1, 256, 256), (1, 512, 512), (1, 512, 1024))
"""Tried one after the other where the original takes none of those."""
_SCENE = (144, 192)
"""(height, width) of drawn pictures; each size is resized from them."""
_OTHER_AXIS = 8
"""Length of open axes of inputs that are no images."""


class Drawing:
    """Draws feeds: images are `photos` uint8 [H, W, 3], resized and normalised as `spec` says.

    Without photos, pictures are made up; without a spec, floats are in -1..1.
    """

    def __init__(self, photos: Sequence[Pixels], spec: Spec | None) -> None:
        self._photos = list(photos) or [
            scene(np.random.default_rng(seed), *_SCENE)[0] for seed in range(2)
        ]
        self._spec = spec
        self._rng = np.random.default_rng(0)

    def feeds(self, model: ModelProto, sizes: Sequence[tuple[int, int, int]]) -> list[Feed]:
        """One feed per size (N, H, W) that gives other shapes than those before.

        Raises UserError where an input's type is nothing that can be drawn.
        """
        inputs = real_inputs(model)
        found: dict[tuple[tuple[int, ...], ...], Feed] = {}
        for size in sizes:
            shapes = _shapes(inputs, size)
            if tuple(shapes.values()) not in found:
                feed = {value.name: self._values(value, shapes[value.name]) for value in inputs}
                found[tuple(shapes.values())] = feed
        return list(found.values())

    def _values(self, value: ValueInfoProto, shape: tuple[int, ...]) -> Array:
        kind = value.type.tensor_type.elem_type
        dtype = np.dtype(object)
        if value.type.HasField("tensor_type") and kind != TensorProto.UNDEFINED:
            dtype = tensor_dtype_to_np_dtype(kind)
        if dtype.kind not in "iubf":
            raise UserError(f"no values can be drawn for the input '{value.name}' of its type")
        if len(shape) == 4 and dtype.kind in "uf" and 3 in (shape[1], shape[3]):
            return self._images(shape, dtype)
        if dtype.kind in "iub":
            # Whole numbers may be indices, and 0 and 1 are indices of almost everything.
            return np.asarray(self._rng.integers(0, 2, shape).astype(dtype))
        return np.asarray(self._rng.standard_normal(shape).astype(dtype))

    def _images(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        planar = shape[1] == 3
        height, width = shape[2:] if planar else shape[1:3]
        resized = [
            np.asarray(Image.fromarray(photo).resize((width, height))) for photo in self._photos
        ]
        images = np.stack([resized[index % len(resized)] for index in range(shape[0])])
        if dtype.kind == "u":
            values: Array = images.transpose(0, 3, 1, 2) if planar else images
        else:
            # Without a spec nobody knows the normalisation: the usual range will do.
            floats = (
                normalise(images, self._spec)
                if self._spec is not None
                else (images / 127.5 - 1).transpose(0, 3, 1, 2)
            )
            values = floats if planar else floats.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(values.astype(dtype))


def _shapes(
    inputs: Sequence[ValueInfoProto], size: tuple[int, int, int]
) -> Mapping[str, tuple[int, ...]]:
    """A shape for each input, with `size` (N, H, W) where it is open; one symbol, one length."""
    symbols: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for value in sorted(inputs, key=lambda value: len(value.type.tensor_type.shape.dim) != 4):
        dims = value.type.tensor_type.shape.dim
        wished = _wished(value, size)
        shape = []
        for axis, wish in enumerate(wished):
            dim = dims[axis] if axis < len(dims) else None
            if dim is not None and dim.HasField("dim_value") and dim.dim_value > 0:
                shape.append(dim.dim_value)
            elif dim is not None and dim.dim_param:
                shape.append(symbols.setdefault(dim.dim_param, wish))
            else:
                shape.append(wish)
        shapes[value.name] = tuple(shape)
    return {value.name: shapes[value.name] for value in inputs}


def _wished(value: ValueInfoProto, size: tuple[int, int, int]) -> tuple[int, ...]:
    """Lengths for the axes that the graph leaves open."""
    count, height, width = size
    tensor = value.type.tensor_type
    if tensor.HasField("shape") and len(tensor.shape.dim) != 4:
        rank = len(tensor.shape.dim)
        return (count, *[_OTHER_AXIS] * (rank - 1)) if rank else ()
    channels_last = tensor.elem_type == TensorProto.UINT8
    if tensor.HasField("shape"):
        fixed = [dim.dim_value for dim in tensor.shape.dim]
        channels_last = fixed[3] == 3 or (channels_last and not fixed[1])
    return (count, height, width, 3) if channels_last else (count, 3, height, width)
