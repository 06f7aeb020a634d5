"""Dockerfile and compose.yaml say what `srdeploy serve` understands. Neither is built here."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from srdeploy.cli.main import app
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.middleware import OPEN_PREFIXES

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(
    not (ROOT / "Dockerfile").is_file(), reason="the container's files are only in the clone"
)


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of the Dockerfile, in order."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def instruction(name: str) -> str:
    """The only instruction of this name."""
    (found,) = [text for one, text in instructions() if one == name]
    return found


def compose() -> Any:
    """compose.yaml, with the defaults of its variables."""
    text = (ROOT / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def parsed(words: list[str]) -> dict[str, Any]:
    """What `srdeploy` understands by these words; nothing is run."""
    program, verb, *rest = words
    assert (program, verb) == ("srdeploy", "serve")
    group: Any = typer.main.get_command(app)
    values: dict[str, Any] = group.commands["serve"].make_context("serve", rest).params
    return values


def test_the_image_starts_the_server_for_others_with_a_key_from_a_file() -> None:
    found = parsed([*json.loads(instruction("ENTRYPOINT")), "night=/models/night"])
    assert found["artifacts"] == ["night=/models/night"]
    assert found["host"] == "0.0.0.0"
    assert found["log"] == "json"
    assert str(found["port"]) == instruction("EXPOSE")
    assert found["api_key_file"] == Path("/run/secrets/srdeploy_api_key")
    assert "SRDEPLOY_API_KEY" not in (ROOT / "Dockerfile").read_text()


def test_the_composed_service_gives_options_that_there_are_and_the_secret_that_is_read() -> None:
    service = compose()["services"]["srdeploy"]
    found = parsed([*json.loads(instruction("ENTRYPOINT")), *service["command"]])
    (artifact,) = found["artifacts"]
    assert artifact.partition("=")[2].startswith(service["volumes"][0]["target"] + "/")
    (secret,) = service["secrets"]
    assert found["api_key_file"] == Path("/run/secrets") / secret
    assert secret in compose()["secrets"]
    (port,) = service["ports"]
    assert port.split(":") == ["127.0.0.1", "8000", str(found["port"])]


def test_the_composed_service_can_change_nothing_and_is_given_time_to_stop() -> None:
    service = compose()["services"]["srdeploy"]
    assert service["read_only"] is True
    assert all(volume["read_only"] for volume in service["volumes"])
    assert service["cap_drop"] == ["ALL"]
    assert any(one.startswith("/tmp:") for one in service["tmpfs"])
    limits = ServerLimits()
    assert int(service["stop_grace_period"].rstrip("s")) > limits.drain_s + limits.timeout_s + 5


def test_nothing_runs_as_root() -> None:
    names = [name for name, _ in instructions()]
    user = instruction("USER").partition(":")[0]
    assert int(user) > 0
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_health_is_asked_where_no_key_is_needed() -> None:
    command = instruction("HEALTHCHECK").partition(" CMD ")[2]
    program, flag, code = json.loads(command)
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    (address,) = re.findall(r"http://127\.0\.0\.1:8000(/[^']*)", code)
    assert address == "/v2/health/ready"
    assert address.startswith(OPEN_PREFIXES)


def test_the_image_gets_what_the_build_copies_and_nothing_else() -> None:
    copied = {
        source
        for name, text in instructions()
        if name == "COPY" and not text.startswith("--from")
        for source in text.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = settings["tool"]["setuptools"]["package-dir"].values()
    assert copied >= {*packaged, "srdeploy", "pyproject.toml", settings["project"]["readme"]}


def test_the_image_is_installed_with_extras_and_a_python_that_there_are() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (words,) = [shlex.split(text) for name, text in instructions() if "pip install" in text]
    extras = words[-1].removeprefix(".[").removesuffix("]").split(",")
    assert set(extras) == {"cpu", "serve"} <= set(settings["optional-dependencies"])
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    (version,) = [text for name, text in instructions() if text.startswith("PYTHON=")]
    assert f"Programming Language :: Python :: {version[7:]}" in settings["classifiers"]


def test_triton_is_there_only_when_it_is_asked_for() -> None:
    services = compose()["services"]
    assert "profiles" not in services["srdeploy"]
    assert services["triton"]["profiles"] == ["triton"]
    assert services["triton"]["volumes"][0]["read_only"] is True
    ports = [port for one in services.values() for port in one["ports"]]
    assert len({port.rpartition(":")[0] for port in ports}) == len(ports)
    assert all(port.startswith("127.0.0.1:") for port in ports)
