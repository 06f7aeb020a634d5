"""Weight files: written and read exactly, and every way a file can be wrong."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.models.weights import load_exactly, read_tensors, save_weights


def unet(classes: int = 3, width: int = 2) -> nn.Module:
    return make_network("unet", classes, width=width)


def equal(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_saved_weights_load_into_another_instance_bit_for_bit(tmp_path: Path) -> None:
    network, other = unet(), unet()
    assert not equal(network, other)
    save_weights(network, tmp_path / "deep" / "w.safetensors")
    load_exactly(other, tmp_path / "deep" / "w.safetensors")
    assert equal(network, other)


def test_metadata_is_stored_and_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    network = unet()
    metadata = {name: name * 3 for name in "zyxwvutsrq"}
    for i in range(4):
        save_weights(network, tmp_path / f"{i}.safetensors", metadata)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_strided_and_shared_tensors_are_saved(tmp_path: Path) -> None:
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    strided = first.weight.detach().contiguous(memory_format=torch.channels_last)
    first.weight = second.weight = nn.Parameter(strided)
    network = nn.Sequential(first, second)
    save_weights(network, tmp_path / "w.safetensors")
    loaded = nn.Conv2d(3, 4, 3)
    load_exactly(nn.Sequential(nn.Conv2d(3, 4, 3), loaded), tmp_path / "w.safetensors")
    assert torch.equal(loaded.weight, strided)


def test_a_file_that_does_not_fit_names_its_keys_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(unet(classes=4), path)
    network = unet(classes=3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"w\.safetensors does not fit UNet: different classifier"):
        load_exactly(network, path)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}), path)
    with pytest.raises(UserError, match=r"missing c\.weight, c\.bias; not expected b\.bias, b\.w"):
        load_exactly(nn.ModuleDict({"a": nn.Linear(1, 1), "c": nn.Linear(1, 1)}), path)


def test_another_dtype_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(1, 1).half(), path)
    with pytest.raises(UserError, match=r"weight float16\[1, 1\] in the file, float32\[1, 1\]"):
        load_exactly(nn.Linear(1, 1), path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_safetensors_file_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(unet(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"w\.safetensors is not a whole safetensors file"):
        read_tensors(path)


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="directory"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_torch_checkpoint_is_read_whatever_it_is_wrapped_in(
    old_format: bool, tmp_path: Path
) -> None:
    state = unet().state_dict()
    parallel = {f"module.{name}": value for name, value in state.items()}
    for i, content in enumerate([state, {"state_dict": state, "epoch": 3}, {"model": parallel}]):
        path = tmp_path / f"{i}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        tensors = read_tensors(path)
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[key], state[key]) for key in state)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1), "b": Harmful(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="could run code"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(unet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"w\.pth is not a whole torch checkpoint"):
        read_tensors(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.ones(2)])
def test_a_checkpoint_without_named_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"tensor"):
        read_tensors(tmp_path / "w.pth")


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match=r"w\.pth"):
        read_tensors(tmp_path / "w.pth")


def test_an_onnx_file_is_told_from_a_broken_weight_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x09\x12\x07pytorch")
    with pytest.raises(UserError, match="is an ONNX graph: a .safetensors or .pth file"):
        read_tensors(path)
