"""`srdeploy export` of networks of a user's own code, and of built-in ones with a weight file."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from srdeploy.cli.main import main
from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.export.digest import graph_digest
from srdeploy.export.pipeline import export_source
from srdeploy.export.source import open_source
from srdeploy.export.to_onnx import export_onnx
from srdeploy.files import sha256_of
from srdeploy.imaging import fit, restore
from srdeploy.models import make_network
from srdeploy.models.weights import save_weights
from srdeploy.runtimes.registry import open_runtime
from srdeploy.spec import Spec

NAME = "exported_pkg.models:make_network"
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width, aux, picky):
        super().__init__()
        self.picky = picky
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)
        self.aux = nn.Conv2d(4, classes, 1) if aux else None

    def forward(self, images):
        sides = images.shape[2:]
        if sides[0] % self.picky or sides[1] % self.picky:
            raise ValueError(f"sides must be multiples of {self.picky}")
        low = self.stem(images)
        out = {"out": self.head(self.body(low))}
        if self.aux is not None:
            out["aux"] = self.aux(low)
        return out

def make_network(num_classes, *, width=6, aux=True, picky=1):
    return Net(num_classes, width, aux, picky)

def with_own_weights():
    torch.manual_seed(5)
    return Net(3, 4, False, 1)

class OneSize(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 8, 8)
        self.place = nn.Parameter(torch.zeros(1, 5, 8, 6))
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, images):
        return self.head(self.embed(images) + self.place)
"""

