"""Images in every mode, depth, byte order and kind of transparency that Pillow can open look as they do to a person.

Every file shows four quarters: black, white, a middle gray of 60%, and a fourth one that is black or transparent.
"""

import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from evaluation.images import read_image

SIDE = 48
LEVELS = (0, 1, 3 / 5, 0)  # of the quarters, as a part of white
WHITE = 255


def quarters(*values: int | float | tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """[SIDE, SIDE] or [SIDE, SIDE, C]: one value for each quarter, row by row."""
    grid = np.array(values, dtype=dtype)
    grid = grid.reshape(2, 2, *grid.shape[1:])
    return grid.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)


def shown(path: Path) -> list[tuple[int, ...]]:
    """The colors in the middle of the four quarters of the image that is read."""
    image = read_image(path)
    return [tuple(image[:, row, column].tolist()) for row in (8, 24) for column in (8, 24)]


def assert_looks(path: Path, last: int = 0, *, within: int = 2) -> None:
    """The quarters are black, white, gray, and `last`: 0 if it is opaque, 255 if it is transparent."""
    for found, expected in zip(shown(path), (0, 255, 153, last), strict=True):
        assert max(abs(channel - expected) for channel in found) <= within, shown(path)


def packed(levels: np.ndarray, depth: int, order: str = ">") -> bytes:
    """Rows of levels with 1 to 32 bits each, every row a whole number of bytes."""
    if depth >= 8 and depth != 12:
        return levels.astype(f"{order}u{depth // 8}").tobytes()
    rows = levels.reshape(len(levels), -1).astype(np.uint16)
    bits = (rows[:, :, None] >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


# ---- PNG ------------------------------------------------------------------------------------------------------------

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # color types of PNG
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (2, 4, 8), GRAY_ALPHA: (8, 16), RGBA: (8, 16)}


def write_png(path: Path, pixels: np.ndarray, color: int, depth: int, **chunks: bytes) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.frombuffer(packed(pixels, depth), np.uint8).reshape(SIDE, -1)
    rows = np.concatenate([np.zeros((SIDE, 1), np.uint8), rows], axis=1)  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + b"".join(chunk(name.encode(), content) for name, content in chunks.items())
                     + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("color", "depth"), [(color, depth) for color in DEPTHS for depth in DEPTHS[color]])
@pytest.mark.parametrize("transparent", [False, True])
def test_every_png_looks_right(tmp_path: Path, color: int, depth: int, transparent: bool) -> None:
    path, top = tmp_path / "x.png", 2**depth - 1
    chunks, last = {}, WHITE if transparent else 0
    middle = round(0.6 * top)
    if color == PALETTE:
        pixels = quarters(0, 1, 2, 3)
        chunks = {"PLTE": bytes([0, 0, 0, 255, 255, 255, 153, 153, 153, 0, 0, 0])}
        chunks |= {"tRNS": bytes([255, 255, 255, 0])} if transparent else {}
    elif color in (GRAY_ALPHA, RGBA):
        repeat = 3 if color == RGBA else 1
        opacities = (top, top, top, 0 if transparent else top)
        pixels = quarters(*((*[level] * repeat, opacity) for level, opacity in
                            zip((0, top, middle, 0), opacities, strict=True)), dtype=np.uint16)
    else:
        key = 1 if depth > 1 else 0  # a level that only the last quarter has
        values = (0, top, middle, key) if depth > 1 else (top, top, top, key)
        pixels = quarters(*((level,) * CHANNELS[color] for level in values), dtype=np.uint16)
        chunks = {"tRNS": struct.pack(f">{CHANNELS[color]}H", *[key] * CHANNELS[color])} if transparent else {}
        if not transparent and depth in (2, 4):
            last = 255 // top
    write_png(path, pixels, color, depth, **chunks)
    if (color, depth, transparent) == (RGB, 16, True):  # Pillow has no such colors to compare with
        with pytest.raises(UserError, match="16 bits per channel"):
            read_image(path)
    elif depth == 1:
        assert [level for level, *_ in shown(path)] == [255, 255, 255, last]
    else:
        assert_looks(path, last, within=2 if depth != 2 else 20)  # two bits have no 60%


# ---- TIFF -----------------------------------------------------------------------------------------------------------

WHITE_IS_ZERO, BLACK_IS_ZERO, TIFF_RGB, TIFF_PALETTE, CMYK, LAB = 0, 1, 2, 3, 5, 8  # photometric interpretations
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats


