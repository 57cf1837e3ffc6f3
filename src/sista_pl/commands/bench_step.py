"""`sista bench step`: forward and backward of a pre-training with each set of losses, against the encoders alone.

B pairs, T sub-words of a report.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sista_pl.allocator import keep_memory
from sista_pl.commands.bench_loss import Peak
from sista_pl.pair import Features, Pair, Semantics
from sista_pl.precision import FAST, usual_precision
from sista_pl.pretrain import PretrainTask

REPORT = "Small left pleural effusion with adjacent atelectasis. The heart is mildly enlarged. No pneumothorax is seen."
PADDED, UPSAMPLED = 112, 299
ENCODERS, WITHIN, FULL, PRODUCT = "encoders", "sia + sta within", "sia + sta batch", "matrix product"
OLD, OLD_299 = "old habits", f"old habits, {UPSAMPLED} px"
SETS: dict[str, tuple[str, ...]] = {
    ENCODERS: (), "clip": ("clip",), "sia": ("sia",), WITHIN: ("sia", "within"), FULL: ("sia", "batch"),
}  # fmt: skip


class StepBench:
    """Steps of one model on one batch: each call of one is a forward and a backward, without the optimizer.

    Reports have one to four times the length of a short one, so that a batch has padding as real ones have.

    Args:
        image_encoder: timm name.
        image_size: side of the images in pixels.
        batch_size: B, at least 2.
        text_layers: of the BERT.
        text_dim: its hidden size, a multiple of 32.
        precision: `bf16-mixed` or `32-true`; None is the usual one of the device.
        tuned: keep freed memory, as `sista fit` does (`sista_pl.allocator`); it can't be undone in a process.
    """

    def __init__(
        self,
        image_encoder: str,
        image_size: int,
        batch_size: int,
        text_layers: int = 2,
        text_dim: int = 128,
        precision: str | None = None,
        tuned: bool = True,
    ):
        if tuned:
            keep_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision or usual_precision(self.device.type)
        torch.manual_seed(0)
        task = PretrainTask(
            {"clip": "clip", "sia": {"name": "sia", "delta": 0.9, "tau": 0.1}, "within": "sta",
             "batch": {"name": "sta", "negatives": "batch"}},
            image_encoder=image_encoder, image_size=image_size, head_hidden=512,
            text_encoder={"name": "small-bert", "dim": text_dim, "layers": text_layers},
        )  # fmt: skip
        reports = [" ".join([REPORT] * (1 + i % 4)) + f" Study {i}." for i in range(batch_size)]
        task.text_encoder.fit(reports)
        self.task = task.to(self.device)
        self.tokens = self._there(task.text_encoder.tokenize(reports).batch(range(batch_size)))
        self.image = torch.randn(batch_size, 1, image_size, image_size, device=self.device)
        self.semantics = Semantics(F.normalize(torch.rand(batch_size, 64, device=self.device), dim=1))

    def _there(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in tokens.items()}

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Return the steps by their sets of losses, those of the encoders alone first."""
        return {name: self._step(losses) for name, losses in SETS.items()}

    def _step(self, losses: tuple[str, ...]) -> Callable[[], Any]:
        def total(pair: Pair) -> Tensor:
            return _plain(pair) + sum(self.task.losses[name](pair)[0] for name in losses)

        return lambda: self._run(self.task, self.image, self.tokens, total, self.precision == FAST)

    def old_habits(self) -> dict[str, Callable[[], Any]]:
        """Return the step of `sia + sta within` as published code of this field does it.

        fp32, contiguous maps, attention that is not fused, reports padded to 112 sub-words, the token loss in a loop
        over the reports, anomaly mode; of a CNN also with the images brought to 299 pixels.
        """
        task = copy.deepcopy(self.task).to(memory_format=torch.contiguous_format)
        for module in task.image_encoder.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        task.text_encoder.model.set_attn_implementation("eager")
        tokens = self._there(padded(self.tokens, PADDED))

        def total(pair: Pair) -> Tensor:
            return _plain(pair) + task.losses["sia"](pair)[0] + looped(task.losses["within"], pair)

        def step(image: Callable[[], Tensor]) -> Callable[[], Any]:
            def run() -> None:
                with torch.autograd.set_detect_anomaly(True):
                    self._run(task, image(), tokens, total, fast=False)

            return run

        found = {OLD: step(lambda: self.image)}
        if not task.image_encoder.has_tokens:
            found[OLD_299] = step(lambda: F.interpolate(self.image, (UPSAMPLED, UPSAMPLED), mode="bilinear"))
        return found

    def _run(
        self, task: PretrainTask, image: Tensor, tokens: dict[str, Tensor], total: Callable[[Pair], Tensor], fast: bool
    ) -> None:
        with torch.autocast(self.device.type, torch.bfloat16) if fast else nullcontext():
            pair = Pair(task.encode_image(image), task.encode_text(tokens), task.scale(), self.semantics)
            loss = total(pair)
        task.zero_grad()
        loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def product(self) -> tuple[Callable[[], Any], int]:
        """Return a product of square matrices in the precision of the steps, and its floating point operations."""
        n = 8192 if self.device.type == "cuda" else 1536
        dtype = torch.bfloat16 if self.precision == FAST else torch.float32
        a = torch.randn(n, n, device=self.device, dtype=dtype)

        def run() -> None:
            a @ a
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return run, 2 * n**3

    def peak(self, step: Callable[[], Any]) -> int:
        """Return the most bytes of tensors that a step keeps at once, gradients among them and weights not."""
        self.task.zero_grad()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated() - before
        with Peak() as counted:
            step()
        return counted.peak

    @staticmethod
    def operations(step: Callable[[], Any]) -> int:
        """Return the floating point operations of the products and convolutions of a step, by torch's formulas."""
        with FlopCounterMode(display=False) as counted:
            step()
        return counted.get_total_flops()


