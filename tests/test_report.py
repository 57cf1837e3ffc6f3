"""The report of a sweep: what is read of its folder, what is computed, and the page, in a browser too."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sista_pl import compare, report, stored
from sista_pl.commands.compare import main as compare_command
from sista_pl.errors import SistaError
from sista_pl.pair import Features
from sista_pl.report import parts, plots, shown, words
from sista_pl.report.found import by_finding, kept
from sista_pl.report.page import page
from sista_pl.report.swept import Swept, write_plan
from sista_pl.sweep import Cell, Part, Sweep

METHODS = ("random", "clip", "sista")
LABELS = ("Edema", "Mass <b>", "Rare")
PATIENTS = [f"p{n // 2}" for n in range(60)]
DRAWS = 100


def sweep(**changes) -> Sweep:
    """Two tasks on three methods, one of which has no pre-training."""
    tasks = {"cls": Part(["cls_chexpert.yaml"], {}, [0.1, 1.0]), "seg": Part(["seg_siim.yaml"])}
    methods = {name: None if name == "random" else Part([f"method/{name}.yaml"]) for name in METHODS}
    given = {"name": "mine", "pretrain": Part(["pretrain.yaml"]), "methods": methods, "tasks": tasks, "seeds": [0, 1],
             "fractions": [0.1], "reference": "clip"}  # fmt: skip
    return Sweep(**(given | changes))


def predictions(cell: Cell) -> pd.DataFrame:
    truth = np.random.default_rng(0)
    noise = np.random.default_rng([METHODS.index(cell.method), cell.seed, int(10 * cell.fraction), cell.task == "seg"])
    table = {"image_id": [f"i{n:02}" for n in range(60)], "patient_id": PATIENTS}
    if cell.task == "seg":
        pixels = np.where(truth.random(60) < 0.5, truth.integers(20, 200, 60), 0)
        right = (pixels * noise.random(60)).astype(int)
        return pd.DataFrame(
            table | {"truth_pixels": pixels, "predicted_pixels": right + 30, "intersection_pixels": right}
        )
    for label, share in zip(LABELS, (0.4, 0.3, 0.0), strict=True):
        positive = (truth.random(60) < share).astype(float)
        table |= {f"truth_{label}": positive, f"score_{label}": 0.3 * positive + 0.7 * noise.random(60)}
    return pd.DataFrame(table)


def finish(root: Path, cell: Cell) -> None:
    """Put down what the commands of a cell would leave."""
    run = root / "runs" / cell.name / "0001"
    (run / "test" / "pictures").mkdir(parents=True)
    facts = {
        "phantom": "PHANTOM DATA: drawn", "precision": "32-true", "versions": {"torch": f"2.{cell.seed}"},
        "data": {"source": "made up", "hash": "abc" * 9, "split": {"name": "own", "sha256": "def" * 9},
                 "rows": {"test": 60}},
    }  # fmt: skip
    interval = {"value": 0.25, "interval95": [0.125, 0.5], "n": 9}
    if cell.task is None:
        history = [{"epoch": e, "train/loss": 4.0 - e, "val/loss": 4.5 - e, "val/R_mean": 0.1 * e} for e in range(3)]
        best = {"epoch": 2, "intervals": {"val/R_mean": interval}}
        (run / "metrics.json").write_text(json.dumps(facts | {"history": history, "best": best}))
        told = {"test": {"test/pool": 32.0}, "intervals": {"test/R_mean": interval}}
    else:
        told = {"intervals": {}}
        predictions(cell).to_parquet(run / "test" / "predictions.parquet")
        Image.new("RGB", (1300, 60), (90, 90, 200)).save(run / "test" / "pictures" / "cases.png")
    (run / "test" / "metrics.json").write_text(json.dumps(facts | told))
    mark = root / "done" / f"{cell.name}.json"
    mark.parent.mkdir(exist_ok=True)
    fit = ["fit", "--config", "pretrain.yaml", "--model.lr", "0.5", "--name", cell.name, "--run_root", "OUT/runs"]
    mark.write_text(json.dumps({"commands": [fit, ["test", *fit[1:]]], "seconds": 61.0}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sweep that is done, whatever needs a checkpoint apart; not to be changed."""
    root = tmp_path_factory.mktemp("sweep") / "mine"
    write_plan(root, sweep())
    for cell in sweep().cells():
        finish(root, cell)
    return root


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "half"))


@pytest.fixture(scope="module")
def html(whole) -> str:
    return page(report.gather(Swept.open(whole), DRAWS))


# --- what the folder holds -------------------------------------------------------------


