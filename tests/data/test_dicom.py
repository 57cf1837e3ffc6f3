"""DICOM pixels as a reader sees them, whatever way they are stored."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from sista_pl.data.dicom import dicom_size, read_dicom
from sista_pl.data.formats import Release, Row
from sista_pl.data.images import BadImage, image_size, read_gray
from sista_pl.data.prepare import prepare

RAMP = np.linspace(0, 1, 80 * 60).reshape(80, 60)


def write(path, pixels, syntax=ExplicitVRLittleEndian, meta=True, **tags):
    """A radiograph of (H, W) uint8 or (u)int16 pixels with a patient's name in it."""
    data = FileDataset(str(path), {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax in (RLELossless, JPEG2000Lossless) else syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.PatientName, data.PatientID = "Doe^Jane", "4711"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if syntax == JPEGBaseline8Bit:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=98)
        data.PixelData = encapsulate([buffer.getvalue()])
    else:
        data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    if syntax in (RLELossless, JPEG2000Lossless):
        data.compress(syntax, generate_instance_uid=False)
    if not meta:
        del data.file_meta.TransferSyntaxUID
        pydicom.dcmwrite(path, pydicom.Dataset({e.tag: e for e in data}), implicit_vr=True, little_endian=True,
                         enforce_file_format=False)  # fmt: skip
    else:
        data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless,
                                    JPEG2000Lossless])  # fmt: skip
@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.int16])
def test_every_way_to_store_pixels_gives_the_same_film(tmp_path, syntax, depth):
    top = {np.uint8: 255, np.uint16: 4095, np.int16: 2000}[depth]
    stored = np.rint(RAMP * top - (1000 if depth == np.int16 else 0)).astype(depth)
    path = write(tmp_path / "film.dcm", stored, syntax)
    assert dicom_size(path) == image_size(path) == (60, 80)
    assert np.abs(read_dicom(path).astype(int) - np.rint(RAMP * 255)).max() <= 1


def test_jpeg_baseline(tmp_path):
    pixels = np.rint(RAMP * 255).astype(np.uint8)
    found = read_dicom(write(tmp_path / "film.dcm", pixels, JPEGBaseline8Bit))
    assert np.abs(found.astype(int) - pixels).mean() < 1.5


