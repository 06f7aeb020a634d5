"""Recipes: each is a configuration that trains its network on its data set's layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from srdeploy.cli import train_verbs
from srdeploy.data.classes import CITYSCAPES_LABEL_IDS
from srdeploy.errors import UserError
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.weights import IMAGENET_FILES
from srdeploy.train.config import DATA as DATA_PARTS
from srdeploy.train.config import NETWORKS as NETWORK_PARTS
from srdeploy.train.config import TrainConfig, load_config, open_recipe, recipe_names, recipe_parts
from srdeploy.train.loop import train

SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)
HEIGHT, WIDTH = 64, 80


def write_pair(photo: Path, mask: Path, ids: np.ndarray) -> None:
    for path in (photo, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(photo)
    Image.fromarray(ids.astype(np.uint8)).save(mask)


def write_camvid(root: Path, split: str, name: str, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 11, (HEIGHT, WIDTH))
    write_pair(root / f"images/{split}/{name}.jpg", root / f"labels/{split}/{name}.png", ids)
    (root / "classes.json").write_text(json.dumps({"names": [f"c{i}" for i in range(11)]}))


def write_voc(root: Path, split: str, name: str, rng: np.random.Generator) -> None:
    name = f"{split}{name}"
    ids = rng.integers(0, 21, (HEIGHT, WIDTH))
    write_pair(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png", ids)
    listed = root / f"ImageSets/Segmentation/{split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text((listed.read_text() if listed.exists() else "") + f"{name}\n")


def write_cityscapes(root: Path, split: str, name: str, rng: np.random.Generator) -> None:
    ids = rng.choice(CITYSCAPES_LABEL_IDS, (HEIGHT, WIDTH))
    photo = root / f"leftImg8bit/{split}/city/{name}_leftImg8bit.png"
    write_pair(photo, root / f"gtFine/{split}/city/{name}_gtFine_labelIds.png", ids)


WRITERS = {"camvid": write_camvid, "voc": write_voc, "cityscapes": write_cityscapes}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data set of a few photos in the layout of each recipe's."""
    roots = {}
    for kind, write in WRITERS.items():
        roots[kind] = tmp_path_factory.mktemp(kind)
        rng = np.random.default_rng(0)
        for split, count in (("train", 2), ("val", 1)):
            for index in range(count):
                write(roots[kind], split, f"p{index}", rng)
    return roots


def test_every_named_system_has_a_recipe_for_every_data_set() -> None:
    systems = "deeplabv2-resnet101 segnet unet hrnet-w18 hrnet-w48 ocrnet-hrnet-w48"
    systems += " ocrnet-resnet101 spgnet-resnet50 hourglass"
    wanted = {f"{one}/{data}" for one in systems.split() for data in WRITERS}
    assert set(recipe_names()) == wanted


@pytest.mark.wheel
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_one_yaml_file_whose_keys_stand_once_and_are_known(
    name: str, tmp_path: Path
) -> None:
    recipe = open_recipe(name)
    node = yaml.compose(recipe.text)
    assert isinstance(node, yaml.MappingNode)
    keys = [key.value for key, _ in node.value]
    assert len(keys) == len(set(keys))
    config = load_config(recipe=name, flags={"data": "somewhere"})
    assert config.network.name == name.partition("/")[0]
    assert config.network.name in NETWORKS
    assert all(side % 32 == 0 for side in config.crop)
    # What `srdeploy recipes NAME` prints, as --config, is the same configuration.
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.text)
    assert load_config(file=file, flags={"data": "somewhere"}) == config


@pytest.mark.parametrize("name", recipe_names())
def test_exits_learn_for_a_quarter_of_every_recipe_before_they_teach(name: str) -> None:
    regulation = load_config(recipe=name, flags={"data": "somewhere"}).regulation
    assert regulation.enabled
    assert (regulation.start, regulation.ramp) == (0.25, 0.1)
    assert 0 < regulation.srf_weight < regulation.seg_weight < 1


# Every network on one layout, and one network on every layout: what remains is read alike.
@pytest.mark.parametrize(
    "name", [one for one in recipe_names() if one.endswith("/camvid") or one.startswith("unet/")]
)
def test_a_recipe_trains_its_network_on_its_layout(
    name: str, layouts: dict[str, Path], tmp_path: Path
) -> None:
    network, _, data = name.partition("/")
    small = {"network.options": SMALL[network], "crop": "64x64", "batch": 2, "steps": 2}
    quick = {"pretrained": None, "workers": 0, "device": "cpu", "regulation.width": 4}
    config = load_config(recipe=name, flags={"data": layouts[data], **small, **quick})
    result = train(config, tmp_path / "run")
    assert result.finished
    assert result.steps == 2


@pytest.mark.parametrize("network", recipe_parts(NETWORK_PARTS))
def test_a_recipe_that_starts_from_imagenet_has_a_backbone_with_such_weights(network: str) -> None:
    config = load_config(recipe=f"{network}/voc", flags={"data": "somewhere"})
    with torch.device("meta"):
        built = make_network(network, 21, **config.network.options)
    has_weights = getattr(built, "backbone", built).__dict__.get("architecture") in IMAGENET_FILES
    assert has_weights == (config.pretrained == "imagenet")


def test_a_file_and_flags_beat_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 7\nregulation: {srf_form: hard}\n")
    config = load_config(recipe="segnet/camvid", file=file, flags={"data": "somewhere", "batch": 3})
    assert (config.steps, config.batch, config.regulation.srf_form) == (7, 3, "hard")
    assert config.class_weights == "median-frequency"
    assert config.class_weights != TrainConfig(data=Path("somewhere")).class_weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("segnett/camvid", "its network 'segnett' is unknown: did you mean 'segnet'?"),
        ("segnet/camvit", "its data set 'camvit' is unknown: did you mean 'camvid'?"),
        ("segnet/../common", "its data set '../common' is unknown"),
        ("segnet", "recipe 'segnet': a recipe is NETWORK/DATA, such as"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_closest_one(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_recipe(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    train_verbs.register(app)
    return app


@pytest.mark.wheel
def test_recipes_lists_every_part_with_a_line_and_prints_one(app: typer.Typer) -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0, listed.output
    for kind in ("networks", "data"):
        for part, about in recipe_parts(kind).items():
            assert about
            assert f"{about}\n" in listed.stdout
            assert part in listed.stdout
    printed = CliRunner().invoke(app, ["recipes", "unet/voc"])
    assert printed.stdout == open_recipe("unet/voc").text
    values = json.loads(CliRunner().invoke(app, ["recipes", "unet/voc", "--json"]).stdout)
    assert values == {"name": "unet/voc", "values": open_recipe("unet/voc").values}


def test_train_takes_a_recipe_and_resume_refuses_one(
    app: typer.Typer, layouts: dict[str, Path], tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    quick = ["--steps", "1", "--batch", "2", "--crop", "64x64", "--workers", "0", "-q"]
    quick += ["--device", "cpu", "--set", "network.options.width=4"]
    words = ["train", str(layouts["camvid"]), "--recipe", "unet/camvid", "--out", out, *quick]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["clip"] == 10.0
    assert saved["steps"] == 1
    words = ["train", "--recipe", "unet/camvid", "--out", out, "--resume"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert "leave --recipe out" in str(result.exception)


def test_the_documented_table_is_what_the_recipes_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for data in recipe_parts(DATA_PARTS):
        config = load_config(recipe=f"unet/{data}", flags={"data": "somewhere"})
        height, width = config.crop
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {data} |")]
        assert row.endswith(f"| {config.steps:,} | {config.batch} | {height}x{width} |")
