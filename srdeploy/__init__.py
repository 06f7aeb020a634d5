"""srdeploy: train with self-regulation, deploy the plain network, prove that it is the plain one.

The public names are imported on first use, so that `import srdeploy` costs nothing:

    from srdeploy import SelfRegulation, make_network, open_dataset, open_runtime, Spec
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srdeploy.data import open_dataset as open_dataset
    from srdeploy.models import make_network as make_network
    from srdeploy.runtimes.registry import open_runtime as open_runtime
    from srdeploy.spec import Spec as Spec
    from srdeploy.train.regulation import SelfRegulation as SelfRegulation

__version__ = "0.1.0"

_HOMES = {
    "SelfRegulation": "srdeploy.train.regulation",
    "Spec": "srdeploy.spec",
    "make_network": "srdeploy.models",
    "open_dataset": "srdeploy.data",
    "open_runtime": "srdeploy.runtimes.registry",
}
__all__ = ["SelfRegulation", "Spec", "__version__", "make_network", "open_dataset", "open_runtime"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'srdeploy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
