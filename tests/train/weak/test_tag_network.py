"""The classifier of tags: its maps are class activation maps, and its exits are MEA's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.models.deeplab import deeplabv2_mobilenetv2
from srdeploy.models.spgnet import SPGNet
from srdeploy.models.unet import UNet
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.train.weak.tag_network import TagNetwork

PLAIN = RegulationConfig(enabled=False)


def deeplab(settings: RegulationConfig = PLAIN, classes: int = 3) -> TagNetwork:
    torch.manual_seed(0)
    return TagNetwork(deeplabv2_mobilenetv2(4, width_mult=0.25), classes, settings)


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def test_activation_maps_equal_grad_cam() -> None:
    """Of a classifier that is a global mean and a linear layer, Grad-CAM (Selvaraju et al., ICCV
    2017), from gradients alone, is CAM divided by the number of cells."""
    network = deeplab().eval()
    kept: list[Tensor] = []
    handle = network.network.get_submodule("backbone").register_forward_hook(
        lambda _module, _args, output: kept.append(output)
    )
    logits = network(images()).class_logits[-1]
    handle.remove()
    (features,) = kept
    found = network.activation(images())
    cells = features.shape[2] * features.shape[3]
    for number in range(3):
        (gradient,) = torch.autograd.grad(logits[:, number].sum(), features, retain_graph=True)
        weights = gradient.mean((2, 3), keepdim=True)
        grad_cam = (weights * features).sum(1).relu()
        torch.testing.assert_close(found[:, number], cells * grad_cam, atol=1e-5, rtol=1e-4)


def test_logits_are_the_means_of_the_maps() -> None:
    outputs = deeplab().eval()(images())
    torch.testing.assert_close(outputs.class_logits[-1], outputs.maps.mean((2, 3)))


def test_the_head_of_the_network_does_not_run() -> None:
    network = deeplab()
    network.network.get_submodule("head").register_forward_hook(
        lambda *_: pytest.fail("the head ran")
    )
    network(images())


def test_no_hook_is_left_behind() -> None:
    network = deeplab(RegulationConfig())
    network(images())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("network", "source", "stages"),
    [
        (deeplabv2_mobilenetv2(4, width_mult=0.25), "backbone", 4),
        (UNet(4, width=8), "encoder.4", 4),
        (SPGNet(4, width=8), "backbone.layer4", 3),
    ],
)
def test_classifiers_sit_at_every_stage_up_to_the_deepest_map(
    network: nn.Module, source: str, stages: int
) -> None:
    found = TagNetwork(network, 3, RegulationConfig())
    assert found.source.name == source
    assert len(found.stages) == stages
    assert len(found(images()).class_logits) == stages + 1


def test_regulated_and_plain_classifiers_start_alike() -> None:
    plain, regulated = deeplab(), deeplab(RegulationConfig())
    assert torch.equal(plain.classifier.weight, regulated.classifier.weight)
    assert not plain.exits
    first, second = (n.network.state_dict() for n in (plain, regulated))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_losses_are_the_formulas() -> None:
    settings = RegulationConfig(cls_weight=0.3, srl_weight=0.7, start=0.0, ramp=0.0)
    network = deeplab(settings)
    tags = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    network.eval()  # BatchNorm without its batch, so that both forwards agree
    found = network.losses(images(), tags, progress=0.5)
    *shallow, deepest = network(images()).class_logits
    bce = functional.binary_cross_entropy_with_logits
    main = bce(deepest, tags)
    cls = torch.stack([bce(one, tags) for one in shallow]).sum()
    srl = torch.stack([bce(one, deepest.detach().sigmoid()) for one in shallow]).sum()
    torch.testing.assert_close(found.total, main + 0.3 * cls + 0.7 * srl)
    assert set(found.terms) == {"main", "cls", "srl"}


def test_feedback_begins_with_the_schedule() -> None:
    network = deeplab(RegulationConfig(start=0.5, ramp=0.1))
    tags = torch.zeros(2, 3)
    assert set(network.losses(images(), tags, progress=0.4).terms) == {"main", "cls"}
    assert set(network.losses(images(), tags, progress=0.7).terms) == {"main", "cls", "srl"}


def test_the_teacher_of_feedback_gets_no_gradient_from_it() -> None:
    network = deeplab(RegulationConfig(cls_weight=1e-9, start=0.0, ramp=0.0, srl_weight=1.0))
    tags = torch.zeros(2, 3)
    both = network.losses(images(), tags, progress=1.0)
    bias = network.classifier.bias
    assert bias is not None
    (with_feedback,) = torch.autograd.grad(both.total, bias, retain_graph=True)
    outputs = network(images())
    main = functional.binary_cross_entropy_with_logits(outputs.class_logits[-1], tags)
    (alone,) = torch.autograd.grad(main, bias)
    torch.testing.assert_close(with_feedback, alone, atol=1e-5, rtol=1e-3)
