"""An ONNX file as TensorRT's parser reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.export.engines.messages import explain_failure, explain_parser
from srdeploy.serve.engine_file import Builder
from srdeploy.serve.tensorrt_library import collecting_logger, import_tensorrt


@dataclass(frozen=True)
class Parsed:
    """A strongly typed network, and what must live as long as it."""

    trt: Any
    """The package."""
    path: Path
    logger: Any
    builder: Any
    network: Any
    parser: Any
    """It owns the weights."""


def parse_onnx(path: Path, kind: Builder) -> Parsed:
    """Parses `path` with its side files.

    Every tensor's type is the graph's (strongly typed): in TensorRT 11 there is nothing else, 10
    is told so. Raises MissingPackageError, and UserError naming the first node that TensorRT does
    not take.
    """
    trt = import_tensorrt(kind)
    logger = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # what pybind11 makes of a null pointer
        raise explain_failure(logger, str(path)) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise explain_parser(parser, str(path))
    if network.num_inputs != 1:
        raise UserError(f"{path}: one input (the images) is expected, not {network.num_inputs}")
    return Parsed(trt, path, logger, builder, network, parser)
