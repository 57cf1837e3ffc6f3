"""Two machines, played by two agents of torchrun on loopback, or two processes: weights, figures, bytes, shards."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

COMMON = [
    "--config", "pretrain.yaml", "--data.root", "null", "--data.phantom", "null", "--data.format", "null",
    "--data.size", "64", "--data.crop", "48", "--model.head_hidden", "32", "--model.embed_dim", "16",
    # without batch statistics or dropout, and in double precision: Adam makes a step of a gradient that is but rounding
    "--model.image_encoder", "vit_tiny_patch16_224", "--model.head_norm", "layer", "--trainer.precision", "64-true",
    "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500, dropout: 0.0}",
    # `batch` would take its groups of negatives from one rank
    "--model.losses",
    "{instance: {name: sia, mode: multi_positive, delta: 0.95}, token: {name: sta, negatives: within}}",
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.enable_progress_bar", "false",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false",
]  # fmt: skip
ONE = ["--data.batch_size", "16", "--trainer.devices", "1"]
TWO = ["--data.batch_size", "8", "--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(launchers: list[list[str]], arguments: list[str], folder: Path) -> None:
    """Start `-m sista_pl` with these arguments by each of the launchers at the same time, in one shared folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, *launcher, "-m", "sista_pl", *arguments], cwd=folder, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for launcher in launchers
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=3600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(told)


def agents() -> list[list[str]]:
    """One of torchrun for each machine."""
    common = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-id",
        "test",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
        "--local-addr",
        "127.0.0.1",
    ]
    return [[*common, "--node-rank", str(rank)] for rank in range(2)]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "runs/pretrain/0001/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def figures(folder: Path) -> dict[str, float]:
    """The figures of a test without the diagnostics of a loss, which are means over batches: a node's are others."""
    found = json.loads((folder / "runs/pretrain/0001/test/metrics.json").read_text())["test"]
    return {key: value for key, value in found.items() if key.count("/") == 1}


@pytest.mark.slow
def test_two_nodes_train_and_test_as_one_process_with_the_whole_batch(tmp_path, phantom_store):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for name, launchers, more in (("one", [[]], ONE), ("two", agents(), TWO)):
        run(launchers, ["fit", *COMMON, *more, "--data.store", str(phantom_store)], tmp_path / name)
    assert [p.name for p in (tmp_path / "two/runs/pretrain").iterdir()] == ["0001"]
    expected, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.allclose(value.double(), got[name].double(), rtol=0, atol=1e-5), name

    last = ["--ckpt_path", str(tmp_path / "two/runs/pretrain/0001/checkpoints/last.ckpt")]
    found = []
    for launchers, more in (([[]], ONE), (agents(), TWO)):
        run(launchers, ["test", *COMMON, *more, *last, "--data.store", str(phantom_store)], tmp_path / "two")
        found.append(figures(tmp_path / "two"))
    assert "test/i2t_R@10" in found[0]
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def fork_two(main, folder: Path) -> None:
    """Call main(rank, port, folder) in two processes."""
    mp.start_processes(main, (free_port(), str(folder)), nprocs=2, start_method="fork")


def join_group(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)


def received() -> int:
    """Bytes that the TCP sockets of this process have received, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=int(name))
        except OSError:  # a file
            continue
        if found.family in (socket.AF_INET, socket.AF_INET6):
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received, Linux 4.1
        found.detach()
    return total


PAIRS, DIM, SEMANTICS, PARAMETERS = 512, 96, 24, 700 * 701
CONTRASTS = {
    "clip": {"name": "clip"},
    "sia": {"name": "sia", "mode": "multi_positive", "delta": 0.9},
}


def count_main(rank: int, port: int, folder: str) -> None:
    from sista_pl.losses import LOSSES
    from sista_pl.pair import Features, Pair, Semantics

    join_group(rank, port)
    draw = torch.Generator().manual_seed(rank)
    vectors = F.normalize(torch.rand(PAIRS, SEMANTICS, generator=draw), dim=1)
    none = torch.zeros(PAIRS, 0, DIM)
    found = {}
    for name, spec in CONTRASTS.items():
        sides = [Features(torch.randn(PAIRS, DIM, generator=draw, requires_grad=True), none) for _ in range(2)]
        pair = Pair(sides[0], sides[1], torch.tensor(14.3, requires_grad=True), Semantics(vectors, 0.6))
        loss = LOSSES.build(spec)
        before = received()
        loss(pair)[0].backward()
        found[name] = received() - before
    model = nn.parallel.DistributedDataParallel(nn.Linear(700, 700))
    for _ in range(3):  # the first one sets the buckets up
        before = received()
        model(torch.ones(1, 700)).sum().backward()
        found["gradients"] = received() - before
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of a socket's bytes")
def test_the_bytes_of_a_step_are_those_of_the_handbook(tmp_path):
    """The formulas are the python block of docs/scale.md, the bytes are the kernel's."""
    text = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    formulas: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1], formulas)
    fork_two(count_main, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["gradients"] == pytest.approx(formulas["gradients"](PARAMETERS, R=2), rel=0.02)
    assert found["clip"] == pytest.approx(formulas["contrast"](PAIRS, DIM, 0, R=2), rel=0.02)
    assert found["sia"] == pytest.approx(formulas["contrast"](PAIRS, DIM, SEMANTICS, R=2), rel=0.02)
    # and the table has what they say
    for ranks, row in re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE):
        R, cells = int(ranks), [cell.strip() for cell in row.split("|")]
        assert cells == [
            f"{144 * R:,}", f"{formulas['gradients'](100_000_000, R) / 1e6:,.0f}",
            f"{formulas['contrast'](144, 128, 64, R) / 1e6:,.1f}", f"{377_110 // (144 * R):,}",
        ]  # fmt: skip