Randomised = Callable[..., nn.Module]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `srdeploy ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["srdeploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, randomised: Randomised, spec: Spec) -> Path:
    """A working folder with a package, a class list, a spec and the weights of two networks."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "exported_pkg").mkdir()
    (folder / "exported_pkg" / "models.py").write_text(CODE)
    (folder / "classes.json").write_text(json.dumps({"names": ["sky", "road", "tree"]}))
    (folder / "spec.json").write_text(spec.to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        network = randomised(make_network(NAME, 3), seed=4)
        torch.save(
            {"state_dict": {f"model.{key}": value for key, value in network.state_dict().items()}},
            folder / "trained.pth",
        )
        other = randomised(make_network("exported_pkg.models:OneSize", 3), seed=5)
        save_weights(other, folder / "one_size.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def exported(place: Path) -> tuple[dict[str, Any], Path]:
    """The summary and deploy folder of a network that only takes multiples of 32."""
    arguments = [NAME, "--weights", "trained.pth", "--classes", "spec.json", "--size", "48x80"]
    arguments += ["--option", "picky=32", "--set", "multiple=32", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "srdeploy", "export", *arguments],
        cwd=place,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": _repository()},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), place / "deploy" / "trained"


def _repository() -> str:
    import srdeploy

    return str(Path(srdeploy.__file__).parent.parent)


def test_a_users_network_is_exported_and_certified(
    exported: tuple[dict[str, Any], Path], place: Path
) -> None:
    summary, folder = exported
    assert summary["certificate"]["passed"] is True
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["network"] == {"name": NAME, "options": {"picky": 32}}
    assert manifest["weights_sha256"] == sha256_of(place / "trained.pth")
    assert manifest["spec"]["input"]["multiple"] == 32
    assert manifest["command"] == (
        f"srdeploy export {NAME} --weights trained.pth --classes spec.json --option picky=32 "
        "--size 48x80 --set multiple=32 --out deploy/trained --input uint8 --output labels"
    )
    metadata = {
        entry.key: entry.value for entry in read_model(folder / "model.onnx").metadata_props
    }
    assert json.loads(metadata["srdeploy.network"]) == manifest["network"]


def test_auxiliary_heads_are_left_out_and_named(
    exported: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    summary, folder = exported
    assert summary["manifest"]["auxiliary_heads_left_out"] == [{"name": "aux", "parameters": 15}]
    source = open_source(
        NAME,
        weights=Path("trained.pth"),
        classes=Path("spec.json"),
        options={"picky": 32, "aux": False},
        size=(48, 80),
        multiple=32,
    )
    never_had = Deployable(make_network(NAME, 3, picky=32, aux=False), source.spec)
    export_onnx(never_had, source.spec, tmp_path / "plain.onnx")
    digests = [
        graph_digest(read_model(f)) for f in (folder / "model.onnx", tmp_path / "plain.onnx")
    ]
    assert digests[0] == digests[1]


def test_synthetic_pictures_are_never_taken_for_photos(
    exported: tuple[dict[str, Any], Path],
) -> None:
    lines = {line["name"]: line for line in exported[0]["certificate"]["lines"]}
    assert lines["parity"]["detail"].endswith("on synthetic images, not photos: give --images")
    assert lines["parity"]["figures"]["drawn"] is True
    assert lines["provenance"]["figures"]["photos"] == 0


@pytest.mark.parametrize("shape", [(1, 97, 131, 3), (3, 64, 96, 3), (2, 33, 32, 3)])
def test_the_graph_pads_to_multiples_as_torch_does(
    exported: tuple[dict[str, Any], Path], shape: tuple[int, ...]
) -> None:
    network, _ = open_source(
        NAME,
        weights=Path("trained.pth"),
        classes=Path("classes.json"),
        options={"picky": 32},
        multiple=32,
    ).build()
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with open_runtime(exported[1]) as runtime, torch.inference_mode():
        labels = runtime.run(images)
        expected = Deployable(network, runtime.spec)(torch.from_numpy(images))
    assert labels.shape == shape[:3]
    assert (labels == expected.numpy()).mean() > 0.999


def test_a_network_of_one_size_gets_every_photo_resized_to_it(
    tmp_path: Path, photos: list[Any]
) -> None:
    source = open_source(
        "exported_pkg.models:OneSize",
        weights=Path("one_size.safetensors"),
        classes=Path("classes.json"),
        size=(64, 48),
        fixed_size=True,
    )
    result = export_source(source, tmp_path / "deploy")
    assert result.passed, result.certificate.summary()
    with open_runtime(result.folder) as runtime:
        assert runtime.input_shape == (None, 64, 48, 3)
        fitted = fit(photos[0], runtime.spec)
        assert fitted.shape == (64, 48, 3)
        labels = restore(runtime.run(fitted[None])[0], *photos[0].shape[:2])
    assert labels.shape == photos[0].shape[:2]


def test_a_built_in_network_is_exported_with_a_weight_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    randomised: Randomised,
) -> None:
    save_weights(randomised(make_network("tiny", 3, width=5), 2), tmp_path / "w.safetensors")
    flags = (
        "--weights",
        tmp_path / "w.safetensors",
        "--classes",
        "classes.json",
        "--size",
        "40x48",
    )
    out = tmp_path / "out"
    assert call(monkeypatch, "export", "tiny", *flags, "--option", "width=5", "--out", out) == 0
    assert "✓ identity" in capsys.readouterr().err
    assert json.loads((out / "manifest.json").read_text())["network"]["name"] == "tiny"


def test_weights_that_the_function_brings_are_exported_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "exported_pkg.models:with_own_weights"
    source = open_source(name, classes=Path("classes.json"))
    assert "no --weights: exporting the weights that" in capsys.readouterr().err
    first, second = (source.build()[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert source.name == "with_own_weights"


WEIGHTS = ("--weights", "trained.pth")
CLASSES = ("--classes", "classes.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NAME, *WEIGHTS), "needs --classes FILE"),
        (("unet", *CLASSES), "network 'unet' needs --weights FILE: fresh ones are random"),
        (("unett", *CLASSES), "no such run folder, and no network: unett: did you mean 'unet'?"),
        (
            (NAME, *WEIGHTS, *CLASSES, "--set", "fixed_size=true"),
            "fixed_size needs the size: --size HEIGHTx",
        ),
        ((NAME, *WEIGHTS, *CLASSES, "--size", "big"), "--size 'big': height x width"),
        ((NAME, *WEIGHTS, *CLASSES, "--option", "width"), "--option width: needs KEY=VALUE"),
        ((NAME, *WEIGHTS, *CLASSES, "--option", "wide=3"), "has no option 'wide': did you mean"),
        ((NAME, *WEIGHTS, *CLASSES, "--option", "width=5"), "does not fit Net (without the prefix"),
        (
            (NAME, "--weights", "one_size.safetensors", *CLASSES),
            "missing stem.0.weight, stem.0.bias, stem.1.weight and",
        ),
        ((NAME, *WEIGHTS, *CLASSES, "--option", "picky=32"), "fails on an image of 65x97 (Value"),
        (
            ("exported_pkg.models:OneSize", "--weights", "one_size.safetensors", *CLASSES),
            "export: --size HxW --set fixed_size=true)",
        ),
        (("exported_pkg.models:absent", *WEIGHTS, *CLASSES), "has no 'absent'"),
        ((NAME, *WEIGHTS, *CLASSES, "--images", "nowhere"), "no such folder of photos: nowhere"),
    ],
)
def test_what_cannot_be_exported_ends_with_one_line_and_nothing_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert call(monkeypatch, "export", *arguments, "--out", tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    two = tmp_path / "two.json"
    two.write_text(json.dumps({"names": ["sky", "road"]}))
    source = open_source("exported_pkg.models:with_own_weights", classes=two)
    with pytest.raises(UserError, match="gives 3 logits per pixel, but the class list has 2"):
        source.build()


def test_a_run_takes_none_of_a_networks_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    make_run: Callable[[Path], Path],
) -> None:
    run = make_run(tmp_path / "run")
    settings = ("--set", "multiple=32")
    for flags in (WEIGHTS, CLASSES, settings, ("--option", "width=3")):
        assert call(monkeypatch, "export", run, *flags, "--out", tmp_path / "out") == 2
        assert (
            f"which says by itself what {'multiple' if flags is settings else flags[0]} would"
            in capsys.readouterr().err
        )
