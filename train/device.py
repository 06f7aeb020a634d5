"""Where training runs: the device that was asked for, or a refusal."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srdeploy.errors import UserError
from srdeploy.runtimes.base import parse_device
from srdeploy.train.distributed import ALONE, World


def find_device(name: str, world: World = ALONE) -> torch.device:
    """ "auto": the first CUDA device where there is one, else the CPU; any other name: only that
    device. Of several processes each takes the CUDA device of its number on its machine.

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


# Deterministic algorithms

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable without which cuBLAS may add in another order each time."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While the block runs, torch takes only deterministic algorithms and refuses an operation
    that has none: UserError with its name. Where it is not `wanted`, nothing changes."""
    if not wanted:
        yield
        return
    # Read when cuBLAS begins, so it must stand before the device is first used.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        # Without the search for the fastest algorithm, which may choose another one each time.
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        ):
            yield
    except RuntimeError as error:
        found = refused(error)
        if found is None:
            raise
        raise found from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def refused(error: RuntimeError) -> UserError | None:
    """The refusal in one line, where that is what torch reports."""
    text = str(error)
    if "deterministic" not in text or WORKSPACE not in text and "implementation" not in text:
        return None
    operation = text.split(maxsplit=1)[0]
    return UserError(
        f"deterministic=true: torch has no deterministic algorithm for {operation} on this device: "
        "train with --set deterministic=false, or replace that operation in the network"
    )
