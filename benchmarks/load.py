"""Load over HTTP/1.1 from one event loop: closed loops and open ones, with every reply kept.

Requests are made once, as bytes, and replies are told apart by their bytes, so that what is
measured is the server and not its client; what the client cost is reported with every result.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httptools

TICK_S = 0.002
"""How often an open loop looks for requests that are due."""
RETRY_S = 0.02
"""Before a connection that the server refused is tried again."""


@dataclass(frozen=True)
class Call:
    """One request as it goes over the wire; `item` says which answer is the right one."""

    wire: bytes
    item: int


@dataclass(frozen=True)
class Reply:
    """What came back; equal replies are equal objects, and are counted."""

    item: int
    status: int
    retry_after: bool
    inference_header_length: int
    """Bytes of JSON that begin a body of KServe binary tensors; 0 for other bodies."""
    body: bytes


@dataclass
class Outcome:
    """What a load met, within its measured seconds."""

    seconds: float = 0.0
    replies: Counter[Reply] = field(default_factory=Counter)
    latencies_s: dict[int, list[float]] = field(default_factory=dict)
    """By status, from the moment of sending to the last byte of the answer."""
    connection_errors: int = 0
    """Connections that broke with a request under way, or that were refused."""
    held_back: int = 0
    """Requests of an open loop that were never sent, for want of a free connection."""
    unanswered: int = 0
    """Requests still without an answer when waiting for them ended."""
    late: int = 0
    """Answers of an open loop that came when it no longer sent."""
    lags_s: list[float] = field(default_factory=list)
    """Of an open loop: how much later than due each request was sent."""
    client_cpu_s: float = 0.0
    """CPU time of this process while it measured."""

    @property
    def answered(self) -> int:
        """Replies with status 200."""
        return len(self.latencies_s.get(200, []))

    @property
    def rate(self) -> float:
        """Answers per second, of status 200, while it sent."""
        return (self.answered - self.late) / self.seconds if self.seconds else 0.0

    @property
    def client_cores(self) -> float:
        """What the load itself took, in cores."""
        return self.client_cpu_s / self.seconds if self.seconds else 0.0

    def take(self, reply: Reply | None, latency_s: float) -> None:
        """Counts one reply, or a connection that broke."""
        if reply is None:
            self.connection_errors += 1
            return
        self.replies[reply] += 1
        self.latencies_s.setdefault(reply.status, []).append(latency_s)


class Connection(asyncio.Protocol):
    """One connection with at most one request under way. It tells `done` what became of it."""

    def __init__(self, done: "Callable[[Connection, Reply | None, float], None]") -> None:
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._sent = 0.0
        self._reset()

    def send(self, call: Call) -> None:
        """Sends the request; the connection must be free."""
        assert self._transport is not None
        assert self._call is None
        self._call = call
        self._reset()
        self._sent = time.perf_counter()
        self._transport.write(call.wire)

    @property
    def usable(self) -> bool:
        """Open, and without a request under way."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._call is None

    @property
    def waiting(self) -> bool:
        """Whether a request is under way."""
        return self._call is not None

    def close(self) -> None:
        """Ends the connection; a request under way is forgotten."""
        self._call = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._call is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._call is not None:
            self._fail()

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key == b"retry-after":
            self._retry_after = True
        elif key == b"inference-header-content-length":
            self._header_length = int(value)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        call = self._call
        if call is None:
            return
        latency = time.perf_counter() - self._sent
        status = self._parser.get_status_code()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._call = None
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.abort()  # also of a body that is still being sent
        reply = Reply(call.item, status, self._retry_after, self._header_length, body)
        self._done(self, reply, latency)

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._retry_after = False
        self._header_length = 0

    def _fail(self) -> None:
        self._call = None
        if self._transport is not None:
            self._transport.abort()
        self._done(self, None, 0.0)


