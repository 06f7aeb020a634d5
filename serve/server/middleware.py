"""What happens to every request before and after its route: access checks, admission, logging.

Plain ASGI middleware around the application: a refusal costs no routing and reads no body.
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
    AdmissionControl,
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    Refusal,
    TooLarge,
    Unauthorized,
    UnsupportedMedia,
)
from srdeploy.serve.server.config import LOOPBACK
from srdeploy.serve.server.server_log import log, log_exception
from srdeploy.serve.server.state import AppState, RequestContext

OPEN_PATHS = ("/", "/docs", "/openapi.json")
OPEN_PREFIXES = ("/v2/health/", "/static/")
"""Paths without an API key: they reveal nothing about models or photos."""
SMALL_BODY = 2**16
"""Most bytes in the body of a request that asks for no inference."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
CLIENT_GONE = 499
"""Status only for logs and metrics: the client closed the connection."""


class RequestMiddleware:
    """Wraps one server's application: checks the sender, admits, times out, logs and counts."""

    def __init__(self, app: ASGIApp, state: AppState, api_key: str | None, loopback: bool) -> None:
        self._app = app
        self._state = state
        self._key = None if api_key is None else _digest(api_key)
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        known = _REQUEST_ID.fullmatch(given)
        context = RequestContext(given if known else f"{random.getrandbits(128):032x}")
        scope.setdefault("state", {})["context"] = context
        answer = _AnswerSender(send, context, self._state)
        began = time.monotonic()
        is_inference = _is_inference(scope)
        admitted = False
        timeout = asyncio.timeout(self._state.limits.timeout_s)
        try:
            self._check_sender(scope, headers)
            if is_inference:
                self._state.admission.enter()
                admitted = True
                _check_encoding(headers)
                length = headers.get("content-length", "0")
                self._state.admission.check_length(int(length) if length.isdecimal() else 0)
                body = _BodyReceiver(receive, context, self._state.admission)
                async with timeout:
                    await self._app(scope, body, answer)
            else:
                await self._app(scope, _BodyReceiver(receive, context, None), answer)
        except TimeoutError:
            seconds = f"{self._state.limits.timeout_s:g}"
            refusal = DeadlineExceeded(
                f"no answer within {seconds} s: send less at once, and send it faster", 1
            )
            if not answer.status:  # else the client reads too slowly: its connection is closed
                await refusal_response(refusal)(scope, receive, answer)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, answer)
        except Exception as error:
            if not answer.status:
                await JSONResponse({"error": "internal error"}, 500)(scope, receive, answer)
            log_exception("internal error", error, request_id=context.id, path=scope["path"])
        finally:
            if admitted:
                self._state.admission.leave(context.body_bytes)
            self._record(scope, context, answer.status or CLIENT_GONE, time.monotonic() - began)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        # Otherwise any site's page could reach this machine's server, through a name that points
        # here (DNS rebinding) or by posting blindly.
        if self._loopback and _host_name(host) not in LOOPBACK:
            raise BadRequest(f"the host '{host[:80]}' is not this server's: use 127.0.0.1")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != host
        if foreign and scope["method"] not in _SAFE_METHODS:
            raise Forbidden("pages of other sites can't use this server")
        if self._key is not None and not _needs_no_key(scope["path"]):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(_digest(key.strip()), self._key):
                raise Unauthorized(
                    "an API key is needed: send it as Authorization: Bearer KEY, or as X-API-Key"
                )

    def _record(self, scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
        if scope["path"].startswith("/v2/health/"):
            return  # probed every few seconds
        metrics = self._state.metrics
        route = getattr(scope.get("route"), "path", "none")
        metrics.requests.labels(context.model, route, status).inc()
        self._state.refresh_gauges()
        if context.items:
            metrics.duration.labels(context.model, route).observe(seconds)
        if status >= 400:
            metrics.refused.labels(_reason(status)).inc()
        fields: dict[str, Any] = {"request_id": context.id, "status": status}
        fields |= {"method": scope["method"], "path": scope["path"][:200]}
        fields["ms"] = round(1000 * seconds, 1)
        if context.items:
            fields |= {"model": context.model, "images": len(context.items)}
            fields |= {f"{step}_ms": round(ms, 1) for step, ms in context.milliseconds().items()}
        log("request", **fields)


def refusal_response(refusal: Refusal) -> Response:
    """{"error": the message}, with the refusal's status and headers."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)


class _AnswerSender:
    """`send` that adds the headers of every answer and remembers the status."""

    def __init__(self, send: Send, context: RequestContext, state: AppState) -> None:
        self._send = send
        self._context = context
        self._state = state
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._context.id
            headers["X-Content-Type-Options"] = "nosniff"
            if self._context.items:
                headers["Server-Timing"] = ", ".join(
                    f"{step};dur={ms:.2f}" for step, ms in self._context.milliseconds().items()
                )
            if self._state.models.stopping:
                headers["Connection"] = "close"  # the client's next request goes elsewhere
        await self._send(message)


class _BodyReceiver:
    """`receive` that counts bytes: for admission control, or up to SMALL_BODY if there is none.
    Raises TooLarge and Unavailable."""

    def __init__(
        self, receive: Receive, context: RequestContext, admission: AdmissionControl | None
    ) -> None:
        self._receive = receive
        self._context = context
        self._admission = admission

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if self._admission is not None:
                self._admission.grow(count, self._context.body_bytes)
            elif self._context.body_bytes + count > SMALL_BODY:
                raise TooLarge(f"a body of more than {SMALL_BODY} bytes: none is needed here")
            self._context.body_bytes += count
        return message


def _is_inference(scope: Mapping[str, Any]) -> bool:
    """Whether the request asks for inference: only those are subject to admission control."""
    path: str = scope["path"]
    return scope["method"] == "POST" and (path == "/v1/segment" or path.endswith("/infer"))


def _check_encoding(headers: Headers) -> None:
    """Raises UnsupportedMedia for a compressed body, whose unpacked size is unknown."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMedia(
            f"Content-Encoding {encoding[:40]}: send the body as it is; images are small already"
        )


def _host_name(host: str) -> str | None:
    """The name or address in a Host header, without its port; None if there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # half of an IPv6 address
        return None


def _needs_no_key(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def _digest(key: str) -> bytes:
    """Digests of all keys are equally long, so that comparing them takes equal time."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _reason(status: int) -> str:
    if status == CLIENT_GONE:
        return "client gone"
    return HTTPStatus(status).phrase.lower()
