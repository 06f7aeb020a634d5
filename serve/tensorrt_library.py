"""TensorRT's Python package, proper or for RTX: both offer one API."""

from typing import Any

from srdeploy.errors import MissingPackageError
from srdeploy.serve.engine_file import Builder


def import_tensorrt(builder: Builder) -> Any:
    """The package. Raises MissingPackageError with the pip line."""
    try:
        if builder == "rtx":
            import tensorrt_rtx

            return tensorrt_rtx
        import tensorrt
    except ImportError as error:
        name = "tensorrt_rtx" if builder == "rtx" else "tensorrt"
        raise MissingPackageError(name, builder, "building and running TensorRT engines") from error
    return tensorrt
