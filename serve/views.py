"""Runtimes that look at an image more than once, or piece by piece."""

from srdeploy.errors import UserError
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.runtime import Runtime


def with_views(runtime: Runtime, settings: PredictSettings, batch: int) -> Runtime:
    """`runtime` as `settings` ask for: inside an augmented and a tiled one; itself where they ask
    for neither."""
    if settings.tile is None and not settings.augmented:
        return runtime
    raise UserError("not there yet")
