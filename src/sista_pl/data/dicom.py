"""The pixels of a DICOM radiograph as a reader sees them: windowed, bones white; nothing else leaves the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sista_pl.errors import BadImage

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom")
# As Pillow's own limit; the largest radiographs have some 25 million pixels.
MAX_PIXELS = 89_478_485


def is_dicom(path: Path) -> bool:
    """True where the name or the first bytes say so; a file without the usual preamble needs the name."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):  # a NUL in the name is a ValueError
        return False


def dicom_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels from the header.

    Raises:
        BadImage: as `read_dicom`.
    """
    data = _read(path, pixels=False)
    return data.Columns, data.Rows


def read_dicom(path: Path) -> np.ndarray:
    """Read one radiograph.

    Rescale slope and intercept are applied, then the first window or VOI look-up table (PS3.3 C.11.2); without
    either, 8 bits are taken as they are and deeper images by their real range. MONOCHROME1 is inverted. Uncompressed,
    RLE, JPEG baseline and lossless, JPEG-LS and JPEG 2000 are decoded, also without the file's meta header.

    Args:
        path: the file.

    Returns:
        (H, W) uint8.

    Raises:
        BadImage: missing, not DICOM, no pixels, several frames, absurd sizes, a palette, pixels that cannot be decoded.
    """
    from pydicom.pixels import apply_modality_lut

    data = _read(path, pixels=True)
    try:
        stored = data.pixel_array
        if stored.ndim == 3:
            stored = np.asarray(Image.fromarray(stored).convert("L"))
        shown = _window(apply_modality_lut(stored, data), data)
    except MemoryError:
        raise BadImage("DICOM: too large for the memory") from None
    # decoders raise almost anything on a broken file
    except Exception as why:
        raise BadImage(f"DICOM: pixels cannot be decoded ({_line(why)})") from None
    if not np.isfinite(shown).all():
        raise BadImage("DICOM: pixels that are not finite")
    if str(data.get("PhotometricInterpretation", "")).upper() == "MONOCHROME1":
        shown = 1 - shown
    return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


def _read(path: Path, pixels: bool) -> Dataset:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        data = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
        size = int(data.get("Columns") or 0), int(data.get("Rows") or 0)
        frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
        if "TransferSyntaxUID" not in data.file_meta:
            implicit = data.original_encoding[0]
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    except FileNotFoundError:
        raise BadImage("file not found") from None
    except Exception as why:
        raise BadImage(f"DICOM: cannot be read ({_line(why)})") from None
    if "Rows" not in data or (pixels and "PixelData" not in data):
        raise BadImage("not a DICOM image" if path.stat().st_size else "empty file")
    if min(size) < 1 or frames != 1 or samples not in (1, 3):
        raise BadImage(f"DICOM of {size[0]}×{size[1]}, {frames} frames, {samples} samples a pixel; one film is read")
    if str(data.get("PhotometricInterpretation", "")).upper() == "PALETTE COLOR":
        raise BadImage("DICOM of palette colours, whose numbers are no grays; save it as grays")
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS} pixels")
    return data


def _window(values: np.ndarray, data: Dataset) -> np.ndarray:
    """Return what the window shows, black 0 and white 1."""
    from pydicom.pixels import apply_voi_lut

    if "VOILUTSequence" in data and len(data.VOILUTSequence):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi_lut(values, data, index=0).astype(np.float32) / (2**bits - 1)
    values = values.astype(np.float32)
    centre, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    if centre is not None and width is not None and width >= 1:
        function = str(data.get("VOILUTFunction") or "LINEAR").upper()
        if function == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - centre) / width))
        if function == "LINEAR_EXACT" or width == 1:
            return (values - centre) / width + 0.5
        return (values - (centre - 0.5)) / (width - 1) + 0.5
    if data.BitsAllocated == 8:
        return values / 255
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _line(why: BaseException) -> str:
    return " ".join(str(why).split())[:160] or type(why).__name__
