import io
import json

import numpy as np
import pytest
from PIL import Image

from sista_pl.commands.doctor import main
from sista_pl.data.doctor import Subject, diagnose, worst
from sista_pl.data.doctor.checks import reason
from sista_pl.data.doctor.pixels import NEAR_BITS, NEAR_CORRELATION, likeness, near_pairs, perceptual_hash
from sista_pl.data.formats import Release, Row
from sista_pl.data.phantom import write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError

SIZE = 64
N = 40
# sides × zones × findings: each report states something else
FINDINGS = [
    f"{size}{side} {zone} {kind}."
    for kind in ("consolidation", "atelectasis", "nodule", "mass", "granuloma")
    for side in ("Right", "Left")
    for zone in ("upper lobe", "lower lobe")
    for size in ("", "Possible ")
]


def film(seed):
    """A smooth picture, dark at the border and bright in the middle."""
    coarse = np.random.default_rng(seed).integers(0, 170, (9, 9), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    return np.clip(noise + 90 - 400 * (x**2 + y**2) ** 1, 0, 255).astype(np.uint8)


def object_mask(i):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[10 : 20 + i % 9, 12 : 30 + i % 7] = 255
    return mask


def jpeg(image, quality=50):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("L"))


class Planted:
    """A release without a fault; a test changes films, masks or rows, then asks for the checks."""

    def __init__(self, root):
        self.root = root
        self.films = [film(i) for i in range(N)]
        self.masks = [object_mask(i) for i in range(N)]
        self.skipped = []
        self.phantom = False
        self.name = "test"
        self.rows = []
        for i in range(N):
            split = "train" if i < 24 else "val" if i < 32 else "test"
            labels = {"Edema": float(i % 2), "Mass": float(i % 3 == 0) if i % 5 else float("nan")}
            box = {"category": "opacity", "x": 10.0, "y": 12.0, "w": 20.0, "h": 9.0}
            text = FINDINGS[i] if i < 40 else ""
            self.rows.append(
                Row(f"secret-{i}", f"patient-{i // 2}", f"s{i}", root / f"{i}.png", "PA", split, text, "", labels,
                    root / f"{i}m.png", [box] if i % 2 else [], f"t.csv:{i + 2}")
            )  # fmt: skip

    def release(self):
        self.root.mkdir(exist_ok=True)
        for i, (image, mask) in enumerate(zip(self.films, self.masks, strict=True)):
            Image.fromarray(image).save(self.root / f"{i}.png")
            if mask is not None:
                Image.fromarray(mask).save(self.root / f"{i}m.png")
        return Release(self.name, "Test 1.0", self.rows, self.skipped, self.phantom, self.root)

    def store(self):
        return prepare(self.release(), self.root.parent / "store", size=SIZE, progress=False, max_bad=0.5)

    def checks(self, **options):
        return {check.name: check for check in diagnose(Subject.of_store(self.store()), **options)}


@pytest.fixture
def planted(tmp_path):
    return Planted(tmp_path / "raw")


def fires(planted, level, name, *words):
    """The fault makes this one check fire; returns it."""
    checks = planted.checks()
    assert checks[name].level == level, checks[name]
    for word in words:
        assert word in checks[name].text
    assert checks[name].step
    return checks[name]


def test_a_clean_store_passes_every_check(planted):
    checks = planted.checks()
    assert {name: check.text for name, check in checks.items() if check.level != "ok"} == {}
    assert worst(list(checks.values())) == "ok"
    assert list(checks) == [
        "counts", "left out", "patients in one split", "studies in one split", "image files in one split",
        "exact duplicates", "near-duplicates", "intensity", "masks", "one mask an image", "boxes", "labels", "reports",
        "length of reports", "reports that say the same",
    ]  # fmt: skip
    assert checks["counts"].figures["splits"] == {"train": 24, "val": 8, "test": 8}
    assert checks["boxes"].figures == {"images": 40, "images_without": 20, "boxes": 20, "outside": 0, "no_area": 0}


