"""TensorRT's Python package, proper or for RTX: both offer one API."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Message:
    """One line of TensorRT's log."""

    error: bool
    warning: bool
    text: str


def collecting_logger(trt: Any) -> Any:
    """A logger for TensorRT with a list `messages` of the errors and warnings; prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base is known at run time alone
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[Message] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.WARNING:
                error = severity <= trt.ILogger.ERROR
                self.messages.append(Message(error=error, warning=not error, text=msg))

    return Collector()
