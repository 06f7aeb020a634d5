"""How pseudo masks are made of a classifier's maps: one frozen model, kept beside them."""

from typing import Annotated, Literal

from pydantic import Field

from srdeploy.validation import Settings

Scale = Annotated[float, Field(gt=0, le=8)]
Dilation = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class PseudoConfig(Settings):
    """Everything that decides what becomes of the classifier's maps. Sizes are in pixels of the
    photo as the network sees it."""

    scales: tuple[Scale, ...] = Field(default=(0.5, 1.0, 1.5, 2.0), min_length=1)
    """Sizes, relative to the photo's, at which the network looks; their maps are averaged."""
    flip: bool = True
    """Look at the mirrored photo too."""
    grid: int = Field(default=4, ge=1)
    """Pixels per cell of the maps that are kept, along each side."""
    refine: Literal["pamr", "walk", "none"] = "pamr"
    """What makes maps follow the photo's edges: "pamr", pixel-adaptive refinement; "walk", a random
    walk; "none"."""
    pamr_steps: int = Field(default=10, ge=1)
    pamr_dilations: tuple[Dilation, ...] = Field(default=(1, 2, 4, 8, 12, 24), min_length=1)
    """Distances of the 8 neighbours that a pixel is mixed with."""
    walk_grid: int = Field(default=8, ge=1)
    """Pixels per cell that is walked on, along each side."""
    walk_radius: int = Field(default=5, ge=1)
    """Cells that a step of the walk may go, along each axis."""
    walk_power: float = Field(default=30.0, gt=0)
    """Sharpens the affinities: higher, and the walk stays within one colour."""
    walk_steps: int = Field(default=4, ge=1)
    """Few: colours alone don't hold a longer walk back, as the boundaries that IRN learns do for
    its 256 steps at power 10."""
    background: float = Field(default=0.25, gt=0, lt=1)
    """The background's score. A class's map has 1 as its highest, so a pixel is background where no
    class reaches this. Not used with a teacher, whose maps have the background's own."""
    certain: Share = 0.2
    """Pixels less certain than this are ignored. Certainty is how far the best score a stands above
    the second best b, (a - b) / (a + b)."""
    batch: int = Field(default=8, ge=1)
    """Photos of one size that are looked at together."""
