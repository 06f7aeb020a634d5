"""Runtimes that look at an image more than once, or piece by piece."""

from srdeploy.serve.augmented_runtime import AugmentedRuntime
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.runtime import Runtime
from srdeploy.serve.tiled_runtime import TiledRuntime


def with_views(runtime: Runtime, settings: PredictSettings, batch: int) -> Runtime:
    """`runtime` as `settings` ask for: inside an augmented and a tiled one; itself where they ask
    for neither. batch: tiles in one run, at most. Raises UserError where it can't be."""
    if settings.augmented:
        runtime = AugmentedRuntime(runtime, settings.scales, settings.flip)
    if settings.tile is not None:
        runtime = TiledRuntime(runtime, settings.tile, settings.overlap, batch)
    return runtime
