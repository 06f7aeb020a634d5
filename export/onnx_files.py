"""ONNX models on disk: one file each, and a side file for weights that one file can't hold."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import (
    ExternalDataInfo,
    set_external_data,
    uses_external_data,
)

from srdeploy.export.certificate import read_model
from srdeploy.export.subgraph import every_tensor
from srdeploy.files import whole_file

ONE_FILE = 2**31 - 2**20
"""Bytes that one file can hold: protobuf's limit, with room for what is around the tensors."""

_ALIGNMENT = 4096
"""Side files are mapped into memory by page."""
_SMALL = 1024
"""Bytes; smaller tensors, shapes among them, stay in the graph's file."""


def load_model(path: Path) -> ModelProto:
    """Reads and checks `path` with its side files, as if all had been in one. Raises UserError."""
    model = read_model(path)
    for tensor in every_tensor(model):
        if tensor.data_location == TensorProto.DEFAULT:
            tensor.ClearField("data_location")  # loading a side file leaves the default behind
    return model


def write_model(model: ModelProto, path: Path) -> list[Path]:
    """Writes `model` to `path`, and its weights to `path`.data where one file can't hold both.

    Weights that move to the side file leave `model`. Returns the files, the graph's last.
    """
    files = [path]
    if _bytes_of(model) > ONE_FILE:
        side = path.with_name(f"{path.name}.data")
        with side.open("wb") as stream:
            for tensor in every_tensor(model):
                _move_out(tensor, stream, side.name)
        files.insert(0, side)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return files


def publish(files: Sequence[Path], folder: Path) -> None:
    """Copies `files` into `folder`, each whole, in the order given. Raises UserError."""
    for file in files:
        with whole_file(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)


def side_files(path: Path) -> dict[str, Path]:
    """The files beside `path` that hold weights of its graph, by their path as text."""
    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    locations = _locations(every_tensor(model))
    return {str(path.parent / name): path.parent / name for name in sorted(locations)}


def _locations(tensors: Iterable[TensorProto]) -> set[str]:
    return {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}


def _bytes_of(model: ModelProto) -> int:
    """Size as one file; a message above protobuf's limit can't be asked for its own."""
    graph = model.graph
    parts = (*graph.node, *graph.initializer, *graph.sparse_initializer, *model.functions)
    return sum(part.ByteSize() for part in parts)


def _move_out(tensor: TensorProto, stream: BinaryIO, location: str) -> None:
    if len(tensor.raw_data) < _SMALL:
        return
    stream.write(bytes(-stream.tell() % _ALIGNMENT))
    offset = stream.tell()
    stream.write(tensor.raw_data)
    set_external_data(tensor, location, offset, len(tensor.raw_data))
    tensor.ClearField("raw_data")
