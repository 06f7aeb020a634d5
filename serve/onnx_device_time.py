"""What onnxruntime's run takes on the device, apart from copying images there and results back."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy.typing as npt


def run_apart(
    ort: Any,
    session: Any,
    feed: tuple[str, npt.NDArray[Any]],
    outputs: Sequence[str],
    device: tuple[Literal["cpu", "cuda"], int],
) -> tuple[list[npt.NDArray[Any]], float]:
    """The named outputs for `feed` (input name, array), and milliseconds of the run alone.

    Input and outputs are bound to the device's memory; the clock is the host's, from when the input
    lies there until the device is idle, so launching counts and copying does not.
    """
    name, array = feed
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, *device))
    for output in outputs:
        binding.bind_output(output, *device)
    binding.synchronize_inputs()
    start = time.perf_counter()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    took = 1000 * (time.perf_counter() - start)
    return binding.copy_outputs_to_cpu(), took
