import csv
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sista_pl.data.formats import Release, Row
from sista_pl.data.images import BadImage, fit, image_size, read_gray, read_mask
from sista_pl.data.prepare import prepare, prepare_part
from sista_pl.data.store import Store
from sista_pl.errors import SistaError


def pixels(seed, height=50, width=40):
    """A smooth random image, so that JPEG and resizing change little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def release(root, n=20, mask_every=0):
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        path = root / f"images/{i}.png"
        Image.fromarray(pixels(i)).save(path)
        mask = None
        if mask_every and i % mask_every == 0:
            mask = root / f"images/{i}_mask.png"
            Image.fromarray((pixels(i) > 127).astype(np.uint8) * 255).save(mask)
        split = ("train", "val")[i % 2]
        row = Row(f"i{i}", f"p{i // 2}", f"s{i}", path, "PA", split, f"Text {i} é.", "", {"Edema": float(i % 2)}, mask)
        row.source = f"t.csv:{i + 2}"
        rows.append(row)
    return Release("test", "Test 1.0", rows, [("gone", "empty report")], root=root)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(data, out, **options):
    return prepare(data, out, **{"size": 32, "shard_rows": 6, "progress": False, **options})


def part(data, out, which):
    return prepare_part(data, out, which, size=32, shard_rows=6, progress=False)


@pytest.fixture
def data(tmp_path):
    return release(tmp_path / "raw")


# --- one image ---------------------------------------------------------------


def gray(tmp_path, image, name="x.png", size=64, **options):
    image.save(tmp_path / name, **options)
    return read_gray(tmp_path / name, size).astype(int)


def test_the_long_side_fills_the_square_and_the_rest_is_zero(tmp_path):
    out = gray(tmp_path, Image.fromarray(np.full((100, 50), 200, np.uint8)))
    assert out.shape == (64, 64)
    assert (out[:, 16:48] == 200).all()
    assert out[:, :16].sum() == out[:, 48:].sum() == 0
    small = gray(tmp_path, Image.fromarray(np.full((5, 10), 200, np.uint8)))
    assert (small[16:48] == 200).all()
    assert gray(tmp_path, Image.fromarray(np.full((1, 300), 9, np.uint8))).sum() == 64 * 9


def test_a_jpeg_decoded_at_a_smaller_scale_equals_the_whole_one_resized(tmp_path):
    for height, width in ((1000, 777), (333, 1024), (70, 64)):
        whole = pixels(3, height, width)
        Image.fromarray(whole).save(tmp_path / "x.jpg", quality=95)
        scale, dx, dy = fit(width, height, 64)
        inner = round(width * scale), round(height * scale)
        reference = np.zeros((64, 64), int)
        resized = Image.fromarray(whole).resize(inner, Image.Resampling.LANCZOS)
        reference[dy : dy + inner[1], dx : dx + inner[0]] = np.asarray(resized)
        assert np.abs(read_gray(tmp_path / "x.jpg", 64) - reference).max() <= 4


def test_every_kind_of_pixels_is_read_as_the_same_gray(tmp_path):
    image = Image.fromarray(pixels(1, 64, 64))
    plain = gray(tmp_path, image)
    for kind, suffix in (("RGB", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "tif")):
        assert np.abs(gray(tmp_path, image.convert(kind), f"x.{suffix}") - plain).max() <= 6, kind
    indexed = image.quantize(256)
    assert np.abs(gray(tmp_path, indexed) - plain).max() <= 6
    colour = gray(tmp_path, Image.new("RGB", (8, 8), (200, 100, 50)))
    assert set(np.unique(colour)) <= {124, 125}
    half = np.dstack([np.full((8, 8), 255, np.uint8), np.repeat([[0, 255]], 4, axis=1).repeat(8, axis=0)])
    assert gray(tmp_path, Image.fromarray(half.astype(np.uint8), "LA"), size=8)[0].tolist() == [0] * 4 + [255] * 4


def test_sixteen_bits_are_scaled_by_their_real_range(tmp_path):
    deep = np.linspace(1000, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    out = gray(tmp_path, Image.fromarray(deep))
    reference = np.rint((deep - 1000.0) / 3095 * 255)
    assert np.abs(out - reference).max() <= 1
    assert (out.min(), out.max()) == (0, 255)
    assert not gray(tmp_path, Image.fromarray(np.full((8, 8), 500, np.uint16))).any()


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.fromarray(pixels(2, 40, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    turned = gray(tmp_path, lying, "x.jpg", exif=exif, quality=95)
    assert np.abs(turned - gray(tmp_path, upright)).max() <= 6


def test_masks_have_the_geometry_of_images_and_no_new_values(tmp_path):
    mask = np.zeros((90, 60), np.uint8)
    mask[20:70, 10:40] = 255
    mask[70:, :] = 127
    Image.fromarray(mask).save(tmp_path / "m.png")
    small, image = read_mask(tmp_path / "m.png", 45), read_gray(tmp_path / "m.png", 45)
    assert set(np.unique(small)) == {0, 127, 255}
    assert ((small == 255) == (image > 191)).mean() > 0.95
    Image.fromarray(mask > 0).save(tmp_path / "m.png")
    assert set(np.unique(read_mask(tmp_path / "m.png", 45))) == {0, 255}
    for bad in (np.zeros((4, 4), np.uint16), np.dstack([mask, mask, 255 - mask])):
        Image.fromarray(bad).save(tmp_path / "m.png")
        with pytest.raises(BadImage, match="write 8-bit"):
            read_mask(tmp_path / "m.png", 45)


def claim_size(png, width, height):
    """Write another size into the header of a PNG file."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def broken_files(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)).save(folder / "whole.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)).save(folder / "whole.png")
    files = {
        "bomb.png": claim_size((folder / "whole.png").read_bytes(), 30_000, 3_000),
        "bigger.png": claim_size((folder / "whole.png").read_bytes(), 60_000, 30_000),
        "cut.jpg": (folder / "whole.jpg").read_bytes()[:9000],
        "cut.png": (folder / "whole.png").read_bytes()[:9000],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "x.dcm": b"\0" * 128 + b"DICM",
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    reasons = ["pixels", "pixels", "truncated", "truncated", "empty file", "not an image", "not a DICOM image"]
    return dict(zip([*files, "missing.jpg"], [*reasons, "not found"], strict=True))


@pytest.mark.parametrize("name", ["a\0b.png", "a\0b", "a\0b.dcm"])
def test_a_nul_in_a_file_name_is_a_bad_image(tmp_path, name):
    for read in (image_size, lambda path: read_gray(path, 16)):
        with pytest.raises(BadImage, match=r"NUL|null byte"):
            read(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_whatever_cannot_be_read_is_a_bad_image(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(BadImage, match=reason):
            read_gray(tmp_path / name, 64)


# --- a release ---------------------------------------------------------------


def test_rows_and_images_correspond(tmp_path, data):
    store = run(data, tmp_path / "store")
    assert len(store) == len(store.manifest) == 20
    assert len(store.contents["shards"]) == 4
    for i, row in enumerate(data.rows):
        assert np.array_equal(store.image(i), read_gray(row.image, 32))
        assert store.manifest.loc[i, "image_id"] == row.image_id
    first = store.manifest.iloc[1]
    assert (first["findings"], first["label_Edema"], first["source"]) == ("Text 1 é.", 1.0, "t.csv:3")
    assert store.info["counts"] == {"train": 10, "val": 10}
    assert (store.name, store.version, store.phantom, store.size) == ("test", "Test 1.0", False, 32)
    assert not (tmp_path / "store.partial").exists()


def test_masks_and_boxes_follow_the_image(tmp_path):
    data = release(tmp_path / "raw", 7, mask_every=3)
    data.rows[1].boxes = [{"category": "Edema", "x": 10, "y": 0, "w": 20, "h": 50}]
    data.rows[2].boxes = []
    store = run(data, tmp_path / "store", size=100)
    assert store.manifest["has_mask"].tolist() == [True, False, False, True, False, False, True]
    assert np.array_equal(store.mask(3), read_mask(data.rows[3].mask, 100))
    assert (store.mask(1) == 127).all()
    boxes = store.manifest["boxes"]
    assert store.info["has_masks"]
    # 40 × 50 at scale 2 stands 10 pixels from the left
    assert boxes[1] == '[{"category": "Edema", "x": 30.0, "y": 0.0, "w": 40.0, "h": 100.0}]'
    assert boxes[2] == "[]"
    assert boxes.isna().tolist() == [True, False, False, True, True, True, True]
    Image.new("L", (50, 40)).save(data.rows[0].mask)
    with pytest.raises(SistaError, match=r"mask of 50×40 on an image of 40×50"):
        run(data, tmp_path / "other")


def test_bytes_do_not_depend_on_workers_or_on_where_the_data_lie(tmp_path):
    data = release(tmp_path / "raw", 20, mask_every=4)
    data.rows[7].image.unlink()
    run(data, tmp_path / "a", max_bad=0.1)
    run(data, tmp_path / "b", max_bad=0.5, workers=1)
    run(data, tmp_path / "d", max_bad=0.5, workers=4)
    moved = release(tmp_path / "elsewhere/raw", 20, mask_every=4)
    moved.rows[7].image.unlink()
    run(moved, tmp_path / "c", max_bad=0.1, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c") == contents(tmp_path / "d")


def test_bad_images_are_left_out_and_listed(tmp_path, data):
    broken = broken_files(tmp_path / "raw")
    for i, name in enumerate(broken):
        data.rows[2 * i].image = tmp_path / "raw" / name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = run(data, tmp_path / "store", max_bad=0.5, workers=2)
    assert store.manifest["image_id"].tolist() == [f"i{i}" for i in range(20) if i % 2 or i >= 16]
    for i, name in enumerate(store.manifest["image_id"]):
        assert np.array_equal(store.image(i), read_gray(tmp_path / f"raw/images/{name[1:]}.png", 32))
    with (tmp_path / "store/skipped.csv").open(newline="", encoding="utf-8") as file:
        skipped = list(csv.reader(file))
    assert skipped[:2] == [["what", "why"], ["gone", "empty report"]]
    assert [what for what, _ in skipped[2:]] == [f"i{2 * i}" for i in range(len(broken))]
    assert skipped[6] == ["i8", "empty.jpg: empty file"]
    assert store.info["skipped"] == 1 + len(broken)


def test_a_shard_without_one_good_image_is_no_shard(tmp_path, data):
    for row in data.rows[6:12]:
        row.image.unlink()
    store = run(data, tmp_path / "store", max_bad=0.5)
    assert len(store) == 14
    assert np.array_equal(store.image(6), read_gray(data.rows[12].image, 32))


def test_not_one_good_image_is_no_store(tmp_path, data, capsys):
    for row in data.rows:
        row.image.unlink()
    with pytest.raises(SistaError, match="not one image can be read"):
        run(data, tmp_path / "store", max_bad=1, progress=True)
    assert not (tmp_path / "store").exists()
    assert "20/20" in capsys.readouterr().out


def test_too_many_bad_images_stop_the_run_and_repaired_ones_are_taken(tmp_path, data):
    whole = data.rows[3].image.read_bytes()
    data.rows[3].image.write_bytes(b"")
    data.rows[14].image.write_bytes(b"")
    with pytest.raises(SistaError, match=r"images/3.png: empty file; it and 1 more of 20 images are bad") as error:
        run(data, tmp_path / "store", max_bad=0.05)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()
    assert "images/14.png: empty file" in (tmp_path / "store.partial/skipped.csv").read_text()
    data.rows[3].image.write_bytes(whole)
    store = run(data, tmp_path / "store", max_bad=0.05)
    assert len(store) == 19
    assert np.array_equal(store.image(3), read_gray(data.rows[3].image, 32))


def test_nothing_to_prepare(tmp_path, data):
    data.rows = []
    with pytest.raises(SistaError, match="test: no image to prepare, 1 were left out, most as: empty report"):
        run(data, tmp_path / "store")
    with pytest.raises(SistaError, match="size 0"):
        run(release(tmp_path / "raw"), tmp_path / "store", size=0)
    assert [f.name for f in tmp_path.iterdir()] == ["raw"]


def test_the_same_again_is_returned_and_something_else_is_refused(tmp_path, data):
    run(data, tmp_path / "store")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "store").iterdir()}
    shutil.rmtree(tmp_path / "raw")
    assert len(run(data, tmp_path / "store")) == 20
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "store").iterdir()} == before
    with pytest.raises(SistaError, match=r"holds another store \(test Test 1.0, 20 images of 32 px\)"):
        run(data, tmp_path / "store", size=64)
    data.rows[0].findings = "other"
    with pytest.raises(SistaError, match="holds another store"):
        run(data, tmp_path / "store")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(SistaError, match="exists and is no store"):
        run(data, tmp_path / "full")