# --- counts, what was left out, leaks -----------------------------------------------


def test_counts_differ_from_the_published_ones_but_not_for_a_phantom(planted):
    planted.name = "open_i"
    check = fires(planted, "note", "counts", "40 of 7,470 images", "40 of 3,955 studies")
    assert check.figures["published"] == {"images": 7470, "studies": 3955}


def test_a_phantom_is_not_compared(planted):
    planted.name, planted.phantom = "open_i", True
    check = planted.checks()["counts"]
    assert check.level == "ok"
    assert "phantom" in check.text


def test_what_was_left_out_is_counted_by_reason(planted):
    planted.films[3] = np.zeros((5, 5), np.uint8)
    planted.skipped = [("a", "t.csv:9: no film 'a-secret' in x"), ("b", "t.csv:10: no film 'b' in x")]
    planted.release()
    (planted.root / "3.png").write_bytes(b"")
    planted.release = lambda: Release("test", "Test 1.0", planted.rows, planted.skipped, False, planted.root)
    check = fires(planted, "warning", "left out", "3 left out")
    assert check.figures["reasons"] == {"no film … in x": 2, "empty file": 1}


def test_a_reason_names_no_file_and_no_id():
    assert reason("files/p10/s5001.jpg: file not found") == "file not found"
    assert reason("t.csv:3: repeats the image id '77abc' of row 12") == "repeats the image id … of row #"


@pytest.mark.parametrize(
    ("name", "key"), [("patients in one split", "patient_id"), ("studies in one split", "study_id")]
)
def test_a_group_in_two_splits_is_a_problem(planted, name, key):
    setattr(planted.rows[30], key, getattr(planted.rows[2], key))
    check = fires(planted, "problem", name, "1 of ")
    assert check.examples == [([2, 30], "train and val")]
    assert "patient-" not in json.dumps([check.text, check.figures, check.examples])


def test_an_image_file_in_two_splits_is_a_problem(planted):
    planted.rows[30].image = planted.rows[2].image
    checks = {check.name: check for check in diagnose(Subject.of_release(planted.release()))}
    assert checks["image files in one split"].level == "problem"
    assert checks["image files in one split"].examples == [([2, 30], "train and val")]


# --- pixels --------------------------------------------------------------------


def test_copies_across_splits_are_a_problem_and_within_one_a_warning(planted):
    planted.films[5], planted.masks[5] = planted.films[4], planted.masks[4]
    check = fires(planted, "warning", "exact duplicates", "1 images")
    assert check.examples == [([4, 5], "train and train")]


def test_a_copy_in_another_split_is_a_problem(planted):
    planted.films[35], planted.masks[35] = planted.films[4], planted.masks[4]
    check = fires(planted, "problem", "exact duplicates", "1 groups across splits")
    assert check.examples == [([4, 35], "train and test")]
    assert check.figures == {"images": 40, "groups": 1, "copies": 1, "groups_across": 1}


def test_black_images_are_no_duplicates(planted):
    planted.films[4] = planted.films[35] = np.zeros((SIZE, SIZE), np.uint8)
    checks = planted.checks()
    assert checks["exact duplicates"].level == checks["near-duplicates"].level == "ok"
    assert checks["one mask an image"].level == "ok"
    assert checks["intensity"].figures["nearly black"] == 2


@pytest.mark.parametrize("change", ["jpeg", "brighter", "smaller"])
def test_a_film_written_again_in_another_split_is_found(planted, change):
    image = planted.films[4]
    planted.films[35] = {
        "jpeg": lambda: jpeg(image),
        "brighter": lambda: np.clip(image * 0.8 + 20, 0, 255).astype(np.uint8),
        "smaller": lambda: np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS)),
    }[change]()
    if change == "smaller":
        planted.masks[35] = np.asarray(Image.fromarray(planted.masks[35]).resize((48, 48), Image.Resampling.NEAREST))
    check = fires(planted, "warning", "near-duplicates", "1 near-identical pair")
    assert [rows for rows, _ in check.examples] == [[4, 35]]


