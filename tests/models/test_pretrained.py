"""Pretrained weights: files, downloads with their checksum, and nothing loaded half in silence."""

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import make_network, weights
from srdeploy.models.weights import download, load_pretrained, read_tensors, save_weights

REPOSITORY = Path(__file__).parents[2]


def shared_weights(name: str) -> Path:
    folder = Path(os.environ.get("SRDEPLOY_WEIGHTS") or REPOSITORY.parent / "shared" / "weights")
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is absent: set SRDEPLOY_WEIGHTS to the folder that has it")
    return folder / name


def mobilenet(classes: int = 3) -> nn.Module:
    return make_network("deeplabv2-mobilenetv2", classes, width_mult=0.25)


def backbone_weights(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.get_submodule("backbone").state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A classification checkpoint as torchvision's, and its backbone's tensors."""
    backbone = backbone_weights(mobilenet())
    extra = {"features.18.0.weight": torch.ones(2), "classifier.1.weight": torch.ones(2)}
    torch.save({**backbone, **extra}, tmp_path / "net.pth")
    return tmp_path / "net.pth", backbone


def test_a_classification_checkpoint_fills_the_backbone_and_says_what_it_left_out(
    checkpoint: tuple[Path, dict[str, Tensor]],
) -> None:
    path, backbone = checkpoint
    network = mobilenet()
    line = load_pretrained(network, str(path))
    assert equal(backbone_weights(network), backbone)
    assert line.startswith(f"net.pth: {len(backbone)} tensors (")
    assert line.endswith(
        "into the backbone; classification layers left out: classifier, features.18"
    )


def test_a_whole_networks_file_loads_wholly(tmp_path: Path) -> None:
    source, network = mobilenet(), mobilenet()
    save_weights(source, tmp_path / "w.safetensors")
    assert load_pretrained(network, str(tmp_path / "w.safetensors")).endswith("the whole network")
    assert equal(network.state_dict(), source.state_dict())


def test_a_head_for_other_classes_stays_as_initialised_if_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    source, network = mobilenet(classes=7), mobilenet(classes=3)
    save_weights(source, path)
    with pytest.raises(UserError, match=r"different head\.branches\.0\.weight"):
        load_pretrained(network, str(path))
    assert load_pretrained(network, str(path), ("head",)).endswith("left as initialised: head")
    assert equal(backbone_weights(network), backbone_weights(source))


def test_a_missing_key_is_named_and_nothing_is_loaded(
    checkpoint: tuple[Path, dict[str, Tensor]],
) -> None:
    path, backbone = checkpoint
    torch.save({k: v for k, v in backbone.items() if k != "features.1.conv.1.weight"}, path)
    network = mobilenet()
    before = backbone_weights(network)
    with pytest.raises(UserError, match=r"\(backbone\): missing features\.1\.conv\.1\.weight;"):
        load_pretrained(network, str(path))
    assert equal(backbone_weights(network), before)


def test_an_unknown_key_is_named(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, backbone = checkpoint
    torch.save({**backbone, "features.19.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"not expected features\.19\.weight"):
        load_pretrained(mobilenet(), str(path))


def test_batch_counts_may_be_absent_as_in_old_files(
    checkpoint: tuple[Path, dict[str, Tensor]],
) -> None:
    path, backbone = checkpoint
    torch.save({k: v for k, v in backbone.items() if "num_batches" not in k}, path)
    network = mobilenet()
    load_pretrained(network, str(path))
    assert equal(backbone_weights(network), backbone)


def test_half_precision_files_load(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    path, backbone = checkpoint
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in backbone.items()}, path)
    network = mobilenet()
    load_pretrained(network, str(path))
    for name, value in backbone_weights(network).items():
        torch.testing.assert_close(value, backbone[name], rtol=1e-3, atol=1e-6)


def test_a_misspelt_prefix_is_refused(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(UserError, match="no part 'feature': did you mean 'features'"):
        load_pretrained(mobilenet(), str(checkpoint[0]), ("feature",))


@pytest.mark.parametrize("name", ["unet", "segnet"])
def test_networks_without_a_backbone_have_no_imagenet_weights(name: str) -> None:
    with pytest.raises(UserError, match="no ImageNet weights for"):
        load_pretrained(make_network(name, 3, width=2), "imagenet")


def test_another_width_has_no_imagenet_weights() -> None:
    with pytest.raises(UserError, match=r"no ImageNet weights for backbone 'mobilenet_v2 x0\.25'"):
        load_pretrained(mobilenet(), "imagenet")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a local file server, and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()
        thread.join()


def publish(folder: Path, content: bytes) -> str:
    """Puts `content` under a name with its checksum, as torchvision does."""
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_imagenet_weights_are_downloaded_once_and_loaded(
    server: tuple[str, Path],
    checkpoint: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder = server
    path, backbone = checkpoint
    name = publish(folder, path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(weights.IMAGENET_FILES, "mobilenet_v2 x0.25", name)
    network = mobilenet()
    assert load_pretrained(network, "imagenet", base_url=url).startswith(name)
    assert equal(backbone_weights(network), backbone)
    assert (tmp_path / "cache" / "srdeploy" / name).exists()
    (folder / name).unlink()
    load_pretrained(mobilenet(), "imagenet", base_url=url)


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = server
    name = publish(folder, b"weights")
    (folder / name).write_bytes(b"weightz")
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=rf"{name}: its SHA-256 starts with [0-9a-f]{{8}}, not"):
        download(name, url, cache)
    assert list(cache.iterdir()) == []


def test_a_broken_copy_in_the_cache_is_downloaded_again(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = server
    name = publish(folder, b"weights")
    (tmp_path / name).write_bytes(b"weig")
    assert download(name, url, tmp_path).read_bytes() == b"weights"


def test_an_absent_file_and_an_absent_server_say_what_to_do(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"can't be downloaded \(.*File not found.*name the file"):
        download("net-00000000.pth", server[0], tmp_path)
    with pytest.raises(UserError, match=r"can't be downloaded \(.*refused.*name the file"):
        download("net-00000000.pth", "http://127.0.0.1:9", tmp_path)


@pytest.mark.parametrize("name", ["mobilenet_v2_onnxzoo", "mobilenet_v2_tf"])
def test_real_mobilenet_weights_fill_the_whole_backbone(name: str) -> None:
    path = shared_weights(f"{name}.safetensors")
    network = make_network("deeplabv2-mobilenetv2", 11)
    load_pretrained(network, str(path))
    tensors = read_tensors(path)
    assert all(torch.equal(v, tensors[k]) for k, v in backbone_weights(network).items())
    images = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        features = network.eval().get_submodule("backbone")(images)
    assert features.isfinite().all()
    # Statistics that fit their weights keep features within a few units; random ones do not.
    assert 0.01 < float(features.std()) < 10


def test_real_resnet_weights_without_their_last_layer_load_if_it_is_named() -> None:
    path = str(shared_weights("resnet18_layers1-3.safetensors"))
    network = make_network("deeplabv2-resnet18", 11)
    before = backbone_weights(network)
    with pytest.raises(UserError, match=r"missing layer4\.0\.conv1\.weight"):
        load_pretrained(network, path)
    assert equal(backbone_weights(network), before)
    assert load_pretrained(network, path, ("layer4",)).endswith("left as initialised: layer4")
    changed = {
        k.split(".")[0] for k, v in backbone_weights(network).items() if not v.equal(before[k])
    }
    assert changed == {"conv1", "bn1", "layer1", "layer2", "layer3"}
