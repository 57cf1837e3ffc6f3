from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sista_pl.data.pairs import PairDataModule
from sista_pl.data.reports import normalise_mgca
from sista_pl.errors import SistaError
from sista_pl.pretrain import PretrainTask


def module(store, **more):
    return PairDataModule(store, size=64, similarity=None, **more)


def test_texts_are_normalised_as_asked(phantom_store):
    plain, mgca = module(phantom_store), module(phantom_store, text={"normalize": "mgca"})
    for data in (plain, mgca):
        data.setup("fit")
    manifest = plain.store.manifest
    rows = [int(rows[0]) for rows in plain.rows.values()]
    for row in rows:
        text = f"{manifest['impression'][row]} {manifest['findings'][row]}".strip()
        assert plain.reports[plain.report_ids[row]] == text
        assert mgca.reports[mgca.report_ids[row]] == normalise_mgca(text) != text


@pytest.mark.parametrize(
    ("text", "line"),
    [({"normalize": "mcga"}, "text.normalize is 'mcga'; did you mean mgca"),
     ({"normalise": "mgca"}, "no key 'normalise'; did you mean normalize")],
)  # fmt: skip
def test_a_misspelt_normalisation_is_one_line(phantom_store, text, line):
    with pytest.raises(SistaError, match=line):
        module(phantom_store, text=text)


def test_labels_in_the_asked_order_beside_their_reports(phantom_store):
    names = ["Pleural Effusion", "No Finding", "Edema"]
    data, plain = module(phantom_store, labels=names, batch_size=4), module(phantom_store, batch_size=4)
    for each in (data, plain):
        each.setup("fit")
    manifest = data.store.manifest
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            rows = batch["index"].tolist()
            expected = [[manifest[f"label_{name}"][row] for name in names] for row in rows]
            assert batch["labels"].dtype == torch.float32
            assert np.array_equal(batch["labels"].numpy(), np.array(expected, np.float32), equal_nan=True)
            seen += batch["labels"].flatten().tolist()
    assert {0.0, 1.0} <= set(seen)
    assert np.isnan(seen).any()
    # no pair is left out for them, and none has any where they are not asked for
    assert {name: rows.tolist() for name, rows in data.rows.items()} == {
        name: rows.tolist() for name, rows in plain.rows.items()
    }
    assert "labels" not in next(iter(plain.val_dataloader()))


def test_shuffled_reports_are_those_of_other_training_images(phantom_store):
    names = ["Edema", "No Finding"]
    plain, control = module(phantom_store, labels=names), module(phantom_store, labels=names, shuffled_reports=True)
    for data in (plain, control):
        data.setup("fit")
    train = plain.rows["train"]
    assert control.rows["train"].tolist() == train.tolist()
    assert sorted(control.report_ids[train]) == sorted(plain.report_ids[train])
    moved = control.report_ids[train] != plain.report_ids[train]
    assert moved.mean() > 0.8  # what stays has the same words as its neighbour in the ring
    for split in ("val", "test"):
        rows = plain.rows[split]
        assert np.array_equal(control.report_ids[rows], plain.report_ids[rows])
        assert np.array_equal(control.labels[rows], plain.labels[rows], equal_nan=True)
    # the labels are still those of the report
    pairs = [
        sorted(
            (report, *map(str, labels))
            for report, labels in zip(data.report_ids[train], data.labels[train], strict=True)
        )
        for data in (plain, control)
    ]
    assert pairs[0] == pairs[1]


def test_an_unknown_label_is_one_line(phantom_store):
    with pytest.raises(SistaError, match=r"has no label 'Edma'; did you mean Edema\?$"):
        module(phantom_store, labels=["Pneumonia", "Edma"]).setup("fit")


def test_a_task_gives_its_losses_the_labels_of_the_batch(phantom_store):
    """Through `PretrainTask.step`, as the Trainer calls it."""
    data = module(phantom_store, labels=["Edema", "Pleural Effusion"], batch_size=4)
    data.setup("fit")
    task = PretrainTask(
        {"instance": {"name": "medclip"}}, image_encoder="resnet10t", image_size=64, embed_dim=8, head_hidden=8,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 200},
    )  # fmt: skip
    task.trainer = SimpleNamespace(datamodule=data, current_epoch=0)
    batch = task.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    seen = []
    task.losses["instance"].register_forward_pre_hook(lambda _, given: seen.append(given[0].labels))
    step = task.step(batch)
    assert torch.equal(seen[0].nan_to_num(2), batch["labels"].nan_to_num(2))
    assert step.losses["instance"].isfinite()
    del batch["labels"]
    with pytest.raises(SistaError, match="the data bring no labels"):
        task.step(batch)


@pytest.mark.parametrize("raw", [b"", "report\nµ\n".encode("cp1252"), b"report\na,b\n", b"report\na\nb,c,d\n"])
def test_a_corpus_that_is_no_table_is_one_line(phantom_store, tmp_path, raw):
    (tmp_path / "more.csv").write_bytes(raw)
    data = module(phantom_store, tokenizer_corpus=tmp_path / "more.csv")
    data.setup("fit")
    with pytest.raises(SistaError, match=r"more\.csv: (not a readable CSV|row 2 has more values)"):
        data.corpus()


def test_a_place_in_other_data_is_refused(phantom_store):
    data = module(phantom_store)
    data.setup("fit")
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    state = data.state_dict()
    assert state["split"] == data.store.info["split"]
    data.load_state_dict(state)
    assert data.position == {"batches": 0}
    with pytest.raises(SistaError, match=r"trained on other data .*needs the same store"):
        data.load_state_dict(state | {"data": "0" * 64})
    data.position, data.trainer.state.fn = None, "test"
    data.load_state_dict(state | {"data": "0" * 64})
    assert data.position is None
