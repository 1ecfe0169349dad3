"""Loading of image files to RGB, confinement of paths, and resizing to buckets."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import clora.data.images as images
from clora.data.images import (
    aspect_buckets,
    choose_bucket,
    cover_crop,
    load_image,
    resolve_inside,
    why_unread,
)
from clora.errors import InputError

RAMP = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


# ---- modes ----


def test_rgb_is_unchanged(tmp_path: Path) -> None:
    loaded = load_image(saved(tmp_path, Image.fromarray(RAMP), "a.png"))
    assert np.array_equal(pixels(loaded), RAMP)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (8, 9, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 0)
    loaded = pixels(load_image(saved(tmp_path, Image.fromarray(rgba), "a.png")))
    assert np.abs(loaded - over_white(rgba.astype(float))).max() <= 1
    assert loaded[0, 0].tolist() == [255, 255, 255]  # not the hidden colour
    grey = Image.fromarray(rgba[..., :2].copy(), "LA")
    expected = over_white(rgba[..., [0, 0, 0, 1]].astype(float))
    assert np.abs(pixels(load_image(saved(tmp_path, grey, "b.png"))) - expected).max() <= 1


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = saved(tmp_path, image, "a.png", transparency=bytes([255, 0, 128]))
    assert pixels(load_image(path)).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 255]]]
    path = saved(tmp_path, image, "b.gif", transparency=1)
    assert pixels(load_image(path))[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_transparent_colour_of_grey_and_rgb(tmp_path: Path, mode: str, key: object) -> None:
    image = Image.fromarray(np.array([[0, 7, 9]], dtype=np.uint8), "L").convert(mode)
    loaded = pixels(load_image(saved(tmp_path, image, "a.png", transparency=key)))
    assert loaded[0, :, 0].tolist() == [0, 255, 9]


def test_grey_and_bilevel(tmp_path: Path) -> None:
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    assert pixels(load_image(saved(tmp_path, Image.fromarray(grey), "a.png")))[0, :, 1].tolist() == [
        0,
        100,
        255,
    ]
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert pixels(load_image(saved(tmp_path, bits, "b.png")))[0, :, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65534, 65535]], dtype=np.uint16)
    loaded = pixels(load_image(saved(tmp_path, Image.fromarray(values), name)))
    expected = [math.floor(value * 255 / 65535 + 0.5) for value in values[0].tolist()]
    assert loaded[0, :, 0].tolist() == expected == [0, 0, 1, 1, 128, 255, 255]
    assert np.array_equal(loaded[..., 0], loaded[..., 2])


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_sixteen_bit_rgb_and_transparent_grey(tmp_path: Path) -> None:
    path = tmp_path / "rgb.png"
    path.write_bytes(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32768, 65535, 257, 514, 771)))
    assert np.abs(pixels(load_image(path)) - [[[0, 128, 255], [1, 2, 3]]]).max() <= 1
    path.write_bytes(png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 700, 701), (b"tRNS", struct.pack(">H", 700))))
    assert pixels(load_image(path))[0, :, 0].tolist() == [255, 3]


def test_thirty_two_bit_grey_beyond_sixteen_bits_is_refused(tmp_path: Path) -> None:
    wide = Image.fromarray(np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(InputError, match=r"wide\.tif: 32-bit grey values beyond 0\.\.65535; save it as"):
        load_image(saved(tmp_path, wide, "wide.tif"))
    real = Image.fromarray(np.array([[0.1, 0.9]], dtype=np.float32))
    with pytest.raises(InputError, match="colour mode F"):
        load_image(saved(tmp_path, real, "real.tif"))


# ---- CMYK ----


def cmyk_profile(cyan_lab: tuple[int, int, int]) -> bytes:
    """A small CMYK profile: paper white, full cyan gives `cyan_lab` (8-bit Lab), any other ink black."""
    corners = [(0, 128, 128)] * 16
    corners[0], corners[8] = (255, 128, 128), cyan_lab  # cyan is the slowest index
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(0x10000 if k % 4 == 0 else 0 for k in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4
    table += b"".join(bytes(corner) for corner in corners) + ramp * 3
    offset = 128 + 4 + 12
    tags = struct.pack(">I4sII", 1, b"A2B0", offset, len(table))
    size = offset + len(table)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3I", 0x0000F6D6, 0x00010000, 0x0000D32D)
    return header.ljust(128, b"\0") + tags + table


def test_cmyk_without_a_profile_is_the_plain_formula(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255], [40, 80, 0, 60]]], np.uint8)
    loaded = pixels(load_image(saved(tmp_path, Image.fromarray(inks, "CMYK"), "a.tif")))
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(loaded - expected).max() <= 1


def test_cmyk_goes_through_its_profile(tmp_path: Path) -> None:
    lab = (153, 90, 100)  # L* 60, a* -38, b* -28
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.fromarray(inks, "CMYK")
    for name in ("a.tif", "a.jpg"):
        path = saved(tmp_path, image.resize((24, 8), Image.Resampling.NEAREST), name, icc_profile=cmyk_profile(lab))
        white, cyan, black = pixels(load_image(path))[4, [4, 12, 20]]
        # The same colour through the stock Lab profile is the reference.
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        pixel = ImageCms.applyTransform(Image.new("LAB", (1, 1), lab), to_srgb)
        reference = np.array(pixel.getpixel((0, 0)))
        tolerance = 2 if name.endswith("tif") else 12
        assert np.abs(cyan - reference).max() <= tolerance
        assert np.abs(white - 255).max() <= tolerance and black.max() <= tolerance
        assert np.abs(cyan - [0, 255, 255]).max() > 40  # what the plain formula would give


def test_cmyk_with_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("CMYK", (4, 4)), "a.tif", icc_profile=cmyk_profile((1, 2, 3))[:150])
    with pytest.raises(InputError, match="CMYK colour profile is damaged"):
        load_image(path)


# ---- EXIF and animations ----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(RAMP)
    exif = image.getexif()
    exif[0x0112] = orientation
    stored = RAMP.astype(int)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    loaded = load_image(saved(tmp_path, image, "a.png", exif=exif))
    assert np.array_equal(pixels(loaded), undo[orientation](stored))
    assert loaded.getexif().get(0x0112, 1) == 1  # nobody rotates it a second time


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert pixels(load_image(path))[3, 3].tolist() == [255, 0, 0]


# ---- formats ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a.jpe", "JPEG"),
        ("a.pgm", "PPM"),
        ("a.j2k", "JPEG2000"),
        ("a.qoi", "QOI"),
        ("a.dib", "BMP"),
    ],
)
def test_load_image_reads_a_format_by_its_other_names(tmp_path: Path, name: str, kind: str) -> None:
    image = Image.fromarray(np.full((16, 16, 3), (90, 90, 90), dtype=np.uint8))
    image = image.convert("L") if kind == "PPM" else image
    path = saved(tmp_path, image, name, format=kind)
    assert why_unread(path) is None
    assert np.abs(pixels(load_image(path)) - 90).max() <= 2


@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_load_image_reads_tga_by_its_name_alone(tmp_path: Path, compression: str | None) -> None:
    path = saved(tmp_path, Image.fromarray(RAMP), "a.tga", compression=compression)
    assert why_unread(path) is None and np.array_equal(pixels(load_image(path)), RAMP)
    # Nothing in it says that it is one: under another name damaged bytes must not become a picture.
    path.rename(tmp_path / "a.png")
    with pytest.raises(InputError, match="not an image of a known format"):
        load_image(tmp_path / "a.png")


def test_tga_size_is_checked_before_decoding(tmp_path: Path) -> None:
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0)
    path = tmp_path / "bomb.tga"
    path.write_bytes(header + b"\xff\0\0\0" * 9)
    with pytest.raises(InputError, match=r"bomb\.tga.*pixels.*make the image smaller"):
        load_image(path)


def heic(path: Path, image: Image.Image, **options: object) -> Path:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(image).save(path, quality=-1, **options)  # lossless
    return path


def test_load_image_reads_heic_also_under_another_name(tmp_path: Path) -> None:
    ramp = np.tile(RAMP, (16, 11, 1))
    for name in ("a.heic", "renamed.jpg"):
        path = heic(tmp_path / name, Image.fromarray(ramp), chroma=444, matrix_coefficients=0)
        assert np.array_equal(pixels(load_image(path)), ramp)
        with pytest.raises(InputError, match=rf"{name}: 66 x 64 pixels, more than the 4223 allowed"):
            load_image(path, max_pixels=4223)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"renamed\.jpg is damaged or cut off"):
        load_image(path)


def test_heic_gives_its_primary_image_turned_once(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = pillow_heif.HeifFile()
    for colour in ("red", "lime", "blue"):
        file.add_from_pillow(Image.new("RGB", (64, 64), colour))
    file.save(tmp_path / "burst.heic", quality=-1, primary_index=1)
    assert pixels(load_image(tmp_path / "burst.heic"))[3, 3].argmax() == 1
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste("blue", (0, 0, 32, 64))
    exif = wide.getexif()
    exif[0x0112] = (
        6  # to be turned right by a quarter, as phones write it and HEIC's own `irot`: what was left is on top
    )
    wide.info["exif"] = exif.tobytes()
    assert images.reads_heif()
    wide.save(tmp_path / "phone.heic", quality=-1)
    turned = pixels(load_image(tmp_path / "phone.heic"))
    assert turned.shape == (96, 64, 3)
    assert turned[5, 32].argmax() == 2 and turned[90, 32].argmax() == 0


def test_heic_without_pillow_heif_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    monkeypatch.setattr(images, "reads_heif", lambda: False)
    assert why_unread(path) == images.NO_HEIF and "clora[heif]" in images.NO_HEIF
    with pytest.raises(
        InputError, match=r"a\.heic cannot be read: HEIC needs pillow-heif: pip install 'clora\[heif\]'"
    ):
        load_image(path)


# ---- hostile and damaged files ----


def test_declared_size_is_checked_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    for side in (9_000, 50_000, 2**31 - 1):
        path.write_bytes(png(side, side, 8, 2, b""))
        with pytest.raises(InputError, match=r"bomb\.png.*pixels.*make the image smaller"):
            load_image(path)
    small = saved(tmp_path, Image.new("RGB", (10, 10)), "small.png")
    assert load_image(small, max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="10 x 10 pixels, more than the 99 allowed"):
        load_image(small, max_pixels=99)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.gif", "a.ppm", "a.tga", "a.qoi"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_file_cut_off_is_refused_by_name(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load_image(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.png", b"no image at all"),
        ("page.jpg", b"<html><body>404</body></html>"),
        ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        # Pillow would run an interpreter over this one.
        (
            "script.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n",
        ),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an image of a known format; save it as"):
        load_image(path)


def test_missing_files_folders_and_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / ("x" * 5000))


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "TGA"]), st.data())
def test_damaged_bytes_give_an_image_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.tile(RAMP, (4, 4, 1))).save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(raw)
    try:
        assert load_image(path, max_pixels=1 << 20).mode == "RGB"
    except InputError as error:
        assert str(path) in str(error)


# ---- confinement ----


def test_resolve_inside_follows_links_before_it_compares(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    (root / "sub").mkdir(parents=True)
    other.mkdir()
    (other / "x.png").touch()
    (root / "link").symlink_to(other)
    (root / "inner").symlink_to(root / "sub")
    (root / "loop").symlink_to(root / "loop")
    assert resolve_inside(root, "sub/../sub/a.png") == root / "sub" / "a.png"
    assert resolve_inside(root, root / "sub") == root / "sub"
    assert resolve_inside(root, "inner/a.png") == root / "sub" / "a.png"
    for leaving in (
        "../other/x.png",
        "link/x.png",
        str(other / "x.png"),
        "sub/../../other",
        "/etc/passwd",
        "..",
    ):
        with pytest.raises(InputError, match="leads outside"):
            resolve_inside(root, leaving)
    for leaving in ("../other/x.png", "link/x.png", str(other / "x.png")):
        assert resolve_inside(root, leaving, [other]) == other / "x.png"
    with pytest.raises(InputError):
        resolve_inside(root, "loop/a.png")
    with pytest.raises(InputError, match="is not a path"):
        resolve_inside(root, "a\0b")


def test_resolve_inside_is_not_fooled_by_a_common_prefix(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data2").mkdir()
    with pytest.raises(InputError, match="leads outside"):
        resolve_inside(tmp_path / "data", "../data2/a.png")


def test_resolve_inside_accepts_a_root_that_is_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert resolve_inside(tmp_path / "alias", "a.png") == tmp_path / "real" / "a.png"


# ---- buckets ----


def test_aspect_buckets_of_the_real_model() -> None:
    ratios = [(1, 1), (3, 4), (4, 3), (16, 9)]
    assert aspect_buckets(1024 * 1024, 32, ratios) == [(1024, 1024), (864, 1152), (1152, 864), (1344, 768)]
    assert aspect_buckets(64 * 64, 8, [(1, 1), (2, 2)]) == [(64, 64)]


@given(st.integers(1, 4_000_000), st.sampled_from([1, 8, 16, 32]), st.integers(1, 21), st.integers(1, 21))
def test_aspect_buckets_fit_and_have_the_best_shape(area: int, multiple: int, width: int, height: int) -> None:
    try:
        (bucket,) = aspect_buckets(area, multiple, [(width, height)])
    except InputError:
        # Refused only where not one block, or no block strip around the ideal size, fits.
        assert area < multiple * multiple * max(math.ceil(width / height), math.ceil(height / width)) ** 2
        return
    assert bucket[0] % multiple == 0 and bucket[1] % multiple == 0 and bucket[0] * bucket[1] <= area
    columns, rows = math.sqrt(area * width / height) / multiple, math.sqrt(area * height / width) / multiple
    around = [
        (c * multiple, r * multiple)
        for c in {math.floor(columns), math.ceil(columns)} - {0}
        for r in {math.floor(rows), math.ceil(rows)} - {0}
        if c * r * multiple**2 <= area
    ]

    def off(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] * height / (size[1] * width)))

    assert off(bucket) <= min(map(off, around)) + 1e-8


def test_aspect_buckets_too_small_name_the_field() -> None:
    with pytest.raises(InputError, match=r"train\.buckets: no 1:1 size of multiples of 32 fits into 1023 pixels"):
        aspect_buckets(1023, 32, [(1, 1)])


def test_choose_bucket_compares_shapes_symmetrically() -> None:
    buckets = [(100, 100), (50, 200), (200, 50), (120, 120)]
    assert choose_bucket((30, 30), buckets) == (120, 120)  # equally near: the largest
    assert choose_bucket((1000, 4000), buckets) == (50, 200)
    assert choose_bucket((201, 100), buckets) == (200, 50)  # log 2 lies half-way to log 4
    assert choose_bucket((100, 199), buckets) == (120, 120)
    with pytest.raises(InputError, match="no bucket"):
        choose_bucket((1, 1), [])


def test_cover_crop_of_the_same_size_is_exact() -> None:
    image = Image.fromarray(RAMP)
    assert np.array_equal(pixels(cover_crop(image, image.size)), RAMP)
    assert np.array_equal(pixels(cover_crop(image, choose_bucket(image.size, [(6, 4), (5, 5)]))), RAMP)


@pytest.mark.parametrize(("size", "into"), [((300, 200), (100, 100)), ((200, 301), (64, 48)), ((90, 60), (96, 96))])
def test_cover_crop_keeps_the_middle_in_place(size: tuple[int, int], into: tuple[int, int]) -> None:
    """On a ramp the pixel (i, j) of the result is known: box start + (i + 1/2) / scale - 1/2."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    ramp = np.stack([x * 250 / size[0], y * 250 / size[1], 0 * x], -1).round().astype(np.uint8)
    result = pixels(cover_crop(Image.fromarray(ramp), into))
    scale = max(into[0] / size[0], into[1] / size[1])
    for axis, channel in ((0, 0), (1, 1)):
        start = (size[axis] - into[axis] / scale) / 2
        position = start + (np.arange(into[axis]) + 0.5) / scale - 0.5
        expected = position * 250 / size[axis]
        measured = result[into[1] // 2, :, 0] if axis == 0 else result[:, into[0] // 2, channel]
        assert np.abs(measured - expected)[4:-4].max() <= 1.5


def test_source_and_target_of_equal_size_stay_aligned() -> None:
    rng = np.random.default_rng(2)
    source = Image.fromarray(rng.integers(0, 256, (113, 171, 3), dtype=np.uint8))
    inverted = Image.fromarray(255 - np.asarray(source))
    size = choose_bucket(source.size, aspect_buckets(64 * 64, 8, [(1, 1), (3, 2)]))
    total = pixels(cover_crop(source, size)) + pixels(cover_crop(inverted, size))
    assert np.abs(total - 255).max() <= 1
