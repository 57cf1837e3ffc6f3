"""One image file to one square of pixels, and masks and boxes to the same square."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sista_pl.data.dicom import MAX_PIXELS, dicom_size, is_dicom, read_dicom
from sista_pl.errors import BadImage, SistaError, did_you_mean

IGNORE = 127
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION = 0x0112
_NEAREST = Image.Resampling.NEAREST


def fit(width: int, height: int, size: int) -> tuple[float, int, int]:
    """Return how an image comes into the square: long side to `size`, centred, the rest 0.

    Args:
        width: pixels of the upright image.
        height: the same.
        size: side of the square.

    Returns:
        scale, dx, dy: a point (x, y) of the image lies at (x · scale + dx, y · scale + dy) in the square.
    """
    scale = size / max(width, height)
    new_width, new_height = _scaled(width, height, size)
    return scale, (size - new_width) // 2, (size - new_height) // 2


def fit_box(box: Mapping[str, Any], width: int, height: int, size: int) -> dict[str, Any]:
    """Return the box `{"x", "y", "w", "h", …}` of a (width, height) image in pixels of the square, to 1/100.

    What leaves the image is cut off.

    Raises:
        BadImage: no part of the box lies in the image.
    """
    scale, dx, dy = fit(width, height, size)
    x, y = max(0, box["x"]), max(0, box["y"])
    w, h = min(width, box["x"] + box["w"]) - x, min(height, box["y"] + box["h"]) - y
    if not (w > 0 and h > 0):
        raise BadImage(f"box {box['x']:g} {box['y']:g} {box['w']:g} {box['h']:g} outside the image of {width}×{height}")
    place = {"x": x * scale + dx, "y": y * scale + dy, "w": w * scale, "h": h * scale}
    return {**box, **{key: round(float(value), 2) for key, value in place.items()}}


def film(width: int, height: int, size: int, crop: int) -> np.ndarray:
    """Return (crop, crop) bool: the part of the centre crop that shows film, and no padding.

    Args:
        width, height: of the upright original, in pixels.
        size: side of the stored square.
        crop: side of the centre crop.
    """
    (across, down), (_, dx, dy) = _scaled(width, height, size), fit(width, height, size)
    square = np.zeros((size, size), bool)
    square[dy : dy + down, dx : dx + across] = True
    return centre(square, crop)


def centre(square: np.ndarray, crop: int) -> np.ndarray:
    """Return the centre crop of (..., size, size)."""
    off = (square.shape[-1] - crop) // 2
    return square[..., off : off + crop, off : off + crop]


def unfit_boxes(boxes: np.ndarray, width: int, height: int, size: int, crop: int) -> np.ndarray:
    """Return boxes (M, 4) x0 y0 x1 y1 of the centre crop in pixels of the (width, height) image, cut at its edges."""
    scale, dx, dy = fit(width, height, size)
    off = (size - crop) // 2
    moved = (np.asarray(boxes, np.float64).reshape(-1, 4) + off - [dx, dy, dx, dy]) / scale
    return np.clip(moved, 0, [width, height, width, height])


def unfit_mask(mask: np.ndarray, width: int, height: int, size: int) -> np.ndarray:
    """Return a mask (crop, crop) bool of the centre crop as (height, width) bool; outside of the crop it is False."""
    square, off = np.zeros((size, size), np.uint8), (size - len(mask)) // 2
    square[off : off + len(mask), off : off + len(mask)] = mask
    _, dx, dy = fit(width, height, size)
    new_width, new_height = _scaled(width, height, size)
    content = Image.fromarray(square[dy : dy + new_height, dx : dx + new_width])
    return np.asarray(content.resize((width, height), _NEAREST)) > 0


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of the upright image from the file's header.

    Raises:
        BadImage: missing, empty, not an image, or of too many pixels.
    """
    if is_dicom(path):
        return dicom_size(path)
    with _open(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
        except Exception as why:
            raise BadImage(f"broken EXIF: {why}") from None
    return (height, width) if turned else (width, height)


def read_gray(path: Path, size: int) -> np.ndarray:
    """Read an image as a gray square.

    JPEG and PNG of 8 bits are taken as they are, colour by its luma (ITU-R 601), transparency as black, palettes
    resolved. Deeper images (16 bits, 32 bits, float) are scaled linearly by their real range: their smallest value to
    0, their largest to 255. EXIF orientation is applied. A JPEG is decoded at the nearest scale above twice the
    wanted size, then resized with a Lanczos filter. DICOM is windowed first, see `read_dicom`.

    Args:
        path: the file.
        size: side of the square.

    Returns:
        (size, size) uint8; long side = `size`, centred, padded with 0.

    Raises:
        BadImage: missing, truncated, empty, not an image, of too many pixels.
    """

    def gray(image: Image.Image) -> Image.Image:
        if image.mode in _DEEP:
            values = np.asarray(image, dtype=np.float32)
            low, high = float(values.min()), float(values.max())
            if not np.isfinite([low, high]).all():
                raise BadImage("pixels that are not finite")
            return Image.fromarray((values - low) * np.float32(255 / (high - low) if high > low else 0))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return image.convert("L")

    return _read(path, size, gray, Image.Resampling.LANCZOS, draft=True)


def read_mask(path: Path, size: int) -> np.ndarray:
    """Read a mask as a square of the geometry of `read_gray`, by nearest neighbour: no new value appears.

    Args:
        path: 8-bit gray or palette file; a palette's indices are its values. 1-bit masks are 0 and 255.
        size: side of the square.

    Returns:
        (size, size) uint8, padded with 0.

    Raises:
        BadImage: as `read_gray`; a mask deeper than 8 bits, or in colours that are not gray.
    """

    def plain(image: Image.Image) -> Image.Image:
        if image.mode in _DEEP:
            raise BadImage(f"mask of mode {image.mode}; write 8-bit values")
        if image.mode in ("L", "P"):
            return Image.fromarray(np.asarray(image))
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            raise BadImage("mask in colours; write 8-bit gray values")
        return image.convert("RGB").getchannel(0)

    return _read(path, size, plain, _NEAREST, draft=False)


def _scaled(width: int, height: int, size: int) -> tuple[int, int]:
    long = max(width, height)
    return max(1, (width * size + long // 2) // long), max(1, (height * size + long // 2) // long)


def _open(path: Path) -> Image.Image:
    if is_dicom(path):
        return Image.fromarray(read_dicom(path))
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise BadImage("file not found") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS} pixels") from None
    except Exception as why:
        if isinstance(why, OSError) and why.errno is not None:
            raise BadImage(f"cannot be read: {why.strerror}") from None
        if "\0" in str(path):
            raise BadImage("no file name: it has a NUL") from None
        raise BadImage("not an image" if path.stat().st_size else "empty file") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadImage(f"more than {MAX_PIXELS} pixels")
    return image


def _read(path: Path, size: int, convert: Any, resample: Image.Resampling, draft: bool) -> np.ndarray:
    with _open(path) as image:
        try:
            target = _scaled(*image.size, size)
            # the part of the drafted image that the whole image covers: its last row and column may stick out
            covered = image.draft("L", (2 * target[0], 2 * target[1])) if draft else None
            image.load()
            orientation = image.getexif()
            plain = convert(image)
            box = covered[1] if covered else None
            plain = plain.resize(target, resample, box=box, reducing_gap=2.0 if draft else None)
            if orientation.get(_ORIENTATION, 1) != 1:
                plain.getexif()[_ORIENTATION] = orientation[_ORIENTATION]
                plain = ImageOps.exif_transpose(plain)
        except BadImage:
            raise
        # Pillow's plug-ins raise almost anything on a broken file
        except Exception as why:
            raise BadImage(f"broken image: {why}") from None
    pixels = np.asarray(plain)
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return _centred(pixels, size)


def fit_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Bring a decoded mask (H, W) uint8 to the square, as `read_mask` does a file's."""
    height, width = mask.shape
    return _centred(np.asarray(Image.fromarray(mask).resize(_scaled(width, height, size), _NEAREST)), size)


def _centred(pixels: np.ndarray, size: int) -> np.ndarray:
    square = np.zeros((size, size), np.uint8)
    height, width = pixels.shape
    dx, dy = (size - width) // 2, (size - height) // 2
    square[dy : dy + height, dx : dx + width] = pixels
    return square


SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom", "")


def find_images(inputs: Path) -> list[Path]:
    """Return the image files of a folder, searched through, of a CSV with a column `image`, `path` or `file`, or one.

    Raises:
        SistaError: no such file or folder, or no image in it.
    """
    if inputs.is_dir():
        files = [p for p in sorted(inputs.rglob("*")) if p.is_file() and p.suffix.lower() in SUFFIXES]
        files = [p for p in files if not p.name.startswith(".")]
    elif inputs.suffix.lower() == ".csv" and inputs.is_file():
        import pandas as pd

        try:
            table = pd.read_csv(inputs, dtype=str, keep_default_na=False)
        except (ValueError, OSError) as why:
            raise SistaError(f"{inputs}: no readable CSV ({' '.join(str(why).split())[:120]}); mend it") from None
        column = next((name for name in ("image", "path", "file") if name in table), None)
        if column is None:
            raise SistaError(f"{inputs}: it has no column image; {did_you_mean('image', table.columns)}")
        files = [inputs.parent / name for name in table[column] if name]
    elif inputs.is_file():
        return [inputs]
    else:
        raise SistaError(f"{inputs}: no such file or folder; check the path")
    if not files:
        raise SistaError(f"{inputs}: no image in it; JPEG, PNG and DICOM are read")
    return files
