"""The precision to train in where none is asked for: bf16 where the hardware multiplies it, else fp32."""

from __future__ import annotations

from pathlib import Path

import torch

FAST, SAFE = "bf16-mixed", "32-true"
# What Linux calls the instructions; a CPU without them computes bf16 by way of fp32, at a tenth of its speed.
_INSTRUCTIONS = frozenset(("avx512_bf16", "amx_bf16"))


def usual_precision(accelerator: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the Trainer's precision for an accelerator of its.

    Args:
        accelerator: as the Trainer takes it; `auto` is a CUDA device where there is one.
        cpuinfo: where the CPU tells its instructions; one that is not there knows none.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return FAST if torch.cuda.is_bf16_supported(including_emulation=False) else SAFE
    if accelerator not in ("auto", "cpu"):
        return SAFE
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return SAFE
    return FAST if _INSTRUCTIONS & set(flags.split()) else SAFE
