"""`grad_cache`: the gradient of a large batch in chunks is that of the whole batch, in the memory of a chunk.

B pairs, b of a chunk.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from sista_pl.cli import main
from sista_pl.commands.bench_loss import Peak
from sista_pl.errors import SistaError
from sista_pl.pair import Semantics

LOSSES = {"instance": {"name": "sia", "delta": 0.7, "tau": 0.2}, "token": {"name": "sta", "negatives": "batch"}}
CLIP = {"instance": {"name": "clip"}}
WORDS = ["no", "small", "left", "pleural", "effusion", "heart", "enlarged", "normal", "lungs", "clear", "edema", "rib"]
SIZE, B = 32, 1024


def build(losses: dict, chunk: int | None, dropout: float = 0.0, image_encoder: str = "vit_tiny_patch16_224"):
    """A task with a vision transformer of one block, so that a thousand images take a second."""
    from sista_pl.pretrain import PretrainTask

    torch.manual_seed(0)
    task = PretrainTask(
        losses, image_encoder=image_encoder, image_size=SIZE, embed_dim=16, head_hidden=24, head_norm="layer",
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 100, "dropout": dropout},
        grad_cache=chunk,
    )  # fmt: skip
    task.image_encoder.model.blocks = task.image_encoder.model.blocks[:1]
    task.text_encoder.fit([" ".join(WORDS)] * 2)
    return task


def make_batch(task, size: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    picked = torch.randint(len(WORDS), (size, 9), generator=draw)
    lengths = torch.randint(1, 10, (size,), generator=draw).tolist()
    reports = [" ".join(WORDS[i] for i in row[:n]) for row, n in zip(picked, lengths, strict=True)]
    vectors = nn.functional.normalize(torch.rand(size, 6, generator=draw), dim=1)
    batch = {"image": torch.randn(size, 1, SIZE, SIZE, generator=draw), "vectors": vectors,
             **task.text_encoder.tokenize(reports).batch(range(size))}  # fmt: skip
    return {key: value[rows] for key, value in batch.items()}


class Whole(nn.Module):
    """What a training step computes of a batch, without a Trainer."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pair = self.task(batch)
        pair.semantics = Semantics(batch["vectors"], 0.5)
        return torch.stack([loss(pair)[0] for loss in self.task.losses.values()]).sum()


def loss_and_gradients(task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = Whole(task)(batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(task)}


def gradients(task) -> dict[str, Tensor]:
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


@pytest.mark.parametrize("size", [B, 40])
def test_chunks_of_32_give_the_gradient_of_the_whole_batch(size):
    whole, cached = build(LOSSES, None), build(LOSSES, 32)
    right = loss_and_gradients(whole, make_batch(whole, size))
    assert len(right) == 1 + sum(p.requires_grad for p in whole.parameters())
    assert_alike(loss_and_gradients(cached, make_batch(cached, size)), right)


def test_dropout_drops_the_same_in_both_passes():
    """The features that the losses saw, and their gradient, belong to the same random numbers."""
    task = build(LOSSES, 8, dropout=0.3)
    batch = make_batch(task, 24)
    torch.manual_seed(5)
    found = loss_and_gradients(task, batch)
    after = torch.rand(1)
    task.zero_grad()
    with unchecked():
        torch.manual_seed(5)
        assert_alike(found, loss_and_gradients(task, batch), 1e-6)
        assert torch.equal(torch.rand(1), after)  # and those of the next step are as if there were no second pass


@contextlib.contextmanager
def unchecked():
    """The chunks of `grad_cache` with their activations kept: one graph, one forward pass."""
    patch = pytest.MonkeyPatch()
    patch.setattr("sista_pl.grad_cache.checkpoint", lambda encode, rows, use_reentrant: encode(rows))
    try:
        yield
    finally:
        patch.undo()


def peak(task, size: int) -> int:
    batch = make_batch(task, size)
    with Peak() as bytes_:
        Whole(task)(batch).backward()
    return bytes_.peak


def test_the_peak_is_that_of_a_chunk():
    """And the gradient so far of all parameters, to which a chunk adds its own, one after the other, and the embeddings
    of the batch."""
    chunk, many = 16, 192
    one, cached = build(CLIP, None), build(CLIP, chunk)
    gradients = [parameter.numel() * parameter.element_size() for parameter in one.parameters()]
    small = peak(one, chunk)
    assert peak(one, many) > 4 * small
    assert peak(cached, many) < 1.1 * small + sum(gradients) + max(gradients) + 12 * many * 16 * 4
    # the token loss looks at the patches and words of the whole batch, which are kept
    assert peak(build(LOSSES, chunk), many) < peak(build(LOSSES, None), many) / 3


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    task = build(RANK_LOSSES, 6)
    model, sent = DistributedDataParallel(Whole(task)), []

    def count(group, bucket):
        sent.extend(p.numel() for p in bucket.parameters())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, count)
    for _ in range(2):  # a second step finds a parameter that the first left out
        task.zero_grad()
        sent.clear()
        model(make_batch(task, 32, slice(16 * rank, 16 * rank + 16))).backward()
    assert sum(sent) == sum(p.numel() for p in task.parameters() if p.requires_grad)  # each once, not once a chunk
    if rank == 0:
        torch.save(gradients(task), Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


RANK_LOSSES = {**LOSSES, "token": {"name": "sta", "negatives": "batch", "group": 16}}


def test_two_ranks_in_chunks_equal_one_process_without(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port, str(tmp_path)), nprocs=2, start_method="fork")
    task = build(RANK_LOSSES, None)
    right = loss_and_gradients(task, make_batch(task, 32))
    del right["loss"]
    assert_alike(torch.load(tmp_path / "found.pt", weights_only=True), right)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"head_norm": "batch"}, r"head_norm \(.*MaskedBatchNorm.*set `head_norm: layer`, or leave grad_cache out"),
        ({"image_encoder": "resnet10t"}, r"image_encoder \(.*choose an encoder that normalises each image for itself"),
        ({"grad_cache": 0}, "grad_cache is 0; give a whole number of pairs of at least 1"),
        ({"grad_cache": True}, "grad_cache is True"),
    ],
)
def test_what_chunks_would_change_is_refused_in_one_line(arguments, says):
    from sista_pl.pretrain import PretrainTask

    with pytest.raises(SistaError, match=says) as error:
        PretrainTask(CLIP, **{"image_encoder": "vit_tiny_patch16_224", "image_size": SIZE, "head_norm": "layer",
                              "head_hidden": 8, "grad_cache": 4, **arguments})  # fmt: skip
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_fit_in_chunks_is_the_fit_without(workdir, tiny):
    """Through the Trainer: clipping, schedule, accumulation, logging and mixed precision do not see the chunks."""
    found = []
    for more in ([], ["--model.grad_cache", "3"]):
        assert main([
            "fit", "--config", "pretrain.yaml", *tiny, "--model.image_encoder", "vit_tiny_patch16_224",
            "--model.head_norm", "layer", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1",
            "--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "1", "--seed_everything", "1",
            "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500, dropout: 0.0}", *more,
        ]) == 0  # fmt: skip
        run = sorted((workdir / "runs" / "pretrain").iterdir())[-1]
        found.append(json.loads((run / "metrics.json").read_text())["history"][-1])
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert found[1][key] == pytest.approx(found[0][key], rel=2e-3), key
