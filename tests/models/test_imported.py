"""Networks of a user's own code: made by import, refused in one line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.models.imported import require_alike

pytestmark = pytest.mark.wheel

CODE = """
import functools
from torch import nn
import imported_layers

class Net(nn.Module):
    def __init__(self, nclass, width=4):
        super().__init__()
        self.head = nn.Conv2d(3, nclass, 1)
        self.width = width

    @classmethod
    def wide(cls, nclass):
        return cls(nclass, width=99)

def by_name(width=4, *, num_classes):
    return nn.Conv2d(width, num_classes, 1)
def by_place(k, /, width=4):
    import imported_late
    return nn.Conv2d(width, k, 1)
def by_int(k: int):
    return nn.Conv2d(3, k, 1)
def by_nothing(*, width=4):
    return nn.Conv2d(3, width, 1)
def taking_any(**options):
    return nn.Conv2d(3, options["classes"], 1)
def taking_all(classes, **options):
    net = nn.Conv2d(3, classes, 1)
    net.options = options
    return net
def from_file(path: str):
    net = nn.Conv2d(3, 7, 1)
    net.path = path
    return net
bound = functools.partial(Net, width=8)

def raising(classes):
    raise ValueError("no luck\\nat all")
def leaving(classes):
    raise SystemExit(3)
def wrong_kind(classes):
    return {"net": nn.ReLU()}
made = nn.ReLU()
number = 3
_shared = nn.Conv2d(3, 2, 1)
def same_again(classes):
    return _shared
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the working folder; forgotten afterwards, so that each test imports anew."""
    folder = tmp_path / "imported_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "models.py").write_text(CODE)
    (folder / "needy.py").write_text("import not_on_this_machine\n")
    (folder / "broken.py").write_text("x = = 1\n")
    (folder / "script.py").write_text("raise SystemExit('usage: script')\n")
    (folder / "empty.py").write_text("import torch\n")
    for helper in ("imported_layers", "imported_late"):
        (tmp_path / f"{helper}.py").write_text("")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("imported_"):
            del sys.modules[name]


def make(function: str, classes: int = 5, **options: object) -> nn.Module:
    return make_network(f"imported_pkg.models:{function}", classes, **options)


@pytest.mark.parametrize(
    "function", ["by_name", "by_place", "by_int", "taking_any", "Net", "Net.wide", "bound"]
)
def test_the_class_count_goes_where_the_signature_has_it(function: str) -> None:
    network = make(function)
    assert [one for one in network.modules() if isinstance(one, nn.Conv2d)][-1].out_channels == 5
    assert network.training


def test_a_function_without_a_place_for_the_class_count_is_called_without_it() -> None:
    network = make("by_nothing", 5, width=7)
    assert isinstance(network, nn.Conv2d)
    assert network.out_channels == 7


def test_a_first_parameter_that_is_no_number_is_an_option() -> None:
    assert make("from_file", path="w.pth").path == "w.pth"
    with pytest.raises(UserError, match=r"needs a value for 'path': --option path=VALUE"):
        make("from_file")


def test_options_reach_the_function_and_any_option_where_it_takes_all() -> None:
    assert make("Net", width=9).width == 9
    assert make("taking_all", name="x", depth=[1, 2]).options == {"name": "x", "depth": [1, 2]}


def test_the_working_folder_is_searched_for_the_call_alone(tmp_path: Path) -> None:
    before = list(sys.path)
    make("by_place")  # imports a module from the working folder inside the function
    assert sys.path == before


def test_equal_seeds_give_equal_networks() -> None:
    torch.manual_seed(3)
    first = make("Net").state_dict()
    torch.manual_seed(3)
    second = make("Net").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_pkg.models:make", r"no module 'absent_pkg' in .*, nor installed: run this in the"),
        ("imported_pkg.absent:make", r"there is no module 'imported_pkg.absent' in "),
        (
            "imported_pkg.needy:make",
            r"importing imported_pkg.needy raised ModuleNotFoundError: No module named "
            r"'not_on_this_machine' \(needy.py, line 1\)",
        ),
        ("imported_pkg.broken:make", r"raised SyntaxError: invalid syntax \(broken.py, line 1\)"),
        ("imported_pkg.script:make", r"importing imported_pkg.script raised SystemExit: usage"),
        ("imported_pkg.empty:make", "imported_pkg.empty has no 'make': it defines no functions"),
        ("imported_pkg.models:by_nam", "has no 'by_nam': did you mean 'by_name'"),
        ("imported_pkg.models:Net.wid", "has no 'Net.wid': did you mean 'wide'"),
        ("imported_pkg.models:number", "is a int: name a function that makes the network"),
        ("imported_pkg.models:made", "is a network, not a function that makes one"),
        ("imported_pkg/models.py:Net", "name is needed, not a file: imported_pkg.models:Net"),
        ("imported_pkg.models:", "give PACKAGE.MODULE:FUNCTION"),
        ("imported pkg:make", "give PACKAGE.MODULE:FUNCTION"),
        ("imported_pkg.models:raising", r"calling it raised ValueError: no luck \(models.py, line"),
        ("imported_pkg.models:leaving", "calling it raised SystemExit: 3"),
        ("imported_pkg.models:wrong_kind", "returned a dict: a torch.nn.Module is needed"),
    ],
)
def test_what_makes_no_network_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_network(name, 3)
    assert str(caught.value).startswith(f"network '{name}'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("Net", {"widht": 3}, "has no option 'widht': did you mean 'width'"),
        ("Net", {"nclass": 3}, "option 'nclass' is the number of classes, which comes from"),
        ("raising", {"width": 3}, "has no option 'width': it takes none"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    function: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(function, 5, **options)


def test_a_function_that_gives_one_network_twice_is_refused() -> None:
    name = "imported_pkg.models:same_again"
    with pytest.raises(UserError, match="two calls gave the same weights in memory"):
        require_alike(name, make_network(name, 2), make_network(name, 2))
    with pytest.raises(UserError, match="two calls gave different networks: different head.weight"):
        require_alike(name, make("Net", 3), make("Net", 4))
    require_alike(name, make("Net", 3), make("Net", 3))