def test_near_pairs_are_those_of_a_comparison_of_all(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.random((300, 256)) < 0.5
    for i in range(60):
        bits[200 + i] = bits[i] ^ (rng.permutation(256) < rng.integers(0, 25))
    hashes, group = np.packbits(bits, axis=1).view(np.uint64), rng.integers(0, 3, 300)
    distance = (bits[:, None] != bits[None]).sum(2)
    wanted = {(i, j) for i in range(300) for j in range(i + 1, 300) if distance[i, j] <= 15 and group[i] != group[j]}
    pairs, found, capped = near_pairs(hashes, group, bits=15)
    assert {tuple(pair) for pair in pairs.tolist()} == wanted
    assert len(wanted) > 10
    assert found.tolist() == sorted(found.tolist())
    assert not capped


def test_phantoms_of_two_patients_are_not_near(tmp_path):
    from sista_pl.data.formats.mimic_cxr import read_mimic_cxr

    write_phantom("mimic_cxr", tmp_path / "raw", studies=14, seed=1, size=96, workers=1)
    store = prepare(read_mimic_cxr(tmp_path / "raw"), tmp_path / "store", size=96, progress=False)
    films = store.images(range(len(store)))
    hashes = np.array([perceptual_hash(np.ascontiguousarray(image)) for image in films])
    pairs, _, _ = near_pairs(hashes, np.arange(len(films)))
    assert not len(pairs)
    again = np.array([perceptual_hash(jpeg(image, 75)) for image in films])
    pairs, distance, _ = near_pairs(np.concatenate([hashes, again]), np.arange(2 * len(films)))
    assert {tuple(pair) for pair in pairs.tolist()} == {(i, i + len(films)) for i in range(len(films))}
    assert distance.max() <= NEAR_BITS // 2
    assert likeness(films[0], jpeg(films[0], 75)) > 0.95
    assert likeness(films[0], films[1]) < NEAR_CORRELATION


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (np.zeros((SIZE, SIZE)), "nearly black"),
        (np.full((SIZE, SIZE), 255), "nearly white"),
        (np.full((SIZE, SIZE), 90), "constant"),
        (film(3) // 5, "of a narrow range (maximum below 64)"),
        (255 - film(3), "perhaps inverted"),
    ],
)
def test_a_strange_intensity_is_told(planted, image, kind):
    planted.films[3] = image.astype(np.uint8)
    check = fires(planted, "warning", "intensity", kind)
    assert check.examples == [([3], kind)]
    assert check.figures[kind] == 1


def test_a_release_that_is_inverted_as_a_whole_is_told(planted):
    planted.films = [255 - image for image in planted.films[:-1]] + planted.films[-1:]
    check = fires(planted, "warning", "intensity", "perhaps inverted")
    assert check.figures["perhaps inverted"] >= 30


# --- masks, boxes, labels ---------------------------------------------------------


def test_an_image_with_two_masks_in_two_splits_is_a_problem(planted):
    whole = planted.masks[4].copy()
    planted.films[35], planted.masks[35] = planted.films[4], whole.copy()
    planted.masks[4][:14], planted.masks[35][14:] = 0, 0
    check = fires(planted, "problem", "one mask an image", "1 images", "1 of them in two splits")
    assert check.examples == [([4, 35], "train and test")]


def test_two_masks_in_one_split_are_a_warning(planted):
    planted.films[5] = planted.films[4]
    fires(planted, "warning", "one mask an image", "0 of them in two splits")


def test_other_values_in_a_mask_are_a_problem(planted):
    planted.masks[7][2, 2] = 1
    assert fires(planted, "problem", "masks", "1 masks have other values").examples[0][0] == [7]


