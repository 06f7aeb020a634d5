"""ONNX models on disk: the graph's file, and side files that hold weights."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.export.subgraph import every_tensor
from srdeploy.files import explain_os_error

LARGEST = 2**31 - 2**20
"""Bytes that a model in memory can hold: protobuf's limit, with room for what is around the
tensors."""


def load_model(path: Path) -> ModelProto:
    """Reads and checks `path` with its side files, as if all had been in one.

    Raises UserError where it is no valid model, a side file is missing, or all is above 2 GiB.
    """
    size = path.stat().st_size if path.is_file() else 0
    size += sum(_length(tensor) for tensor in _tensors_outside(path))
    if size > LARGEST:
        raise UserError(
            f"{path} and its side files hold {size / 2**30:.1f} GiB: models of up to 2 GiB can be "
            "read whole (export it in float16, or without the auxiliary outputs)"
        )
    model = read_model(path)
    for tensor in every_tensor(model):
        if tensor.data_location == TensorProto.DEFAULT:
            tensor.ClearField("data_location")  # loading a side file leaves the default behind
    return model


def side_files(path: Path) -> dict[str, Path]:
    """The files beside `path` that hold weights of its graph, by their path as text."""
    locations = {ExternalDataInfo(tensor).location for tensor in _tensors_outside(path)}
    return {str(path.parent / name): path.parent / name for name in sorted(locations)}


def _tensors_outside(path: Path) -> list[TensorProto]:
    """Tensors whose values are in side files, without them. What is no model has none."""
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError:
        return []
    except OSError as error:
        raise explain_os_error(error, path) from error
    return [tensor for tensor in every_tensor(model) if uses_external_data(tensor)]


def _length(tensor: TensorProto) -> int:
    """Bytes that the tensor takes in its side file, 0 where the file does not say."""
    return int(ExternalDataInfo(tensor).length or 0)
