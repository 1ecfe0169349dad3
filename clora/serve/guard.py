"""Everything a request passes before a route sees it: host, origin, key; and what an answer passes on its way out."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clora.serve.keys import find_owner
from clora.serve.problems import Problem
from clora.serve.service import Service

log = logging.getLogger("clora.serve")

# Without a key: the probes, which say nothing but yes or no, and the page, which holds nothing but itself.
PUBLIC = frozenset(("/livez", "/readyz", "/", "/page.js", "/page.css"))
LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
DISCARD_BYTES, DISCARD_SECONDS = 8 << 20, 2.0  # of a refused request's body
UNSEEN = 499  # the client had gone
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))  # any text may stand in their place


class Guard:
    """The outermost layer of the application; routes find the key's name in `scope["clora.owner"]`."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        settings = service.settings
        self._origins = frozenset(settings.cors_origins)
        own = LOOPBACK | {settings.host} if settings.host in LOOPBACK else None
        self._hosts = own if settings.allowed_hosts is None else frozenset(settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started, request, status = time.perf_counter(), secrets.token_hex(8), 0
        body = _Body(receive)

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400 and scope["method"] not in ("GET", "HEAD"):
                    await body.discard()
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
                headers["x-request-id"] = request
            await send(message)

        code = None
        try:
            scope["clora.owner"] = self._admit(scope)
            await self._app(scope, body.receive, sent)
        except ClientDisconnect:
            status = status or UNSEEN
        except Problem as problem:
            code = problem.code
            if not status:
                await answer(sent, problem)
        except Exception as error:
            log.error("a request failed", exc_info=error, extra={"request": request})
            if not status:
                code = "internal_error"
                await answer(sent, Problem(500, "something went wrong here; it has been noted", code))
        finally:
            self._note(scope, request, status or UNSEEN, code or scope.get("clora.code"), started)

    def _admit(self, scope: Scope) -> str:
        """The owner of a request that may come in; `Problem` for the others."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _hostname(host)
        if (host and not name) or (self._hosts is not None and name not in self._hosts):
            raise Problem(421, "this server does not answer to that host name", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and origin not in self._origins:
            if not host or _netloc(origin) != host.lower():
                raise Problem(403, "requests from other sites' pages are not taken", "wrong_origin")
        client = scope.get("client")
        if self._service.keys is None or scope["path"] in PUBLIC:
            return f"ip:{client[0] if client else '?'}"
        kind, _, key = headers.get("authorization", "").partition(" ")
        owner = find_owner(self._service.keys, key.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            raise Problem(401, "give a valid API key as 'Authorization: Bearer KEY'", "invalid_api_key")
        return owner

    def _note(self, scope: Scope, request: str, status: int, code: str | None, started: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        # Each new label is kept for good, and this runs before anybody is known to have a key.
        method = scope["method"] if route != "other" and scope["method"] in METHODS else "*"
        metrics = self._service.metrics
        metrics.requests.labels(method, route, str(status)).inc()
        if code is not None:
            metrics.rejects.labels(code).inc()
        found = {"request": request, "key": scope.get("clora.owner"), "method": scope["method"][:16], "route": route}
        found |= {"status": status, "ms": round((time.perf_counter() - started) * 1000, 1)}
        found |= {name: value for name, value in (("code", code), ("job", scope.get("clora.job"))) if value}
        if route not in ("/livez", "/readyz", "/metrics"):
            log.info("request", extra=found)


def _hostname(host: str) -> str:
    """The name in a `Host` header, without its port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # a bracket without its fellow, and the like
        return ""


def _netloc(origin: str) -> str:
    """Host and port of an `Origin` header; "" for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class _Body:
    """A request's body on its way to the routes, so that what they left of it is known."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._is_over = receive, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_over = self._is_over or message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read what a refused client still sends, within bounds: cut off while it sends, it would not see why."""
        total = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self._is_over and total < DISCARD_BYTES:
                    total += len((await self.receive()).get("body", b""))


async def answer(send: Send, problem: Problem) -> None:
    """Send a refusal."""
    content = json.dumps(problem.to_json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **problem.headers()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
