"""`sista bench`: what the losses cost beside the encoders, as a ratio measured side by side in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from sista_pl.errors import SistaError

REPORT = "Small left pleural effusion with adjacent atelectasis. The heart is mildly enlarged. No pneumothorax is seen."


def main(argv: list[str]) -> int:
    """Time alternating rounds and print medians with their spread."""
    parser = argparse.ArgumentParser(
        prog="sista bench",
        description="Time a training step of the encoders alone and with each set of losses, in alternating rounds.",
        epilog="example:\n  sista bench --image-encoder resnet10t --image-size 96 --batch-size 32 --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image-encoder", default="resnet10t", help="timm name (default: resnet10t)")
    parser.add_argument("--image-size", type=int, default=96, help="side of the images in pixels (default: 96)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs a step (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one warm-up (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.batch_size < 2:
        raise SistaError("bench: give at least 1 round and a batch of at least 2")
    steps = _steps(options.image_encoder, options.image_size, options.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    figures = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["encoders"], strict=True)]
        figures[name] = {
            "pairs_per_second": options.batch_size / statistics.median(values),
            "ratio_to_encoders": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        low, high = figures[name]["ratio_range"]
        print(
            f"{name:<22} {figures[name]['pairs_per_second']:8.1f} pairs/s   "
            f"{figures[name]['ratio_to_encoders']:.3f} x the encoders ({low:.3f} to {high:.3f})"
        )
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"figures": figures}, indent=2, default=str) + "\n")
    return 0


def _steps(image_encoder: str, size: int, batch_size: int) -> dict[str, Callable[[], None]]:
    import torch

    from sista_pl.allocator import keep_memory
    from sista_pl.pair import Pair, Semantics
    from sista_pl.pretrain import PretrainTask

    keep_memory()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    task = PretrainTask(
        {"a": {"name": "clip"}, "b": {"name": "sia", "delta": 0.9, "tau": 0.1}, "within": "sta",
         "batch": {"name": "sta", "negatives": "batch"}},
        image_encoder=image_encoder, image_size=size, head_hidden=512,
    )  # fmt: skip
    reports = [f"{REPORT} Study {i}." for i in range(batch_size)]
    task.text_encoder.fit(reports)
    tokens = task.text_encoder.tokenize(reports).batch(range(batch_size))
    image = torch.randn(batch_size, 1, size, size, generator=generator)
    vectors = torch.nn.functional.normalize(torch.rand(batch_size, 64, generator=generator), dim=1)

    def step(names: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                pair = Pair(task.encode_image(image), task.encode_text(tokens), task.scale(), Semantics(vectors))
                outputs = (pair.image.pooled, pair.text.pooled, pair.image.local, pair.text.local)
                total = torch.stack([o.float().square().mean() for o in outputs]).sum()
                for name in names:
                    total = total + task.losses[name](pair)[0]
            task.zero_grad()
            total.backward()

        return run

    return {
        "encoders": step(()),
        "clip": step(("a",)),
        "sia": step(("b",)),
        "sia + sta within": step(("b", "within")),
        "sia + sta batch": step(("b", "batch")),
    }
