"""What clients are told of a model."""

from dataclasses import dataclass

from srdeploy.serve.runtime import Runtime
from srdeploy.serve.signature import Shape
from srdeploy.spec import Spec


@dataclass(frozen=True)
class ModelCard:
    """One loaded model: its place in addresses, and what it takes and gives."""

    name: str
    version: str
    """"1" after the start, one more after each reload."""
    spec: Spec
    backend: str
    device: str
    precision: str
    input_shape: Shape
    """(N, H, W, 3) of the images; None: any."""

    @classmethod
    def of(cls, name: str, version: int, runtime: Runtime) -> "ModelCard":
        """The card of an open runtime."""
        return cls(
            name,
            str(version),
            runtime.spec,
            runtime.backend,
            runtime.device,
            runtime.precision,
            runtime.input_shape,
        )