def test_a_working_folder_with_files_of_others_is_left_alone(tmp_path, data):
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial/thesis.txt").write_text("mine")
    with pytest.raises(SistaError, match=r"thesis.txt: not written by a preparation"):
        run(data, tmp_path / "store")
    assert (tmp_path / "store.partial/thesis.txt").read_text() == "mine"


def test_two_runs_on_one_folder_exclude_each_other(tmp_path, data):
    (tmp_path / "store.partial").mkdir()
    with (tmp_path / "store.partial/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SistaError, match="another process is at work"):
            run(data, tmp_path / "store")
    assert len(run(data, tmp_path / "store")) == 20


def test_locks_are_open_for_reading_and_writing_as_nfs_asks(tmp_path, data, monkeypatch):
    modes, real = set(), fcntl.flock

    def flock(file, kind):
        modes.add(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    part(data, tmp_path / "store", (0, 2))
    assert modes == {os.O_RDWR}


def test_who_starts_while_a_store_is_renamed_leaves_it_alone(tmp_path, data, monkeypatch):
    real, turned_away = os.rename, []

    def rename(*paths):
        monkeypatch.undo()
        with pytest.raises(SistaError, match="another process is at work") as error:
            run(data, tmp_path / "store")
        turned_away.append(error)
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    store = run(data, tmp_path / "store")
    assert len(turned_away) == 1
    assert len(store.contents["files"]) == 6
    assert not list((tmp_path / "store").glob(".lock*"))


# four shards with their notes, manifest, what was left out, files.json, store.json
@pytest.mark.parametrize("when", range(1, 13))
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, data, monkeypatch, when):
    run(data, tmp_path / "undisturbed")
    written, real = [], os.fsync

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SistaError, match="store: disk full; free some space and run again") as error:
            run(data, tmp_path / "store")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()
    # a shard that was written is not decoded again
    for row in data.rows[: 6 * min((when - 1) // 2, 4)]:
        row.image.unlink()
    run(data, tmp_path / "store", max_bad=0)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_place_that_may_not_be_written(tmp_path, data, monkeypatch):
    def replace(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SistaError, match=r"store: cannot be written \(Permission denied\); give another folder"):
        run(data, tmp_path / "store")


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("file/store", "Not a directory"),
        ("store", r"store\.partial: cannot be written \(File exists"),
        ("x" * 300, "name too long"),
    ],
)
def test_a_place_that_cannot_be(tmp_path, data, out, why):
    for name in ("file", "store.partial"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(SistaError, match=f"{why}.*give another folder"):
        run(data, tmp_path / out)
    assert (tmp_path / "store.partial").read_text() == "mine"


def test_a_working_folder_of_other_inputs_is_begun_anew(tmp_path, data, monkeypatch):
    run(data, tmp_path / "undisturbed")
    other = release(tmp_path / "raw")
    other.rows.reverse()
    with monkeypatch.context() as patch:
        patch.setattr("sista_pl.data.shards._manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(other, tmp_path / "store")
    assert len(list((tmp_path / "store.partial").glob("images-*.npy"))) == 4
    run(data, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


PROGRAM = """
import pickle, sys
from sista_pl.data.prepare import prepare, prepare_part
with open(sys.argv[1], "rb") as file:
    data = pickle.load(file)
print("ready", flush=True)
prepare(data, sys.argv[2], size=200, shard_rows=6, workers=int(sys.argv[3]), progress=False)
"""


def kill_test(tmp_path, kills):
    import pickle

    data = release(tmp_path / "raw", 120, mask_every=5)
    for row in data.rows:
        Image.fromarray(pixels(int(row.image_id[1:]), 500, 400)).save(row.image)
        if row.mask:
            Image.new("L", (400, 500), 255).save(row.mask)
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(data))
    start = time.monotonic()
    prepare(data, tmp_path / "undisturbed", size=200, shard_rows=6, progress=False)
    whole = time.monotonic() - start
    random, shards = np.random.default_rng(0), tmp_path / "store.partial"
    for n in range(kills):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "data.pickle"), str(tmp_path / "store"), str(n % 3)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            # the first time not before there is something to go on from
            while n == 0 and process.poll() is None and not list(shards.glob("images-*.npy")):
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.7 * whole) if n else 0)
            assert n > 0 or process.poll() is None
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "store").exists():
            assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
            shutil.rmtree(tmp_path / "store")
    prepare(data, tmp_path / "store", size=200, shard_rows=6, progress=False)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    kill_test(tmp_path, 3)