def test_a_folder_says_what_was_wanted_and_what_is_done(half):
    (half / "done" / "sista-1-cls-1.json").unlink()
    shutil.rmtree(half / "runs" / "clip-0" / "0001" / "test")  # a mark without its test is not done
    swept = Swept.open(half)
    assert (swept.name, swept.reference) == ("mine", "clip")
    assert swept.wanted == sweep().cells()
    assert {c.name for c in swept.wanted} - {c.name for c in swept.done} == {"sista-1-cls-1", "clip-0"}
    assert swept.settings == [("cls", 0.1), ("cls", 1.0), ("seg", 0.1)]
    assert swept.count("sista", "cls", 1.0) == (1, 2)
    assert swept.count("clip", None, None) == (1, 2)
    assert swept.count("random", None, None) == (0, 0)
    assert swept.made_by(Cell("clip", 1)) == ["pretrain.yaml", "model.lr=0.5"]
    assert len(swept.tested()) == 3 * 2 * 3 - 1


def test_the_newest_run_with_a_test_counts(half):
    cell = Cell("clip", 1)
    for number in ("0002", "0003"):
        (half / "runs" / cell.name / number).mkdir()
    shutil.copytree(half / "runs/clip-1/0001/test", half / "runs/clip-1/0002/test")
    assert Swept.open(half).run(cell) == half / "runs/clip-1/0002"


def test_a_folder_without_a_plan_is_no_sweeps(half):
    (half / "sweep.json").write_text('{"name": "mine"}')
    with pytest.raises(SistaError, match=r"sweep.json can't be read \('cells'\); run its sweep again"):
        Swept.open(half)
    (half / "sweep.json").unlink()
    with pytest.raises(SistaError, match=r"has no sweep.json; run `sista sweep` first"):
        Swept.open(half)


def test_a_path_of_a_run_is_found_from_where_the_sweep_was_run(half, tmp_path, monkeypatch):
    cell = Cell("clip", 0)
    (half / "runs/clip-0/0001/config.yaml").write_text("run_root: half/runs\n")
    (tmp_path / "stores").mkdir()
    monkeypatch.chdir(half)
    assert Swept.open(half).here("stores", cell) == tmp_path / "stores"
    monkeypatch.chdir(tmp_path)
    assert Swept.open(Path("half")).here("stores", cell) == Path("stores")


# --- what is computed ------------------------------------------------------------------


def gathered(root: Path) -> tuple[report.Contents, int]:
    """A report's contents, and the resamples that it drew."""
    steps = [0]

    def begin(total):
        def advance():
            steps[0] += 1

        return advance

    return report.gather(Swept.open(root), DRAWS, words=False, begin=begin), steps[0]


def test_a_comparison_of_the_same_predictions_is_taken_as_it_is(half, capsys):
    fresh, all_steps = gathered(half)
    pd.DataFrame(
        [(r.method, r.task, r.fraction, r.seed, r.file.relative_to(half), r.subset) for r in Swept.open(half).tested()],
        columns=[*stored.COLUMNS, "subset"],
    ).to_csv(half / "cells.csv", index=False)
    table = ["--table", str(half / "cells.csv"), "--out", str(half), "--reference", "clip"]
    compare_command([*table, "--draws", str(DRAWS)])
    again, steps = gathered(half)
    settings = stored.load(Swept.open(half).tested())
    assert all_steps - steps == compare.work(settings, DRAWS)
    for one, two in ((fresh.comparison.rows, again.comparison.rows), (fresh.comparison.ranks, again.comparison.ranks)):
        assert [pytest.approx(row, nan_ok=True) for row in one] == two
    assert again.comparison.notes == fresh.comparison.notes
    capsys.readouterr()


def test_a_comparison_of_anything_else_is_not_taken(half):
    runs = [run for run in Swept.open(half).tested() if run.task == "seg"]
    file = half / "compare.json"
    assert kept(file, runs, "clip", 100, 0) is None  # there is none
    files = [
        {"method": run.method, "task": run.task, "fraction": run.fraction, "seed": run.seed,
         "subset": run.subset, "predictions": f"elsewhere/{run.file}"} for run in runs
    ]  # fmt: skip
    told = {"schema": 2, "reference": "clip", "draws": 100, "seed": 0, "comparisons": 0, "rows": [], "ranks": []}
    file.write_text(json.dumps(told | {"notes": [], "files": files}))
    assert kept(file, runs, "clip", 100, 0) is not None  # a folder that was moved is the same
    for other in ((runs[1:], "clip", 100, 0), (runs, "sista", 100, 0), (runs, "clip", 99, 0), (runs, "clip", 100, 1)):
        assert kept(file, *other) is None
    later = file.stat().st_mtime_ns + 1
    os.utime(runs[3].file, ns=(later, later))
    assert kept(file, runs, "clip", 100, 0) is None  # tested again since