def _plain(pair: Pair) -> Tensor:
    """Something of all outputs, so that each encoder has its whole backward in every step."""
    outputs = (pair.image.pooled, pair.text.pooled, pair.image.local, pair.text.local)
    return torch.stack([out.float().square().mean() for out in outputs]).sum()


def padded(tokens: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Pad a batch of reports to T = `length` sub-words and as many words."""
    blank = {"word_index": -1}
    return {key: F.pad(value, (0, max(0, length - value.shape[1])), value=blank.get(key, 0))
            for key, value in tokens.items()}  # fmt: skip


def looped(loss: nn.Module, pair: Pair) -> Tensor:
    """Return a loss within reports as the mean over one report at a time, cut to its own words."""
    mask = pair.text.mask
    assert mask is not None
    found = []
    for i, count in enumerate(mask.sum(1).tolist()):
        image = Features(pair.image.pooled[i : i + 1], pair.image.local[i : i + 1])
        cut = [x if x is None else x[i : i + 1, :count] for x in (pair.text.local, mask, pair.text.ids)]
        text = Features(pair.text.pooled[i : i + 1], *cut)  # type: ignore[arg-type]
        found.append(loss(replace(pair, image=image, text=text))[0])
    return torch.stack(found).mean()


def draw(step: Callable[[], Any], title: str, path: Path, most: int = 12) -> None:
    """Profile one step and draw what its operators take themselves, the longest first, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it calls a machine without a GPU an error
    on_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        step()
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    taken = {each.key: getattr(each, key) / 1e3 for each in profiled.key_averages()}
    names = sorted(taken, key=lambda name: -taken[name])
    bars = {name.removeprefix("aten::"): taken[name] for name in names[:most]}
    bars["all others"] = sum(taken[name] for name in names[most:])
    whole = sum(taken.values())
    figure = Figure(figsize=(8, 0.32 * len(bars) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    drawn = axis.barh(list(bars), list(bars.values()))
    axis.bar_label(drawn, [f" {value / whole:.1%}" for value in bars.values()], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ms of one step, without what an operator calls", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