@pytest.mark.slow
def test_a_run_killed_thirty_times(tmp_path):
    kill_test(tmp_path, 30)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_of_an_array_job_give_the_bytes_of_one_run(tmp_path, data, order):
    run(data, tmp_path / "undisturbed")
    done = [part(data, tmp_path / "store", (index, 3)) for index in order]
    assert [store is None for store in done] == [True, True, False]
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
    assert part(data, tmp_path / "store", (0, 3)).hash == done[-1].hash


def test_parts_may_run_at_the_same_time_and_again(tmp_path, data):
    run(data, tmp_path / "undisturbed")
    assert part(data, tmp_path / "store", (1, 3)) is None
    for row in data.rows[6:12]:  # the shard that is written is not decoded again
        row.image.rename(row.image.with_suffix(".away"))
    assert part(data, tmp_path / "store", (1, 3)) is None
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda index: part(data, tmp_path / "store", (index, 3)), (0, 2)))
    # two that end at once may each leave the end to the other; any further call makes it
    assert any(stores) or part(data, tmp_path / "store", (0, 3))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_one_part_excludes_itself_and_a_whole_run(tmp_path, data):
    (tmp_path / "store.partial").mkdir()
    with (
        (tmp_path / "store.partial/.lock-0of3").open("w") as mine,
        (tmp_path / "store.partial/.lock").open("w") as all_,
    ):
        fcntl.flock(mine, fcntl.LOCK_EX)
        fcntl.flock(all_, fcntl.LOCK_SH)
        with pytest.raises(SistaError, match="another process is at work"):
            part(data, tmp_path / "store", (0, 3))
        with pytest.raises(SistaError, match="another process is at work"):
            run(data, tmp_path / "store")
        assert part(data, tmp_path / "store", (1, 3)) is None


