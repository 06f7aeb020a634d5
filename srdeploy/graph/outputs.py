"""What each output of an ONNX model costs: the nodes and weights that only it needs."""

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, ValueInfoProto

from srdeploy.graph.signature import is_labels, is_logits
from srdeploy.graph.subgraph import ancestors, size_of
from srdeploy.validation import Settings

_MAIN_NAMES = ("labels", "logits", "out", "output", "main", "pred", "prediction", "mask")
"""What exporters and people call the main output, the surest first."""


class OutputShare(Settings):
    """One output of a model."""

    name: str
    dtype: str
    """The type as ONNX names it, e.g. float or int64."""
    shape: tuple[int | str, ...] | None
    """A number, a symbol or ? for each axis; None where the rank is unknown."""
    nodes: int
    """That only this output needs."""
    parameters: int
    """That only this output needs."""
    bytes: int
    """That only this output needs, as stored."""

    @property
    def shape_text(self) -> str:
        """The shape as readable text."""
        return "any" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"


def output_shares(model: ModelProto) -> tuple[OutputShare, ...]:
    """The outputs in the model's order, with what would go if only that one were removed."""
    names = [value.name for value in model.graph.output]
    whole = size_of(model, ancestors(model, names))
    shares = []
    for value in model.graph.output:
        others = [name for name in names if name != value.name]
        alone = whole - size_of(model, ancestors(model, others))
        shares.append(
            OutputShare(
                name=value.name,
                dtype=_dtype(value),
                shape=_shape(value),
                nodes=alone.nodes,
                parameters=alone.parameters,
                bytes=alone.bytes,
            )
        )
    return tuple(shares)


def likely_main(model: ModelProto, shares: Sequence[OutputShare]) -> str:
    """The output that looks like the segmentation: by its name, else by what only it needs.

    Outputs of another type than labels or logits come last. A guess, to be confirmed by people.
    """
    fitting = {value.name for value in model.graph.output if is_labels(value) or is_logits(value)}
    candidates = [share for share in shares if share.name in fitting] or list(shares)
    by_name = {share.name.lower(): share.name for share in reversed(candidates)}
    for name in _MAIN_NAMES:
        if name in by_name:
            return by_name[name]
    return max(candidates, key=lambda share: (share.parameters, share.nodes)).name


def _dtype(value: ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return (kind or "unknown").removesuffix("_type")
    return str(TensorProto.DataType.Name(value.type.tensor_type.elem_type)).lower()


def _shape(value: ValueInfoProto) -> tuple[int | str, ...] | None:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor.shape.dim
    )
