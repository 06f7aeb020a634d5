"""Auxiliary heads: found by their influence, and removed without touching the main logits."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.export.digest import graph_digest
from srdeploy.export.to_onnx import export_onnx
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.auxiliary import AuxiliaryHead, find_auxiliary, remove_auxiliary
from srdeploy.spec import Spec

K = 3
SIZE = (32, 48)
IMAGES = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Levels(nn.ModuleDict):
    """Several levels of a backbone, as torchvision's IntermediateLayerGetter gives them."""

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        found, features = OrderedDict[str, Tensor](), images
        for name, layer in self.items():
            features = layer(features)
            found[name] = features
        return found


class WithAux(nn.Module):
    """torchvision's way: a dict of outputs, and a head that may be None."""

    def __init__(self, aux: bool) -> None:
        super().__init__()
        self.backbone = Levels({"mid": conv(3, 4, 2), "deep": conv(4, 6, 2)})
        self.classifier = nn.Sequential(conv(6, 6), nn.Conv2d(6, K, 1))
        self.aux_classifier = nn.Sequential(conv(4, 4), nn.Conv2d(4, K, 1)) if aux else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, size = self.backbone(images), images.shape[-2:]
        result = {"out": functional.interpolate(self.classifier(features["deep"]), size=size)}
        if self.aux_classifier is not None:
            result["aux"] = functional.interpolate(self.aux_classifier(features["mid"]), size=size)
        return result


class Base(nn.Module):
    """A backbone and a head; sub-classes add what they test."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = conv(3, 4, 2)
        self.decode_head = nn.Conv2d(4, K, 1)
        self.add()

    def add(self) -> None:
        self.auxiliary_head = nn.ModuleList([nn.Conv2d(4, K, 1), nn.Conv2d(4, 7, 1)])

    def forward(self, images: Tensor) -> Any:
        return self.decode_head(self.backbone(images))


class InTraining(Base):
    def add(self) -> None:
        self.aux = nn.Conv2d(4, K, 1)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        logits = self.decode_head(features)
        return (logits, self.aux(features)) if self.training else logits


class CalledWithoutAsking(Base):
    def add(self) -> None:
        self.aux = nn.Conv2d(4, K, 1)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.decode_head(features), self.aux(input=features) * 2


class InADict(Base):
    def add(self) -> None:
        self.heads = nn.ModuleDict({"edge": nn.Conv2d(4, 1, 1), "depth": nn.Conv2d(4, 1, 1)})

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        extra = {name: head(features) for name, head in self.heads.items()}
        return {"out": self.decode_head(features), **extra}


class InAList(Base):
    """Only one of the list's heads is the main one."""

    def add(self) -> None:
        del self.decode_head
        self.heads = nn.ModuleList(nn.Conv2d(4, K, 1) for _ in range(3))

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        found = [head(features) for head in self.heads if head is not None]
        return self.heads[1](features), found


class ByNumber(Base):
    """It calls the entries of a list by number."""

    def add(self) -> None:
        self.heads = nn.ModuleList([nn.Conv2d(4, K, 1), nn.Conv2d(4, 1, 1)])

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.decode_head(features), self.heads[0](features), self.heads[1](features)


class Twice(Base):
    """One head under two names."""

    def add(self) -> None:
        self.aux = nn.Conv2d(4, K, 1)
        self.by_name = nn.ModuleDict({"aux": self.aux})


class FrozenBackbone(Base):
    """No gradient passes the backbone, but its values do."""

    def add(self) -> None:
        self.token = nn.Parameter(torch.zeros(4))
        self.backbone.requires_grad_(False)
        self.aux = nn.Conv2d(4, K, 1)

    def forward(self, images: Tensor) -> Any:
        with torch.no_grad():
            features = self.backbone(images)
        return self.decode_head(features), self.aux(features)


class Insisting(Base):
    """It can't do without its head."""

    def add(self) -> None:
        self.aux = nn.Conv2d(4, K, 1)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.decode_head(features), self.aux.weight.sum()


