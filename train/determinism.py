"""Bit for bit the same on a GPU, where torch has algorithms for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from srdeploy.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable without which cuBLAS may add in another order each time."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While the block runs, torch takes deterministic algorithms alone and refuses an operation
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
