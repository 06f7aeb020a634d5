"""The load behind the server's figures: what it counts, and that it sees what is wrong."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.imaging import encode_mask
from srdeploy.spec import Spec

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Answer = Callable[[int], bytes | None]
"""Number of the request -> the whole reply; None: the connection breaks."""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/load.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("load")


def reply(status: str, body: bytes, *headers: str) -> bytes:
    """A reply of HTTP/1.1."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Server:
    """A server of one line of thought: it waits, then answers as it is told."""

    def __init__(self, answer: Answer, delay_s: float) -> None:
        self.requests = 0
        self._answer, self._delay_s = answer, delay_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                self.requests += 1
                answer = self._answer(self.requests)
                await asyncio.sleep(self._delay_s)
                if answer is None:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def against(
    server: Server, loop: Callable[..., Any], calls: list[Any], *arguments: float
) -> Any:
    """What a load on `server` met."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        return await loop(port, calls, *arguments)


def call(load: Any, item: int) -> Any:
    """A request with a body of 3 bytes."""
    return load.Call(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", item)


def test_a_closed_loop_has_as_many_requests_under_way_as_it_has_clients(load: Any) -> None:
    server = Server(lambda _: reply("200 OK", b"mask"), delay_s=0.05)
    outcome = asyncio.run(against(server, load.closed_loop, [call(load, 0)], 4, 0.1, 0.5))
    assert 8 <= outcome.answered <= 4 * 10 + 4  # each answer takes 50 ms, or more on a busy machine
    assert min(outcome.latencies_s[200]) >= 0.045
    assert outcome.rate == outcome.answered / outcome.seconds
    assert outcome.connection_errors == outcome.unanswered == 0
    assert server.requests > outcome.answered, "warming up isn't counted"
    assert 0 < outcome.client_cores < 1


def test_broken_connections_are_counted_and_opened_again(load: Any) -> None:
    server = Server(lambda n: None if n % 3 == 0 else reply("200 OK", b"mask"), delay_s=0.01)
    outcome = asyncio.run(against(server, load.closed_loop, [call(load, 0)], 2, 0.0, 0.5))
    assert outcome.answered > 5
    assert outcome.connection_errors == pytest.approx(outcome.answered / 2, abs=3)


def test_an_open_loop_sends_what_is_due_whether_or_not_answers_come(load: Any) -> None:
    server = Server(lambda _: reply("200 OK", b"mask"), delay_s=0.4)
    outcome = asyncio.run(
        against(server, load.open_loop, [call(load, 0)], 100.0, 64, 0.5)  # 40 wait at a time
    )
    assert outcome.answered == len(outcome.lags_s) == 50
    assert outcome.held_back == outcome.unanswered == outcome.connection_errors == 0
    assert 0 < outcome.late <= 50
    assert outcome.rate == (50 - outcome.late) / outcome.seconds
    assert np.median(outcome.lags_s) < 0.3


def test_an_open_loop_says_what_it_could_not_send(load: Any) -> None:
    server = Server(lambda _: reply("200 OK", b"mask"), delay_s=0.3)
    outcome = asyncio.run(against(server, load.open_loop, [call(load, 0)], 100.0, 5, 0.5))
    assert outcome.held_back > 0
    assert outcome.held_back + len(outcome.lags_s) == 50


def test_refusals_that_close_the_connection_are_replies_and_no_errors(load: Any) -> None:
    refusal = reply("503 Service Unavailable", b"{}", "Retry-After: 1", "Connection: close")
    server = Server(lambda _: refusal, delay_s=0.0)
    outcome = asyncio.run(against(server, load.open_loop, [call(load, 0)], 100.0, 16, 0.3))
    assert outcome.answered == outcome.connection_errors == 0
    assert len(outcome.latencies_s[503]) == 30
    assert all(one.retry_after for one in outcome.replies)


def test_every_reply_is_judged_by_its_labels(load: Any) -> None:
    answers = import_module("answers")
    spec = Spec(classes=("road", "car"), palette=((128, 64, 128), (0, 0, 142)))
    labels = np.zeros((40, 50), np.uint8)
    one_off = labels.copy()
    one_off[3, 4] = 1
    photos = answers.Photos.__new__(answers.Photos)
    photos.labels, photos.masks, photos._judged = [labels], [encode_mask(labels, spec)], {}
    good = load.Reply(0, 200, False, 0, photos.masks[0])
    replies = Counter(
        {
            good: 5,
            replace(good, body=encode_mask(one_off, spec)): 3,
            replace(good, body=encode_mask(1 - labels, spec)): 2,
            replace(good, body=encode_mask(labels.T.copy(), spec)): 1,
            replace(good, body=b"<html>"): 1,
            replace(good, inference_header_length=2, body=b"{}" + labels.tobytes()): 7,
            replace(good, inference_header_length=2, body=b"{}" + labels.tobytes()[1:]): 1,
            replace(good, status=503, retry_after=True): 4,
            replace(good, status=503): 2,
        }
    )
    verdict = photos.judge(replies)
    assert verdict.same_bytes == 5 + 7
    assert verdict.rounded == 3
    assert verdict.wrong == 2 + 1 + 1 + 1
    assert verdict.refused == {503: 6}
    assert verdict.without_retry_after == 2


@pytest.mark.parametrize("script", ["serving.py", "overload.py"])
@pytest.mark.parametrize(
    ("words", "said"),
    [(["--help"], "Usage"), (["absent", "--photos", "absent"], "nothing was measured")],
)
def test_the_scripts_say_what_they_do_and_what_they_did_not(
    script: str, words: list[str], said: str
) -> None:
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said in result.stdout + result.stderr
    assert result.returncode == (0 if words == ["--help"] else 1)


def test_without_litserve_the_others_are_measured_and_the_pip_line_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    serving = import_module("serving")
    monkeypatch.setattr(serving, "find_spec", lambda _: None)
    assert serving.choose("srdeploy,litserve,fastapi-2x1", "image") == ["srdeploy", "fastapi-2x1"]
    assert "pip install litserve" in capsys.readouterr().err
