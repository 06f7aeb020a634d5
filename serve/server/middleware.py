"""What happens to every request before and after its route: who may ask, how much, and the record.

Plain ASGI, around the application: a refusal costs no routing, and no body is read for it.
"""

import asyncio
import hmac
import random
import re
import time
from collections.abc import Mapping
from hashlib import sha256
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from srdeploy.serve.server.admission import (
    BadRequest,
    Expired,
    Forbidden,
    Gate,
    Refusal,
    TooLarge,
    Unauthorized,
)
from srdeploy.serve.server.config import LOOPBACK
from srdeploy.serve.server.desk import Desk, Visit
from srdeploy.serve.server.journal import log, log_fault

OPEN_PATHS = ("/", "/docs", "/openapi.json")
OPEN_PREFIXES = ("/v2/health/", "/static/")
"""What needs no key: nothing there tells of models or photos."""
SMALL_BODY = 2**16
"""Bytes of a request that asks for no inference."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
CLIENT_GONE = 499
"""In logs and metrics alone: nobody is there to read a status."""


class Guard:
    """Around the application of one server."""

    def __init__(self, app: ASGIApp, desk: Desk, api_key: str | None, loopback: bool) -> None:
        self._app = app
        self._desk = desk
        self._key = None if api_key is None else _digest(api_key)
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}")
        scope.setdefault("state", {})["visit"] = visit
        reply = _Reply(send, visit, self._desk)
        began = time.monotonic()
        works = is_work(scope)
        inside = False
        timeout = asyncio.timeout(self._desk.limits.timeout_s)
        try:
            self._check_sender(scope, headers)
            if works:
                self._desk.gate.enter()
                inside = True
                length = headers.get("content-length", "0")
                self._desk.gate.check_length(int(length) if length.isdecimal() else 0)
                body = _Body(receive, visit, self._desk.gate)
                async with timeout:
                    await self._app(scope, body, reply)
            else:
                await self._app(scope, _Body(receive, visit, None), reply)
        except TimeoutError:
            seconds = f"{self._desk.limits.timeout_s:g}"
            late = Expired(
                f"no answer within {seconds} s: send less at once, and send it faster", 1
            )
            if not reply.status:  # else the client reads too slowly, and its connection is closed
                await answer_refusal(late)(scope, receive, reply)
        except Refusal as refusal:
            await answer_refusal(refusal)(scope, receive, reply)
        except Exception as error:
            if not reply.status:
                await JSONResponse({"error": "internal error"}, 500)(scope, receive, reply)
            log_fault("internal error", error, request_id=visit.id, path=scope["path"])
        finally:
            if inside:
                self._desk.gate.leave(visit.body_bytes)
            self._record(scope, visit, reply.status or CLIENT_GONE, time.monotonic() - began)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        # A page of any site could otherwise reach this machine's server, by a name that it points
        # here, or by posting to it blindly.
        if self._loopback and _name_of(host) not in LOOPBACK:
            raise BadRequest(f"the host '{host[:80]}' is not this server's: use 127.0.0.1")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        if foreign and scope["method"] not in _SAFE_METHODS:
            raise Forbidden("pages of other sites can't use this server: call it from outside")
        if self._key is not None and not _is_open(scope["path"]):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(_digest(key.strip()), self._key):
                raise Unauthorized(
                    "an API key is needed: send it as Authorization: Bearer KEY, or as X-API-Key"
                )

    def _record(self, scope: Scope, visit: Visit, status: int, seconds: float) -> None:
        if scope["path"].startswith("/v2/health/"):
            return  # asked every few seconds, by machines
        watch = self._desk.watch
        route = getattr(scope.get("route"), "path", "none")
        watch.requests.labels(visit.model, route, status).inc()
        self._desk.refresh_gauges()
        if visit.jobs:
            watch.duration.labels(visit.model, route).observe(seconds)
        if status >= 400:
            watch.refused.labels(_reason(status)).inc()
        fields: dict[str, Any] = {"request_id": visit.id, "status": status}
        fields |= {"method": scope["method"], "path": scope["path"][:200]}
        fields["ms"] = round(1000 * seconds, 1)
        if visit.jobs:
            fields |= {"model": visit.model, "images": len(visit.jobs)}
            fields |= {f"{step}_ms": round(ms, 1) for step, ms in visit.milliseconds().items()}
        log("request", **fields)


class _Reply:
    """`send`, with the headers that every answer has; it remembers the status."""

    def __init__(self, send: Send, visit: Visit, desk: Desk) -> None:
        self._send = send
        self._visit = visit
        self._desk = desk
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._visit.id
            headers["X-Content-Type-Options"] = "nosniff"
            if self._visit.jobs:
                headers["Server-Timing"] = ", ".join(
                    f"{step};dur={ms:.2f}" for step, ms in self._visit.milliseconds().items()
                )
            if self._desk.hub.stopping:
                headers["Connection"] = "close"  # so that the client's next request goes elsewhere
        await self._send(message)


class _Body:
    """`receive`, which counts bytes: into the gate, or, where no work is asked for, up to
    SMALL_BODY. Raises TooLarge and Busy."""

    def __init__(self, receive: Receive, visit: Visit, gate: Gate | None) -> None:
        self._receive = receive
        self._visit = visit
        self._gate = gate

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if self._gate is not None:
                self._gate.grow(count, self._visit.body_bytes)
            elif self._visit.body_bytes + count > SMALL_BODY:
                raise TooLarge(f"a body of more than {SMALL_BODY} bytes: none is needed here")
            self._visit.body_bytes += count
        return message


def is_work(scope: Mapping[str, Any]) -> bool:
    """Whether the request asks for inference, which is what the gate counts."""
    path: str = scope["path"]
    return scope["method"] == "POST" and (path == "/v1/segment" or path.endswith("/infer"))


def answer_refusal(refusal: Refusal) -> Response:
    """{"error": the line}, with its status and headers."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)


def _name_of(host: str) -> str | None:
    """The name or number in a Host header, without its port; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # half of an IPv6 address
        return None


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def _digest(key: str) -> bytes:
    """Of equal length for keys of any length, so that comparing takes equal time."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _reason(status: int) -> str:
    if status == CLIENT_GONE:
        return "client gone"
    return HTTPStatus(status).phrase.lower()