def test_empty_masks_are_counted_and_told_where_all_are(planted):
    planted.masks[0] = np.zeros((SIZE, SIZE), np.uint8)
    assert planted.checks()["masks"].figures["empty"] == 1


def test_only_empty_masks_are_a_warning(planted):
    planted.masks = [np.zeros((SIZE, SIZE), np.uint8)] * N
    fires(planted, "warning", "masks", "40 of them empty")


@pytest.mark.parametrize(
    ("box", "word"),
    [((60.0, 5.0, 20.0, 9.0), "1 boxes leave"), ((5.0, 5.0, 0.0, 9.0), "1 have no area"),
     ((float("nan"), 5.0, 3.0, 9.0), "1 have no area")],
)  # fmt: skip
def test_a_box_outside_or_without_area_is_a_problem(planted, box, word):
    # a preparation refuses such boxes, so that they are put into its table
    subject = Subject.of_store(planted.store())
    place = {"category": "opacity", **dict(zip("xywh", box, strict=True))}
    subject.table.loc[1, "boxes"] = json.dumps([place])
    checks = {check.name: check for check in diagnose(subject)}
    assert checks["boxes"].level == "problem"
    assert word in checks["boxes"].text
    assert checks["boxes"].examples[0][0] == [1]


def test_boxes_are_held_against_the_image_and_not_the_padding(planted):
    planted.films[1] = planted.films[1][:, :32]
    planted.masks[1] = planted.masks[1][:, :32]
    subject = Subject.of_store(planted.store())
    box = {"category": "opacity", "x": 2.0, "y": 5.0, "w": 10.0, "h": 9.0}
    subject.table.loc[1, "boxes"] = json.dumps([box])
    assert next(check for check in diagnose(subject) if check.name == "boxes").figures["outside"] == 1


def test_a_label_that_a_split_lacks_is_a_warning(planted):
    for row in planted.rows[32:]:
        row.labels["Mass"] = 0.0
    check = fires(planted, "warning", "labels", "Mass has no present one in test")
    assert check.figures["Mass"]["test"] == {"present": 0, "absent": 8, "unknown": 0}
    assert check.figures["Edema"]["train"] == {"present": 12, "absent": 12, "unknown": 0}


def test_a_label_that_nobody_gave_is_no_warning(planted):
    for row in planted.rows:
        row.labels["Mass"] = float("nan")
    assert planted.checks()["labels"].level == "ok"


# --- reports -----------------------------------------------------------------


def test_images_without_a_report_are_a_note(planted):
    planted.rows[0].findings = ""
    check = fires(planted, "note", "reports", "97.5%")
    assert check.figures["train"] == {"images": 24, "with_report": 23}


def test_a_release_without_reports_is_fine(planted):
    for row in planted.rows:
        row.findings = ""
    checks = planted.checks()
    assert checks["reports"].level == "ok"
    assert "length of reports" not in checks


def test_long_reports_are_a_warning(planted):
    for row in planted.rows[:8]:
        row.findings += " No focal consolidation." * 40
    check = fires(planted, "warning", "length of reports", "20.0% longer than 112 tokens (estimate")
    assert check.figures["truncated"] == 8


def test_tokens_are_counted_where_a_tokenizer_is_given(planted):
    checks = planted.checks(max_tokens=10, count_tokens=lambda texts: [11] * 30 + [9] * (len(texts) - 30))
    assert checks["length of reports"].figures["truncated"] == 30
    assert "(counted)" in checks["length of reports"].text


def test_false_negatives_of_a_batch(planted):
    """Of 24 training pairs 12 have equal words, 18 equal findings: 32 and 144 are more than there are."""
    for i, row in enumerate(planted.rows[:18]):
        row.findings = "Large right pleural effusion." if i < 12 else f"Right pleural effusion, film {'again ' * i}."
    checks = planted.checks()
    groups = checks["reports that say the same"].figures["groups"]
    assert groups["equal_text"]["share_of_studies"] == pytest.approx(0.5)
    assert groups["equal_findings"]["share_of_studies"] == pytest.approx(0.75)
    assert groups["equal_text"]["expected_false_negatives"] == {"32": None, "144": None, "512": None}


