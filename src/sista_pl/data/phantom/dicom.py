"""Films as DICOM files: 8 bit, JPEG baseline, as the challenges hand them out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def write_dicom(path: Path, film: np.ndarray, view: str, photometric: str) -> None:
    """Write a film (H, W) uint8 with white bones; `MONOCHROME1` stores it inverted, as its name asks."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, JPEGBaseline8Bit

    data = FileDataset(str(path), {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    # secondary capture; the numbers of the instance come from the file's name, so that equal films are equal bytes
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    number = "".join(str(int(c, 36) % 10) for c in path.stem if c.isalnum())[:30].lstrip("0") or "1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = UID(f"1.2.276.0.7230010.3.1.4.{number}")
    data.PatientID, data.Modality, data.BodyPartExamined, data.ViewPosition = path.stem, "CR", "CHEST", view
    data.Rows, data.Columns = film.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    buffer = io.BytesIO()
    Image.fromarray(255 - film if photometric == "MONOCHROME1" else film).save(buffer, "jpeg", quality=92)
    data.PixelData = encapsulate([buffer.getvalue()])
    data.save_as(path, enforce_file_format=True)
