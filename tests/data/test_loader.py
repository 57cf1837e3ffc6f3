"""Batches are a pure function of seed, epoch and rank, and go on where they were."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from sista_pl.callbacks import DataWait, wait_told
from sista_pl.data import transforms
from sista_pl.data.loader import EpochSampler, ResumableLoader
from sista_pl.data.module import BaseDataModule, StoreDataset
from sista_pl.data.store import Store
from sista_pl.errors import SistaError


class Echo(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, place):
        return torch.tensor(place)


def rows(sampler):
    return [row for batch in sampler for row, _ in batch]


def test_ranks_share_an_epoch_without_overlap():
    samplers = [EpochSampler(np.arange(50), 5, True, seed=1, rank=r, world=3) for r in range(3)]
    seen = [rows(s) for s in samplers]
    assert len({len(s) for s in seen}) == 1
    together = [row for rank in seen for row in rank]
    assert len(set(together)) == len(together)
    assert rows(samplers[0]) == seen[0]
    samplers[0].set_epoch(1)
    assert rows(samplers[0]) != seen[0]


def test_evaluation_sees_every_row_on_every_number_of_ranks():
    for world in (1, 2, 3):
        seen = [rows(EpochSampler(np.arange(10, 60), 8, False, rank=r, world=world)) for r in range(world)]
        assert {row for rank in seen for row in rank} == set(range(10, 60))
        assert len({len(s) for s in seen}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restarted_epoch_goes_on_where_it_was(workers):
    def loader():
        loader = ResumableLoader(
            Echo(), EpochSampler(np.arange(50), 5, True, seed=2), num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        loader.batch_sampler.set_epoch(3)
        return loader

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    head = [next(iterator).tolist() for _ in range(4)]
    state = first.state_dict()
    assert state == {"batches": 4}, "what the workers have prefetched does not count"
    second = loader()
    second.load_state_dict(state)
    assert len(second) == 10, "the length stays that of the epoch: Lightning adds what it has consumed"
    assert head + [batch.tolist() for batch in second] == whole
    assert [batch.tolist() for batch in second] == whole, "the next pass is whole again"


class Record(LightningModule):
    """Trains nothing and keeps which images each batch had."""

    def __init__(self, asks):
        super().__init__()
        self.weight, self.asks, self.seen = torch.nn.Parameter(torch.zeros(1)), asks, []

    def configure_optimizers(self):
        # who asks has the loaders made before the checkpoint is restored
        assert not self.asks or self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters())

    def training_step(self, batch, _):
        self.seen.append(batch["index"].tolist())
        return self.weight.sum()


@pytest.mark.parametrize("asks", [False, True])
def test_a_run_of_shortened_epochs_goes_on_with_its_batches(phantom_store, tmp_path, asks):
    def fit(resumed=None):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = Trainer(
            max_epochs=2, limit_train_batches=2, limit_val_batches=0, accelerator="cpu", callbacks=[keep],
            logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        model = Record(asks)
        trainer.fit(model, datamodule=BaseDataModule(phantom_store, size=64, batch_size=2), ckpt_path=resumed)
        return model.seen

    whole = fit()
    assert len(whole) == 4
    for step in (1, 2, 3):  # within the first epoch, at its end, within the second
        assert fit(tmp_path / f"step={step}.ckpt") == whole[step:]


class Clock:
    """A clock that only those move who are told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def test_the_time_without_a_batch_is_told(monkeypatch, capsys):
    clock = Clock(monkeypatch)

    class Slow(Echo):
        def __getitem__(self, place):
            clock.now += 1
            return super().__getitem__(place)

    loader, wait = ResumableLoader(Slow(), EpochSampler(np.arange(50), 5, True)), DataWait()
    for _ in range(2):
        for _ in loader:
            clock.now += 7  # hooks and logging
            wait.on_train_batch_start()
            clock.now += 15
            wait.on_train_batch_end()
    assert (loader.waited, wait.stepped) == (2 * 50, 2 * 10 * 15)
    wait.on_fit_end(SimpleNamespace(train_dataloader=loader, is_global_zero=True), None)
    assert capsys.readouterr().out == (
        "waiting for batches: 25.0% of the training; data.num_workers makes them beside it: -1 takes what the machine "
        "has\n"
    )
    assert wait_told(0.05, 0) == "waiting for batches: 5.0% of the training"
    assert wait_told(0.051, 2).endswith("more than the 2 there are")


def test_fewer_rows_than_a_batch():
    with pytest.raises(SistaError, match=r"lower data\.batch_size"):
        EpochSampler(np.arange(7), 8, True)


def test_augmentation_is_a_function_of_its_seed_and_leaves_the_global_generator():
    image = torch.randint(0, 256, (1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = transforms.build(40, 32, train=True, rotate=10, contrast=0.3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (transforms.seeded(transform, image, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.shape == (1, 32, 32)
    assert a.dtype == torch.uint8
    a = transforms.normalise(a)
    assert -1 <= a.min() < a.max() <= 1


def test_crop_larger_than_the_store():
    with pytest.raises(SistaError, match="crop is 64 but the store holds 32"):
        transforms.build(32, 64, train=True)


def test_a_batch_is_its_images_one_by_one(phantom_store):
    store = Store.open(phantom_store)
    transform = transforms.build(64, 48, train=True, contrast=0.2)
    places = [(5, 11), (0, 12), (7, 13)]
    batch = StoreDataset(store, transform, random=True).__getitems__(places)
    assert batch["index"].tolist() == [5, 0, 7]
    for image, (row, seed) in zip(batch["image"], places, strict=True):
        torch.manual_seed(seed)  # the slow way: the global generator
        whole = transform(torch.from_numpy(store.image(row))[None])
        assert torch.allclose(image, whole / 127.5 - 1, atol=1e-6)
    middle = StoreDataset(store, transforms.build(64, 48, train=False), random=False).__getitems__(places)["image"]
    assert torch.allclose(middle[1, 0], torch.from_numpy(store.image(0)[8:56, 8:56]) / 127.5 - 1, atol=1e-6)
