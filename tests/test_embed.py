"""`sista embed`: rows against the plain pass of the checkpoint's task, one film at a time."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sista_pl.cli import main
from sista_pl.data.images import read_gray
from sista_pl.data.store import Store
from sista_pl.embed import preparation
from sista_pl.errors import SistaError
from sista_pl.pretrain import PretrainTask


@pytest.fixture(scope="module")
def task(phantom_store):
    torch.manual_seed(0)
    found = PretrainTask(
        {"instance": "clip"}, "resnet10t", image_size=48, embed_dim=8, head_hidden=16,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 300},
    )  # fmt: skip
    found.text_encoder.fit(Store.open(phantom_store).manifest["findings"].tolist())
    return found.eval()


@pytest.fixture(scope="module")
def ckpt(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("embed") / "tiny.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}, path)
    return path


def embed(ckpt, inputs, out, *more):
    return main(["embed", "--ckpt_path", str(ckpt), "--inputs", str(inputs), "--out", str(out), *more])


@torch.no_grad()
def encode(task, square):
    """The reference: the centre crop of one film, normalised by hand."""
    off = (len(square) - 48) // 2
    image = torch.from_numpy(square[off : off + 48, off : off + 48].astype(np.float32) / 127.5 - 1)[None, None]
    return task.image_encoder(image).pooled[0], task.encode_image(image).pooled[0]


def unit(vector):
    return (vector / vector.norm()).numpy()


@torch.no_grad()
def test_a_store_with_its_reports(task, ckpt, phantom_store, tmp_path):
    assert embed(ckpt, phantom_store, tmp_path / "a.parquet", "--batch-size", "7") == 0
    table, store = pq.read_table(tmp_path / "a.parquet"), Store.open(phantom_store)
    assert table.schema.field("embedding").type.list_size == 8
    assert table.schema.field("embedding").type.value_type == "float"
    assert json.loads(table.schema.metadata[b"sista"])["phantom"] is True
    frame, rows = table.to_pandas(), store.manifest
    assert frame["image_id"].tolist() == rows["image_id"].tolist()
    for row in (0, 6, 7, len(rows) - 1):
        assert np.allclose(frame["embedding"][row], unit(encode(task, store.image(row))[1]), atol=1e-5)
        text = f"{rows['impression'][row]} {rows['findings'][row]}".strip()
        words = task.encode_text(task.text_encoder.tokenize([text]).batch([0]))
        assert np.allclose(frame["text_embedding"][row], unit(words.pooled[0]), atol=1e-5)


def test_a_store_of_another_size_than_the_runs_is_refused(ckpt, phantom_store, tmp_path, capsys):
    """Of its films the encoder would see another part."""
    run = tmp_path / "runs" / "a" / "0001"
    (run / "checkpoints").mkdir(parents=True)
    own = shutil.copy(ckpt, run / "checkpoints" / "best.ckpt")
    (run / "config.yaml").write_text("data: {init_args: {size: 56}}")
    assert embed(own, phantom_store, tmp_path / "a.parquet") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert (
        "holds films of 64 px, the run's had 56, of which the encoder saw the middle 48; prepare a store with" in told
    )
    (run / "config.yaml").write_text("data: {init_args: {size: 64}}")
    assert embed(own, phantom_store, tmp_path / "a.parquet") == 0
    (run / "config.yaml").write_text("data: {init_args: {size: 56}}")
    assert embed(own, phantom_store, tmp_path / "asked.parquet", "--size", "64") == 0
    assert pd.read_parquet(tmp_path / "asked.parquet").equals(pd.read_parquet(tmp_path / "a.parquet"))


def test_a_film_without_a_report_has_nan(ckpt, phantom_store, tmp_path, monkeypatch):
    rows = Store.open(phantom_store).manifest.assign(findings="", impression="")
    rows.loc[2, "findings"] = "Small effusion."
    monkeypatch.setattr(Store, "manifest", rows)
    assert embed(ckpt, phantom_store, tmp_path / "a.parquet") == 0
    found = pd.read_parquet(tmp_path / "a.parquet")["text_embedding"]
    assert [bool(np.isfinite(vector).all()) for vector in found] == [row == 2 for row in range(len(rows))]
    assert np.linalg.norm(found[2]) == pytest.approx(1)


def films(folder):
    draw = np.random.default_rng(0)
    for number, (height, width) in enumerate([(90, 60), (50, 120), (64, 64)]):
        Image.fromarray(draw.integers(0, 255, (height, width), np.uint8)).save(folder / f"{number}.png")
    (folder / "3.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no film")
    (folder / "list.csv").write_text("image\n1.png\nmissing.png\n")
    return folder


@pytest.mark.parametrize("inputs", [".", "list.csv", "0.png"])
def test_files_pooled(task, ckpt, tmp_path, inputs, capsys):
    folder = films(tmp_path)
    assert embed(ckpt, folder / inputs, tmp_path / "a.parquet", "--pooled", "--size", "56", "--batch-size", "2") == 0
    frame = pd.read_parquet(tmp_path / "a.parquet")
    expected = {".": ["0.png", "1.png", "2.png"], "list.csv": ["1.png"], "0.png": ["0.png"]}[inputs]
    assert frame["image"].tolist() == [str(folder / name) for name in expected]
    for name, vector in zip(expected, frame["embedding"], strict=True):
        assert np.allclose(vector, encode(task, read_gray(folder / name, 56))[0], rtol=1e-4, atol=1e-5)
    listed = tmp_path / "a-unreadable.csv"
    lost = {".": "3.jpg: not an image", "list.csv": "missing.png: file not found"}.get(inputs)
    assert listed.exists() == (lost is not None)
    if lost:
        assert lost in capsys.readouterr().out
        assert len(pd.read_csv(listed)) == 1


def test_the_size_is_the_runs(tmp_path):
    run = tmp_path / "runs" / "a" / "0001"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("data: {init_args: {size: 112, text: {normalize: mgca}}}")
    found = preparation(run / "checkpoints" / "best.ckpt", 96)
    assert (found.size, found.normalize, found.text("Größe, SMALL")) == (112, "mgca", found.text("gre, small"))
    (run / "config.yaml").write_text("data: broken")
    found = preparation(run / "checkpoints" / "best.ckpt", 96)
    assert found.size == 96
    assert "--size" in found.told
    with pytest.raises(SistaError, match="96 or more"):
        preparation(tmp_path / "a.ckpt", 96, 95)


@pytest.mark.parametrize(
    ("inputs", "out", "more", "why"),
    [
        ("nowhere", "a.parquet", (), "no such file or folder"),
        ("films", "a.csv", (), "give FILE.parquet"),
        ("films", "taken.parquet", (), "exists"),
        ("films", "bad.csv/a.parquet", (), "cannot be written"),
        ("films/3.jpg", "a.parquet", (), "no film can be read"),
        ("empty", "a.parquet", (), "no image in it"),
        ("bad.csv", "a.parquet", (), "no column image"),
        ("films", "a.parquet", ("--batch-size", "0"), "counts"),
        ("films", "a.parquet", ("--device", "nonsense"), "--device nonsense"),
        ("films", "a.parquet", ("--size", "20"), "48 or more"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(ckpt, tmp_path, capsys, inputs, out, more, why):
    (tmp_path / "films").mkdir()
    (tmp_path / "empty").mkdir()
    films(tmp_path / "films")
    (tmp_path / "taken.parquet").write_text("")
    (tmp_path / "bad.csv").write_text("a\nb\n")
    before = sorted(tmp_path.iterdir())
    assert embed(ckpt, tmp_path / inputs, tmp_path / out, *more) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.startswith("sista: ")
    assert told.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_a_task_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"image_encoder": "resnet10t"}}, tmp_path / "cls.ckpt")
    (tmp_path / "films").mkdir()
    films(tmp_path / "films")
    assert embed(tmp_path / "cls.ckpt", tmp_path / "films", tmp_path / "a.parquet") == 2
    assert "without a text encoder" in capsys.readouterr().err
