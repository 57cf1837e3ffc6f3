"""`sista bench`: speed as ratios, measured side by side in alternating rounds of one run."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sista_pl.errors import SistaError

_EPILOG = """\
examples:
  sista bench step --image-encoder resnet10t --image-size 96 --batch-size 32 --rounds 15 --picture step.png
  sista bench step --image-encoder resnet50 --image-size 224 --batch-size 16 --old-habits
  sista bench loss --pairs 16384
  sista bench data --images 8 --size 256
  sista bench probe --image-encoder resnet50 --image-size 224 --images 200
  sista bench startup --rounds 5
  sista bench growth --picture growth.png
"""


def main(argv: list[str]) -> int:
    """Time alternating rounds and print medians with their spread."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sista bench", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    step = verbs.add_parser("step", help="a training step with each set of losses, against the encoders alone")
    step.add_argument("--image-encoder", default="resnet10t", help="timm name (default: %(default)s)")
    step.add_argument("--image-size", type=int, default=96, help="side of the images in pixels (default: %(default)s)")
    step.add_argument("--batch-size", type=int, default=32, help="pairs a step (default: %(default)s)")
    step.add_argument("--text-layers", type=int, default=2, help="of the BERT (default: %(default)s)")
    step.add_argument("--text-dim", type=int, default=128, help="hidden size of the BERT (default: %(default)s)")
    step.add_argument("--precision", choices=["bf16-mixed", "32-true"], help="(default: what suits the device)")
    step.add_argument("--old-habits", action="store_true", help="also the step as published code of this field does "
                      "it: fp32, padding to 112, loops, anomaly mode; of a CNN also at 299 px")  # fmt: skip
    step.add_argument("--allocator", choices=["tuned", "default"], default="tuned",
                      help="glibc as `sista fit` sets it, or as it is (default: %(default)s)")  # fmt: skip
    step.add_argument("--picture", type=Path, help="also draw which operators take the time of a step to this PNG")
    step.set_defaults(run=_bench_step)
    loss = verbs.add_parser("loss", help="instance losses in blocks of the logits, against whole matrices of B x B")
    loss.add_argument("--pairs", type=int, default=4096, help="the batch B; seven matrices of 4 B² bytes have to fit "
                      "(default: %(default)s)")  # fmt: skip
    loss.add_argument("--dim", type=int, default=128, help="joint dimension (default: %(default)s)")
    loss.set_defaults(run=_bench_loss)
    data = verbs.add_parser("data", help="preparing and reading a store, against decoding each image in each epoch")
    data.add_argument("--images", type=int, default=6, help="JPEGs of 8 megapixels to draw (default: %(default)s)")
    data.add_argument("--size", type=int, default=256, help="side of the stored images (default: %(default)s)")
    data.add_argument("--crop", type=int, default=224, help="side of the crop (default: %(default)s)")
    data.set_defaults(run=_bench_data)
    probe = verbs.add_parser("probe", help="a linear probe on kept features, against one that encodes in each epoch")
    probe.add_argument("--image-encoder", default="resnet10t", help="timm name (default: %(default)s)")
    probe.add_argument("--image-size", type=int, default=96, help="side of the images in pixels (default: %(default)s)")
    probe.add_argument("--images", type=int, default=300, help="films to draw (default: %(default)s)")
    probe.add_argument("--epochs", type=int, default=10, help="of each of the nine fits (default: %(default)s)")
    probe.set_defaults(run=_bench_probe, rounds=1)
    probe.add_argument("--json", type=Path, help="also write the figures to this file")
    startup = verbs.add_parser("startup", help="how long commands take to answer, against an import of Lightning")
    startup.set_defaults(run=_bench_startup)
    growth = verbs.add_parser("growth", help="what grows with the batch, the store and the epochs, and what does not")
    growth.add_argument("--image-encoder", default="resnet10t", help="timm name (default: %(default)s)")
    growth.add_argument(
        "--image-size", type=int, default=96, help="side of the images in pixels (default: %(default)s)"
    )
    growth.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], metavar="B",
                        help="pairs a step (default: %(default)s)")  # fmt: skip
    growth.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], metavar="N",
                        help="of stores to make; the shards take no room (default: %(default)s)")  # fmt: skip
    growth.add_argument("--epochs", type=int, default=10, help="of a small training, at least 3 (default: %(default)s)")
    growth.add_argument("--picture", type=Path, help="also draw the three curves to this PNG")
    growth.set_defaults(run=_bench_growth)
    for verb in (step, loss, data, startup, growth):
        verb.add_argument("--rounds", type=int, default=5, help="timed rounds after one warm-up (default: %(default)s)")
        verb.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        raise SistaError("bench: give at least 1 round")
    figures = options.run(options)
    if options.json:
        told = {key: value for key, value in vars(options).items() if key != "run"}
        options.json.write_text(json.dumps(told | figures, indent=2, default=str) + "\n")
    return 0


