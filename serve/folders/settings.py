"""Which outputs are written for each photo, and how the network is run on it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from srdeploy.spec import Size
from srdeploy.validation import Settings

Scale = Annotated[float, Field(gt=0, le=8, allow_inf_nan=False)]


class PredictSettings(Settings):
    """Two runs with equal settings, of one artifact, write equal files."""

    mask: Literal["palette", "gray", "none"] = "palette"
    """PNG of the photo's size, the pixel value being the class id, with or without colours."""
    overlay: bool = False
    """JPEG of the photo with the class colours on top."""
    probabilities: bool = False
    """npz with float16 [K, h, w], at the network's input size."""
    rle: bool = False
    """JSON with COCO's run lengths of each class."""
    areas: Literal["none", "jsonl", "parquet"] = "none"
    """One table of the classes' areas in all photos."""
    tile: Size | None = None
    """(height, width) of the tiles in which the network sees a photo at its own size; None: the
    photo as a whole, fitted as the spec says."""
    overlap: int | None = Field(default=None, ge=0)
    """Pixels by which neighbouring tiles overlap, and over which they are blended; None: a quarter
    of the tile's shorter side."""
    scales: tuple[Scale, ...] = Field(default=(1.0,), min_length=1)
    """Sizes, relative to the usual one, whose probabilities are averaged."""
    flip: bool = False
    """Also average over the mirrored image, at each scale."""
    max_megapixels: float = Field(default=200.0, gt=0, allow_inf_nan=False)
    """Larger photos are skipped: decoding takes 3 bytes per pixel, in several copies."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.mask == "none" and not (
            self.overlay or self.probabilities or self.rle or self.areas != "none"
        ):
            raise ValueError("nothing would be written: ask for at least one output")
        if self.overlap is not None and self.tile is None:
            raise ValueError("an overlap needs tiles: give their size, too")
        if self.tile is not None and (self.overlap or 0) >= min(self.tile):
            raise ValueError("tiles must overlap by less than their shorter side")
        return self

    @property
    def augmented(self) -> bool:
        """Whether several views of each photo are averaged."""
        return self.flip or self.scales != (1.0,)