def test_monochrome1_is_turned_so_that_bones_are_white(tmp_path):
    pixels = np.rint(RAMP * 255).astype(np.uint8)
    found = read_dicom(write(tmp_path / "film.dcm", pixels, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(found, 255 - pixels)


def window_reference(value: float, centre: float, width: float) -> float:
    """The pseudo-code of PS3.3 C.11.2.1.2.1, LINEAR."""
    if value <= centre - 0.5 - (width - 1) / 2:
        return 0
    if value > centre - 0.5 + (width - 1) / 2:
        return 255
    return ((value - (centre - 0.5)) / (width - 1) + 0.5) * 255


@pytest.mark.parametrize("centre", [1000, [1000, 5]])
def test_the_first_window_after_the_rescale(tmp_path, centre):
    stored = np.rint(RAMP * 4095).astype(np.uint16)
    width = 800 if centre == 1000 else [800, 7]
    path = write(tmp_path / "film.dcm", stored, WindowCenter=centre, WindowWidth=width, RescaleSlope=2,
                 RescaleIntercept=-1024)  # fmt: skip
    expected = [[window_reference(2 * int(v) - 1024, 1000, 800) for v in row] for row in stored]
    assert np.abs(read_dicom(path) - np.array(expected)).max() <= 0.51


def test_sigmoid_and_exact_windows(tmp_path):
    stored = np.rint(RAMP * 4095).astype(np.uint16)
    tags = {"WindowCenter": 2000, "WindowWidth": 1000}
    found = read_dicom(write(tmp_path / "film.dcm", stored, VOILUTFunction="SIGMOID", **tags))
    assert np.abs(found - 255 / (1 + np.exp(-4 * (stored - 2000.0) / 1000))).max() <= 0.51
    found = read_dicom(write(tmp_path / "film.dcm", stored, VOILUTFunction="LINEAR_EXACT", **tags))
    assert np.abs(found - np.clip((stored - 2000.0) / 1000 + 0.5, 0, 1) * 255).max() <= 0.51


def test_a_voi_look_up_table(tmp_path):
    stored = np.rint(RAMP * 255).astype(np.uint16)
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 12]
    table.LUTData = np.array([4095 * (i / 255) ** 2 for i in range(256)], np.uint16).tobytes()
    path = write(tmp_path / "film.dcm", stored, VOILUTSequence=[table], WindowCenter=3, WindowWidth=5)
    assert np.abs(read_dicom(path) - (stored / 255) ** 2 * 255).max() <= 1


def test_a_file_without_its_meta_header(tmp_path):
    pixels = np.rint(RAMP * 255).astype(np.uint8)
    np.testing.assert_array_equal(read_dicom(write(tmp_path / "film.dcm", pixels, meta=False)), pixels)


def test_a_file_without_an_ending_is_known_by_its_first_bytes(tmp_path):
    pixels = np.rint(RAMP * 255).astype(np.uint8)
    path = write(tmp_path / "film", pixels)
    assert image_size(path) == (60, 80)
    np.testing.assert_array_equal(read_gray(path, 80)[:, 10:70], pixels)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "more than"),
        ({"Rows": 0}, "0"),
        ({"Rows": 5000}, "cannot be decoded"),
        ({"NumberOfFrames": 9}, "9 frames"),
        ({"SamplesPerPixel": 7}, "7 samples"),
        ({"BitsAllocated": 13}, "cannot be decoded"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette colours"),
    ],
)
def test_absurd_headers_are_bad_images(tmp_path, tags, why):
    path = write(tmp_path / "film.dcm", np.rint(RAMP * 255).astype(np.uint8), **tags)
    with pytest.raises(BadImage, match=why) as error:
        read_dicom(path)
    assert "\n" not in str(error.value)


def test_broken_files_are_bad_images(tmp_path):
    whole = write(tmp_path / "film.dcm", np.rint(RAMP * 255).astype(np.uint8), RLELossless).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for n in range(150):
        raw = bytearray(whole[: rng.integers(len(whole))] if n % 2 else whole)
        for place in rng.integers(max(1, len(raw)), size=12) if raw else ():
            raw[place] = rng.integers(256)
        (tmp_path / "broken.dcm").write_bytes(raw)
        try:
            outcomes.add(read_dicom(tmp_path / "broken.dcm").ndim)
        except BadImage as why:
            outcomes.add(type(why))
            assert "\n" not in str(why)  # noqa: PT017
    assert BadImage in outcomes
    with pytest.raises(BadImage, match="file not found"):
        read_dicom(tmp_path / "nowhere.dcm")


def test_nothing_of_the_patient_reaches_a_store(tmp_path):
    path = write(tmp_path / "film.dcm", np.rint(RAMP * 255).astype(np.uint8))
    row = Row("a", "p", "s", path, "PA", "train", "", "")
    store = prepare(Release("test", "test", [row], root=tmp_path), tmp_path / "store", size=32, progress=False)
    assert store.manifest["width"].tolist() == [60]
    for file in (tmp_path / "store").iterdir():
        raw = file.read_bytes()
        assert b"Doe" not in raw
        assert b"4711" not in raw


@pytest.mark.real
def test_real_films_stand_upright_with_white_bones(real_data):
    files = sorted((real_data / "dicom").glob("*.dcm"))
    assert len(files) == 2
    for file in files:
        film = read_gray(file, 256).astype(float)
        spine = film[60:160, 118:138].mean()
        lungs = np.minimum(film[80:130, 60:90].mean(), film[80:130, 165:195].mean())
        assert spine > lungs + 30, file
        # shoulders and air above, the white abdomen below
        assert film[200:250, 60:110].mean() > film[80:130, 60:90].mean() + 30, file
