"""One process with B pairs equals two gloo ranks with B/2 each: loss and every gradient.

The ranks run this file as a script, both for all cases, so that starting them is paid once.
B pairs, P patches, L words, D joint dimension, K classes, H W pixels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair, Semantics
from sista_pl.words import word_id

RANKS, B = 2, 8
CLIP = {"name": "clip"}
WITHIN = {"name": "sta", "negatives": "within"}
BATCH = {"name": "sta", "negatives": "batch", "group": B // RANKS}
CPA = {"name": "mgca_cpa", "prototypes": 12, "dim": 5, "frozen_epochs": 0}
FINDINGS = {"name": "findings", "prototypes": 6, "dim": 5}
TRIAGE = {"name": "sia", "mode": "triage"}
ONLINE = {"name": "sia", "source": "online", "delta": 0.3, "tau": 0.3}
SIGLIP = {"name": "siglip", "semantic": True, "bias": -2.0}
CASES = {
    "clip": [CLIP],
    "clip in chunks": [{**CLIP, "chunk": 3}],
    "sia soft": [{"name": "sia", "mode": "soft"}],
    "sia soft in chunks": [{"name": "sia", "mode": "soft", "chunk": 3}],
    "sia soft, half": [{"name": "sia", "mode": "soft", "alpha": 0.5}],
    "sia mask": [{"name": "sia", "mode": "mask"}],
    "sia multi_positive": [{"name": "sia", "mode": "multi_positive"}],
    "sia triage": [{**TRIAGE, "positive_threshold": 0.9, "negative_threshold": 0.7}],
    "sia triage in chunks": [{**TRIAGE, "chunk": 3}],
    "sia online": [ONLINE],
    "sia online, triage in chunks": [
        {**ONLINE, **TRIAGE, "positive_threshold": 0.5, "negative_threshold": 0.2, "chunk": 3}
    ],
    "medclip": [{"name": "medclip", "tau": 0.3}],
    "medclip in chunks": [{"name": "medclip", "chunk": 3}],
    "siglip": [{"name": "siglip", "bias": -2.0}],
    "siglip, semantic": [SIGLIP],
    "siglip, semantic in chunks": [{**SIGLIP, "chunk": 3}],
    "sia and sta within": [{"name": "sia"}, WITHIN],
    "sta within, mean over words": [{**WITHIN, "reduction": "word"}],
    "sta batch": [BATCH],
    "sta batch, mean over words": [{**BATCH, "reduction": "word"}],
    "clip and sta batch": [CLIP, BATCH],
    "gloria": [CLIP, {"name": "gloria"}],
    "gloria in chunks, mean over words": [{"name": "gloria", "chunk": 3, "aggregation": "mean"}],
    "mgca": [CLIP, {"name": "mgca_cta"}, CPA],
    "mgca_cta": [{"name": "mgca_cta"}],
    "mgca_cpa": [CPA],
    "findings": [FINDINGS],
    "findings, images alone": [CLIP, {**FINDINGS, "sides": "image"}],
    "mgca_cpa, frozen": [{**CPA, "frozen_epochs": 1}],
    "sta batch, sparsemax": [{**BATCH, "sparsity": "sparsemax"}],
    "sta patch_to_word": [{**WITHIN, "direction": "patch_to_word"}],
    "sta both, topk": [{**WITHIN, "direction": "both", "sparsity": "topk", "top": 3}],
    "sta both, softmax, mean over words": [{**WITHIN, "direction": "both", "sparsity": "softmax", "reduction": "word"}],
    **{name: [{"name": name}] for name in ("bce", "cross_entropy", "dice_bce", "focal_logdice")},
}


class Model(nn.Module):
    """The smallest that has a gradient everywhere: four linear layers and a logit scale."""

    def __init__(self, specs: list[dict]):
        super().__init__()
        self.image, self.text, self.patches, self.words = (nn.Linear(6, 5) for _ in range(4))
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=draw)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        torch.manual_seed(0)  # of the losses' own parameters
        self.losses = nn.ModuleList(LOSSES.build(spec) for spec in specs)

    def forward(self, batch: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["ids"]
        pair = Pair(
            image=Features(self.image(batch["image"]), self.patches(batch["patches"]),
                           attention=batch["patches"][..., 0].exp()),
            text=Features(self.text(batch["text"]), self.words(batch["words"]), ids != 0, ids,
                          batch["words"][..., 0].exp() * (ids != 0)),
            scale=self.log_scale.exp(),
            semantics=Semantics(batch["semantics"], 0.2, sample),
            labels=batch["labels"],
        )  # fmt: skip
        looked_at = {
            "pair": (pair,),
            "labels": (pair.text.pooled[:, :4], batch["classes"]),  # B K
            "mask": (pair.image.local[:, None], batch["mask"]),  # B 1 H W, B H W
        }
        parts = [loss(*looked_at[getattr(loss, "takes", "pair")]) for loss in self.losses]
        return sum(loss for loss, _ in parts), parts[0][1]


def make_batch() -> tuple[dict[str, Tensor], Tensor]:
    """B pairs with 0 to 7 words, unevenly over the ranks, and two reports of equal semantics on different ranks.

    The second rank alone has an object in its masks; the first has less that is known.
    """
    draw = torch.Generator().manual_seed(1)
    names = torch.tensor([word_id(word) for word in ("heart", "lung", "edema", "rib", "the", "left", "hila")])
    signs = torch.tensor([1, 1, 1, -1])
    lengths = torch.tensor([7, 6, 7, 3, 1, 0, 2, 1])
    picked = names[torch.randint(7, (B, 7), generator=draw)] * signs[torch.randint(4, (B, 7), generator=draw)]
    semantics = torch.randn(B, 4, generator=draw).abs()
    semantics[6] = semantics[1]
    batch = {
        "image": torch.randn(B, 6, generator=draw),
        "text": torch.randn(B, 6, generator=draw),
        "patches": torch.randn(B, 9, 6, generator=draw),
        "words": torch.randn(B, 7, 6, generator=draw),
        "ids": torch.where(torch.arange(7) < lengths[:, None], picked, 0),
        "semantics": nn.functional.normalize(semantics, dim=1),
        "labels": torch.tensor([1.0, 0.0, 0.0, float("nan")])[torch.randint(4, (B, 4), generator=draw)],
        "classes": torch.eye(4)[torch.randint(4, (B,), generator=draw)],
        "mask": torch.tensor([0, 127, 255], dtype=torch.uint8)[torch.randint(3, (B, 9, 5), generator=draw)],
    }
    batch["classes"][[0, 2, 3, 5]] = float("nan")
    batch["mask"][: B // RANKS].clamp_(max=127)
    return batch, torch.rand(32, 64, generator=draw)


def evaluate(specs: list[dict], batch: dict[str, Tensor], sample: Tensor) -> dict[str, Tensor]:
    """Return loss, gradients and diagnostics as DDP leaves them: their mean over the ranks."""
    model = Model(specs)
    loss, logs = model(batch, sample)
    loss.backward()
    out = {"loss": loss.detach(), "false negatives": logs.get("false_negatives", torch.zeros(()))}
    out |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    out |= {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if dist.is_initialized():
        for value in out.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return out


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS)
    batch, sample = make_batch()
    rows = slice(rank * B // RANKS, (rank + 1) * B // RANKS)
    local = {key: value[rows] for key, value in batch.items()}
    torch.save({name: evaluate(specs, local, sample) for name, specs in CASES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * RANKS, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case, two_ranks):
    one = evaluate(CASES[case], *make_batch())
    assert one["loss"] > 0.01
    if case.startswith("sia"):
        assert one["false negatives"] >= 2 / B
    for rank in two_ranks:
        for name, value in rank[case].items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
