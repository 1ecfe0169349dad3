"""Image files to RGB, safely and the same everywhere: loading, confinement of paths, buckets.

What a file holds is decided here once, so that training, evaluation and serving see the same pixels:
- rotation in EXIF is applied; of an animation the first frame counts, of a HEIC the primary image;
- transparency is composited on white;
- CMYK goes to sRGB through the embedded profile where there is one, else by Pillow's plain formula;
- 16-bit grey is scaled to 8 bits (65535 -> 255);
- RGB values are left as stored, whatever profile they carry: the model's own pipeline does the same.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from clora.errors import InputError

DEFAULT_MAX_PIXELS = 1 << 26  # 8192 x 8192: 192 MiB as RGB
# Formats whose decoders only decode (Pillow hands PostScript, for one, to an interpreter).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "JPEG2000", "PPM", "QOI")
SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif",
     ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi")
)  # fmt: skip
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))  # of phones; pillow-heif decodes them
TGA_SUFFIX = ".tga"  # nothing in such a file says what it is, so that only its name can
NO_HEIF = "HEIC needs pillow-heif: pip install 'clora[heif]', or save it as PNG or JPEG"
UNKNOWN_FORMAT = "not a format that is read; save it as PNG, JPEG or WebP"
WHITE = (255, 255, 255, 255)

Size = tuple[int, int]


def load_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an image file to 8-bit RGB (see the module docstring for how other modes are converted).

    The declared size is compared with `max_pixels` before anything is decoded. Raises `InputError`, naming
    the file and the mend, for a file that is missing, no image, damaged or cut off, too large, or of a mode
    without a known range.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False, not an error, for names no file can have
        what = "is a folder, not an image" if os.path.isdir(path) else "does not exist"
        raise InputError(f"{path} {what}; correct the path")
    try:
        with Image.open(path, formats=_formats(path)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(_too_large(path, f"{width} x {height} pixels", max_pixels))
            return _to_rgb(ImageOps.exif_transpose(_first_frame(image)), path)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(path, "declares too many pixels", max_pixels)) from error
    except UnidentifiedImageError as error:
        if _is_heif(path):
            what = "is damaged or cut off; replace the file" if reads_heif() else f"cannot be read: {NO_HEIF}"
            raise InputError(f"{path} {what}") from error
        raise InputError(f"{path} is not an image of a known format; save it as PNG, JPEG or WebP") from error
    except Exception as error:
        # Whatever a decoder raises on damaged bytes (it may be any type) means one thing to the user.
        raise InputError(f"{path} is damaged or cut off ({error}); replace the file") from error


def decode_image(
    content: bytes, name: str, formats: Sequence[str], max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """`load_image` for bytes at hand, called `name` in errors: 8-bit RGB, in one of Pillow's `formats` alone.

    What is declared is compared with `max_pixels` before anything is decoded. Raises `InputError` as `load_image` does.
    """
    try:
        with Image.open(io.BytesIO(content), formats=list(formats)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(_too_large(name, f"{width} x {height} pixels", max_pixels))
            return _to_rgb(ImageOps.exif_transpose(_first_frame(image)), name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name, "declares too many pixels", max_pixels)) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is none of {', '.join(formats)}; save it as one of them") from error
    except Exception as error:
        # As above, without the decoder's words: this message goes to strangers.
        raise InputError(f"{name} is damaged or cut off; replace it") from error


def why_unread(path: Path) -> str | None:
    """Why a file is not read as an image, judged by its name, with the mend; None where it is."""
    suffix = path.suffix.lower()
    if suffix in HEIF_SUFFIXES:
        return None if reads_heif() else NO_HEIF
    return None if suffix in SUFFIXES or suffix == TGA_SUFFIX else UNKNOWN_FORMAT


@cache
def reads_heif() -> bool:
    """Whether pillow-heif is installed; Pillow can read HEIC from then on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _formats(path: Path) -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with (it stumbles over names it does not know), and what this
    file may be besides."""
    Image.init()
    tga = ("TGA",) if path.suffix.lower() == TGA_SUFFIX else ()
    heif = ("HEIF",) if _is_heif(path) and reads_heif() else ()
    return tuple(name for name in (*FORMATS, *tga, *heif) if name in Image.OPEN)


def _is_heif(path: Path) -> bool:
    """Whether a file says that it is HEIC, whatever its name; phones' pictures are often renamed to .jpg."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def _too_large(path: Path | str, what: str, max_pixels: int) -> str:
    return f"{path}: {what}, more than the {max_pixels} allowed; make the image smaller"