def test_findings_equal_a_comparison_by_that_metric(whole):
    found = report.gather(Swept.open(whole), DRAWS, words=False)
    runs = [run for run in Swept.open(whole).tested() if (run.task, run.fraction) == ("cls", 1.0)]
    mine = next(each for each in found.findings if each.setting.fraction == 1.0)
    assert [each.setting.task for each in found.findings] == ["cls", "cls"]
    assert any("Rare has no positive image" in note for note in mine.notes)
    truth = predictions(Cell("clip", 0, "cls", 1.0))
    for label in LABELS[:2]:
        slow = compare.compare(stored.load(runs, f"auroc/{label}"), "clip", DRAWS)
        rows = [row for row in mine.rows if row["finding"] == label]
        assert [row["method"] for row in rows] == ["random", "sista"]
        for row, expected in zip(rows, [row for row in slow.rows if row["method"] != "clip"], strict=True):
            assert row["positives"] == truth[f"truth_{label}"].sum()
            assert row["positives"] + row["negatives"] == 60
            del expected["p_holm"]
            assert {key: row[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    segmentation = [run for run in Swept.open(whole).tested() if run.task == "seg"]
    assert by_finding(stored.load(segmentation)[0]) == {}


def test_what_is_not_there_is_named_and_never_made_up(half):
    for name in ("sista-1-cls-1", "sista-0-cls-1", "clip-1"):
        (half / "done" / f"{name}.json").unlink()
    (half / "runs/clip-0/0001/metrics.json").unlink()
    (half / "runs/random-0-seg-0.1/0001/test/pictures/cases.png").unlink()
    (half / "runs/sista-0-seg-0.1/0001/test/pictures/cases.png").unlink()
    html = page(report.gather(Swept.open(half), DRAWS))
    for told in (
        "19 of 22", "3 cells are not done: sista-0-cls-1, clip-1, sista-1-cls-1", "not done: sista<",
        "not done: clip-0 (its run has no history), clip-1", "left no cases.png", "clip: clip-0 has no checkpoint",
        "random: no pre-training", "left out of the average ranks",
    ):  # fmt: skip
        assert told in html
    broken = half / "runs/clip-0-seg-0.1/0001/test/predictions.parquet"
    pd.read_parquet(broken).assign(truth_pixels=7).to_parquet(broken)
    found = report.gather(Swept.open(half), DRAWS, words=False)
    html = page(found)
    assert {row["task"] for row in found.comparison.rows} == {"cls"}
    assert "seg 0.1 is left out: " in html
    assert "seg, 10\u00a0% of the labels: nothing is tested yet" in html


@pytest.mark.parametrize(
    ("done", "told"),
    [
        ([], "no method is tested yet: nothing to compare"),
        (["random-0-cls-0.1", "random-0-cls-1"], "only random is tested yet"),
        (["random-0-cls-0.1", "sista-0-cls-0.1"], "reference, clip, is not tested yet: random stands in"),
        (["clip-0-seg-0.1", "sista-0-seg-0.1"], "no classification of several findings is tested"),
    ],
)
def test_a_sweep_that_has_just_begun_has_a_page(half, done, told):
    for mark in (half / "done").iterdir():
        if mark.stem not in done:
            mark.unlink()
    found = report.gather(Swept.open(half), DRAWS)
    html = page(found)
    assert told in html
    assert (found.comparison is None) == (len({name.partition("-")[0] for name in done}) < 2)
    assert all(f'<section id="{name}">' in html for name in ("results", "curves", "training", "words", "how"))


# --- the page --------------------------------------------------------------------------


def test_the_page_has_every_figure_of_the_comparison(whole, html):
    comparison = report.gather(Swept.open(whole), DRAWS, words=False).comparison
    assert len(comparison.rows) == 9

    def said(value, form):
        return f"{value:{form}}".replace("-", "−")

    for row in comparison.rows:
        assert f"{said(row['value'], '.3f')} [{said(row['low'], '.3f')}, {said(row['high'], '.3f')}]" in html
        assert f'data-label="SD over seeds" data-value="{row["seed_sd"]:.9g}">{row["seed_sd"]:.3f}<' in html
        if row["method"] != "clip":
            ends = (said(row[key], "+.3f") for key in ("difference", "difference_low", "difference_high"))
            assert "{} [{}, {}]".format(*ends) in html
            assert f'data-value="{row["p_holm"]:.9g}"' in html
    for row in comparison.ranks:
        assert f"{row['rank']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in html
    assert "0.250 [0.125, 0.500]" in html  # of the pre-trainings
    assert "torch 2.0 in 11 cells and 2.1 in 11 cells" in html
    assert "PHANTOM DATA" in html


def test_the_page_needs_nothing_from_elsewhere(html):
    assert len(html.encode()) < 10_000_000
    assert "http" not in html
    assert "@import" not in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.findall(r"url\((?!#)", html)
    assert "<b>" not in "".join(re.findall(r'="([^"]*)"', html))  # names are escaped
    assert "Mass &lt;b&gt;" in html


def test_every_figure_has_words_and_its_own_ids(html):
    charts = re.findall(r'<svg class="plot"[^>]*>', html)
    assert len(charts) == 2 + 2 + 1 + 2  # curves, forests, retrieval, losses
    assert all(re.search(r'role="img" aria-label="[^"]{30,}"', chart) for chart in charts)
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 2 * 2  # cases of the reference and of the best other, in two tasks
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', html)) <= set(ids)
    assert not any(ink in html for ink in plots.INKS)


def test_a_page_stays_small_whatever_the_tests_left(whole, monkeypatch):
    monkeypatch.setattr(shown, "MOST", 2000)
    told = page(report.gather(Swept.open(whole), DRAWS, words=False))
    assert "no room for that of clip; see runs/clip-0-cls-0.1/0001/test/pictures/cases.png" in told


def test_methods_look_different_and_the_same_throughout():
    names = [f"m{n}" for n in range(19)]
    look = plots.looks(names, "m3")
    assert len(set(look.values())) == 19
    assert look["m3"] == plots.Look(0)
    assert plots.looks(names[:5], "m3")["m4"] == look["m4"]


def test_an_evaluation_has_no_share_of_the_labels():
    assert [parts.setting("ground", share) for share in (None, 0.0)] == ["ground", "ground"]
    assert parts.setting("cls", 0.01) == "cls, 1\u00a0% of the labels"


@pytest.mark.parametrize("seed", range(5))
def test_names_at_the_ends_of_lines_stay_apart(seed):
    values = np.sort(np.random.default_rng(seed).random(9)).tolist()
    places = plots.spread(values, 0.1, 0.0, 1.0)
    assert np.diff(places).min() > 0.1 - 1e-9
    assert min(places) >= 0.0
    assert max(places) <= 1.0
    assert plots.spread(values, 1e-6, 0.0, 1.0) == pytest.approx(values, abs=1e-4)
    assert plots.spread([0.5, 0.5], 0.2, 0.0, 1.0) == pytest.approx([0.4, 0.6])


# --- words over patches ----------------------------------------------------------------


def test_words_that_are_shown_name_findings_and_are_not_negated():
    text = "Cardiomegaly. No effusion; patchy opacities and an opacity at the left base. Effusion on the right."
    assert words.finding_words(text) == ["Cardiomegaly", "opacities", "opacity", "Effusion"]
    assert words.finding_words("No pneumothorax. The lungs are clear.") == []


@pytest.fixture(scope="module")
def encoders(whole, phantom_store, tmp_path_factory):
    """The sweep with tiny checkpoints in place of `clip` and `sista`, and the task of the second."""
    from sista_pl.data.pairs import PairDataModule
    from sista_pl.pretrain import PretrainTask

    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("encoders") / "mine"))
    data = PairDataModule(phantom_store, similarity=None, size=64)
    data.setup("fit")
    small = {"image_encoder": "resnet10t", "text_encoder": {"name": "small-bert", "layers": 1, "dim": 32},
             "embed_dim": 16, "head_hidden": 32, "image_size": 64}  # fmt: skip
    for method, losses in (("clip", {}), ("sista", {"token": {"name": "sta", "negatives": "batch"}})):
        torch.manual_seed(0)
        task = PretrainTask({"instance": {"name": "clip"}, **losses}, **small).eval()
        task.text_encoder.fit(data.corpus())
        run = root / "runs" / f"{method}-0" / "0001"
        (run / "checkpoints").mkdir()
        torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)},
                   run / "checkpoints" / "best.ckpt")  # fmt: skip
        (run / "config.yaml").write_text(f"data: {{init_args: {{store: {phantom_store}}}}}\n")
    return root, task, data


