"""What a deployment machine installs, without torch: `make check-lean` sets the environment up and
names its `srdeploy` in SRDEPLOY_LEAN. Networks are trained and exported here, with torch, and every
verb of the deploy side runs there."""

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.conftest import write_tiny_data

LEAN = os.environ.get("SRDEPLOY_LEAN")
pytestmark = pytest.mark.skipif(
    LEAN is None, reason="no lean environment: `make check-lean` makes one. NOT tested here"
)
ABSENT = ("torch", "onnxscript", "ray", "openvino", "tensorrt")
LIMIT_MB = 350
PARTS = re.compile(r"(pip|scipy|matplotlib|fontTools|fonttools|kiwisolver|mpl_toolkits)[-./]")
"""Not counted: pip itself, and what only `bench` needs."""


class Deployed:
    """Two networks of one kind that differ in their weights, and the data set of both."""

    def __init__(self, root: Path) -> None:
        self.data = write_tiny_data(root / "data")
        self.photos = self.data / "images" / "val"
        self.first, self.second = (self._export(root, seed) for seed in (0, 1))

    def _export(self, root: Path, seed: int) -> Path:
        # The runs are elsewhere, as on a machine that only deploys.
        run, deploy = root / "training" / f"run{seed}", root / f"deploy{seed}"
        words = ["--network", "unet", "--option", "width=4", "--steps", "2", "--batch", "2"]
        words += ["--crop", "32x32", "--workers", "0", "--device", "cpu", "--seed", str(seed)]
        here("train", self.data, *words, "--out", run)
        here("export", run, "--out", deploy)
        return deploy


def here(*words: object) -> None:
    """Runs a verb in the full environment."""
    subprocess.run(["srdeploy", *map(str, words), "--quiet"], check=True, timeout=120)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("lean"))


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs a verb in the lean environment, from a folder without a checkout; returns its JSON."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*words: object) -> dict[str, Any]:
        assert LEAN is not None
        done = subprocess.run(
            [LEAN, *map(str, words), "--json"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def python() -> Path:
    assert LEAN is not None
    return Path(LEAN).parent / "python"


def test_nothing_heavy_is_installed() -> None:
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    done = subprocess.run(
        [python(), "-P", "-c", code, *ABSENT], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_installation_is_small() -> None:
    """Megabytes on disk, without bytecode and pip. bench is a part that a server does not need."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True)
    site = Path(done.stdout.strip())
    files = [
        path
        for path in site.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not PARTS.match(str(path.relative_to(site)))
    ]
    assert sum(path.stat().st_size for path in files) / 2**20 <= LIMIT_MB


def test_certify(lean: Callable[..., dict[str, Any]], deployed: Deployed) -> None:
    found = lean("certify", deployed.first, deployed.second)
    assert found["passed"] is True
    assert "identity" in {line["name"] for line in found["lines"]}


def test_strip(lean: Callable[..., dict[str, Any]], deployed: Deployed, tmp_path: Path) -> None:
    """A second output is added to the exported file, and taken off again."""
    model = onnx.load(str(deployed.first / "model.onnx"))
    (output,) = model.graph.output
    model.graph.node.append(helper.make_node("Identity", [output.name], ["second"]))
    second = model.graph.output.add()
    second.CopyFrom(output)
    second.name = "second"
    onnx.save(model, str(tmp_path / "two.onnx"))
    lean("strip", tmp_path / "two.onnx", "--keep", output.name)
    stripped = onnx.load(str(tmp_path / "two.stripped.onnx"))
    assert [one.name for one in stripped.graph.output] == [output.name]


def test_evaluate(lean: Callable[..., dict[str, Any]], deployed: Deployed) -> None:
    found = lean("evaluate", deployed.first, deployed.data, "--split", "val")
    assert 0 <= found["miou"] <= 1


def test_predict(lean: Callable[..., dict[str, Any]], deployed: Deployed, tmp_path: Path) -> None:
    lean("predict", deployed.first, deployed.photos, "--out", tmp_path / "masks")
    masks = {path.stem for path in (tmp_path / "masks").rglob("*.png")}
    assert masks >= {path.stem for path in deployed.photos.iterdir()}


def test_bench(lean: Callable[..., dict[str, Any]], deployed: Deployed, tmp_path: Path) -> None:
    found = lean(
        "bench", deployed.first, deployed.second, "--budget", "4", "--out", tmp_path / "report"
    )
    assert found["cells"]


@pytest.fixture
def address(deployed: Deployed, tmp_path: Path) -> Iterator[str]:
    """Where a lean server listens."""
    assert LEAN is not None
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [LEAN, "serve", str(deployed.first), "--port", "0", "--log", "json"],
            stdout=stream,
            stderr=stream,
        )
        try:
            yield listening(server, log)
        finally:
            server.terminate()
            server.wait(30)


def listening(server: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address, once the server is ready."""
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found is not None and is_ready(found[0]):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=5) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


def test_serve(address: str, deployed: Deployed) -> None:
    photo = sorted(deployed.photos.iterdir())[0].read_bytes()
    request = urllib.request.Request(
        f"{address}/v1/segment", photo, {"Content-Type": "image/png", "Accept": "image/png"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.read(8) == b"\x89PNG\r\n\x1a\n"