def test_expected_false_negatives_are_the_mean_over_random_batches(planted, monkeypatch):
    monkeypatch.setattr("sista_pl.data.doctor.reports.BATCHES", (8,))
    for row in planted.rows[:12]:
        row.findings = "Large right pleural effusion."
    check = fires(planted, "note", "reports that say the same", "50.0% of the training reports")
    group = np.array([0] * 12 + list(range(1, 13)))
    rng = np.random.default_rng(0)
    batches = np.array([rng.permutation(24)[:8] for _ in range(4000)])
    mean = np.mean([[(group[batch] == group[i]).sum() - 1 for i in batch] for batch in batches])
    told = check.figures["groups"]["equal_text"]["expected_false_negatives"]["8"]
    assert told == pytest.approx(7 * 12 * 11 / (24 * 23))
    assert told == pytest.approx(mean, rel=0.03)


def test_reports_in_another_language_are_told(planted):
    for i, row in enumerate(planted.rows):
        row.findings = f"Unauffälliger Befund Nummer {i}."
    fires(planted, "note", "reports that say the same", "findings are named in 0% only")


# --- a raw release ---------------------------------------------------------------


def test_a_release_is_checked_without_its_pixels(planted):
    release = planted.release()
    (planted.root / "3.png").unlink()
    checks = {check.name: check for check in diagnose(Subject.of_release(release))}
    assert checks["files"].level == "problem"
    assert checks["files"].figures == {"missing": 1, "empty": 0}
    assert "exact duplicates" not in checks
    assert checks["boxes"].figures["boxes"] == 20


def test_pixels_of_a_release_are_sampled(planted):
    planted.films[35], planted.masks[35] = planted.films[4], planted.masks[4]
    release = planted.release()
    subject = Subject.of_release(release, pixels=30)
    assert len(subject.rows) == 30
    assert np.array_equal(subject.rows, Subject.of_release(release, pixels=30).rows)
    checks = {check.name: check for check in diagnose(Subject.of_release(release, pixels=N))}
    assert checks["exact duplicates"].level == "problem"
    assert "in a sample of 40" in checks["exact duplicates"].text
    assert checks["boxes"].level == checks["masks"].level == "ok"


def test_the_verb_reads_a_raw_release(tmp_path, capsys):
    write_phantom("mimic_cxr", tmp_path / "raw", studies=12, seed=0, size=96, workers=1)
    assert main([str(tmp_path / "raw"), "--format", "mimic_cxr", "--option", "views=[PA, AP]", "--pixels", "5"]) == 0
    assert "PHANTOM DATA" in capsys.readouterr().out
    report = json.loads((tmp_path / "raw-doctor/doctor.json").read_text())
    assert report["subject"]["images_with_pixels"] == 5
    assert report["subject"]["phantom"]
    assert '<div class="phantom">PHANTOM DATA' in (tmp_path / "raw-doctor/doctor.html").read_text()


# --- the page and the verb -----------------------------------------------------------


def test_the_page_shows_samples_and_offenders_and_hides_ids(planted, tmp_path, capsys):
    planted.films[35] = jpeg(planted.films[4])
    planted.rows[30].patient_id = planted.rows[2].patient_id
    planted.store()
    assert main([str(tmp_path / "store")]) == 1
    out = tmp_path / "store-doctor"
    assert sorted(file.name for file in out.iterdir()) == ["doctor.html", "doctor.json"]
    html, text = (out / "doctor.html").read_text(), (out / "doctor.json").read_text()
    assert html.count("<img ") == 12 + 2 + 2
    assert html.count("data:image/jpeg;base64,") == 16
    for word in ("near-identical pair", "Worst offenders", "Samples", "False negatives", 'class="badge problem"'):
        assert word in html
    assert "http" not in html
    assert "<script" not in html
    assert "PHANTOM" not in html
    for leak in (html, text, capsys.readouterr().out):
        assert "secret-" not in leak
        assert "patient-" not in leak
    report = json.loads(text)
    assert report["level"] == "problem"
    assert [len(example["images"]) for check in report["checks"] for example in check["examples"]] == [2, 2]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    # a second run replaces the first
    assert main([str(tmp_path / "store"), "--show-ids"]) == 1
    assert "secret-4" in (out / "doctor.html").read_text()
    assert "patient-" not in (out / "doctor.html").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["raw", "store", "store-doctor"]


