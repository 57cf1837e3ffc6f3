"""Report similarity: what it is fitted on, its calibration against slow loops, its sources and its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sista_pl.data import similarity as module
from sista_pl.data.similarity import SOURCES, fit_similarity
from sista_pl.errors import SistaError

REPORTS = [
    "The heart is normal. Lungs are clear.",
    "No effusion or pneumothorax. Normal heart size.",
    "Cardiomegaly.",
    "Left pleural effusion with basal atelectasis.",
    "Right upper lobe opacity, possibly pneumonia.",
    "Scoliosis. The lungs are hyperinflated.",
    "Zebra stripes and zebra spots beside a walrus.",
]
TRAIN = np.array([0, 1, 2, 2, 3, 4, 0, 5, 2])


@pytest.mark.parametrize("source", ["findings", "tfidf"])
def test_offset_and_shares_equal_the_double_loop(source: str) -> None:
    got = fit_similarity(REPORTS, TRAIN, source)
    pairs = [(i, j) for i in range(len(TRAIN)) for j in range(len(TRAIN)) if i != j]
    s = [float(got.vectors[TRAIN[i]] @ got.vectors[TRAIN[j]]) for i, j in pairs]
    assert got.offset == pytest.approx(np.mean(s), abs=1e-6)
    assert got.identical_pairs == pytest.approx(np.mean([TRAIN[i] == TRAIN[j] for i, j in pairs]))
    assert got.repeated_images == pytest.approx(5 / 9)
    # every other study is in the sample here, so that its mean is that of all pairs: 0 after centring
    assert got.sample.shape == (9, 8)
    assert got.sample.dtype == np.float32
    assert got.sample.mean() == pytest.approx(0, abs=1e-6)
    assert sorted(got.sample.ravel()) == pytest.approx(sorted((np.array(s) - got.offset) / (1 - got.offset)), abs=1e-5)


@pytest.mark.parametrize("of", ["findings", {"name": "tfidf", "dimensions": 3}])
def test_permuted_gives_each_vector_to_one_report_and_not_its_own(of) -> None:
    plain, permuted = fit_similarity(REPORTS, TRAIN, of), fit_similarity(REPORTS, TRAIN, {"name": "permuted", "of": of})
    assert sorted(map(tuple, permuted.vectors.tolist())) == sorted(map(tuple, plain.vectors.tolist()))
    own = [
        np.array_equal(moved, vector)
        for moved, vector in zip(permuted.vectors, plain.vectors, strict=True)
        if (plain.vectors == vector).all(1).sum() == 1  # that no other text has as well
    ]
    assert own
    assert not any(own)
    again = fit_similarity(REPORTS, TRAIN, {"name": "permuted", "of": of})
    assert np.array_equal(again.vectors, permuted.vectors)


def test_no_calibration() -> None:
    got, centred = (fit_similarity(REPORTS, TRAIN, calibration=c) for c in ("none", "center"))
    assert got.offset == 0
    np.testing.assert_allclose((got.sample - centred.offset) / (1 - centred.offset), centred.sample, atol=1e-6)


@pytest.mark.parametrize("source", ["findings", "tfidf", {"name": "tfidf", "dimensions": 3}])
def test_vectors_are_unit_rows_for_all_reports(source) -> None:
    got = fit_similarity([*REPORTS, ""], TRAIN, source)
    assert got.vectors.dtype == np.float32
    assert got.vectors.shape[0] == len(REPORTS) + 1
    assert got.vectors.shape[1] <= 1024
    np.testing.assert_allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=1e-5)


def test_sample_is_seeded_bounded_and_never_a_study_with_itself() -> None:
    reports = [f"word{i} word{i + 1}" for i in range(1500)]
    train = np.arange(1400)
    got, again, other = (fit_similarity(reports, train, "tfidf", seed=seed) for seed in (0, 0, 1))
    assert got.sample.shape == (256, 1024)
    np.testing.assert_array_equal(got.sample, again.sample)
    assert not np.array_equal(got.sample, other.sample)
    distinct = fit_similarity([f"a{i}" for i in range(300)], np.arange(300), {"name": "tfidf", "dimensions": 1023})
    assert distinct.sample.max() < 0.999


def test_repeats_occur_in_the_sample() -> None:
    got = fit_similarity(["edema", "scoliosis"], np.array([0] * 50 + [1]), calibration="none")
    assert got.sample.shape == (51, 50)
    assert (got.sample > 0.999).sum() == 50 * 49


def test_tfidf_sees_the_training_split_only() -> None:
    changed = [*REPORTS[:-1], "Giraffe stripes and zebra spots beside a giraffe."]
    one, two = (fit_similarity(reports, TRAIN, "tfidf") for reports in (REPORTS, changed))
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert one.offset == two.offset
    seen = fit_similarity(changed, np.append(TRAIN, 6), "tfidf")
    assert not np.allclose(one.vectors[:6] @ one.vectors[:6].T, seen.vectors[:6] @ seen.vectors[:6].T)


def test_tfidf_reads_letters_of_any_script() -> None:
    reports = ["сердце нормальное", "сердце увеличено", "æøå ñandú", "сердце нормальное"]
    s = fit_similarity(reports, np.array([0, 1, 2]), "tfidf").vectors
    assert s[0] @ s[3] == pytest.approx(1)
    assert 0 < s[0] @ s[1] < 0.9
    assert s[0] @ s[2] == pytest.approx(0, abs=1e-6)


def test_report_is_plain() -> None:
    figures = fit_similarity(REPORTS, TRAIN).report()
    assert figures == json.loads(json.dumps(figures))
    assert figures["source"] == "findings"
    # 0 and 1 are both normal (studies 0, 1, 6), 2 stands three times: 6 + 6 of 72 ordered pairs
    assert figures["equal_semantics"] == pytest.approx(12 / 72)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit_similarity(REPORTS, TRAIN, "tfidf", cache=tmp_path / "deep")
    (file,) = (tmp_path / "deep").iterdir()
    assert file.name.startswith("similarity-tfidf-")
    assert file.suffix == ".npz"

    def never(*_):
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(SOURCES["tfidf"], "vectors", never)
        second = fit_similarity(REPORTS, TRAIN, "tfidf", cache=tmp_path / "deep")
        assert second.report() == first.report()
        np.testing.assert_array_equal(second.vectors, first.vectors)
        np.testing.assert_array_equal(second.sample, first.sample)
        changes = [
            {"reports": [*REPORTS[:-1], "other"]},
            {"train": TRAIN[::-1]},
            {"seed": 1},
            {"calibration": "none"},
            {"source": {"name": "tfidf", "dimensions": 2}},
        ]
        for change in changes:
            arguments = {"reports": REPORTS, "train": TRAIN, "source": "tfidf"} | change
            with pytest.raises(AssertionError, match="not used"):
                fit_similarity(**arguments, cache=tmp_path / "deep")
        patch.setattr(module, "VERSION", module.VERSION + 1)
        with pytest.raises(AssertionError, match="not used"):
            fit_similarity(REPORTS, TRAIN, "tfidf", cache=tmp_path / "deep")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", None])
def test_damaged_cache_is_computed_again(tmp_path: Path, damage: bytes | None) -> None:
    first = fit_similarity(REPORTS, TRAIN, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    again = fit_similarity(REPORTS, TRAIN, cache=tmp_path)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert list(tmp_path.iterdir()) == [file]
    assert module._load(file) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "finding"}, "did you mean findings"),
        ({"source": {"name": "tfidf", "dims": 3}}, "has no argument"),
        ({"source": {"name": "tfidf", "dimensions": 2000}}, "choose 1 to 1023"),
        ({"source": "frozen_text"}, "model"),
        ({"source": {"name": "frozen_text", "model": "x", "pooling": "max"}}, "pooling"),
        ({"calibration": "centre"}, "did you mean center"),
        ({"train": np.array([0])}, "at least two"),
        ({"train": np.array([0, 7])}, "indices"),
        ({"train": np.array([0, 1])}, "all training reports are alike"),
        ({"reports": ["", "", "word"], "train": np.array([0, 1]), "source": "tfidf"}, "have words"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:
    with pytest.raises(SistaError, match=message):
        fit_similarity(**{"reports": REPORTS, "train": TRAIN} | arguments)


def test_source_of_a_plug_in_is_held_to_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long:
        def vectors(self, reports, train):
            return np.full((len(reports), 4), 3.0)

        def fingerprint(self):
            return ""

    monkeypatch.setitem(SOURCES._builders, "long", Long)
    with pytest.raises(SistaError, match="unit rows"):
        fit_similarity(REPORTS, TRAIN, "long")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, as save_pretrained leaves it."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word.strip(".,").lower() for report in REPORTS for word in report.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *words]))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words) + 7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_frozen_text_equals_one_report_at_a_time(encoder: Path, pooling: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = {"name": "frozen_text", "model": str(encoder), "pooling": pooling, "batch_size": 3}
    got = fit_similarity(REPORTS, TRAIN, spec).vectors
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for report, vector in zip(REPORTS, got, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(report, return_tensors="pt")).last_hidden_state[0]
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-5)


def test_frozen_text_cuts_long_reports_and_notices_new_weights(encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "model")
    spec = {"name": "frozen_text", "model": str(folder), "max_tokens": 6}
    reports = ["cardiomegaly . " * 200, "cardiomegaly . " * 300, "scoliosis ."]
    got = fit_similarity(reports, np.array([0, 2]), spec, cache=tmp_path / "cache")
    np.testing.assert_allclose(got.vectors[0], got.vectors[1], atol=1e-6)
    (folder / "note.txt").write_text("other weights")
    fit_similarity(reports, np.array([0, 2]), spec, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_frozen_text_of_weights_that_did_not_load_is_refused(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"tower.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(SistaError, match="its weights lack"):
        fit_similarity(REPORTS, TRAIN, {"name": "frozen_text", "model": str(folder)})


def test_frozen_text_of_more_tokens_than_the_model_takes(encoder: Path) -> None:
    with pytest.raises(SistaError, match="max_tokens is 600; this model takes 4 to 128"):
        fit_similarity(REPORTS, TRAIN, {"name": "frozen_text", "model": str(encoder), "max_tokens": 600})


def test_frozen_text_without_a_network_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub\nmore lines")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(SistaError, match=r"couldn't connect.*local folder") as caught:
        fit_similarity(REPORTS, TRAIN, {"name": "frozen_text", "model": "some/encoder"})
    assert "\n" not in str(caught.value)
