"""Who may call: keys on every route but the probes and the page, quotas, hosts, origins."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from clora.errors import InputError
from clora.serve.app import create_app
from clora.serve.guard import PUBLIC
from clora.serve.keys import digest, find_owner, new_key, read_keys
from clora.serve.limits import Quotas
from clora.serve.problems import Problem
from clora.serve.server import check_binding
from clora.serve.service import Service
from clora.serve.settings import Settings
from tests.serve.conftest import call, png, post

KEYS = {"alice": digest("clora-secret-of-alice"), "bob": digest("clora-secret-of-bob")}
ALICE = {"authorization": "Bearer clora-secret-of-alice"}
BOB = {"authorization": "Bearer clora-secret-of-bob"}


def request(service: Service, method: str, path: str, host: str = "localhost", **headers: str) -> httpx.Response:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(method, path, headers=headers)

    found: httpx.Response = call(service, talk, host)
    return found


def routes(service: Service) -> list[tuple[str, str]]:
    """Every method and path that the application has."""
    found = [route for route in create_app(service).routes if isinstance(route, Route)]
    return [(method, route.path) for route in found for method in sorted(route.methods or ())]


def test_every_route_but_probes_and_page_asks_for_a_key(make_service: Callable[..., Service]) -> None:
    service = make_service(KEYS)
    paths = routes(service)
    assert {"/v1/images/edits", "/v1/effects", "/v1/jobs/{id}", "/metrics", "/openapi.json"} < {p for _, p in paths}
    for method, path in [*paths, ("POST", "/v1/images/generations"), ("GET", "/nothing")]:
        answer = request(service, method, path.replace("{id}", "x").replace("{name:path}", "x"))
        if path in PUBLIC:
            assert answer.status_code in (200, 405), path
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Bearer clora-secret-of-carol", f"Bearer {KEYS['alice']}", "Basic clora-secret-of-alice",
     "Bearer clora-secret-of-alice, Bearer x", "Bearer \xe9"],
)  # fmt: skip
def test_wrong_keys_are_refused(make_service: Callable[..., Service], given: str) -> None:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/v1/models", headers=[(b"authorization", given.encode("latin-1"))])

    answer = call(make_service(KEYS), talk)
    assert answer.status_code == 401
    assert "alice" not in answer.text and KEYS["alice"] not in answer.text


def test_a_key_opens_and_sees_its_own_jobs_alone(make_service: Callable[..., Service]) -> None:
    service = make_service(KEYS)

    async def talk(client: httpx.AsyncClient) -> list[int]:
        headers = ALICE | {"prefer": "respond-async"}
        made = await client.post("/v1/images/edits", data={"effect": "a"}, files={"image": png()}, headers=headers)
        place = made.headers["location"]
        return [made.status_code, *[(await client.get(place, headers=who)).status_code for who in (ALICE, BOB)],
                (await client.delete(place, headers=BOB)).status_code]  # fmt: skip

    assert call(service, talk) == [202, 200, 404, 404]


def test_new_key_is_in_the_file_as_a_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first, second = new_key(path, "alice"), new_key(path, "bob")
    text = path.read_text()
    assert first not in text and second not in text and first != second
    assert path.stat().st_mode & 0o777 == 0o600
    keys = read_keys(path)
    assert (find_owner(keys, first), find_owner(keys, second), find_owner(keys, first + "x")) == ("alice", "bob", None)
    with pytest.raises(InputError, match="has a key named alice"):
        new_key(path, "alice")


def test_new_key_leaves_the_file_to_those_who_could_read_it(tmp_path: Path) -> None:
    """The server may run as another user than who makes keys."""
    path = tmp_path / "keys"
    new_key(path, "alice")
    path.chmod(0o640)
    owner = (10001, 10002) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    new_key(path, "bob")
    found = path.stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, *owner) and len(read_keys(path)) == 2


def test_find_owner_compares_every_entry_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key shows neither in which entries are compared nor, by `compare_digest`, in how long one of them takes."""
    keys = {f"key{number}": digest(f"secret{number}") for number in range(5)}
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key, owner in (("secret0", "key0"), ("secret4", "key4"), ("secret", None), ("", None)):
        compared.clear()
        assert find_owner(keys, key) == owner
        assert [known for _, known in compared] == list(keys.values())
        assert {len(given) for given, _ in compared} == {64}  # a hash: not even its length is the key's


@pytest.mark.parametrize("text", ["", "alice", "alice 12", f"a {'0' * 64}\na {'1' * 64}", f"../a {'0' * 64}", "\0"])
def test_read_keys_refuses_damaged_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_keys(path)
    assert "0000" not in str(error.value)


def test_quotas_hold_rate_and_number() -> None:
    now = [0.0]
    quotas = Quotas(per_minute=60, burst=2, concurrent=2, now=lambda: now[0])
    with quotas.request("a"):
        with quotas.request("a"), pytest.raises(Problem) as error:
            with quotas.request("a"):
                raise AssertionError
        assert (error.value.status, error.value.code) == (429, "too_many_concurrent")
        with pytest.raises(Problem) as error, quotas.request("a"):
            raise AssertionError
        assert (error.value.code, error.value.headers()["retry-after"]) == ("rate_limit_exceeded", "2")
        with quotas.request("b"):
            now[0] = 1.0
        with quotas.request("a"):
            pass


