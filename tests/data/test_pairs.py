from types import SimpleNamespace

import pytest

from sista_pl.data.pairs import PairDataModule
from sista_pl.data.reports import normalise_mgca
from sista_pl.errors import SistaError


def module(store, **more):
    return PairDataModule(store, size=64, similarity=None, **more)


def test_texts_are_normalised_as_asked(phantom_store):
    plain, mgca = module(phantom_store), module(phantom_store, text={"normalize": "mgca"})
    for data in (plain, mgca):
        data.setup("fit")
    manifest = plain.store.manifest
    rows = [int(rows[0]) for rows in plain.rows.values()]
    for row in rows:
        text = f"{manifest['impression'][row]} {manifest['findings'][row]}".strip()
        assert plain.reports[plain.report_ids[row]] == text
        assert mgca.reports[mgca.report_ids[row]] == normalise_mgca(text) != text


@pytest.mark.parametrize(
    ("text", "line"),
    [({"normalize": "mcga"}, "text.normalize is 'mcga'; did you mean mgca"),
     ({"normalise": "mgca"}, "no key 'normalise'; did you mean normalize")],
)  # fmt: skip
def test_a_misspelt_normalisation_is_one_line(phantom_store, text, line):
    with pytest.raises(SistaError, match=line):
        module(phantom_store, text=text)


def test_a_place_in_other_data_is_refused(phantom_store):
    data = module(phantom_store)
    data.setup("fit")
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    state = data.state_dict()
    assert state["split"] == data.store.info["split"]
    data.load_state_dict(state)
    assert data.position == {"batches": 0}
    with pytest.raises(SistaError, match=r"trained on other data .*needs the same store"):
        data.load_state_dict(state | {"data": "0" * 64})
    data.position, data.trainer.state.fn = None, "test"
    data.load_state_dict(state | {"data": "0" * 64})
    assert data.position is None