def write_tiff(path: Path, content: bytes, photometric: int, bits: tuple[int, ...], order: str = "<",
               sample: int = UNSIGNED, extra: int | None = None, palette: bytes = b"") -> None:
    """An uncompressed TIFF of one strip."""
    entries = [(256, 3, [SIDE]), (257, 3, [SIDE]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric]),
               (273, 4, [0]), (277, 3, [len(bits)]), (278, 3, [SIDE]), (279, 4, [len(content)]),
               (339, 3, [sample] * len(bits))]
    if palette:
        entries.append((320, 3, np.frombuffer(palette, np.uint16).tolist()))
    if extra is not None:
        entries.append((338, 3, [extra]))
    entries.sort()
    long_values, table = b"", b""
    after = 8 + 2 + 12 * len(entries) + 4
    sizes = {3: "H", 4: "I"}
    total = sum(len(values) * struct.calcsize(sizes[kind]) for _, kind, values in entries
                if len(values) * struct.calcsize(sizes[kind]) > 4)
    for tag, kind, values in entries:
        values = [after + total] if tag == 273 else values
        value = struct.pack(f"{order}{len(values)}{sizes[kind]}", *values)
        if len(value) > 4:
            long_values, value = long_values + value, struct.pack(f"{order}I", after + len(long_values))
        table += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(start + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4) + long_values + content)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_every_gray_tiff_looks_right(tmp_path: Path, bits: int, photometric: int, order: str) -> None:
    top = 2**bits - 1
    levels = np.array([round(level * top) for level in LEVELS])
    levels = top - levels if photometric == WHITE_IS_ZERO else levels
    write_tiff(tmp_path / "x.tif", packed(quarters(*levels, dtype=np.uint16), bits, order), photometric, (bits,), order)
    if (bits, photometric, order) in {(12, WHITE_IS_ZERO, "<"), (12, WHITE_IS_ZERO, ">"), (12, BLACK_IS_ZERO, ">"),
                                      (16, WHITE_IS_ZERO, ">")}:  # not supported by Pillow
        with pytest.raises(UserError):
            read_image(tmp_path / "x.tif")
    else:
        assert_looks(tmp_path / "x.tif")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i2", "u4", "i4", "f4"])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
def test_levels_without_a_range_are_stretched(tmp_path: Path, kind: str, photometric: int, order: str) -> None:
    """From the darkest to the lightest level; a few kinds are not supported by Pillow."""
    low, high = (-20_000, 20_000) if kind == "i2" else (0, 4e9) if kind == "u4" else (-1e6, 2e6)
    levels = [low + part * (high - low) for part in LEVELS]
    levels = [low + high - level for level in levels] if photometric == WHITE_IS_ZERO else levels
    content = quarters(*levels, dtype=np.float64).astype(f"{order}{kind}").tobytes()
    sample = {"i": SIGNED, "u": UNSIGNED, "f": FLOAT}[kind[0]]
    write_tiff(tmp_path / "x.tif", content, photometric, (8 * int(kind[1]),), order, sample)
    supported = {"f4", "i2", "i4"} if photometric == BLACK_IS_ZERO else {"f4"}
    if kind in supported:
        assert_looks(tmp_path / "x.tif")
    else:
        with pytest.raises(UserError) as problem:
            read_image(tmp_path / "x.tif")
        assert "\n" not in str(problem.value)


LAB_QUARTERS = ((0, 0, 0), (255, 0, 0), (161, 0, 0), (0, 0, 0))  # lightness of 63% looks like a gray of 60%


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("photometric", "depth", "values", "extra"), [
    *((TIFF_RGB, depth, [(level,) * 3 for level in LEVELS], None) for depth in (8, 16)),
    *((TIFF_RGB, depth, [(0, 0, 0, 1), (1, 1, 1, 1), (0.6, 0.6, 0.6, 1), (0, 0, 0, 0)], extra)
      for depth, extra in product((8, 16), (0, 1, 2))),  # an extra channel without meaning, and opacity
    (BLACK_IS_ZERO, 8, [(0, 1), (1, 1), (0.6, 1), (0, 0)], 0),
    (BLACK_IS_ZERO, 8, [(0, 1), (1, 1), (0.6, 1), (0, 0)], 1),
    (BLACK_IS_ZERO, 8, [(0, 1), (1, 1), (0.6, 1), (0, 0)], 2),
    *((CMYK, depth, [(0, 0, 0, 1 - level) for level in LEVELS], None) for depth in (8, 16)),
    (LAB, 8, [tuple(level / 255 for level in color) for color in LAB_QUARTERS], None),
])
def test_every_color_tiff_looks_right(tmp_path: Path, photometric: int, depth: int, values: list[tuple[float, ...]],
                                      extra: int | None, order: str) -> None:
    top = 2**depth - 1
    pixels = quarters(*(tuple(round(top * part) for part in color) for color in values), dtype=np.uint16)
    write_tiff(tmp_path / "x.tif", packed(pixels, depth, order), photometric, (depth,) * len(values[0]), order,
               extra=extra)
    assert_looks(tmp_path / "x.tif", WHITE if extra in (1, 2) else 0)