NETWORKS_WITH_HEADS: list[tuple[nn.Module, list[AuxiliaryHead], list[str]]] = [
    (WithAux(aux=True), [AuxiliaryHead("aux_classifier", 167, True, K)], []),
    (Base(), [AuxiliaryHead("auxiliary_head", 50, False, None)], []),
    (InTraining(), [AuxiliaryHead("aux", 15, True, K)], []),
    (CalledWithoutAsking(), [AuxiliaryHead("aux", 15, True, K)], []),
    (
        InADict(),
        [AuxiliaryHead("heads", 10, True, None)],
        [],
    ),
    (
        InAList(),
        [AuxiliaryHead("heads.0", 15, True, K), AuxiliaryHead("heads.2", 15, True, K)],
        ["heads.1.bias", "heads.1.weight"],
    ),
    (ByNumber(), [AuxiliaryHead("heads", 20, True, None)], []),
    (Twice(), [AuxiliaryHead("aux", 15, False, None)], []),
    (FrozenBackbone(), [AuxiliaryHead("aux", 15, True, K)], ["token"]),
]


def main(network: nn.Module) -> Tensor:
    output = network.eval()(IMAGES)
    output = output["out"] if isinstance(output, dict) else output
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@pytest.mark.parametrize(
    ("network", "heads", "kept"), NETWORKS_WITH_HEADS, ids=lambda value: type(value).__name__
)
def test_heads_are_found_and_removed_and_the_logits_stay_bit_for_bit(
    network: nn.Module, heads: list[AuxiliaryHead], kept: list[str]
) -> None:
    network = copy.deepcopy(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    logits = main(network)
    assert list(find_auxiliary(network, SIZE)) == heads
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert remove_auxiliary(network, SIZE) == tuple(head.name for head in heads)
    assert torch.equal(main(network), logits)
    left = {key for key in network.state_dict() if key not in kept}
    assert {key.partition(".")[0] for key in left} <= {"backbone", "classifier", "decode_head"}
    assert set(kept) <= set(network.state_dict())
    assert find_auxiliary(network, SIZE) == ()
    assert remove_auxiliary(network, SIZE) == ()


def test_a_network_that_insists_on_its_head_is_refused_and_left_as_it_was() -> None:
    network = Insisting()
    keys, modules = list(network.state_dict()), list(network.named_modules())
    with pytest.raises(UserError, match="can't run without its auxiliary head 'aux'.*Attribute"):
        remove_auxiliary(network, SIZE)
    assert list(network.state_dict()) == keys
    assert list(network.named_modules()) == modules


def test_every_head_is_put_back_where_a_later_one_can_not_go() -> None:
    network = Insisting()
    insisted = network._modules.pop("aux")
    network.unused = nn.Conv2d(1, 1, 1)
    network.add_module("aux", insisted)
    names = [name for name, _ in network.named_modules()]
    with pytest.raises(UserError, match="'aux'"):
        remove_auxiliary(network, SIZE)
    assert [name for name, _ in network.named_modules()] == names


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_house_have_no_auxiliary_heads(name: str) -> None:
    assert find_auxiliary(make_network(name, K, **SMALL[name])) == ()


def test_on_the_meta_device_heads_are_found_by_gradients_alone() -> None:
    with torch.device("meta"):
        network = WithAux(aux=True)
    assert [head.name for head in find_auxiliary(network, SIZE)] == ["aux_classifier"]


def exported(network: nn.Module, path: Path) -> onnx.ModelProto:
    spec = Spec(classes=("a", "b", "c"), palette=((0, 0, 0), (9, 9, 9), (99, 99, 99)))
    export_onnx(Deployable(network, spec), spec, path)
    return onnx.load(path)


def test_a_stripped_network_exports_to_the_graph_of_one_built_without_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, without = WithAux(aux=True).eval(), WithAux(aux=False).eval()
    remove_auxiliary(network, SIZE)
    assert network.aux_classifier is None
    assert list(network.state_dict()) == list(without.state_dict())
    without.load_state_dict(network.state_dict())
    found, plain = exported(network, tmp_path / "a.onnx"), exported(without, tmp_path / "b.onnx")
    assert graph_digest(found) == graph_digest(plain)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
