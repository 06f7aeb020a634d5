"""Where training runs: the device that was asked for, or a refusal."""

import torch

from srdeploy.errors import UserError
from srdeploy.serve.runtime import parse_device
from srdeploy.train.distributed import ALONE, World


def find_device(name: str, world: World = ALONE) -> torch.device:
    """ "auto": the first CUDA device where there is one, else the CPU; any other name: that device
    alone. Of several processes each takes the CUDA device of its number on its machine.

    Raises UserError for an unknown name and for a CUDA device that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = parse_device(name)
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.size > 1:
        if ":" in name:
            raise UserError(
                f"device {name} was asked for, but {world.size} processes need a GPU each: give "
                "--device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES"
            )
        index, name = world.local_rank, f"cuda:{world.local_rank}"
    if index >= count:
        raise UserError(
            f"device {name} was asked for, but torch {torch.__version__} sees {count} CUDA "
            "devices: check the driver and the torch build, or use --device cpu"
        )
    return torch.device("cuda", index)
