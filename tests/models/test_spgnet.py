"""SPGNet: the gate against a loop, the order of decoding, what stage 2 takes from stage 1."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.models import INTERPRETATIONS, make_network, spgnet
from srdeploy.models.resnet import ResNet
from srdeploy.models.spgnet import DecoderUnit, Guidance, GuidedLevel, SPGNet
from srdeploy.models.weights import load_pretrained


def randomised(module: nn.Module) -> None:
    """Evaluation mode, with statistics that normalise and weights that matter."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    module.eval()


def test_the_gate_weighs_each_channel_of_each_pixel_by_the_prediction_there() -> None:
    torch.manual_seed(0)
    guidance = Guidance(classes=3, channels=4).double().requires_grad_(False)
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    logits = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    weight, bias = guidance.gate.weight[:, :, 0, 0], guidance.gate.bias
    assert bias is not None
    nn.init.normal_(bias)
    expected = torch.empty_like(features)
    for n in range(2):
        for c in range(4):
            for y in range(3):
                for x in range(5):
                    score = float(bias[c]) + sum(
                        float(weight[c, k]) * float(logits[n, k, y, x]) for k in range(3)
                    )
                    gate = 1 / (1 + torch.exp(torch.tensor(-score, dtype=torch.float64)))
                    expected[n, c, y, x] = features[n, c, y, x] * gate
    torch.testing.assert_close(guidance(features, logits), expected)


def test_projecting_before_raising_equals_the_papers_order_once_trained() -> None:
    torch.manual_seed(0)
    unit = DecoderUnit(lateral=6, channels=4)
    randomised(unit)
    features, coarser = torch.randn(2, 6, 9, 13), torch.randn(2, 4, 5, 7)
    raised = functional.interpolate(coarser, (9, 13), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        expected = functional.relu(
            unit.lateral_bn(unit.lateral(features)) + unit.coarser_bn(unit.coarser(raised))
        )
        torch.testing.assert_close(unit(features, coarser), expected, rtol=1e-4, atol=1e-5)


def test_a_level_of_stage_2_adds_what_stage_1_saw_and_decoded_after_its_own_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    level = GuidedLevel(layer, channels=6, decoded=5)
    randomised(level)
    features, encoded, decoded = (torch.randn(2, c, 7, 8) for c in (4, 6, 5))

    def emitted(sequence: nn.Sequential, values: Tensor) -> Tensor:
        convolution, norm = sequence[0], sequence[1]
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.kernel_size == (1, 1)
        assert convolution.bias is None
        return functional.relu(norm(convolution(values)))

    with torch.inference_mode():
        expected = layer(features) + emitted(level.from_encoder, encoded)
        expected = expected + emitted(level.from_decoder, decoded)
        torch.testing.assert_close(level(features, encoded, decoded), expected)


def test_the_output_depends_on_stage_1s_prediction_through_the_gate() -> None:
    torch.manual_seed(0)
    network = SPGNet(5, width=4).train()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for parameter in network.prediction.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_stage_1s_prediction_is_supervised_at_a_quarter_of_the_size() -> None:
    network = SPGNet(5, width=4).eval()
    assert list(network.auxiliary_heads) == ["prediction"]
    seen: list[Tensor] = []
    network.prediction.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        network(torch.randn(1, 3, 97, 131))
    assert [tuple(logits.shape) for logits in seen] == [(1, 5, 25, 34)]


def test_a_batch_of_one_can_be_trained_although_the_image_is_pooled_to_one_pixel() -> None:
    network = SPGNet(5, width=4).train()
    network(torch.randn(1, 3, 64, 64)).sum().backward()
    assert network.decoder.coarsest.pooled.weight.grad is not None


def test_weights_of_a_classifier_under_torchvisions_names_load_into_stage_1(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = ResNet("resnet50", width=4)
    classifier = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    torch.save({**source.state_dict(), **classifier}, tmp_path / "resnet50.pth")
    network = SPGNet(5, width=4)
    told = load_pretrained(network, str(tmp_path / "resnet50.pth"))
    assert "into the backbone" in told
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_it_has_the_architecture_whose_imagenet_weights_are_downloaded() -> None:
    with torch.device("meta"):
        network = make_network("spgnet-resnet50", 21)
    assert network.get_submodule("backbone").architecture == "resnet50"


def test_it_is_called_an_interpretation() -> None:
    assert {"spgnet-resnet50"} == INTERPRETATIONS
    assert "interpretation" in str(spgnet.__doc__)
