"""What TensorRT says while it parses and builds, and what that means."""

from typing import Any

from srdeploy.errors import UserError

_MEMORY = (
    "could not find any implementation",
    "out of memory",
    "outofmemory",
    "cudaerrormemoryallocation",
    "insufficient memory",
    "insufficient workspace",
    "no space left",
)
_NO_GPU = (
    "cuda initialization failure",
    "cudaerrornodevice",
    "no cuda-capable device",
    "cudaerrorinsufficientdriver",
    "cuda_error_no_device",
    "driver version is insufficient",
    "unable to determine gpu",
)
"""Parts of TensorRT's own messages, in lower case."""
_LONGEST = 300
"""Characters of a message that are shown."""


def warnings_of(logger: Any) -> list[str]:
    """The warnings so far, each once."""
    return list(dict.fromkeys(message.text for message in logger.messages if message.warning))


def explain_failure(logger: Any, what: str) -> UserError:
    """One line for a build of `what` that TensorRT gave up, from what it logged."""
    errors = [message.text for message in logger.messages if message.error]
    said = " ".join(errors).lower()
    first = _short(errors[0]) if errors else "it gives no reason"
    if any(part in said for part in _NO_GPU):
        return UserError(
            f"{what}: TensorRT finds no usable NVIDIA GPU or driver ({first}): build on the "
            "machine that will run it, or ahead of time with --builder rtx --sm 8.9"
        )
    if any(part in said for part in _MEMORY):
        return UserError(
            f"{what}: TensorRT found no kernel that fits, which is probably a matter of memory "
            f"({first}): raise --workspace, free the GPU, or give a smaller --profile"
        )
    return UserError(f"{what}: TensorRT can't build it ({first})")


def explain_parser(parser: Any, what: str) -> UserError:
    """One line for a graph that TensorRT's parser refused: node, operator and reason."""
    faults = [_fault(parser.get_error(index)) for index in range(parser.num_errors)]
    if not faults:
        return UserError(f"{what}: TensorRT does not parse it, and gives no reason")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return UserError(f"{what}: TensorRT does not take {faults[0]}{more}")


def _fault(error: Any) -> str:
    node = error.node_name() or f"number {error.node()}"
    operator = error.node_operator()
    where = f"node {node} ({operator})" if operator else "the graph"
    return f"{where}: {_short(error.desc())}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
