"""The spec: everything that turns a photo into the network's input and its output into a mask.

It is made from the data set, saved with the run (spec.json), written into the ONNX metadata (key
`srdeploy.spec`) and read by every runtime. Nothing else says how to pre- or post-process.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from srdeploy.validation import Settings

ONNX_KEY = "srdeploy.spec"
"""Key of the spec's JSON in an ONNX file's metadata."""

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_classes(
    names: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int,
    scored: Sequence[int] | None,
) -> None:
    """Raises ValueError where names, colours, ignored label and scored ids don't fit together."""
    if len(palette) != len(names):
        raise ValueError(f"{len(names)} classes but {len(palette)} palette colours")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ValueError(f"class names must differ from each other: '{doubled[0]}' stands twice")
    if ignore_index < len(names):
        raise ValueError(
            f"ignore_index {ignore_index} is also the id of class '{names[ignore_index]}'"
        )
    if scored is None:
        return
    bad = [i for i in scored if not 0 <= i < len(names)]
    if bad:
        raise ValueError(f"scored class ids {bad} are not among 0..{len(names) - 1}")
    if not scored or len(set(scored)) != len(scored):
        raise ValueError(f"scored class ids {list(scored)} must be one or more, each once")


class InputPolicy(Settings):
    """Which sizes the network is given. Sizes are (height, width) in pixels.

    Where `smallest` equals `largest` the network takes that one size: photos are resized to it,
    whatever their proportions.
    """

    longest_side: int | None = Field(default=None, ge=32)
    """Photos are scaled so that their longest side is this; None: the network sees the photo's
    own size."""
    smallest: Size = (32, 32)
    """Anything smaller is refused."""
    usual: Size = (512, 512)
    """The size that most inputs have: benchmarks, parity checks and TensorRT's `opt` profile use
    it."""
    largest: Size = (2048, 2048)
    """Largest size promised to work: parity checks and TensorRT's `max` profile use it."""
    multiple: int = Field(default=1, ge=1, le=1024)
    """The network takes only heights and widths divisible by this: the deployed graph pads the
    image at its bottom and right, and crops the result."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for axis in (0, 1):
            if not self.smallest[axis] <= self.usual[axis] <= self.largest[axis]:
                raise ValueError(
                    f"sizes must grow: smallest {self.smallest}, usual {self.usual}, "
                    f"largest {self.largest}"
                )
        return self

    @model_serializer(mode="wrap")
    def _brief(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Specs from before this field, and graphs that carry them, keep their text byte for byte.
        values: dict[str, Any] = handler(self)
        if self.multiple == 1:
            values.pop("multiple", None)
        return values

    @property
    def fixed(self) -> bool:
        """Whether the network takes images of only one size."""
        return self.smallest == self.largest

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size at which the network sees an image of `size`: the next multiples."""
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width

    def near(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size nearest to `size` that the network itself takes: within [smallest, largest],
        then padded. For probes, which run the network without the graph around it."""
        return self.padded(self.clamped(size))

    def clamped(self, size: tuple[int, int]) -> tuple[int, int]:
        """The image size within [smallest, largest] that is nearest to `size`."""
        height, width = (
            min(max(size[axis], self.smallest[axis]), self.largest[axis]) for axis in (0, 1)
        )
        return height, width


class Spec(Settings):
    """Pre- and post-processing of one segmentation network. Frozen; equal specs process equally."""

    version: Literal[1] = 1
    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    """Class names; the position is the id that masks carry."""
    palette: tuple[Colour, ...]
    """One RGB colour per class, 0..255."""
    ignore_index: Byte = 255
    """Label of pixels that are neither trained on nor scored."""
    void_colour: Colour = (224, 224, 192)
    """RGB colour of ignored pixels in pictures."""
    scored: tuple[int, ...] | None = None
    """Class ids that mIoU averages over; pixels with other true ids are ignored. None: all."""
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    """Per channel in RGB order, of values scaled to 0..1."""
    std: tuple[Std, Std, Std] = IMAGENET_STD
    """Per channel in RGB order, of values scaled to 0..1."""
    colour_order: Literal["RGB", "BGR"] = "RGB"
    """Channel order the network was trained with. Images in memory are always RGB."""
    input: InputPolicy = InputPolicy()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_classes(self.classes, self.palette, self.ignore_index, self.scored)
        return self

    @property
    def class_count(self) -> int:
        """K, the number of classes, scored or not."""
        return len(self.classes)

    @property
    def scored_ids(self) -> tuple[int, ...]:
        """The class ids that count."""
        return self.scored if self.scored is not None else tuple(range(len(self.classes)))

    def to_json(self) -> str:
        """One line of JSON with sorted keys: equal specs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
