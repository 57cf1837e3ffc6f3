import csv
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sista_pl.commands.data import main
from sista_pl.data.formats import READERS
from sista_pl.data.store import Store
from sista_pl.errors import SistaError


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    with (folder / "studies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "patient", "split", "plane", "label_Edema"])
        for i in range(6):
            Image.fromarray(np.full((10, 10), 40 * i, np.uint8)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", f"Text {i}.", f"p{i}", "train" if i < 4 else "val", i % 2, i % 2])
    return folder


def prepare(table, out, *more):
    return main(["prepare", "table", "--root", str(table), "--out", str(out), "--size", "16", *more])


def test_prepare_and_show(tmp_path, table, capsys):
    assert prepare(table, tmp_path / "store", "--workers", "2") == 0
    out = capsys.readouterr().out
    assert "studies.csv: 6 images, 0 left out" in out
    assert "6 images (4 train, 2 val), 0 left out" in out
    assert len(Store.open(tmp_path / "store")) == 6
    assert main(["show", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    assert "6 images of 16 px" in " ".join(out.split())
    assert "PHANTOM" not in out
    cells = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in cells]
    assert ["train", "4", "4", "4", "4", "4", "0", "0"] in cells
    assert ["all", "6", "6", "6", "6", "6", "0", "0"] in cells
    assert ["Edema", "3", "3", "0", "0.500"] in cells


def test_options_are_yaml_and_may_be_nested(tmp_path, table):
    options = ["columns.view=plane", "where={plane: 1}", "require_report=false", "table=studies.csv"]
    prepare(table, tmp_path / "store", *(word for option in options for word in ("--option", option)))
    store = Store.open(tmp_path / "store")
    assert store.manifest["image_id"].tolist() == ["1.png", "3.png", "5.png"]
    assert set(store.manifest["view"]) == {"1"}
    assert store.info["options"]["where"] == {"plane": [1]}


def test_a_phantom_is_never_silent(tmp_path, table, capsys):
    (table / "phantom").mkdir()
    (table / "phantom/phantom.json").write_text("{}")
    prepare(table, tmp_path / "store")
    assert "PHANTOM DATA" in capsys.readouterr().out
    main(["show", str(tmp_path / "store")])
    assert "PHANTOM DATA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--option", "require_report"], "no KEY=VALUE"),
        (["--option", "where={"], "no YAML"),
        (["--option", "columns=1", "--option", "columns.image=path"], "plain value already"),
        (["--option", "wher=1"], "no argument 'wher'; did you mean where"),
        (["--option", "table=study.csv"], "did you mean studies.csv"),
        (["--root", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, table, more, match):
    with pytest.raises(SistaError, match=match) as error:
        prepare(table, tmp_path / "store", *more)
    assert "\n" not in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["raw"]


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(SistaError, match="unknown data format 'mimic-cxr'; did you mean mimic_cxr"):
        main(["prepare", "mimic-cxr", "--root", str(tmp_path), "--out", str(tmp_path / "store")])
    with pytest.raises(SistaError, match="not a prepared store"):
        main(["show", str(tmp_path)])


@pytest.mark.parametrize("argv", [[], ["prepare"], ["phantom"], ["show"]])
def test_help_teaches(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "sista data" in out
    if argv in ([], ["prepare"]):
        assert "sista data prepare table" in out
    if argv == ["prepare"]:
        options = out.split("Options of a reader")[1]
        for name, told in re.findall(r"^  (\w+)  ((?:.*\n(?:   .*\n)*))", options, re.M):
            for option in list(inspect.signature(READERS[name]).parameters)[1:]:
                assert re.search(rf"\b{option}[.=]", told), (name, option)


def test_neither_torch_nor_lightning_is_imported(tmp_path, table):
    program = f"""
import sys
from sista_pl.commands.data import main
main(["prepare", "table", "--root", {str(table)!r}, "--out", {str(tmp_path / "store")!r}, "--size", "16"])
main(["show", {str(tmp_path / "store")!r}])
print(sorted({{"torch", "pytorch_lightning", "lightning", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_array_job(tmp_path, table, capsys):
    assert prepare(table, tmp_path / "store", "--shard", "1/2") == 0
    assert "part 1 of 2 is done" in capsys.readouterr().out
    assert prepare(table, tmp_path / "store", "--shard", "0/2") == 0
    assert "listed in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        prepare(table, tmp_path / "store", "--shard", "2/2")
    assert "the first of four is 0/4" in capsys.readouterr().err