def _alternate(steps: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each step in each round, the first round left out."""
    from rich.console import Console
    from rich.progress import track

    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    console = Console(stderr=True)
    turns = [(round_, name) for round_ in range(rounds + 1) for name in steps]
    for round_, name in track(turns, "timing", console=console, transient=True, disable=not console.is_terminal):
        start = time.perf_counter()
        steps[name]()
        if round_:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(values: list[float], base: list[float]) -> dict[str, Any]:
    """How many times the base each round took: median, its 95 % interval, and range over the rounds."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)],
            "interval95": median_interval(ratios)}  # fmt: skip


def median_interval(values: list[float]) -> list[float] | None:
    """Return two of the sorted values with the median between them in 95 % or more of samples, of any distribution.

    The sign test's interval: how many values lie below the median is binomial (1/2). None of fewer than six values.
    """
    n, place, tail = len(values), 0, 0
    while tail + math.comb(n, place) <= 0.025 * 2**n:
        tail += math.comb(n, place)
        place += 1
    ordered = sorted(values)
    return [ordered[place - 1], ordered[n - place]] if place else None


def _bench_step(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_step

    if options.batch_size < 2:
        raise SistaError("bench: give a batch of at least 2")
    if options.text_layers < 1:
        raise SistaError("bench: give the text encoder at least 1 layer")
    bench = bench_step.StepBench(
        options.image_encoder, options.image_size, options.batch_size, options.text_layers, options.text_dim,
        options.precision, options.allocator == "tuned",
    )  # fmt: skip
    steps, old = bench.steps(), bench.old_habits() if options.old_habits else {}
    bytes_ = {name: bench.peak(step) for name, step in (steps | old).items()}
    operations = {name: bench.operations(step) for name, step in steps.items()}
    product, of_product = bench.product()
    seconds = _alternate({**steps, **old, bench_step.PRODUCT: product}, options.rounds)
    fastest = of_product / statistics.median(seconds[bench_step.PRODUCT])
    print(f"{options.image_encoder} at {options.image_size} px, BERT of {options.text_layers} layers "
          f"of {options.text_dim}, B = "
          f"{options.batch_size}, {bench.precision} on {bench.device.type}; a matrix product: {fastest / 1e9:,.0f} "
          "GFLOP/s")  # fmt: skip
    figures: dict[str, Any] = {}
    for name in (*steps, *old):
        base = bench_step.WITHIN if name in old else bench_step.ENCODERS
        ratio, median = _ratio(seconds[name], seconds[base]), statistics.median(seconds[name])
        found = {"pairs_per_second": options.batch_size / median, "ratio_to": base, "ratio": ratio,
                 "peak_bytes": bytes_[name], "memory_ratio": bytes_[name] / bytes_[base]}  # fmt: skip
        told = f"{_spread(ratio)} x {'the encoders' if base == bench_step.ENCODERS else base}"
        told = f"{name:<19} {found['pairs_per_second']:8.2f} pairs/s  {told}  {bytes_[name] / 1e6:,.0f} MB"
        if name in old:
            told += f", {found['memory_ratio']:.2f} x"
        else:
            found["mfu"] = operations[name] / median / fastest
            told += f"  MFU {found['mfu']:.0%}"
        figures[name] = found
        print(told)
    if options.picture:
        bench_step.draw(steps[bench_step.FULL], f"{options.image_encoder}, {bench_step.FULL}", options.picture)
        print(f"picture: {options.picture}")
    return {"precision": bench.precision, "product_flops": fastest, "figures": figures}


def _bench_loss(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_loss

    if options.pairs < 2 or options.dim < 1:
        raise SistaError("bench: give at least 2 pairs, and a dimension of at least 1")
    figures: dict[str, Any] = {}
    print(f"B = {options.pairs}, D = {options.dim}, value and gradients; blocks against whole matrices")
    for name, (blocks, whole) in bench_loss.steps(options.pairs, options.dim).items():
        apart = bench_loss.difference(blocks(), whole())
        bytes_ = {"blocks": bench_loss.peak(blocks), "whole": bench_loss.peak(whole)}
        seconds = _alternate({"blocks": blocks, "whole": whole}, options.rounds)
        ratio = _ratio(seconds["blocks"], seconds["whole"])
        share = bytes_["blocks"] / bytes_["whole"]
        figures[name] = {
            "seconds": {side: statistics.median(values) for side, values in seconds.items()}, "time_ratio": ratio,
            "peak_bytes": bytes_, "memory_ratio": share, "largest_difference": apart,
        }  # fmt: skip
        low, high = ratio["range"]
        print(f"{name:<9} time {ratio['median']:.2f} x ({low:.2f} to {high:.2f})   memory {share:.3f} x "
              f"({bytes_['blocks'] / 1e6:,.0f} of {bytes_['whole'] / 1e6:,.0f} MB)   apart {apart:.0e}")  # fmt: skip
    return {"figures": figures}


def _bench_data(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_data

    if options.images < 2 or not 1 <= options.crop <= options.size:
        raise SistaError("bench: give at least 2 images, and a crop of at most the size")
    steps, facts = bench_data.steps(options.images, options.size, options.crop)
    passes = {name: step() for name, step in steps.items()}
    seconds = _alternate(steps, options.rounds)
    rates = {name: passes[name] / statistics.median(values) for name, values in seconds.items()}
    print(f"{facts['images']}, one core")
    for name, rate in rates.items():
        print(f"{name:<22} {rate:8.1f} images/s")
    each = {name: [value / passes[name] for value in values] for name, values in seconds.items()}
    ratios = {
        "prepare": _ratio(each["plain"], each["prepare"]),
        "store loader": _ratio(each["decoding loader"], each["store loader"]),
    }
    print(f"prepare:      {_told(ratios['prepare'])} as fast as a full decode and resize; "
          f"mean difference {facts['difference']:.2f} grey levels")  # fmt: skip
    print(f"store loader: {_told(ratios['store loader'])} as fast as decoding in each epoch")
    return {"images_per_second": rates, "ratios": ratios, "mean_difference": facts["difference"]}


def _bench_probe(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_probe

    if options.images < 200 or options.epochs < 1:
        raise SistaError("bench: give at least 200 images, of which 1 % of the training ones has to have a finding")
    found = bench_probe.compare(options.image_encoder, options.image_size, options.images, options.epochs)
    for name in ("cached", "uncached"):
        side = found[name]
        print(f"{name:<9} {side['passes']:>9,} encoder passes  {side['seconds']:8.1f} s  for {side['fits']} fits")
    ratios = found["ratios"]
    print(f"kept features: {ratios['passes']:.1f} times fewer passes, {ratios['seconds']:.1f} times as fast; "
          f"the layers differ by {found['largest_difference']:.1e} at most")  # fmt: skip
    return found


def _bench_startup(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_startup

    wall, cpu = bench_startup.measure(options.rounds)
    base = bench_startup.IMPORT
    print(f"{base}: {statistics.median(wall[base]):.2f} s, {statistics.median(cpu[base]):.2f} s of CPU time")
    print(f"{'fresh process of':<22}{'s':>7}  {'x the import':<24}{'x its CPU time':<24}bound")
    figures: dict[str, Any] = {}
    for name, bound in bench_startup.BOUNDS.items():
        ratios = _ratio(wall[name], wall[base]), _ratio(cpu[name], cpu[base])
        seconds = statistics.median(wall[name])
        figures[name] = {"seconds": seconds, "ratio": ratios[0], "cpu_ratio": ratios[1], "bound": bound}
        told = ["{:.3f} ({:.3f} to {:.3f})".format(r["median"], *r["range"]) for r in ratios]
        print(f"{'sista ' + name:<22}{seconds:7.2f}  {told[0]:<24}{told[1]:<24}{bound}")
    for name in bench_startup.over(figures):
        print(f"over its bound: sista {name}; python -X importtime -m sista_pl {name} shows what it imports")
    return {"import_seconds": statistics.median(wall[base]), "figures": figures}


def _bench_growth(options: argparse.Namespace) -> dict[str, Any]:
    from sista_pl.commands import bench_growth, bench_step

    batches, rows = sorted(set(options.batch_sizes)), sorted(set(options.rows))
    if len(batches) < 2 or batches[0] < 2 or len(rows) < 2 or rows[0] < 1 or options.epochs < 3:
        raise SistaError("bench: give two batch sizes of at least 2, two numbers of rows, and at least 3 epochs")
    encoder, size = options.image_encoder, options.image_size
    steps = {b: bench_step.StepBench(encoder, size, b).steps()[bench_step.FULL] for b in batches}
    seconds = _alternate(steps, options.rounds)
    each = {b: [value / b for value in values] for b, values in seconds.items()}
    a_pair = _ratio(each[batches[-1]], each[batches[0]])
    for b in batches:
        median = statistics.median(seconds[b])
        print(f"batch {b:>9,}  {1e3 * median:9.1f} ms a step   {1e3 * median / b:7.2f} ms a pair")
    print(f"time a pair, batch {batches[-1]} against {batches[0]}: {_told(a_pair)}")

    runs = bench_growth.opening(rows, options.rounds)
    stores = {n: {key: statistics.median(values) for key, values in found.items()} for n, found in runs.items()}
    for n, found in stores.items():
        print(f"rows  {n:>9,}  open {1e3 * found['open']:7.2f} ms  +{found['bytes'] / 1e6:6.1f} MB   an image "
              f"{1e6 * found['read']:7.1f} us   manifest {1e3 * found['manifest']:8.1f} ms  "
              f"+{found['manifest_bytes'] / 1e6:7.1f} MB")  # fmt: skip
    opened = _ratio(runs[rows[-1]]["open"], runs[rows[0]]["open"])
    print(f"opening {rows[-1]:,} rows against {rows[0]:,}: {_told(opened)}")

    bytes_ = bench_growth.training(options.epochs)
    grown = bytes_[-1] / bytes_[1]
    print(f"memory after epoch {options.epochs} against after epoch 2: {grown:.3f} times, {bytes_[-1] / 1e6:,.0f} MB")
    figures: dict[str, Any] = {
        "step": {"seconds": {b: statistics.median(values) for b, values in seconds.items()}, "a_pair_ratio": a_pair},
        "store": stores, "open_ratio": opened, "memory": {"bytes": bytes_, "ratio": grown},
    }  # fmt: skip
    if options.picture:
        bench_growth.draw(figures, options.picture)
        print(f"picture: {options.picture}")
    return figures


def _told(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} times ({ratio['range'][0]:.2f} to {ratio['range'][1]:.2f})"


def _spread(ratio: dict[str, Any]) -> str:
    """The median with its interval, or with its range where the rounds are too few for one."""
    if ratio["interval95"]:
        return "{:.3f} [{:.3f}, {:.3f}]".format(ratio["median"], *ratio["interval95"])
    return "{:.3f} ({:.3f} to {:.3f})".format(ratio["median"], *ratio["range"])