class _Window:
    """Whether it is time to count, and the CPU time of what is counted."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self.open = False

    def begin(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self.open = True

    def end(self) -> None:
        self.open = False
        self._outcome.seconds = time.perf_counter() - self._began
        self._outcome.client_cpu_s = time.process_time() - self._cpu


class _Loop:
    """Keeps connections open and counts what comes back."""

    def __init__(self, port: int, calls: Sequence[Call], connections: int) -> None:
        self.outcome = Outcome()
        self.window = _Window(self.outcome)
        self._port, self._calls, self._connections = port, calls, connections
        self._position = 0
        self._open: set[Connection] = set()
        self._missing: asyncio.Queue[None] = asyncio.Queue()
        for _ in range(connections):
            self._missing.put_nowait(None)

    async def keep_open(self) -> None:
        """Opens a connection in the place of each that is missing, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._missing.get()
            try:
                _, connection = await loop.create_connection(
                    partial(Connection, self.done), "127.0.0.1", self._port
                )
            except OSError:
                self.outcome.connection_errors += self.window.open
                self._missing.put_nowait(None)
                await asyncio.sleep(RETRY_S)
                continue
            self._open.add(connection)
            self.ready(connection)

    def replace(self, connection: Connection) -> None:
        """Another one is to be opened for a connection that ended."""
        self._open.discard(connection)
        self._missing.put_nowait(None)

    def next_call(self) -> Call:
        """The requests in turn."""
        self._position += 1
        return self._calls[self._position % len(self._calls)]

    async def settle(self, patience: float) -> None:
        """Waits for the last answers, so that the next load finds the server at rest."""
        limit = time.perf_counter() + patience
        while any(one.waiting for one in self._open) and time.perf_counter() < limit:
            await asyncio.sleep(0.01)
        self.outcome.unanswered = sum(one.waiting for one in self._open)
        for one in self._open:
            one.close()

    def ready(self, connection: Connection) -> None:
        """A connection is free."""
        raise NotImplementedError

    def done(self, connection: Connection, reply: Reply | None, latency: float) -> None:
        """A request ended; without a reply where its connection broke."""
        raise NotImplementedError


class _ClosedLoop(_Loop):
    """Each connection sends its next request when it has an answer."""

    async def run(self, warm_s: float, seconds: float) -> Outcome:
        self._running = True
        keeper = asyncio.create_task(self.keep_open())
        await asyncio.sleep(warm_s)
        self.window.begin()
        await asyncio.sleep(seconds)
        self.window.end()
        self._running = False
        keeper.cancel()
        await self.settle(patience=10.0)
        return self.outcome

    def ready(self, connection: Connection) -> None:
        if self._running:
            connection.send(self.next_call())

    def done(self, connection: Connection, reply: Reply | None, latency: float) -> None:
        if self.window.open:
            self.outcome.take(reply, latency)
        if connection.usable:
            self.ready(connection)
        else:
            self.replace(connection)


class _OpenLoop(_Loop):
    """Requests leave when they are due, over whichever connection is free."""

    async def run(self, rate: float, seconds: float, patience: float) -> Outcome:
        self._free: deque[Connection] = deque()
        keeper = asyncio.create_task(self.keep_open())
        limit = time.perf_counter() + 10.0
        while len(self._free) < self._connections and time.perf_counter() < limit:
            await asyncio.sleep(0.01)
        self.window.begin()
        began = time.perf_counter()
        number, count = 0, int(rate * seconds)
        while number < count:
            while number < count and began + number / rate <= time.perf_counter():
                self._send_one(began + number / rate)
                number += 1
            await asyncio.sleep(TICK_S)
        self.window.end()
        await self.settle(patience)
        keeper.cancel()
        return self.outcome

    def ready(self, connection: Connection) -> None:
        self._free.append(connection)

    def done(self, connection: Connection, reply: Reply | None, latency: float) -> None:
        self.outcome.take(reply, latency)
        if reply is not None and reply.status == 200 and not self.window.open:
            self.outcome.late += 1
        if connection.usable:
            self.ready(connection)
        else:
            self.replace(connection)

    def _send_one(self, due: float) -> None:
        while self._free and not self._free[0].usable:  # the server closed it while it was idle
            self.replace(self._free.popleft())
        if not self._free:
            self.outcome.held_back += 1
            return
        self.outcome.lags_s.append(time.perf_counter() - due)
        self._free.popleft().send(self.next_call())


async def closed_loop(
    port: int, calls: Sequence[Call], concurrency: int, warm_s: float, seconds: float
) -> Outcome:
    """`concurrency` clients of 127.0.0.1:port, each of which sends its next request when the answer
    is there; what happens in the first `warm_s` seconds is not counted."""
    return await _ClosedLoop(port, calls, concurrency).run(warm_s, seconds)


async def open_loop(
    port: int,
    calls: Sequence[Call],
    rate: float,
    connections: int,
    seconds: float,
    patience: float = 60.0,
) -> Outcome:
    """`rate` requests a second, evenly spaced, whether or not answers come, over at most
    `connections` connections to 127.0.0.1:port. After the last one, answers are waited for
    `patience` seconds at most. All replies are counted; `seconds` of the outcome are those of
    sending."""
    return await _OpenLoop(port, calls, connections).run(rate, seconds, patience)