class Copy:
    """A machine's own copy of a store of eight images."""

    hash = "of the images"

    def __init__(self, folder: Path):
        self.path = folder / "store"

    def __len__(self) -> int:
        return 8


def rows_as_vectors(encoder, store: Copy, rows: np.ndarray, *_) -> np.ndarray:
    """Encode row r as (r, r), and note in the copy's folder that it was done."""
    with (store.path.parent / "encoded").open("a") as file:
        file.writelines(f"{row} " for row in rows)
    return np.stack([rows, rows], 1).astype(np.float32)


def keep_features(folder: Path, rows: list[int]) -> np.ndarray:
    from sista_pl import features

    folder.mkdir(exist_ok=True)
    encoder = nn.Identity()
    encoder.dim = 2
    return features.cached(encoder, Copy(folder), np.array(rows), crop=8)


def features_main(rank: int, port: int, folder: str) -> None:
    join_group(rank, port)
    np.save(Path(folder) / f"{rank}.npy", keep_features(Path(folder) / str(rank), [6, 0, 1, 2, 3, 5]))
    dist.destroy_process_group()


def test_machines_with_other_features_in_their_copies_of_a_store_fill_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sista_pl.features.extract", rows_as_vectors)
    keep_features(tmp_path / "0", [0, 1, 2, 7])
    keep_features(tmp_path / "1", [1, 6])
    for rank in "01":
        (tmp_path / rank / "encoded").unlink()
    fork_two(features_main, tmp_path)
    for rank in "01":
        found = np.load(tmp_path / f"{rank}.npy")[[0, 1, 2, 3, 5, 6]]
        assert found.tolist() == [[row, row] for row in (0, 1, 2, 3, 5, 6)]
    encoded = [(tmp_path / rank / "encoded").read_text().split() for rank in "01"]
    assert encoded == [["6", "5"], ["3"]]  # what the first machine lacks, each row once
    (file,) = (tmp_path / "0/features").iterdir()
    assert np.isnan(np.load(file)[:, 0]).nonzero()[0].tolist() == [4]


class Total(nn.Module):
    """The task's loss as a forward pass, which is what torch's FSDP wraps."""

    def __init__(self, task: nn.Module):
        super().__init__()
        self.task = task

    def forward(self, rows: slice) -> torch.Tensor:
        from sista_pl.pair import Pair, Semantics

        draw = torch.Generator().manual_seed(1)
        image = torch.randn(8, 1, 32, 32, generator=draw)[rows]
        vectors = F.normalize(torch.rand(8, 6, generator=draw), dim=1)[rows]
        tokens = self.task.text_encoder.tokenize(TEXTS).batch(range(8)[rows])
        images, texts = self.task.encode_image(image), self.task.encode_text(tokens)
        pair = Pair(images, texts, self.task.scale(), Semantics(vectors, 0.1))
        return torch.stack([loss(pair)[0] for loss in self.task.losses.values()]).sum()


TEXTS = [f"Study {i}: no pleural effusion, the heart is enlarged." for i in range(8)]


def make_task() -> nn.Module:
    from sista_pl.pretrain import PretrainTask

    torch.manual_seed(0)
    task = PretrainTask(
        {"instance": CONTRASTS["sia"], "sigmoid": {"name": "siglip"}, "token": {"name": "sta", "negatives": "within"}},
        image_encoder="vit_tiny_patch16_224", image_size=32, embed_dim=16, head_hidden=24, head_norm="layer",
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 200, "dropout": 0.0},
    )  # fmt: skip
    task.text_encoder.fit(TEXTS)
    return task


def one_step(model: nn.Module, rows: slice) -> None:
    from sista_pl.optim import parameter_groups

    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.1), lr=0.1)
    model(rows).backward()
    optimizer.step()


def sharded_main(rank: int, port: int, folder: str) -> None:
    from timm.models.vision_transformer import Block
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from sista_pl.distributed import make_shardable

    join_group(rank, port)
    task = make_task()
    make_shardable(task)
    model = FullyShardedDataParallel(
        Total(task), use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    one_step(model, slice(4 * rank, 4 * rank + 4))
    held = sum(p.numel() for p in model.parameters())
    with FullyShardedDataParallel.summon_full_params(model):
        found = {k.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for k, p in model.named_parameters()}
    if rank == 0:
        torch.save((held, found), Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_parameters_in_shards_make_the_step_of_whole_ones(tmp_path):
    fork_two(sharded_main, tmp_path)
    held, found = torch.load(tmp_path / "found.pt", weights_only=True)
    expected = Total(make_task())
    one_step(expected, slice(0, 8))
    assert held < 0.51 * sum(p.numel() for p in expected.parameters())
    for name, value in expected.named_parameters():
        assert torch.allclose(found[name].reshape(value.shape), value, rtol=0, atol=1e-5), name


@pytest.mark.gpu
def test_fit_takes_a_step_under_fsdp(tmp_path, phantom_store):
    more = [
        "--data.batch_size", "8", "--data.store", str(phantom_store), "--trainer.accelerator", "gpu",
        "--trainer.devices", "1", "--trainer.strategy", "fsdp", "--trainer.gradient_clip_val", "null",
        "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1",
    ]  # fmt: skip
    run([[]], ["fit", *COMMON, *more], tmp_path)
    assert all(value.isfinite().all() for value in weights(tmp_path).values() if value.is_floating_point())