def test_a_clean_store_exits_with_0_and_is_left_as_it_was(planted, tmp_path):
    planted.store()
    before = {file.name: file.read_bytes() for file in (tmp_path / "store").iterdir()}
    assert main([str(tmp_path / "store"), "--out", str(tmp_path / "deep/er")]) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "store").iterdir()} == before
    first = (tmp_path / "deep/er/doctor.html").read_bytes()
    assert main([str(tmp_path / "store"), "--out", str(tmp_path / "deep/er")]) == 0
    assert (tmp_path / "deep/er/doctor.html").read_bytes() == first


def test_the_text_of_a_data_set_is_escaped(planted, tmp_path):
    planted.rows[0].labels["<b>x</b>"] = 1.0
    planted.rows[0].view = planted.rows[1].view = "<script>alert(1)</script>"
    planted.store()
    main([str(tmp_path / "store")])
    html = (tmp_path / "store-doctor/doctor.html").read_text()
    assert "<script" not in html
    assert "<b>x" not in html


def test_mistakes_of_the_user(planted, tmp_path):
    planted.store()
    store = str(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    for argv, words in [
        ([str(tmp_path / "nowhere")], "not a prepared store"),
        ([str(tmp_path / "raw")], "for a raw release add --format"),
        ([store, "--out", f"{store}/x"], "lies in the data"),
        ([store, "--out", str(tmp_path / "mine")], "holds something else"),
        ([store, "--pixels", "3"], "name its --format"),
        ([store, "--max-tokens", "0"], "--max-tokens below 1"),
        ([store, "--tokenizer", str(tmp_path / "raw")], "not a tokenizer"),
        ([str(tmp_path / "raw"), "--format", "mimic"], "did you mean mimic_cxr"),
    ]:
        with pytest.raises(SistaError, match=words):
            main(argv)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_a_tokenizer_counts(planted, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "bert").mkdir()
    tokenizer.save(str(tmp_path / "bert/tokenizer.json"))
    planted.store()
    main([str(tmp_path / "store"), "--tokenizer", str(tmp_path / "bert"), "--max-tokens", "5"])
    report = json.loads((tmp_path / "store-doctor/doctor.json").read_text())
    figures = next(check for check in report["checks"] if check["name"] == "length of reports")["figures"]
    assert figures["tokens"] == "counted"
    assert 0 < figures["truncated"] < N


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "exit code" in said


def test_the_published_siim_split_leaks_and_the_grouped_one_does_not(tmp_path, capsys):
    from sista_pl.data.formats import READERS

    root = write_phantom("siim", tmp_path / "raw", 120, seed=1, size=64, workers=1, progress=False)
    for split, code in (("siim/mgca-rows", 1), ("siim/grouped", 0)):
        store = tmp_path / split.replace("/", "-")
        prepare(READERS.build({"name": "siim", "root": root, "split": split}), store, size=64, progress=False)
        assert main([str(store)]) == code
        told = json.loads((tmp_path / f"{store.name}-doctor/doctor.json").read_text())
        levels = {check["name"]: check["level"] for check in told["checks"]}
        assert (levels["patients in one split"] == levels["one mask an image"] == "problem") == bool(code)
    capsys.readouterr()
