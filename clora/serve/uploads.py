"""What a client sends: a multipart body within its budgets, and pictures that are what they must be.

Nothing is fetched or opened by a name: a file's name is not even kept. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from clora.data.images import decode_image
from clora.errors import InputError
from clora.io.text import is_unicode
from clora.serve.limits import Upload
from clora.serve.problems import Problem, bad
from clora.serve.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_FIELDS = 32
MOST_BOUNDARY = 200


@dataclass(frozen=True)
class Form:
    """The fields of a body by name, and the content of its files by the name of their field, in order."""

    fields: dict[str, list[str]]
    files: dict[str, list[bytes]]


async def read_form(request: Request, limits: Limits, upload: Upload) -> Form:
    """Read a request's multipart body, which stays in memory: nothing is written to a disk.

    Raises `Problem`: 415 for another content type, 413 beyond `limits.body_bytes` or `image_bytes`, 408 where it does
    not arrive in time or is too slow while others wait, 400 for one that is malformed, cut off, or has too many parts.
    """
    boundary = _boundary(request)
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit():
        raise bad("content-length is no number", code="malformed_request")
    if int(declared) > limits.body_bytes:
        raise _too_large(limits)
    tail = bytearray()
    parser = MultiPartParser(
        request.headers,
        _counted(request, limits, tail, upload),
        max_files=limits.images,
        max_fields=MOST_FIELDS,
        max_part_size=_most_text(limits),
    )
    parser.spool_max_size = limits.body_bytes + 1
    try:
        async with asyncio.timeout(limits.upload_seconds) as upload.timeout:
            parsed = await parser.parse()
        upload.timeout = None
    except TimeoutError as error:
        if upload.had_to_go:
            message = "the body arrives too slowly while others wait; send it faster, or a smaller one"
            raise bad(message, code="upload_too_slow", status=408) from error
        message = f"the body did not arrive in {limits.upload_seconds:g} s; send it faster, or a smaller one"
        raise bad(message, code="upload_timeout", status=408) from error
    except MultiPartException as error:
        raise bad(f"the multipart body is not right: {error.message}", code="malformed_request") from error
    except (ClientDisconnect, Problem):
        raise
    except Exception as error:  # whatever a parser raises on damaged bytes
        raise bad("the multipart body is not right", code="malformed_request") from error
    try:
        if not bytes(tail).rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
            raise bad("the multipart body is cut off: its last boundary is missing", code="malformed_request")
        return await _sorted(parsed.multi_items(), limits)
    finally:
        await parsed.close()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise bad("send multipart/form-data, with the picture as a file", code="unsupported_media_type", status=415)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MOST_BOUNDARY:
        raise bad("the content type names no boundary", code="malformed_request")
    return boundary


async def _counted(request: Request, limits: Limits, tail: bytearray, upload: Upload) -> AsyncGenerator[bytes, None]:
    """The body's chunks; `tail` keeps its last bytes."""
    async for chunk in request.stream():
        upload.received += len(chunk)
        if upload.received > limits.body_bytes:
            raise _too_large(limits)
        tail += chunk[-2 * MOST_BOUNDARY :]
        del tail[: -2 * MOST_BOUNDARY]
        yield chunk


async def _sorted(items: list[tuple[str, UploadFile | str]], limits: Limits) -> Form:
    form = Form({}, {})
    for name, value in items:
        _check_text(name)
        if isinstance(value, str):
            _check_text(value)
            form.fields.setdefault(name, []).append(value)
            continue
        _check_file(value.size or 0, limits)
        form.files.setdefault(name, []).append(await value.read())
    return form


def _check_text(text: str) -> None:
    """Refuse halves of surrogate pairs, which a body's own charset can bring in: nothing after this takes them."""
    if not is_unicode(text):
        raise bad("a field holds text that is no Unicode; send it as UTF-8", code="malformed_request")


def check_form(form: Form, limits: Limits) -> None:
    """Raise `Problem` for a form that came otherwise than as a multipart body, and is beyond what one may hold."""
    files = [content for contents in form.files.values() for content in contents]
    texts = [value for values in form.fields.values() for value in values]
    if len(files) > limits.images:
        raise bad(f"image: {len(files)} were sent, {limits.images} may be; send fewer", "image")
    if len(texts) > MOST_FIELDS:
        raise bad(f"{len(texts)} values were sent, {MOST_FIELDS} may be; send fewer", code="malformed_request")
    for name, values in form.fields.items():
        if any(len(value.encode()) > _most_text(limits) for value in values):
            raise bad(f"{name}: is longer than {_most_text(limits)} bytes; shorten it", name)
    for content in files:
        _check_file(len(content), limits)
    if sum(map(len, files)) > limits.body_bytes:
        raise _too_large(limits)


def _most_text(limits: Limits) -> int:
    """Bytes of one value; a prompt's characters have up to four."""
    return 4 * limits.prompt_chars + 1024


def _check_file(size: int, limits: Limits) -> None:
    if size > limits.image_bytes:
        message = f"a file of {size} bytes is beyond the {limits.image_bytes} allowed; make it smaller"
        raise bad(message, "image", "file_too_large", 413)


def _too_large(limits: Limits) -> Problem:
    message = f"the body is beyond the {limits.body_bytes} bytes allowed; send smaller pictures"
    return bad(message, code="body_too_large", status=413)


def decode_picture(content: bytes, number: int, limits: Limits) -> Image.Image:
    """An uploaded picture as 8-bit RGB; `Problem` 400 for what is none, damaged, or beyond `image_pixels`."""
    try:
        return decode_image(content, f"image {number}", FORMATS, limits.image_pixels)
    except InputError as error:
        raise bad(str(error), "image", "invalid_image") from error


def decoded_bytes(content: bytes, limits: Limits) -> int:
    """Bytes of an uploaded picture in memory, four a pixel as Pillow keeps RGB, by what it declares; 0 for one that
    `decode_picture` refuses."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Exception:  # whatever a decoder raises on damaged bytes
        return 0
    return 4 * pixels if pixels <= limits.image_pixels else 0