def test_a_part_waits_for_one_that_ends_and_takes_its_store(tmp_path, data):
    def hold(until):
        with (tmp_path / "store.partial/.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held.set()
            time.sleep(0.2)
            until()

    (tmp_path / "store.partial").mkdir()
    run(data, tmp_path / "undisturbed")
    for until in (lambda: None, lambda: os.rename(tmp_path / "undisturbed", tmp_path / "store")):
        held = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(hold, until)
            held.wait()
            store = part(data, tmp_path / "store", (0, 3))
            ended.result()
    assert len(store) == 20
    assert not (tmp_path / "store.partial").exists()


def test_what_a_part_may_leave_out_is_a_share_of_the_release(tmp_path, data):
    options = {"size": 32, "shard_rows": 6, "max_bad": 0.05, "progress": False}
    data.rows[0].image.unlink()
    done = [prepare_part(data, tmp_path / "store", (index, 3), **options) for index in range(3)]
    assert len(done[-1]) == 19
    data.rows[1].image.unlink()
    with pytest.raises(SistaError, match="it and 1 more of 20 images are bad"):
        prepare_part(data, tmp_path / "other", (0, 3), **options)


@pytest.mark.parametrize("wrong", [(3, 3), (-1, 2), (0, 0)])
def test_a_part_that_is_none(tmp_path, data, wrong):
    with pytest.raises(SistaError, match="not a part; the first of"):
        part(data, tmp_path / "store", wrong)


def test_the_store_opens_as_it_was_returned(tmp_path, data):
    assert run(data, tmp_path / "store").hash == Store.open(tmp_path / "store").hash
