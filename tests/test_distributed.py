"""Two gloo ranks with half a batch each equal one process: loss and every gradient of the whole model."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

METHODS = {
    "clip": {"instance": {"name": "clip"}},
    "sia soft": {"instance": {"name": "sia", "mode": "soft", "alpha": 0.7}},
    "sia mask": {"instance": {"name": "sia", "mode": "mask", "delta": 0.6}},
    "sia multi_positive": {"instance": {"name": "sia", "mode": "multi_positive", "delta": 0.6}},
    "sia + sta within": {"instance": {"name": "sia"}, "token": {"name": "sta", "negatives": "within"}},
    "sia + sta batch": {"instance": {"name": "sia"}, "token": {"name": "sta", "negatives": "batch", "group": 4}},
}
REPORTS = [
    "No pleural effusion. The heart is enlarged.",
    "Small left pleural effusion with adjacent atelectasis.",
    "Heart size is normal. The lungs are clear.",
    "Right lower lobe consolidation, concerning for pneumonia.",
    "Nodule.",
    "Moderate right pneumothorax without mediastinal shift. Small effusion.",
    "No pleural effusion. The heart is enlarged.",
    "Low lung volumes and mild edema; no pneumothorax is seen.",
]


def build(losses: dict, image_encoder: str, head_norm: str, dtype: torch.dtype):
    from sista_pl.pretrain import PretrainTask

    torch.manual_seed(0)
    task = PretrainTask(
        losses, image_encoder=image_encoder, image_size=32, embed_dim=16, head_hidden=24, head_norm=head_norm,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 200, "dropout": 0.0},
    )  # fmt: skip
    task.text_encoder.fit(REPORTS)
    for module in task.modules():  # batch statistics of the backbone differ by nature; our own heads' do not
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return task.to(dtype)


def loss_and_gradients(task, rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of this process's rows, and its parameter gradients."""
    from sista_pl.pair import Pair, Semantics

    generator, dtype = torch.Generator().manual_seed(1), task.log_scale.dtype
    image = torch.randn(len(REPORTS), 1, 32, 32, generator=generator, dtype=dtype)[rows]
    vectors = torch.nn.functional.normalize(torch.rand(len(REPORTS), 6, generator=generator, dtype=dtype), dim=1)[rows]
    sample = torch.rand(8, 32, generator=generator, dtype=dtype)
    tokens = task.text_encoder.tokenize(REPORTS).batch(range(len(REPORTS))[rows])
    pair = Pair(task.encode_image(image), task.encode_text(tokens), task.scale(), Semantics(vectors, 0.1, sample))
    total = torch.stack([loss(pair)[0] for loss in task.losses.values()]).sum()
    task.zero_grad()
    total.backward()
    return total.detach(), {k: p.grad.clone() for k, p in task.named_parameters() if p.grad is not None}


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for model in MODELS:
        for name, losses in METHODS.items():
            for dtype in TOLERANCE:
                with one_convolution(dtype):
                    loss, gradients = loss_and_gradients(build(losses, *model, dtype), slice(4 * rank, 4 * rank + 4))
                for value in (loss, *gradients.values()):  # what DDP does
                    torch.distributed.all_reduce(value)
                    value /= 2
                found[(*model, name, str(dtype))] = (loss, gradients)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


def one_convolution(dtype: torch.dtype):
    """In float32 oneDNN takes another algorithm for half a batch, which rounds otherwise; its use is turned off."""
    return torch.backends.mkldnn.flags(enabled=dtype != torch.float32)


# vit_tiny has no batch statistics; resnet10t's BatchNorm is in eval mode; `batch` is our padding-aware head norm
MODELS = [("vit_tiny_patch16_224", "layer"), ("resnet10t", "batch")]
# float64 leaves rounding no room: what is left would be a fault
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = mp.start_processes(rank_main, (port, str(folder)), nprocs=2, join=False, start_method="fork")
    last = time.monotonic() + 300
    while not ranks.join(timeout=5):
        if time.monotonic() > last:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the two ranks did not end in five minutes")
    yield torch.load(folder / "found.pt", weights_only=True)
    shutil.rmtree(folder)  # 700 MB


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m[0]} {m[1]}")
def test_two_ranks_equal_one_process(two_ranks, model, name, dtype):
    with one_convolution(dtype):
        expected_loss, expected = loss_and_gradients(build(METHODS[name], *model, dtype), slice(0, 8))
    loss, gradients = two_ranks[(*model, name, str(dtype))]
    assert torch.allclose(loss, expected_loss, rtol=0, atol=TOLERANCE[dtype])
    assert gradients.keys() == expected.keys()
    scale = max(1.0, *(value.abs().max().item() for value in expected.values()))
    for key, value in expected.items():
        assert (gradients[key] - value).abs().max() <= TOLERANCE[dtype] * scale, key