def test_a_key_over_its_rate_gets_429_and_others_go_on(make_service: Callable[..., Service]) -> None:
    service = make_service(KEYS, limits={"requests_per_minute": 1, "burst": 1})

    async def talk(client: httpx.AsyncClient) -> list[Any]:
        async def one(who: dict[str, str]) -> httpx.Response:
            return await client.post("/v1/images/edits", data={"effect": "a"}, files={"image": png()}, headers=who)

        return [await one(ALICE), await one(ALICE), await one(BOB)]

    first, second, third = call(service, talk)
    assert [one.status_code for one in (first, second, third)] == [200, 429, 200]
    assert int(second.headers["retry-after"]) >= 30
    assert second.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "evil:8000", "[::2]"])
def test_other_host_names_are_refused_on_this_machine(service: Service, host: str) -> None:
    assert request(service, "GET", "/v1/effects", host).status_code == 421


def with_header(service: Service, method: str, path: str, name: str, value: str) -> int:
    """The status of a request with a header that the client does not make itself."""

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request(method, path, headers=[(name.encode(), value.encode())])

    found: httpx.Response = call(service, talk)
    return found.status_code


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [("host", "[", 421), ("host", "[::1", 421), ("host", "a]b", 421), ("origin", "http://[", 403),
     ("origin", "http://[::1", 403)],
)  # fmt: skip
def test_malformed_hosts_and_origins_are_refused(service: Service, name: str, value: str, status: int) -> None:
    assert with_header(service, "POST", "/v1/images/edits", name, value) == status


def test_a_malformed_host_is_refused_where_any_is_answered(make_service: Callable[..., Service]) -> None:
    """The router builds an address of it where it redirects."""
    service = make_service(host="0.0.0.0", open_to_all=True)
    assert with_header(service, "GET", "/livez/", "host", "any.example") == 307
    assert with_header(service, "GET", "/livez/", "host", "[") == 421


def test_methods_that_clients_invent_share_one_label(make_service: Callable[..., Service]) -> None:
    """A label is kept for good, and a probe needs no key."""
    service = make_service(KEYS)
    for number in range(20):
        assert request(service, f"M{number}", "/livez").status_code == 405
    lines = service.metrics.text().decode().splitlines()
    counted = [line for line in lines if line.startswith("clora_http_requests_total")]
    assert counted == ['clora_http_requests_total{method="*",route="/livez",status="405"} 20.0']


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000"])
def test_own_host_names_are_answered(service: Service, host: str) -> None:
    assert request(service, "GET", "/v1/models", host).status_code == 200


@pytest.mark.parametrize("host", ["GPU-Box.local", "gpu-box.local:8000", "[FE80::1]:8000"])
def test_allowed_hosts_are_names_in_any_case(make_service: Callable[..., Service], host: str) -> None:
    allowed = Settings(allowed_hosts=("GPU-Box.local", "[FE80::1]")).allowed_hosts
    service = make_service(allowed_hosts=allowed)
    assert request(service, "GET", "/v1/models", host).status_code == 200
    assert request(service, "GET", "/v1/models", "other.local").status_code == 421


@pytest.mark.parametrize("host", ["example.com:8000", "https://example.com", "*.example.com", "", "a b"])
def test_allowed_hosts_that_could_never_match_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match="is no name of a host; leave scheme, port and wildcards out"):
        Settings(allowed_hosts=(host,))


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://evil.localhost"])
def test_pages_of_other_sites_cannot_ask_for_edits(service: Service, origin: str) -> None:
    assert post(service, {"effect": "a"}, origin=origin).status_code == 403
    assert post(service, {"effect": "a"}, origin="http://localhost").status_code == 200
    assert "access-control-allow-origin" not in request(service, "GET", "/v1/models", origin=origin).headers


def test_cors_is_for_named_origins(make_service: Callable[..., Service]) -> None:
    service = make_service(KEYS, cors_origins=("https://shop.example",))
    asked = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    allowed = request(service, "OPTIONS", "/v1/images/edits", **asked)
    assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
    assert "access-control-allow-credentials" not in allowed.headers
    other = request(service, "OPTIONS", "/v1/images/edits", **(asked | {"origin": "https://evil.example"}))
    assert "access-control-allow-origin" not in other.headers
    assert post(service, {"effect": "a"}, origin="https://shop.example", **ALICE).status_code == 200


@pytest.mark.parametrize(
    ("changes", "fine"),
    [({}, True), ({"host": "0.0.0.0"}, False), ({"host": "::"}, False), ({"host": "192.168.0.7"}, False),
     ({"host": "0.0.0.0", "open_to_all": True}, True), ({"host": "0.0.0.0", "keys": Path("keys")}, True)],
)  # fmt: skip
def test_check_binding_wants_keys_where_others_can_reach(changes: dict[str, Any], fine: bool) -> None:
    settings = Settings(**changes)
    if fine:
        check_binding(settings)
    else:
        with pytest.raises(InputError, match="--keys"):
            check_binding(settings)


def test_answers_carry_the_security_headers(service: Service) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing"):
        headers = request(service, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_an_error_inside_shows_nothing_of_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/root/secret/path clora-secret-of-alice")

    monkeypatch.setattr(service.jobs, "add", fail)
    answer = post(service, {"effect": "a"})
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text


def test_websockets_are_closed(service: Service) -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/", "headers": []}
        await create_app(service)(scope, asyncio.Queue().get, send)

    asyncio.run(run())
    assert sent == [{"type": "websocket.close", "code": 1008}]