def test_a_map_is_the_cosine_of_a_word_to_each_patch(encoders):
    root, task, data = encoders
    found = words.word_maps(Swept.open(root))
    assert list(found.maps) == ["sista"]
    assert found.missing == {
        "random": "no pre-training, so no space of words and patches",
        "clip": "no loss looks at words and patches, so its token projections are not trained",
    }
    assert len(found.studies) == 2
    for study, maps in zip(found.studies, found.maps["sista"], strict=True):
        assert study.row in data.rows["val"]
        assert study.report == data.reports[data.report_ids[study.row]]
        image = torch.from_numpy(data.store.image(study.row).astype(np.float32) / 127.5 - 1)[None, None]
        assert study.film == pytest.approx(image[0, 0].numpy() / 2 + 0.5, abs=1e-6)
        table = task.text_encoder.tokenize([study.report])
        with torch.no_grad():
            patches: Features = task.encode_image(image)
            text: Features = task.encode_text(table.batch([0]))
        written = [word.lower() for word in re.findall(r"\w+", study.report)]
        assert 1 <= len(study.words) <= 3
        for word, values in zip(study.words, maps, strict=True):
            at = next(i for i, known in enumerate(text.ids[0].tolist())
                      if known > 0 and known == words_id(word))  # fmt: skip
            assert word.lower() in written
            one = text.local[0, at]
            slow = [float(one @ patch / (one.norm() * patch.norm())) for patch in patches.local[0]]
            assert values.ravel().tolist() == pytest.approx(slow, abs=1e-5)
            assert values.shape == (len(slow) ** 0.5,) * 2


