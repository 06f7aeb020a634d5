"""Networks of others, from configurations with random weights: regulated, trained, stripped,
exported, certified."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from srdeploy.deployable import Deployable
from srdeploy.export.certificate import identity_lines
from srdeploy.export.to_onnx import export_onnx
from srdeploy.models import make_network
from srdeploy.models.auxiliary import remove_auxiliary
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.regulation import AUXILIARY_WEIGHT, SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

K = 5
SETTINGS = RegulationConfig(width=8)


@dataclass(frozen=True)
class Foreign:
    """How to build a network, and what is expected of it."""

    build: Callable[[int, bool], nn.Module]
    """Given the number of its levels, and whether it has its auxiliary head."""
    layouts: tuple[str, ...]
    """Of the taps, with four levels."""
    strides: tuple[int, ...]
    size: tuple[int, int] = (64, 96)
    dynamic: bool = True
    """Whether its graph takes other sizes than `size`."""
    auxiliary: str | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back what transformers says about packages that are absent here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def segformer(levels: int, auxiliary: bool) -> nn.Module:
    transformers: Any = library("transformers")
    config = transformers.SegformerConfig(
        num_labels=K,
        num_encoder_blocks=levels,
        depths=[1] * levels,
        sr_ratios=[8, 4, 2, 1][:levels],
        patch_sizes=[7, 3, 3, 3][:levels],
        strides=[4, 2, 2, 2][:levels],
        mlp_ratios=[2] * levels,
        hidden_sizes=[8, 8, 16, 16][:levels],
        num_attention_heads=[1, 1, 2, 2][:levels],
        decoder_hidden_size=8,
    )
    network: nn.Module = transformers.SegformerForSemanticSegmentation(config)
    return network


def upernet(levels: int, auxiliary: bool) -> nn.Module:
    transformers: Any = library("transformers")
    backbone = transformers.ConvNextConfig(
        num_stages=levels,
        depths=[1] * levels,
        hidden_sizes=[4, 8, 8, 8][:levels],
        out_features=[f"stage{i + 1}" for i in range(levels)],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        num_labels=K,
        hidden_size=8,
        pool_scales=[1, 2],
        auxiliary_in_channels=8,
        auxiliary_channels=4,
        use_auxiliary_head=auxiliary,
    )
    made = transformers.UperNetForSemanticSegmentation(config)
    if auxiliary:  # it reads the third level, where there is one
        made.auxiliary_head.in_index = min(2, levels - 1)
    network: nn.Module = made
    return network


def dpt(levels: int, auxiliary: bool) -> nn.Module:
    transformers: Any = library("transformers")
    config = transformers.DPTConfig(
        num_labels=K,
        hidden_size=8,
        num_hidden_layers=2 * levels,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        backbone_out_indices=[2 * i + 1 for i in range(levels)],
        reassemble_factors=[4, 2, 1, 0.5][:levels],
        neck_hidden_sizes=[4] * levels,
        fusion_hidden_size=4,
        use_auxiliary_head=auxiliary,
    )
    network: nn.Module = transformers.DPTForSemanticSegmentation(config)
    return network


FOREIGN = {
    "segformer": Foreign(segformer, ("NLC", "NLC", "NLC", "NCHW"), (4, 8, 16, 32)),
    # Its adaptive pools are exported for one size: with other sizes the graph would be wrong.
    "upernet": Foreign(
        upernet, ("NCHW",) * 4, (4, 8, 16, 32), dynamic=False, auxiliary="auxiliary_head"
    ),
    # It takes square images alone.
    "dpt": Foreign(
        dpt,
        ("NLC",) * 4,
        (16,) * 4,
        size=(64, 64),
        dynamic=False,
        auxiliary="auxiliary_head",
    ),
}


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request: pytest.FixtureRequest) -> Foreign:
    return FOREIGN[request.param]


def trained(foreign: Foreign, levels: int) -> SelfRegulation:
    """The foreign network after two steps of regulated training."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = foreign.build(levels, True)
        regulated = SelfRegulation(network, K, settings=SETTINGS, probe_size=foreign.size)
        optimizer = torch.optim.SGD(regulated.parameters(), lr=0.01)
        images = torch.randn(2, 3, *foreign.size)
        labels = torch.randint(K, (2, *foreign.size))
        expected = {"main", "seg", "cls", "srf", "srl", *(["own"] if foreign.auxiliary else [])}
        for _ in range(2):
            optimizer.zero_grad()
            outputs = regulated(images)
            found = regulated.losses_of(outputs, labels)
            assert all(bool(torch.isfinite(logits).all()) for logits in outputs.logits)
            assert all(bool(torch.isfinite(term)) for term in found.terms.values())
            assert set(found.terms) == expected
            found.total.backward()
            optimizer.step()
    return regulated


@pytest.fixture(scope="module")
def regulated(foreign: Foreign) -> SelfRegulation:
    """With two levels alone, since exporting takes long."""
    return trained(foreign, 2)


