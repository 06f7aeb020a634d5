"""The work of one image or tensor, in the three steps that the scheduler places."""

from typing import Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from srdeploy.imaging import Pixels

Answer_co = TypeVar("Answer_co", covariant=True)


class Task(Protocol, Generic[Answer_co]):
    """prepare and finish run on a codec thread, what lies between them on a model's thread.

    Both may raise a UserError, which is this task's alone.
    """

    def prepare(self) -> Pixels:
        """The images as the network takes them, uint8 [N, H, W, 3]."""

    def finish(self, result: npt.NDArray[Any], /) -> Answer_co:
        """The answer, from what the lane's run made of what prepare gave: labels uint8 [N, H, W],
        or logits float32 [N, K, H, W]."""
