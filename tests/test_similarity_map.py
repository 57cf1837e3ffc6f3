"""The map of a phrase against a slow loop over words and patches."""

import pytest
import torch

from sista_pl.similarity_map import content_words, similarity_map, upsample
from sista_pl.words import word_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_slow_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    words, patches = torch.randn(5, 8, generator=generator).to(dtype), torch.randn(9, 8, generator=generator).to(dtype)
    used = torch.tensor([True, False, True, True, False])
    found = similarity_map(words, patches, used)
    assert found.dtype == torch.float32
    for p in range(9):
        cosines = [torch.cosine_similarity(words[n].float(), patches[p].float(), dim=0) for n in range(5) if used[n]]
        assert found[p // 3, p % 3] == pytest.approx(float(sum(cosines)) / 3, abs=1e-5)
    assert torch.allclose(similarity_map(words[used], patches), found, atol=1e-6)


def test_many_phrases_of_many_images_at_once():
    words, patches, used = torch.randn(3, 4, 8), torch.randn(2, 16, 8), torch.rand(3, 4) < 0.5
    used[:, 0] = True
    found = similarity_map(words, patches[:, None], used)
    assert found.shape == (2, 3, 4, 4)
    for b in range(2):
        for n in range(3):
            assert torch.allclose(found[b, n], similarity_map(words[n], patches[b], used[n]), atol=1e-6)


def test_a_patch_is_highest_in_its_own_pixels():
    maps = torch.zeros(2, 1, 6, 6)
    maps[0, 0, 2, 4], maps[1, 0, 0, 5] = 1, 1
    grown = upsample(maps, 96)
    assert grown.shape == (2, 1, 96, 96)
    for b, (y, x) in enumerate(((2, 4), (0, 5))):
        ys, xs = (grown[b, 0] >= grown[b, 0].max() - 1e-6).nonzero(as_tuple=True)
        assert (ys // 16 == y).all()
        assert (xs // 16 == x).all()


def test_words_that_say_where_to_look():
    ids = torch.tensor([word_id("pneumothorax"), -word_id("effusion"), word_id("the"), 0, word_id("left")])
    assert content_words(ids).tolist() == [True, False, False, False, True]
