"""`srdeploy models`: the figures of networks, as table and as one JSON object."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srdeploy.models import NETWORKS, make_network
from srdeploy.models.cost import count_macs, count_parameters
from srdeploy.studies.model_table import builder_options, network_cost
from srdeploy.train.regulation import SelfRegulation

TESTS = Path(__file__).parents[1]
SMALL: dict[str, dict[str, Any]] = json.loads((TESTS / "small_networks.json").read_text())
GOLDEN = [
    line.split("\t")
    for line in (TESTS / "models" / "golden_sizes.tsv").read_text().splitlines()
    if not line.startswith("#")
]
Verb = Callable[..., tuple[int, str, str]]


def only_json(out: str) -> dict[str, Any]:
    """stdout's one line, parsed."""
    assert out.count("\n") == 1
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


@pytest.fixture
def three_networks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if these were all networks there are; counting every one takes a while."""
    kept = ["unet", "spgnet-resnet50", "hourglass"]
    few = {name: NETWORKS[name] for name in kept}
    monkeypatch.setattr("srdeploy.models.NETWORKS", few)  # restored whole, its order included
    return kept


def test_without_a_name_every_network_has_a_row(srdeploy: Verb, three_networks: list[str]) -> None:
    code, out, err = srdeploy("models")
    assert (code, err) == (0, "")
    assert "21 classes, one image of 512x1024" in out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [row[0].strip().rstrip("*") for row in rows] == three_networks
    assert [cell.strip() for cell in rows[2]][1:6] == ["6,734,762", "72.04", "4", "3", "scores.0"]
    assert "spgnet-resnet50*" in out
    assert "* an interpretation" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_is_one_object_with_the_tables_figures(
    srdeploy: Verb, three_networks: list[str]
) -> None:
    code, out, err = srdeploy("models", "--classes", 2, "--size", "256x256", "--json")
    found = only_json(out)
    assert (code, err) == (0, "")
    assert (found["classes"], found["size"]) == (2, [256, 256])
    assert [network["name"] for network in found["networks"]] == three_networks
    unet = found["networks"][0]
    assert (unet["parameters"], unet["macs"]) == (31037698, 48171581440)
    assert unet["added_parameters"] > sum(s["exit_parameters"] for s in unet["stages"]) > 0


@pytest.mark.parametrize("row", [row for row in GOLDEN if row[-1] != "-"][::6], ids=lambda r: r[0])
def test_the_verbs_figures_are_the_golden_ones(srdeploy: Verb, row: list[str]) -> None:
    name, options, classes, height, width, parameters, gmacs = row
    given = [f"--option={k}={json.dumps(v)}" for k, v in json.loads(options).items()]
    code, out, _ = srdeploy(
        *("models", name, "--classes", classes, "--size", f"{height}x{width}", "--json", *given)
    )
    found = only_json(out)
    assert code == 0
    assert (found["parameters"], found["macs"] / 1e9) == (int(parameters), float(gmacs))
    assert found["options"] == json.loads(options)


@pytest.mark.parametrize(
    "name", ["deeplabv2-mobilenetv2", "unet", "ocrnet-hrnet-w18", "spgnet-resnet50", "hourglass"]
)
def test_what_training_adds_is_the_regulated_networks_cost_less_the_plain_ones(name: str) -> None:
    cost = network_cost(name, 5, (96, 128), SMALL[name])
    with torch.device("meta"):
        network = make_network(name, 5, **SMALL[name])
        regulated = SelfRegulation(network, 5)
    assert cost.added_parameters == count_parameters(regulated) - count_parameters(network)
    plain = count_macs(network, (96, 128))
    assert (cost.macs, cost.added_macs) == (plain, count_macs(regulated, (96, 128)) - plain)
    assert tuple(stage.name for stage in cost.stages) == network.stages
    assert cost.auxiliary_heads == network.auxiliary_heads


@pytest.mark.parametrize(
    ("name", "options", "stride"),
    [
        ("unet", {"width": 4}, 1),
        ("hourglass", {"width": 4, "stacks": 11}, 4),
        ("deeplabv2-mobilenetv2", {"width_mult": 0.25, "output_stride": 8}, 8),
        ("ocrnet-resnet101", SMALL["ocrnet-resnet101"], 8),
    ],
)
def test_the_output_stride_is_that_of_the_logits_before_they_are_resized(
    name: str, options: dict[str, Any], stride: int
) -> None:
    assert network_cost(name, 3, (64, 96), options).output_stride == stride


def test_one_network_is_shown_stage_by_stage_with_its_options(srdeploy: Verb) -> None:
    code, out, _ = srdeploy("models", "hourglass", "--option", "stacks=3", "--option", "width=16")
    assert code == 0
    for words in ("stem", "stacks.0", "stacks.2", "options: stacks=3, width=16", "scores.1 1"):
        assert words in out
    assert "interpretation" not in out


def test_every_option_of_a_builder_is_shown_with_its_default() -> None:
    assert builder_options("hourglass") == {"stacks": 2, "width": 256}


CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        if images.mean().item() > 1e9:
            raise ValueError("too bright")
        return {"out": self.head(self.second(self.first(images)))}

def fixed(classes):
    return Fixed(classes)

class Fixed(Net):
    def forward(self, images):
        if images.shape[2:] != (80, 80):
            raise ValueError("images must be 80x80")
        return super().forward(images)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_models", raising=False)


@pytest.mark.usefixtures("own_code")
def test_a_network_of_ones_own_is_counted_with_the_taps_that_were_found(srdeploy: Verb) -> None:
    code, out, _ = srdeploy(
        *("models", "bench_models:Net", "--classes", 5, "--size", "64x64"),
        *("--option", "width=4", "--json"),
    )
    found = only_json(out)
    assert code == 0
    assert found["macs"] == 32 * 32 * 4 * 3 * 9 + 16 * 16 * 4 * 4 * 9 + 16 * 16 * 4 * 5
    assert (found["source"], found["output_stride"]) == ("traced", 4)
    assert [stage["stride"] for stage in found["stages"]] == [2, 4]


@pytest.mark.usefixtures("own_code")
def test_a_network_of_one_size_is_counted_at_that_size_and_refused_at_others(
    srdeploy: Verb,
) -> None:
    code, _, err = srdeploy("models", "bench_models:fixed", "--size", "64x64")
    assert code == 2
    assert "can't take an image of 64x64" in err
    assert "images must be 80x80" in err
    assert err.count("\n") == 1
    code, out, _ = srdeploy("models", "bench_models:fixed", "--size", "80x80", "--json")
    assert code == 0
    assert only_json(out)["size"] == [80, 80]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unett",), "unknown network 'unett': did you mean 'unet'"),
        (("unet", "--option", "widht=4"), "no option 'widht': did you mean 'width'"),
        (("unet", "--option", "width"), "--option width: needs KEY=VALUE"),
        (("unet", "--size", "512"), "--size '512': height x width in pixels"),
        (("unet", "--size", "8x8"), "network 'unet' can't take an image of 8x8"),
        (("--option", "width=4"), "--option is for one network"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    srdeploy: Verb, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = srdeploy("models", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