def _first_frame(image: Image.Image) -> Image.Image:
    if image.format != "HEIF":  # which opens at its primary image, be it the first or not
        image.seek(0)
    image.load()
    return image


def _to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16") or image.mode == "I":
        return _grey16_to_rgb(image, path)
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image, path)
    if image.mode in ("F", "LAB", "HSV"):
        raise InputError(f"{path}: colour mode {image.mode} has no agreed range; save it as an 8-bit RGB PNG")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # The premultiplied modes convert only to their plain partners.
        plain = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", plain.size, WHITE), plain).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    """Grey of 16 bits, 65535 = white; a tRNS value, where there is one, is composited on white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: 32-bit grey values beyond 0..65535; save it as an 8- or 16-bit PNG")
    grey = (values * 255 + 32767) // 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _cmyk_to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise InputError(f"{path}: its CMYK colour profile is damaged ({error}); save it as RGB") from error
    assert converted is not None  # only the in-place form returns nothing
    return converted


def resolve_inside(root: Path, relative: str | Path, data_roots: Sequence[Path] = ()) -> Path:
    """The real path of `relative` (from `root`), provided that it lies inside `root` or one of `data_roots`.

    Symbolic links are followed before the comparison, so neither `..`, an absolute path nor a link leaves the
    dataset unnoticed. The file need not exist. Raises `InputError` for a path that leads elsewhere.
    """
    if "\0" in str(relative):
        raise InputError(f"{str(relative)!r} is not a path; correct it")
    try:
        real = (Path(root) / relative).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError(f"{relative} cannot be resolved under {root} ({error}); correct the path") from error
    if any(real.is_relative_to(Path(place).resolve()) for place in (root, *data_roots)):
        return real
    raise InputError(f"{relative} leads outside {root}; move it inside or add {real.parent} to data_roots")


def aspect_buckets(max_area: int, multiple: int, ratios: Sequence[Size]) -> list[Size]:
    """The size (width, height) for each aspect ratio (width, height), within `max_area` pixels.

    Sizes are multiples of `multiple`; of those around the ideal one the nearest in shape is taken, then the
    largest. Raises `InputError` when not even one block fits.
    """
    buckets: list[Size] = []
    for ratio_width, ratio_height in ratios:
        ratio = ratio_width / ratio_height
        # The tolerance keeps an exact fit (1024 of 1024 x 1024) from being floored away by rounding.
        columns = math.floor(math.sqrt(max_area * ratio) / multiple + 1e-9)
        rows = math.floor(math.sqrt(max_area / ratio) / multiple + 1e-9)
        fitting = [
            (width * multiple, height * multiple)
            for width in (columns, columns + 1)
            for height in (rows, rows + 1)
            if width > 0 and height > 0 and width * height * multiple * multiple <= max_area
        ]
        if not fitting:
            what = f"no {ratio_width}:{ratio_height} size of multiples of {multiple}"
            raise InputError(f"train.buckets: {what} fits into {max_area} pixels; raise max_area")
        bucket = choose_bucket((ratio_width, ratio_height), fitting)
        if bucket not in buckets:
            buckets.append(bucket)
    return buckets


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket (width, height) nearest to `size` in shape; of equally near ones the largest."""
    if not buckets:
        raise InputError("train.buckets: there is no bucket; give at least one aspect ratio")
    return min(buckets, key=lambda bucket: _rank(bucket, size[0] / size[1]))


def cover_crop(image: Image.Image, size: Size) -> Image.Image:
    """Scale `image` to cover `size` (width, height) and crop the middle, in one Lanczos resampling.

    The crop is a fractional box in the source, not a rounded one in the result: two images of equal size (a
    source and its target) stay aligned, and an image already of that size comes back unchanged.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = min(size[0] / scale, image.width), min(size[1] / scale, image.height)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _rank(size: Size, ratio: float) -> tuple[float, int]:
    """Sorts sizes by distance in shape (log of the ratio of ratios), then by area, the largest first."""
    return round(abs(math.log(size[0] / size[1] / ratio)), 9), -size[0] * size[1]
