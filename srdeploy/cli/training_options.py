"""Options of the verbs that train: a network by `train`, a classifier of tags by `pseudo`."""

from typing import Annotated

import typer

Steps = Annotated[int | None, typer.Option(help="Optimizer steps (default: 2000).")]
Batch = Annotated[int | None, typer.Option(help="Images per forward pass (default: 8).")]
Crop = Annotated[
    str | None, typer.Option(metavar="HxW", help="Size of training crops (default: 320x320).")
]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate (default: 0.01).")]
Pretrained = Annotated[
    str | None, typer.Option(metavar="FILE|imagenet", help="Backbone weights to start from.")
]
Seed = Annotated[int | None, typer.Option(help="Of start, order and views (default: 0).")]
TrainingDevice = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N, or auto, which says what it took.")
]
Workers = Annotated[
    int | None, typer.Option(help="Threads that read and augment photos (default: 2).")
]
