"""Results as files: a picture in the format asked for, with what made it in its text."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clora.serve.offer import OutputFormat

TEXT_KEY = "clora"


def encode_picture(picture: Image.Image, kind: OutputFormat, quality: int, made_by: Mapping[str, Any]) -> str:
    """Base64 of a picture; a PNG carries `made_by` as JSON in its text chunk `clora`, nothing else of it is kept."""
    buffer = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        info.add_text(TEXT_KEY, json.dumps(made_by, ensure_ascii=True))
        picture.save(buffer, "PNG", pnginfo=info)
    else:
        picture.save(buffer, kind.upper(), quality=quality)
    return base64.b64encode(buffer.getvalue()).decode()