def test_half_opaque_colors_are_mixed_with_white(tmp_path: Path) -> None:
    """Colors multiplied by their opacity, as in an associated alpha channel, and plain ones."""
    for extra, stored in ((1, 50), (2, 100)):
        write_tiff(tmp_path / "x.tif", quarters(*[(stored, stored, stored, 128)] * 4).tobytes(), TIFF_RGB, (8,) * 4,
                   extra=extra)
        assert all(abs(channel - 177) <= 2 for color in shown(tmp_path / "x.tif") for channel in color)
        write_tiff(tmp_path / "x.tif", quarters(*[(stored, 128)] * 4).tobytes(), BLACK_IS_ZERO, (8, 8), extra=extra)
        assert all(abs(channel - 177) <= 2 for color in shown(tmp_path / "x.tif") for channel in color)


def test_lab_keeps_its_colors(tmp_path: Path) -> None:
    """The lightness and the signed a and b, under D50, of sRGB red, green, blue, and gray."""
    colors = ((54, 81, 70), (88, -79, 81), (30, 68, -112), (60, 0, 0))
    pixels = quarters(*((round(255 * light / 100), a % 256, b % 256) for light, a, b in colors), dtype=np.uint8)
    write_tiff(tmp_path / "x.tif", pixels.tobytes(), LAB, (8, 8, 8))
    for found, expected in zip(shown(tmp_path / "x.tif"), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (145, 145, 145)),
                               strict=True):
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 25, (found, expected)


# ---- Whatever Pillow writes -----------------------------------------------------------------------------------------

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N")
Image.init()
WRITABLE = sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"})


def in_mode(mode: str) -> Image.Image:
    """Black and white quarters in `mode`, where it can be made."""
    if mode.startswith("I;16"):
        levels = quarters(0, 65535, 65535, 0, dtype=np.uint16)
        order = ">" if mode == "I;16B" else "<"
        return Image.frombytes(mode, (SIDE, SIDE), levels.astype(f"{order}u2").tobytes())
    gray = quarters(0, 255, 255, 0)
    if mode in ("I", "F"):
        return Image.fromarray(gray.astype(np.int32) * 257 if mode == "I" else gray.astype(np.float32))
    rgb = Image.fromarray(gray).convert("RGB")
    if mode == "LAB":
        return Image.frombytes("LAB", (SIDE, SIDE), quarters((0, 0, 0), (255, 0, 0), (255, 0, 0), (0, 0, 0)).tobytes())
    if mode == "La":
        return rgb.convert("LA").convert("La")
    return rgb.convert("RGBA").convert(mode) if mode == "RGBa" else rgb.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_format_looks_right_or_is_refused(tmp_path: Path, mode: str) -> None:
    image, readable = in_mode(mode), []
    for kind in WRITABLE:
        path = tmp_path / f"{kind}.image"
        try:
            image.save(path, format=kind)
        except Exception:  # most formats cannot store most modes
            continue
        try:
            found = shown(path)
        except UserError as problem:
            assert "\n" not in str(problem)
            continue
        for color, expected in zip(found, (0, 255, 255, 0), strict=True):
            assert max(abs(channel - expected) for channel in color) <= 6, (kind, found)
        readable.append(kind)
    assert readable or mode in ("HSV", "La", "RGBa", "I;16N", "I;16L")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, kind: str) -> None:
    if kind not in Image.SAVE_ALL:
        pytest.skip("this Pillow does not write it")
    first, second = (Image.fromarray(quarters(*colors)).convert("RGB")
                     for colors in ((0, 255, 153, 0), (255, 0, 0, 255)))
    first.save(tmp_path / "x.image", format=kind, save_all=True, append_images=[second])
    assert_looks(tmp_path / "x.image", within=8)


@pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
def test_a_transparent_color_of_a_palette_is_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(quarters(0, 1, 2, 3), mode="P")
    image.putpalette([0, 0, 0, 255, 255, 255, 153, 153, 153, 0, 0, 9])
    for suffix in ("png", "gif") if isinstance(transparency, int) else ("png",):
        image.save(tmp_path / f"x.{suffix}", transparency=transparency)
        assert_looks(tmp_path / f"x.{suffix}", WHITE)


def test_missing_levels_are_black(tmp_path: Path) -> None:
    levels = quarters(0, 1, 0.6, np.nan, dtype=np.float32)
    Image.fromarray(levels).save(tmp_path / "x.tif")
    assert_looks(tmp_path / "x.tif")
    Image.fromarray(np.full_like(levels, np.nan)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="no finite levels"):
        read_image(tmp_path / "x.tif")
