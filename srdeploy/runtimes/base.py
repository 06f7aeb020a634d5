"""The runtime contract: photos in, labels out, the same on every backend.

    with open_runtime("deploy/night", device="cpu") as runtime:
        labels = runtime.run(images)        # uint8 [N, H, W, 3] RGB -> uint8 [N, H, W]

What a runtime is (spec, device, precision, input shape) is known at once; it must be open to run.
"""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Literal, Self, cast

import numpy as np
import numpy.typing as npt

from srdeploy.artifacts.artifact import Artifact
from srdeploy.errors import UserError
from srdeploy.graph.signature import Shape
from srdeploy.imaging import Pixels
from srdeploy.spec import Spec

Logits = npt.NDArray[np.float32]


class ImageShapeError(UserError):
    """Images that this runtime can't take, for shape or size; the message has the actual shape."""


class Runtime(ABC):
    """One network, ready to run on one device. A context manager: open it before use."""

    backend: str
    """Which library runs it: one of RUNTIMES but auto."""
    precision: str
    """Of the arithmetic, as it really is once the runtime is open; until then, of what is stored.
    Several are joined with +, and stored types that differ are added: "float32 (stored as
    float16)"."""

    def __init__(self, artifact: Artifact, spec: Spec, device: str, input_shape: Shape) -> None:
        self.artifact = artifact
        self.path = artifact.path
        self.spec = spec
        self.device = device
        self.input_shape = input_shape
        self._is_open = False

    def __enter__(self) -> Self:
        self._open()
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._close()

    def run(self, images: Pixels) -> Pixels:
        """images uint8 [N, H, W, 3] RGB -> labels uint8 [N, H, W].

        Raises ImageShapeError (a UserError) where the graph can't take them.
        """
        self._check(images)
        return self._labels(images)

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        """run, and the device's own time of it in milliseconds by phase, "compute_ms" among them.

        None where the device's time can't be told from the host's. Raises as run.
        """
        return self.run(images), None

    def logits(self, images: Pixels) -> Logits:
        """images uint8 [N, H, W, 3] RGB -> logits float32 [N, K, H, W].

        Raises UserError where the graph gives labels alone, or can't take the images.
        """
        self._check(images)
        return self._logits(images)

    @property
    def gives_logits(self) -> bool:
        """Whether `logits` works."""
        return True

    def __str__(self) -> str:
        return f"{self.path} ({self.backend}, {self.device}, {self.precision})"

    @abstractmethod
    def _open(self) -> None:
        """Loads the network onto the device."""

    @abstractmethod
    def _close(self) -> None:
        """Frees what _open took."""

    @abstractmethod
    def _labels(self, images: Pixels) -> Pixels:
        """run, on checked images."""

    @abstractmethod
    def _logits(self, images: Pixels) -> Logits:
        """logits, on checked images."""

    def _check(self, images: Pixels) -> None:
        if not self._is_open:
            raise UserError(f"the runtime of {self.path} is not open: use it in a with block")
        shape = tuple(images.shape)
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < 1:
            raise ImageShapeError(
                f"images are {images.dtype} {list(shape)}: uint8 [N, H, W, 3] is needed"
            )
        for name, actual, wanted in zip("NHW", shape[:3], self.input_shape[:3], strict=True):
            if wanted is not None and actual != wanted:
                raise ImageShapeError(
                    f"{self.path} takes images of {_shape_text(self.input_shape)} alone, "
                    f"not {list(shape)} ({name} is {actual})"
                )
        least = self.spec.input.smallest
        if shape[1] < least[0] or shape[2] < least[1]:
            raise ImageShapeError(
                f"images are {list(shape)}: {self.path} needs at least {least[0]} x {least[1]} "
                "(height x width)"
            )


def parse_device(device: str) -> tuple[Literal["cpu", "cuda"], int]:
    """("cpu", 0) or ("cuda", N). Raises UserError for anything else."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "cuda") and (index.isdecimal() or device == kind) and device != "cpu:":
        if kind == "cpu" and index not in ("", "0"):
            raise UserError(f"unknown device '{device}': the CPU is one device, cpu")
        return cast(Literal["cpu", "cuda"], kind), int(index or 0)
    raise UserError(f"unknown device '{device}': cpu, cuda or cuda:N")


def _shape_text(shape: Shape) -> str:
    names = ("N", "H", "W", "3")
    return "[" + ", ".join(str(s or n) for s, n in zip(shape, names, strict=True)) + "]"