@pytest.fixture(scope="module")
def spec(foreign: Foreign) -> Spec:
    fixed = InputPolicy(smallest=foreign.size, usual=foreign.size, largest=foreign.size)
    return Spec(
        classes=tuple(f"c{i}" for i in range(K)),
        palette=tuple((i, i, i) for i in range(K)),
        input=InputPolicy() if foreign.dynamic else fixed,
    )


@pytest.fixture(scope="module")
def deployed(
    foreign: Foreign,
    regulated: SelfRegulation,
    spec: Spec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The stripped network as a file."""
    remove_auxiliary(regulated.network, foreign.size)
    path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    with quiet():
        export_onnx(Deployable(regulated.network, spec, output="both"), spec, path, output="both")
    return path


def test_with_four_levels_each_trains_an_exit(foreign: Foreign) -> None:
    regulated = trained(foreign, 4)
    assert regulated.choice is not None
    assert regulated.choice.source == "traced"
    assert tuple(one.layout for one in regulated.choice.maps) == foreign.layouts
    assert tuple(one.stride for one in regulated.choice.maps) == foreign.strides
    wanted = {foreign.auxiliary: AUXILIARY_WEIGHT} if foreign.auxiliary else {}
    assert regulated.auxiliary_heads == wanted


def test_the_stripped_graph_is_that_of_one_built_without_exits_and_heads(
    foreign: Foreign, regulated: SelfRegulation, deployed: Path, spec: Spec, tmp_path: Path
) -> None:
    path = tmp_path / "plain.onnx"
    with quiet():
        plain = foreign.build(2, False).eval()
        remove_auxiliary(plain, foreign.size)  # layers of its own that nothing reads
        assert list(plain.state_dict()) == list(regulated.network.state_dict())
        export_onnx(Deployable(plain, spec, output="both"), spec, path, output="both")
    lines = identity_lines(onnx.load(path), onnx.load(deployed))
    assert [line for line in lines if not line.passed] == []


def test_onnxruntime_gives_torchs_logits_at_sizes_and_batches_it_never_saw(
    foreign: Foreign, regulated: SelfRegulation, deployed: Path, spec: Spec
) -> None:
    module = Deployable(regulated.network, spec, output="both").eval()
    session = onnxruntime.InferenceSession(deployed, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    sizes = ((97, 131), (64, 64)) if foreign.dynamic else (foreign.size,)
    for batch, size in ((batch, size) for batch in (1, 3) for size in sizes):
        images = rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        with torch.inference_mode():
            labels, logits = module(torch.from_numpy(images))
        found_labels, found_logits = session.run(None, {"images": images})
        scale = max(float(logits.abs().max()), 1.0)
        torch.testing.assert_close(
            torch.from_numpy(found_logits), logits, rtol=1e-4, atol=1e-5 * scale
        )
        assert (found_labels == labels.numpy()).mean() > 0.999


@pytest.mark.parametrize("name", ["segformer", "unet"])
def test_regulation_leaves_no_hook_and_no_change_in_the_network(name: str) -> None:
    with quiet():
        network = segformer(2, True) if name == "segformer" else make_network(name, K, width=4)
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, 64, 96))
        hooks = hook_count(network)  # transformers leaves some of its own after a first forward
        before = {key: value.clone() for key, value in network.state_dict().items()}
        regulated = SelfRegulation(network, K, settings=SETTINGS).eval()
        with torch.no_grad():
            regulated(torch.randn(2, 3, 64, 96))
    assert regulated.network is network
    assert hook_count(network) == hooks
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def hook_count(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def library(name: str) -> Any:
    """A package that needs torch's CUDA build on many machines; absent or broken, the test is
    skipped with the reason."""
    try:
        with quiet():
            return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{name} was NOT tested: its import failed here ({error})")


def torchvision_lraspp() -> nn.Module:
    models: Any = library("torchvision.models.segmentation")
    network: nn.Module = models.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=K
    )
    return network


def torchvision_deeplab() -> nn.Module:
    models: Any = library("torchvision.models.segmentation")
    network: nn.Module = models.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=K, aux_loss=True
    )
    return network


def smp_unet() -> nn.Module:
    package: Any = library("segmentation_models_pytorch")
    network: nn.Module = package.Unet("resnet18", encoder_weights=None, classes=K)
    return network


@pytest.mark.parametrize("build", [torchvision_lraspp, torchvision_deeplab, smp_unet])
def test_the_libraries_networks_are_regulated_and_stripped(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build()
    regulated = SelfRegulation(network, K, settings=SETTINGS)
    assert regulated.choice is not None
    assert 2 <= len(regulated.taps) <= 6
    assert ("aux_classifier" in regulated.auxiliary_heads) == (build is torchvision_deeplab)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(K, (2, 64, 96))
    optimizer = torch.optim.SGD(regulated.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        found = regulated.losses(images, labels)
        assert torch.isfinite(found.total)
        found.total.backward()
        optimizer.step()
    remove_auxiliary(network)
    assert not any("aux" in key for key in network.state_dict())
