"""The precision of a machine, from what its CPU says of itself."""

import pytest
import torch

from sista_pl.cli import main
from sista_pl.precision import usual_precision


@pytest.mark.parametrize(
    ("accelerator", "flags", "wanted"),
    [
        ("auto", "fpu avx2 avx512f avx512_bf16", "bf16-mixed"),
        ("cpu", "fpu amx_bf16 amx_tile", "bf16-mixed"),
        ("auto", "fpu avx2 avx512f", "32-true"),
        ("cpu", None, "32-true"),
        ("mps", "fpu amx_bf16", "32-true"),
    ],
)
def test_bf16_only_where_the_cpu_multiplies_it(tmp_path, monkeypatch, accelerator, flags, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = tmp_path / "cpuinfo"
    if flags is not None:
        told.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    assert usual_precision(accelerator, told) == wanted


@pytest.mark.parametrize(("supported", "wanted"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_is_asked_itself(monkeypatch, supported, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert usual_precision("auto") == wanted


@pytest.mark.parametrize(("given", "used"), [([], "16-true"), (["--trainer.precision", "64-true"], "64-true")])
def test_what_is_asked_for_stays(workdir, monkeypatch, capsys, given, used):
    """The run is refused after its precision is set, for want of a checkpoint."""
    seen = []
    monkeypatch.setattr("sista_pl.lightning_cli.usual_precision", lambda accelerator: "16-true")
    monkeypatch.setattr(
        "sista_pl.lightning_cli.SistaCLI._check_tracking", lambda self, c: seen.append(c.trainer.precision)
    )
    monkeypatch.setattr("sista_pl.lightning_cli.SistaCLI.instantiate_classes", lambda self: None)
    monkeypatch.setattr("sista_pl.lightning_cli.SistaCLI._run_subcommand", lambda self, verb: None)
    assert main(["fit", "--config", "pretrain.yaml", *given]) == 0
    assert seen == [used]
