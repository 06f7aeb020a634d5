"""A server's lifecycle: start, overload, deadlines, reload, workers, and shutdown."""

import io
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from srdeploy.cli.serve_verb import serve
from srdeploy.serve.scheduling.planner import MAX_WAIT_MS
from srdeploy.serve.server.config import ServerLimits
from srdeploy.spec import InputPolicy, Spec
from tests.serve.server.live import LiveServer

MakeGraph = Callable[..., Path]
KEY = "0123456789abcdef"
ONE = ("--set", "sessions=1", "--set", "threads=1", "--set", "max_batch=1")


def photo(side: int) -> bytes:
    """A green PNG, which the graphs call class 0."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (40, 160, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def is_right(answer: httpx.Response, side: int) -> bool:
    mask = np.array(Image.open(io.BytesIO(answer.content)))
    return mask.shape == (side, side) and not mask.any()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    servers: list[LiveServer] = []

    def make(*arguments: object, **options: Any) -> LiveServer:
        servers.append(LiveServer(tmp_path / f"live{len(servers)}", *arguments, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


class Crowd:
    """Clients that ask again as soon as they are answered, each on its own connection."""

    def __init__(self, server: LiveServer, count: int, side: int, polite: bool = False) -> None:
        """polite: they stop once an answer says that the connection closes."""
        self._polite = polite
        self.answers: list[httpx.Response] = []
        self.cut: list[httpx.HTTPError] = []
        """Requests that reached a connection and were not answered."""
        self._stop = threading.Event()
        self._server, self._photo = server, photo(side)
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v1/segment", content=self._photo)
                    self.answers.append(answer)
                    if self._polite and answer.headers.get("connection") == "close":
                        return
                except httpx.ConnectError:
                    return  # it no longer listens
                except httpx.HTTPError as error:
                    self.cut.append(error)
                    return

    def leave(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_it_is_live_from_the_start_and_ready_once_warmed_up(
    start: Callable[..., LiveServer], make_graph: MakeGraph
) -> None:
    server = start(make_graph(work=2), "--set", "sessions=2", "--set", "max_batch=4", wait=False)
    seen: list[int] = []
    while not seen or seen[-1] != 200:
        assert server.get("/v2/health/live").status_code == 200
        seen.append(server.get("/v2/health/ready").status_code)
        if seen[-1] == 503:
            early = server.post("/v1/segment", content=photo(48))
            assert early.status_code in (200, 503)
            if early.status_code == 503:
                assert "is not ready" in early.json()["error"]
    assert seen[0] == 503
    (loaded,) = server.wait_for("loaded")
    assert "session" in loaded["plan"]
    (model,) = server.get("/v1/models").json()["models"]
    assert set(model["plan"]) == {"lone", "shared", "batch", "max_wait_ms", "measured"}
    assert len(model["plan"]["measured"]) >= 2
    for trial in model["plan"]["measured"]:
        assert set(trial) == {"layout", "batch", "images_per_s", "alone_ms"}
    assert is_right(server.post("/v1/segment", content=photo(48)), 48)


def test_overload_is_refused_at_once_and_leaves_no_trace(
    start: Callable[..., LiveServer], make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    policy = InputPolicy(smallest=(32, 32), usual=(64, 64), largest=(1024, 1024))
    spec = tiny_spec.model_copy(update={"input": policy})
    server = start(
        make_graph(work=10, spec=spec), *ONE, "--set", "max_waiting=2", "--set", "drain=0"
    )
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, "/v1/segment", content=photo(1024)) for _ in range(8)]
        answers = [one.result() for one in asked]
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(served) >= 2
    assert refused
    assert len(served) + len(refused) == 8
    assert all(is_right(answer, 1024) for answer in served)
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert max(a.elapsed for a in refused) < max(answer.elapsed for answer in served)
    # a deadline
    late = server.post("/v1/segment?timeout_ms=1", content=photo(1024))
    assert late.status_code == 504
    assert "deadline" in late.json()["error"] or "no answer within" in late.json()["error"]
    # a client that leaves
    host, port = server.url.removeprefix("http://").split(":")
    body = photo(1024)
    head = f"POST /v1/segment HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.05)
    deadline = time.monotonic() + 20
    while not any(event.get("status") == 499 for event in server.events):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("srdeploy_waiting_requests") == 0
    assert server.metric("srdeploy_queue_images") == 0
    assert is_right(server.post("/v1/segment", content=photo(64)), 64)


def test_sigterm_drains_in_flight_requests(
    start: Callable[..., LiveServer], make_graph: MakeGraph, tiny_spec: Spec
) -> None:
    policy = InputPolicy(smallest=(32, 32), usual=(64, 64), largest=(512, 512))
    spec = tiny_spec.model_copy(update={"input": policy})
    server = start(make_graph(work=4, spec=spec), *ONE, "--set", "drain=3")
    crowd = Crowd(server, 6, 512, polite=True)
    while len(crowd.answers) < 6:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    assert server.get("/v2/health/live").status_code == 200
    assert server.get("/v2/health/ready").status_code == 503
    assert server.process.wait(60) == 0
    crowd.leave()
    assert crowd.cut == []
    assert {answer.status_code for answer in crowd.answers} == {200}
    assert all(is_right(answer, 512) for answer in crowd.answers)
    requests = [e for e in server.events if e.get("path") == "/v1/segment"]
    assert len(requests) == len(crowd.answers)
    assert server.events[-1]["message"] == "stopped"


def test_a_reload_under_load_drops_no_request_and_others_need_the_key(
    start: Callable[..., LiveServer], make_graph: MakeGraph, tmp_path: Path
) -> None:
    graph = make_graph()
    server = start(graph, *ONE, "--host", "0.0.0.0", SRDEPLOY_API_KEY=KEY)
    port = server.url.rsplit(":", 1)[1]
    server.url = f"http://127.0.0.1:{port}"
    ask = {"content": photo(48)}
    for headers, status in (
        ({}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"X-API-Key": KEY}, 200),
    ):
        assert server.post("/v1/segment", headers=headers, **ask).status_code == status
    assert server.get("/metrics").status_code == server.get("/v1/models").status_code == 401
    assert server.get("/v2/health/ready").status_code == server.get("/").status_code == 200

    # A body that never comes holds its place for the time limit and no longer. Another
    # server: the limit must not strike the requests of a busy machine.
    hasty = start(graph, *ONE, "--set", "timeout=1", SRDEPLOY_API_KEY=KEY)
    hasty_port = int(hasty.url.rsplit(":", 1)[1])
    head = "POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n"
    head += f"X-API-Key: {KEY}\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hasty_port), timeout=30) as connection:
        connection.sendall(head.encode() + b"slow")
        assert b" 504 " in connection.recv(4096)
    hasty.kill()

    statuses: list[int] = []
    stop = threading.Event()

    def hammer() -> None:
        with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60) as client:
            while not stop.is_set():
                statuses.append(client.post("/v1/segment", content=photo(48)).status_code)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(statuses) < 3:
        time.sleep(0.02)
    for version in (2, 3):
        server.process.send_signal(signal.SIGHUP)
        assert server.wait_for("reloaded", version - 1)[-1]["version"] == str(version)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    assert KEY not in server.log_file.read_text()


def test_workers_share_the_port_and_their_metrics(
    start: Callable[..., LiveServer], make_graph: MakeGraph
) -> None:
    server = start(make_graph(), "--workers", 2, *ONE, wait=False)
    server.wait_for("ready", 2)
    crowd = Crowd(server, 4, 48)
    while len(crowd.answers) < 40:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGHUP)  # the parent replaces one after the other
    server.wait_for("ready", 4)
    server.wait_for("stopped", 2)
    crowd.leave()
    assert crowd.cut == []
    assert {answer.status_code for answer in crowd.answers} == {200}
    assert server.metric("srdeploy_requests_total.*/v1/segment") == len(crowd.answers)
    assert server.metric("srdeploy_ready") == 1
    assert "SIGHUP" in server.post("/v2/repository/models/colour/load").json()["error"]
    assert server.terminate() == 0


def test_workers_leave_when_their_parent_is_killed(
    start: Callable[..., LiveServer], make_graph: MakeGraph
) -> None:
    server = start(make_graph(), "--workers", 2, *ONE, "--set", "drain=0", wait=False)
    server.wait_for("ready", 2)
    workers = server.workers()
    assert len(workers) == 2
    server.process.kill()
    server.wait_for("stopped", 2)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def test_help_shows_the_limits_named_defaults() -> None:
    shown = " ".join((serve.__doc__ or "").split())
    for name, value in ServerLimits().model_dump().items():
        setting = name.removesuffix("_s") if name in ("timeout_s", "drain_s") else f"max_{name}"
        assert f"{setting} ({value:g}" in shown
    assert f"max_wait_ms ({MAX_WAIT_MS:g})" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "no such file or folder: nowhere"),
        (
            ("GRAPH", "--host", "0.0.0.0"),
            "--host 0.0.0.0 lets other machines in: an API key",
        ),
        (("GRAPH", "--api-key-file", "SHORT"), "16 or more printable ASCII characters"),
        (("GRAPH", "GRAPH"), "two models named 'colour'"),
        (("a/b=GRAPH",), "'a/b' can't be a model's name"),
        (("GRAPH", "--port", "TAKEN"), "can't listen on 127.0.0.1 port"),
        (("GRAPH", "--device", "tpu"), "unknown device 'tpu'"),
        (("GRAPH", "--samples", "EMPTY"), "no photos in"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(
    make_graph: MakeGraph,
    tmp_path: Path,
    srdeploy: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.delenv("SRDEPLOY_API_KEY", raising=False)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {
            "GRAPH": str(make_graph()),
            "SHORT": str(tmp_path / "short"),
            "EMPTY": str(tmp_path / "empty"),
            "TAKEN": str(taken.getsockname()[1]),
        }
        given = [part for text in arguments for part in [text]]
        for word, value in names.items():
            given = [part.replace(word, value) for part in given]
        code, out, err = srdeploy("serve", *given)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_a_model_that_cannot_be_run_ends_the_start(
    make_graph: MakeGraph, tmp_path: Path, srdeploy: Callable[..., tuple[int, str, str]]
) -> None:
    import onnx

    broken = make_graph()
    model = onnx.load(str(broken))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, str(broken))
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = srdeploy("serve", broken, "--port", "0")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert code == 2
    assert "onnxruntime can't load it" in " ".join(err.split())
