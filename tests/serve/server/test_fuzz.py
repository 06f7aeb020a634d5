"""The server under requests that no client would send: no 500, no crash, no leak."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from tests.serve.server.live import LiveServer

schemathesis = pytest.importorskip(
    "schemathesis", reason="no schemathesis here: the server was NOT fuzzed"
)
COUNT = 2000
"""Damaged and hostile images that the server is sent."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, exported: dict[str, Path]
) -> Iterator[LiveServer]:
    live = LiveServer(
        tmp_path_factory.mktemp("live"),
        f"unet={exported['uint8-labels']}",
        *(
            "--set",
            "sessions=2",
            "--set",
            "threads=1",
            "--set",
            "max_batch=2",
            "--set",
            "max_megapixels=1",
        ),
    )
    yield live
    live.kill()


@pytest.fixture(scope="module")
def api(server: LiveServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()  # type: ignore[untyped-decorator]
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_requests_by_the_description_get_answers_by_the_description(
    case: Any, server: LiveServer
) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    response = case.call(base_url=server.url)
    # What the description allows may still be no image that a network takes.
    excluded = [positive_data_acceptance]
    if response.status_code == 504 and "timeout_ms" in (case.query or {}):
        excluded.append(not_a_server_error)  # it asked for less time than there was: its own doing
    case.validate_response(response, excluded_checks=excluded)


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")  # in making the corpus
def test_hostile_images_neither_crash_nor_leak(
    server: LiveServer, hostile_corpus: Callable[[int, int], Iterator[tuple[str, bytes]]]
) -> None:
    process = psutil.Process(server.process.pid)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(buffer, "PNG")
    memory: list[int] = []
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        right = client.post("/v1/segment", content=buffer.getvalue()).content
        for number, (name, content) in enumerate(hostile_corpus(COUNT, 7)):
            answer = client.post("/v1/segment", content=content)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 413), (name, answer.text)
            if answer.status_code != 200:
                assert set(answer.json()) == {"error"}, name
            if number % (COUNT // 4) == 0:
                memory.append(process.memory_info().rss)
                assert client.post("/v1/segment", content=buffer.getvalue()).content == right
    assert sum(statuses.values()) == COUNT
    assert statuses[400] > COUNT / 4
    assert memory[-1] - memory[1] < 40 * 2**20  # allocators keep some; a leak of images is more
    assert server.process.poll() is None
    assert not [event for event in server.events if event["level"] == "error"]
