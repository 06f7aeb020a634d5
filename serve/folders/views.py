"""Runtimes that look at an image more than once, or piece by piece."""

from srdeploy.errors import UserError
from srdeploy.serve.augmented_runtime import AugmentedRuntime
from srdeploy.serve.folders.rendering import needs_logits
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.runtime import Runtime
from srdeploy.serve.tiled_runtime import TiledRuntime


def with_views(runtime: Runtime, settings: PredictSettings, batch: int) -> Runtime:
    """`runtime` as `settings` ask for: inside an augmented and a tiled one; itself where they ask
    for neither. batch: tiles in one run, at most. Raises UserError where it can't be looked at so,
    or where it has no logits for probabilities."""
    if needs_logits(settings) and not runtime.gives_logits:
        raise UserError(
            f"{runtime.path} gives labels alone, and probabilities come from logits: export it "
            "with --output both"
        )
    if settings.augmented:
        runtime = AugmentedRuntime(runtime, settings.scales, settings.flip)
    if settings.tile is not None:
        runtime = TiledRuntime(runtime, settings.tile, settings.overlap, batch)
    return runtime
