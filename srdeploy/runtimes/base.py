"""The runtime contract: photos in, labels out, the same on every backend.

    with open_runtime("deploy/night", device="cpu") as runtime:
        labels = runtime.run(images)        # uint8 [N, H, W, 3] RGB -> uint8 [N, H, W]

What a runtime is (spec, device, precision, input shape) is known at once; it must be open to run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from srdeploy.artifacts.artifact import Artifact, Builder
from srdeploy.errors import UserError
from srdeploy.graph.signature import Shape
from srdeploy.imaging import Pixels
from srdeploy.spec import Spec

Logits = npt.NDArray[np.float32]


class ImageShapeError(UserError):
    """Images that this runtime can't take, for shape or size; the message has the actual shape."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a backend runs an artifact. open_runtime has checked it against the backend's row."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; None: all cores."""
    precision: str | None = None
    """Of the arithmetic, for backends that have a choice; None: the backend's default."""


class Runtime(ABC):
    """One network, ready to run on one device. A context manager: open it before use.

    A backend's constructor takes (artifact, spec, RuntimeOptions).
    """

    backend: str
    """Which library runs it: a name in the registry."""
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

    @classmethod
    def pick_file(cls, artifact: Artifact, device: str) -> Artifact:
        """What is opened of `artifact` on `device`: of a folder, perhaps another of its files.

        Raises UserError where there is none.
        """
        return artifact

    @classmethod
    def import_library(cls, builder: Builder | None = None) -> Any:
        """Imports the library that computes, and returns it. builder: which TensorRT.

        Raises MissingPackageError. The default: the backend's module has imported it.
        """
        return None

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

        Raises UserError where the graph gives only labels, or can't take the images.
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
                    f"{self.path} takes only images of {_shape_text(self.input_shape)}, "
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