def words_id(word: str) -> int:
    from sista_pl.words import word_id

    return word_id(word)


def test_maps_on_the_page_and_what_they_lack(encoders, tmp_path):
    root, *_ = encoders
    swept = Swept.open(root)
    found = report.Contents(swept, words=words.word_maps(swept))
    section = shown.words(found, plots.looks(METHODS, "clip"))
    shown_words = section.count('<div class="word">')
    assert section.count("<img ") == 2 + shown_words
    assert section.count("<mark>") >= shown_words
    assert len(re.findall(r'alt="sista: [^"]*, cosine [^"]*, highest at the', section)) == shown_words
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    (moved / "runs/sista-0/0001/config.yaml").write_text("data: {init_args: {store: nowhere/store}}\n")
    assert "its images, nowhere/store, are not there" in words.word_maps(Swept.open(moved)).missing["sista"]
    (moved / "runs/sista-0/0001/checkpoints/best.ckpt").write_bytes(b"cut")
    assert "can't be read" in words.word_maps(Swept.open(moved)).missing["sista"]


# --- in a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH")


def opened(browser: str, file: Path, width: int) -> tuple[str, list[str]]:
    """The page as the browser has it after its script ran, and what it said on the console; no name resolves."""
    found = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--window-size={width},900", f"--user-data-dir={file.parent / 'profile'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


# what a reader sees: pictures and charts are there, nothing is wider than the window, the first table sorts
PROBE = """<script>
  const there = [[...document.images].every(i => i.complete && i.naturalWidth > 0),
    [...document.querySelectorAll("svg.plot")].every(s => s.getBoundingClientRect().height > 50),
    document.documentElement.scrollWidth <= innerWidth];
  const head = [...document.querySelectorAll("#settings th button")].find(b => b.textContent.startsWith("mean"));
  const names = () => [...head.closest("table").tBodies[0].rows].map(r => r.cells[0].textContent).join();
  const order = [names()];
  head.click(); order.push(names()); head.click(); order.push(names());
  document.body.dataset.told = JSON.stringify({there, order, sort: head.parentNode.getAttribute("aria-sort")});
</script>"""


@pytest.mark.parametrize("width", [500, 1041])  # a phone, and the narrowest on which tables stay tables
def test_a_browser_has_nothing_to_complain_about_and_sorts(browser, html, tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(html.replace("</html>", f"{PROBE}</html>"))
    dom, said = opened(browser, file, width)
    assert said == []
    told = json.loads(re.search(r'data-told="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert told["there"] == [True, True, True]
    means = [float(v) for v in re.findall(r'data-label="mean \[95 %\]" data-value="([^"]*)"', html)[:3]]
    falling = np.array(METHODS)[np.argsort(means)[::-1]].tolist()
    assert told["order"] == [",".join(order) for order in (METHODS, falling, falling[::-1])]
    assert told["sort"] == "ascending"


def test_the_browser_would_complain(browser, tmp_path):
    file = tmp_path / "broken.html"
    file.write_text("<!doctype html><p>x<script>document.body.append(nothing)</script>")
    assert opened(browser, file, 500)[1]
