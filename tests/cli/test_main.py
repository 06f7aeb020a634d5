"""The frame of the command line: exit codes and errors of one line."""

import errno
import subprocess
import sys

import pytest
import typer

from srdeploy import __version__
from srdeploy.cli import main as command
from srdeploy.errors import MissingPackageError, UserError


def srdeploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srdeploy", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.wheel
def test_the_version_is_printed() -> None:
    result = srdeploy("--version")
    assert (result.returncode, result.stdout) == (0, f"srdeploy {__version__}\n")


HEAVY = {"numpy", "onnx", "onnxruntime", "pydantic", "torch", "yaml"}


@pytest.mark.wheel
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from srdeploy.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert "srdeploy.cli.main" in result.stderr
    assert not HEAVY & set(result.stderr.split())


@pytest.mark.wheel
def test_an_unknown_verb_is_refused_with_exit_code_2() -> None:
    result = srdeploy("trian")
    assert result.returncode == 2
    assert "trian" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            UserError("no such folder: [/tmp/x]\nsecond line"),
            "error: no such folder: [/tmp/x] second line",
        ),
        (
            MissingPackageError("onnxruntime", "cpu", "running an ONNX file"),
            "pip install onnxruntime",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.png"),
            "no space left on the device (out.png)",
        ),
    ],
)
def test_an_error_becomes_one_line_and_exit_code_2(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        raise error

    monkeypatch.setattr(command, "app", app)
    monkeypatch.setattr(sys, "argv", ["srdeploy"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    printed = capfd.readouterr()
    assert stopped.value.code == 2
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(command, "app", app)
    monkeypatch.setattr(sys, "argv", ["srdeploy"])
    with pytest.raises(OSError, match="Input/output"):
        command.main()
