"""A tiny run folder, as srdeploy train would leave it, and tiny networks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.deployable import Deployable, Normalise
from srdeploy.export.to_onnx import export_onnx
from srdeploy.imaging import Pixels
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.weights import save_weights
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.regulation import SelfRegulation

CLASSES = ("sky", "road", "tree")


class TinyNetwork(nn.Module):
    """Two convolutions with BatchNorm and a head at half size."""

    def __init__(self, classes: int = 3, *, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(4, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(images)))
        return logits


class WithExit(nn.Module):
    """What must not be deployed: labels as usual, and one exit's logits beside them."""

    def __init__(self, network: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.normalise = Normalise(spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.regulated = SelfRegulation(network, spec.class_count, taps=["stem"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.regulated(self.normalise(images))
        logits = functional.interpolate(
            outputs.logits[-1], size=images.shape[1:3], mode="bilinear", align_corners=False
        )
        return logits.argmax(1).to(torch.uint8), outputs.logits[0]


Network = TypeVar("Network", bound=nn.Module)


def randomise(network: Network, seed: int) -> Network:
    """Weights and statistics as if trained: nothing is exactly 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                shift = 0.5 if name.endswith("var") else 0.0
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + shift)
    return network


def photo(height: int, width: int, seed: int = 0) -> Pixels:
    """A smooth picture, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def spec() -> Spec:
    return Spec(
        classes=CLASSES,
        palette=((0, 0, 0), (10, 20, 30), (0, 255, 0)),
        input=InputPolicy(smallest=(32, 32), usual=(48, 64), largest=(64, 80)),
    )


@pytest.fixture(scope="session", autouse=True)
def tiny_is_a_known_network() -> Iterator[None]:
    """Runs can name it: tracing one of the real networks takes many times longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", TinyNetwork)
        yield


@pytest.fixture(scope="session")
def tiny() -> type[TinyNetwork]:
    return TinyNetwork


@pytest.fixture(scope="session")
def randomised() -> Callable[..., nn.Module]:
    return randomise


@pytest.fixture(scope="session")
def photos() -> list[Pixels]:
    return [photo(60, 70, seed=index) for index in range(2)]


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> Path:
    """A deployed tiny network with random weights (seed 1)."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    module = Deployable(randomise(TinyNetwork(), 1), spec)
    export_onnx(module, spec, path, description={"srdeploy.network": "{}"})
    return path


@pytest.fixture(scope="session")
def tiny_file_with_exit(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> Path:
    """The same network with one exit left in its graph."""
    path = tmp_path_factory.mktemp("tiny-exit") / "model.onnx"
    module = WithExit(randomise(TinyNetwork(), 1), spec)
    export_onnx(module, spec, path, output_names=["labels", "exit"])
    return path


@pytest.fixture(scope="session")
def make_run(spec: Spec) -> Callable[[Path], Path]:
    """Writes a run folder of a tiny network with random weights and two samples."""

    def make(folder: Path) -> Path:
        options = {"width": 5}
        network = randomise(make_network("tiny", spec.class_count, **options), seed=7)
        (folder / "samples").mkdir(parents=True)
        save_weights(network, folder / "network.safetensors")
        (folder / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
        config = {"network": {"name": "tiny", "options": options}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for index in range(2):
            image = Image.fromarray(photo(60, 70, seed=index))
            image.save(folder / "samples" / f"{index}.png")
        return folder

    return make
