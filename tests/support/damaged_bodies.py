"""Multipart bodies that are damaged, or put together of pieces that do not belong so, and a server that gets them.

    python -m tests.support.damaged_bodies [--bodies 10000] [--seed 0] [--out FILE]

Each body goes to the whole application over a model of one random block. None may end in anything but a refusal in
OpenAI's shape, leave a place taken, or keep a sound edit afterwards from being made.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
from PIL import Image

from clora.io.atomic import write_text
from clora.serve.app import create_app
from clora.serve.service import Service

TYPE = "multipart/form-data; boundary=xyz"
REFUSALS = {400, 404, 413}


def body(*parts: tuple[str, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    """A multipart body from the headers and the content of its parts."""
    return b"".join(b"--xyz\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end


def field(name: str, value: str) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value.encode()


def file(content: bytes, name: str = "image", filename: str = "a.png") -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\nContent-Type: image/png', content


PIECES = (
    b"--xyz", b"--xyz--", b"\r\n", b"\n", b"Content-Disposition: form-data", b'; name="image"', b'; name=""',
    b'; filename="../../etc/passwd"', b"\0", b"\xff\xfe", b"Content-Type: image/png", b"--", b": ", b'"',
    b"Content-Length: -1", b"Content-Transfer-Encoding: base64", b"; filename*=utf-8''%00", b'; name="effect"',
    b"; filename*0=a; filename*1=b", b"\r\n\r\n", b"x" * 9000, b"Content-Disposition: form-data\r\n" * 40,
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0",
)  # fmt: skip


def damaged(count: int, seed: int) -> Iterator[bytes]:
    """`count` bodies: bytes changed, pieces put over others, or made of pieces alone."""
    rng = random.Random(seed)
    whole = body(field("effect", "a"), field("seed", "3"), field("n", "1"), file(b"\x89PNG\r\n\x1a\n" + b"x" * 40))
    for number in range(count):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(content))
            if number % 2:
                content[place : place + rng.randint(0, 12)] = rng.choice(PIECES)
            else:
                content[place] = rng.randrange(256)
        if number % 5 == 0:
            content = bytearray(b"".join(rng.choices(PIECES, k=rng.randint(1, 30))))
        yield bytes(content)


async def send_all(service: Service, bodies: Iterable[bytes]) -> Counter[int]:
    """The statuses of the answers; raises AssertionError for an answer that is no refusal."""
    found: Counter[int] = Counter()
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        for content in bodies:
            answer = await client.post("/v1/images/edits", content=content, headers={"content-type": TYPE})
            found[answer.status_code] += 1
            assert answer.status_code in REFUSALS and answer.json()["error"]["message"], content
    assert service.quotas.running == service.jobs.samples_in_flight() == 0
    return found


def main() -> None:
    from clora.serve.load import open_models
    from clora.serve.logs import log_json
    from clora.serve.settings import Limits, Settings
    from clora.serve.threads import ThreadEngine
    from tests.support.random_base import write_random_base
    from tests.support.random_collection import write_random_collection

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    log_json()
    logging.getLogger("clora").setLevel(logging.ERROR)  # of ten thousand refusals no line each
    with tempfile.TemporaryDirectory() as folder:
        base = write_random_base(Path(folder, "base"), num_layers=1)
        collection = write_random_collection(base, Path(folder, "collection.safetensors"))
        limits = Limits(requests_per_minute=1_000_000, burst=1_000_000)
        settings = Settings(base=str(base), collection=collection, thumbnails=False, limits=limits)
        service = Service(settings, ThreadEngine(open_models(settings), settings))
        began = time.perf_counter()
        found = asyncio.run(send_all(service, damaged(options.bodies, options.seed)))
        seconds = time.perf_counter() - began
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 64).convert("RGB").save(buffer, "PNG")
        sound = httpx.ASGITransport(create_app(service))

        async def edit() -> int:
            async with httpx.AsyncClient(transport=sound, base_url="http://localhost", timeout=60) as client:
                given = {"data": {"effect": "a"}, "files": {"image": buffer.getvalue()}}
                return (await client.post("/v1/images/edits", **given)).status_code

        assert asyncio.run(edit()) == 200
        service.close()
    statuses = {str(status): number for status, number in sorted(found.items())}
    document = {"check": "damaged_bodies", "bodies": options.bodies, "seed": options.seed, "statuses": statuses}
    document |= {"sound_edit_afterwards": 200, "seconds": round(seconds, 1)}
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
