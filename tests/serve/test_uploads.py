"""What a client may send: budgets before decoding, strict multipart, nothing fetched and nothing opened by name."""

from __future__ import annotations

import asyncio
import io
import random
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from clora.serve.app import create_app
from clora.serve.requests import FIELDS
from clora.serve.service import Service
from tests.serve.conftest import call, encoded, picture, png, post
from tests.support.damaged_bodies import TYPE, body, damaged, field, file, send_all


def send(service: Service, content: bytes, kind: str = TYPE, **headers: str) -> httpx.Response:
    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/images/edits", content=content, headers={"content-type": kind, **headers})

    found: httpx.Response = call(service, talk)
    return found


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares so many pixels in a few bytes."""
    packed = zlib.compress(b"\0" * 1000)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_the_plain_body_of_these_tests_is_taken(service: Service) -> None:
    assert send(service, body(file(png()), field("effect", "a"))).status_code == 200


def test_bodies_beyond_the_budget_are_refused(make_service: Callable[..., Service]) -> None:
    service = make_service(limits={"body_bytes": 5000, "image_bytes": 4000})
    assert send(service, body(file(b"x" * 6000))).json()["error"]["code"] == "body_too_large"
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield body(file(b""), end=b"")
        while True:
            read += 65536
            yield b"x" * 65536

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/images/edits", content=endless(), headers={"content-type": TYPE})

    answer = call(service, talk)
    assert answer.status_code == 413 and read < 10 << 20
    assert send(service, body(file(b"x" * 4500))).json()["error"]["code"] == "file_too_large"


def test_a_body_that_does_not_come_is_given_up(make_service: Callable[..., Service]) -> None:
    service = make_service(limits={"upload_seconds": 0.2})
    sent: list[Any] = []

    async def run() -> None:
        async def receive() -> Any:
            await asyncio.sleep(60)

        async def keep(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", TYPE.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "headers": headers, "query_string": b""}
        await create_app(service)(scope, receive, keep)

    asyncio.run(run())
    assert sent[0]["status"] == 408


def test_pixels_are_counted_before_anything_is_decoded(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(limits={"image_pixels": 10_000})
    loaded: list[Any] = []
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    for content in (png_of(101, 100), png_of(60_000, 60_000), png_of(2**31 - 1, 2**31 - 1)):
        answer = post(service, {"effect": "a"}, {"image": content})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
    assert loaded == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x89PNG\r\n\x1a\n", png()[:-200], png()[:60], b"not an image", b"GIF89a" + png(),
        encoded(picture(), "GIF"), encoded(picture(), "TIFF"), encoded(picture(), "BMP"), encoded(picture(), "PPM"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" + png(), b"<?php system('id');?>" + png(), png_of(0, 5), png_of(64, 64), b"\0" * 4096,
        encoded(picture(), "JPEG")[:300], b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    ],
)  # fmt: skip
def test_what_is_no_picture_of_a_known_format_is_refused(service: Service, content: bytes) -> None:
    answer = post(service, {"effect": "a"}, {"image": ("a.png", content, "image/png")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


def test_what_hides_behind_a_picture_does_not_come_back(service: Service) -> None:
    script = b"<script>alert(1)</script>"
    answer = post(service, {"effect": "a", "seed": "1"}, {"image": png() + b"PK\x03\x04" + script})
    clean = post(service, {"effect": "a", "seed": "1"})
    assert answer.status_code == 200
    assert answer.json()["data"] == clean.json()["data"]


def test_too_many_parts_and_wrong_fields_are_refused(service: Service) -> None:
    many = [("image[]", png())] * 5
    assert post(service, {"effect": "a"}, many).status_code == 400
    assert post(service, {"effect": "a"}, {"mask": png()}).status_code == 400
    assert post(service, {"effect": "a"}, {"other": b"x"}).status_code == 400
    assert send(service, body(*[field(f"f{i}", "x") for i in range(40)])).status_code == 400
    assert send(service, body(file(png()), field("effect", "a"), field("n", "1"), field("n", "2"))).status_code == 400
    assert send(service, body(field("effect", "a"))).json()["error"]["code"] == "missing_image"
    assert send(service, body(file(png()), field("prompt", "x" * 100_000))).status_code == 400


@pytest.mark.parametrize("extra", [field("+2AA-", "a"), field("prompt", "hello +2AA- x"), field("effect", "+2AA-")])
def test_text_that_is_no_unicode_is_refused(service: Service, extra: tuple[str, bytes]) -> None:
    """Half a surrogate pair, which UTF-7 can say: neither an answer nor a text encoder could take it."""
    answer = send(service, body(file(png()), extra), f"{TYPE}; charset=utf-7")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_request")


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json", 415), ("text/plain", 415), ("", 415), ("application/x-www-form-urlencoded", 415),
     ("multipart/form-data", 400), ("multipart/form-data; boundary=", 400), ("multipart/mixed; boundary=xyz", 415),
     (f"multipart/form-data; boundary={'x' * 500}", 400), ("multipart/form-data; boundary=other", 400)],
)  # fmt: skip
def test_other_content_types_are_refused(service: Service, kind: str, status: int) -> None:
    assert send(service, body(file(png()), field("effect", "a")), kind).status_code == status


@pytest.mark.parametrize("length", ["-1", "x", "٣", "1e3"])
def test_a_length_that_is_none_is_refused(service: Service, length: str) -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def keep(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", TYPE.encode()), (b"content-length", length.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "headers": headers, "query_string": b""}
        await create_app(service)(scope, asyncio.Queue().get, keep)

    asyncio.run(run())
    assert sent[0]["status"] == 400


def test_truncated_bodies_are_refused_wherever_they_end(service: Service) -> None:
    whole = body(field("effect", "a"), file(png()))
    ends = sorted(random.Random(0).sample(range(len(whole) - 2), 60))
    for end in [*ends, len(whole) - 4]:
        assert send(service, whole[:end]).status_code == 400, end


def test_malformed_bodies_never_break_the_server(service: Service) -> None:
    """Five hundred bodies; `python -m tests.support.damaged_bodies` sends ten thousand."""
    service.quotas = type(service.quotas)(10_000, 10_000, 10)
    statuses = asyncio.run(send_all(service, damaged(500, seed=1)))
    assert statuses[400] > 450
    assert send(service, body(file(png()), field("effect", "a"))).status_code == 200


ADDRESSES = [
    "http://127.0.0.1/", "http://localhost:22/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/",
    "http://0.0.0.0/", "http://2130706433/", "http://0x7f000001/", "http://127.1/", "http://[::ffff:127.0.0.1]/",
    "https://metadata.google.internal/", "http://user:pass@127.0.0.1/", "http://127.0.0.1#@example.com/",
    "file:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/",
    "dict://127.0.0.1:11211/", "ldap://127.0.0.1/", "data:image/png;base64,iVBORw0KGgo=", "jar:http://127.0.0.1!/",
    "//127.0.0.1/", "\\\\127.0.0.1\\share\\a.png", "smb://127.0.0.1/a", "s3://bucket/key", "gs://bucket/key",
    "hf://datasets/a", "blob:http://127.0.0.1/1", "javascript:alert(1)", "php://filter/resource=/etc/passwd",
    "/etc/passwd", "../../../../etc/passwd", "..\\..\\windows\\win.ini", "....//....//etc/passwd",
    "%2e%2e%2fetc/passwd",
    "..%252f..%252fetc", "/proc/self/environ", "/dev/zero", "/dev/random", "~/.ssh/id_rsa", "$HOME/.netrc", "`id`",
    "$(id)", "; cat /etc/passwd", "| id", "C:\\Windows\\win.ini", "CON", "a.png/../../b", "./collection.safetensors",
    "collection.safetensors", "{{7*7}}", "${7*7}", "<script>alert(1)</script>", "' OR 1=1 --", "\r\nSet-Cookie: a=b",
    "%0d%0aX-Evil: 1", "\u202egnp.exe", "\uff0e\uff0e\uff0fetc", "a\tb", "%s%s%n", "@/etc/passwd", "!!python/object:os",
]  # fmt: skip


def test_no_address_or_path_is_opened_from_any_field(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    bytes_in = png()

    def note(*given: Any, **_: Any) -> Any:
        opened.append(given[:2])
        raise OSError("nothing is to be opened")

    async def talk(client: httpx.AsyncClient) -> None:
        for address in ADDRESSES:
            for name in (*FIELDS, "image", "image_url"):
                if name == "prompt":
                    continue
                data = {"effect": "a", name: address, "n": "99"} if name != "n" else {"effect": "a", "n": address}
                answer = await client.post("/v1/images/edits", data=data, files={"image": (address, bytes_in)})
                assert answer.status_code in (400, 404), (name, address)
                assert (
                    "root:" not in answer.text and "x-evil" not in answer.headers and "set-cookie" not in answer.headers
                )

    service.quotas = type(service.quotas)(10**6, 10**6, 10)
    app = create_app(service)
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", note)
        patched.setattr(io, "open", note)
        patched.setattr(Path, "open", note)
        patched.setattr(socket.socket, "connect", note)
        patched.setattr(socket, "getaddrinfo", note)
        call(app, talk)
    assert len(ADDRESSES) >= 60 and opened == []


def test_an_address_as_a_prompt_is_text(service: Service) -> None:
    for address in ADDRESSES[:3] + ADDRESSES[-12:]:
        answer = post(service, {"prompt": address, "seed": "1"})
        assert answer.status_code == 200, address
        assert answer.headers["x-clora-effect"] == ""


def test_names_with_line_breaks_do_not_reach_headers(service: Service) -> None:
    answer = send(service, body(file(png(), filename="a\\r\\nX-Evil: 1.png"), field("effect", "a\r\nX-Evil: 1")))
    assert answer.status_code == 404
    assert "x-evil" not in answer.headers
    answer = send(service, body(file(png()), field("user", "a\r\nX-Evil: 1"), field("effect", "a")))
    assert answer.status_code == 200 and "x-evil" not in answer.headers
