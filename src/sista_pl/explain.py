"""Where in a film the words of a text light up, in the film's own pixels.

h w cells of the encoder's grid, P = h w patches, L words, E joint dimension, H W pixels of the upright original.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sista_pl.data import transforms
from sista_pl.data.images import _scaled, fit, read_gray
from sista_pl.embed import Joint, Preparation
from sista_pl.errors import SistaError
from sista_pl.losses.token import SparseTokenAlignment
from sista_pl.models.attention import AllAttention, roll_out
from sista_pl.models.huggingface import HuggingFaceEncoder
from sista_pl.models.image import ImageEncoder, TimmEncoder
from sista_pl.models.tokens import surfaces
from sista_pl.similarity_map import content_words, similarity_map


@dataclass
class Query:
    """A text, ready to be laid over films.

    Args:
        text: as it was given.
        words: its content words, each once; none where the checkpoint compares no words with patches.
        negated: whether each stands inside a negation.
        pieces: sub-word tokens of each; many of them: hardly a word of the training reports.
        vectors: (L, E) of the words; without words (1, E), the projected text as a whole.
        used: (L,) bool, the vectors that the map of the text is the mean of: the words that are not negated, or all
            where each is.
        notes: what the reader should know, a line each.
    """

    text: str
    words: list[str]
    negated: list[bool]
    pieces: list[int]
    vectors: Tensor
    used: Tensor
    notes: list[str] = field(default_factory=list)


@dataclass
class Maps:
    """What a film has to say to a query, on the encoder's grid.

    Args:
        whole: (h, w) mean cosine of the words of the text and each patch.
        words: (L, h, w) cosine of each word and each patch.
        weights: (L, h, w) of the checkpoint's sparse selection, or None; a word's sum to 1, or to 0 where the patches
            choose the words and none chose it.
        rollout: (h, w) share of the attention that reaches each patch, summing to 1 at most, or None.
    """

    whole: np.ndarray
    words: np.ndarray
    weights: np.ndarray | None
    rollout: np.ndarray | None


@torch.inference_mode()
def ask(joint: Joint, text: str, how: Preparation) -> Query:
    """Encode a text.

    Raises:
        SistaError: a text without a content word that the tokenizer knows.
    """
    clean = how.text(text)
    if not clean:
        raise SistaError(f'--text {text!r}: no word in it; give a finding, as "left pleural effusion"')
    table = joint.text_encoder.tokenize([clean])
    tokenizer = joint.text_encoder.tokenizer
    assert tokenizer is not None
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "[UNK]")
    written = surfaces(tokenizer, clean)
    of_word = [table.tokens[table.place == place] for place in range(len(written))]
    lost = [word for word, ids in zip(written, of_word, strict=True) if unknown is not None and (ids == unknown).all()]
    notes = [f"unknown to its tokenizer, left out: {', '.join(lost)}"] if lost else []
    if table.truncated:
        notes.append(f"longer than {joint.text_encoder.max_tokens} tokens, the rest is cut off")
    chosen: dict[int, list[int]] = {}  # identity → its places; a word that is said twice is one
    telling = content_words(torch.from_numpy(table.words).abs()).tolist()
    for place, (word, identity) in enumerate(zip(written, table.words.tolist(), strict=True)):
        if telling[place] and word not in lost and any(letter.isalpha() for letter in word):
            chosen.setdefault(identity, []).append(place)
    if not chosen:
        why = f"its tokenizer knows none of {', '.join(lost)}" if lost else "it names no finding, only common words"
        raise SistaError(f'--text {text!r}: {why}; give words of the training reports, as "left pleural effusion"')
    found = joint.encode_text([clean])
    if not joint.tokens_trained:
        notes.append(
            "its losses compare whole films with whole reports and no words with patches: shown is the map of the "
            "whole text, through the projection of whole films, which was never trained on patches"
        )
        return Query(text, [], [], [], found.pooled, torch.ones(1, dtype=torch.bool, device=joint.device), notes)
    vectors = torch.stack([found.local[0, places].mean(0) for places in chosen.values()])  # L E
    negated = [identity < 0 for identity in chosen]
    if all(negated):
        notes.append("each of its words is negated: the map shows where they are most alike, not where nothing is")
    used = torch.tensor([all(negated) or not no for no in negated], device=joint.device)
    words = [written[places[0]] for places in chosen.values()]
    pieces = [len(of_word[places[0]]) for places in chosen.values()]
    return Query(text, words, negated, pieces, vectors, used, notes)


@torch.inference_mode()
def look(joint: Joint, query: Query, image: Tensor) -> Maps:
    """Compare a film with a query.

    Args:
        image: (1, 1, crop, crop) in [-1, 1].

    Raises:
        SistaError: a checkpoint without a trained projection of patches, whose encoder gives no map of whole films.
    """
    with AllAttention() as watched:
        found = joint.image_encoder(image.to(joint.device))
    if joint.tokens_trained:
        patches = joint.image_head.local(found.local)[0]  # P E
    else:
        patches = joint.image_head.pooled(pooled_cells(joint.image_encoder, image.to(joint.device), found.local))[0]
    grid = (round(len(patches) ** 0.5),) * 2
    if grid[0] * grid[1] != len(patches):
        raise SistaError(f"the image encoder gives {len(patches)} patches, no square grid; nothing can be shown")
    weights: Tensor | None = None
    loss = selection(joint)
    if query.words and loss is not None:
        if loss.direction == "patch_to_word":
            weights = loss._weights(patches, query.vectors).T  # P L → L P
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
        else:
            weights = loss._weights(query.vectors, patches)  # L P
    rollout = None
    if joint.image_encoder.has_tokens:
        classes = getattr(joint.image_encoder, "class_token", True)
        rollout = roll_out(watched.seen, found.local.shape[1], classes)

    def shaped(values: Tensor | None, *lead: int) -> np.ndarray | None:
        return None if values is None else values.reshape(*lead, *grid).cpu().numpy()

    return Maps(
        similarity_map(query.vectors, patches, query.used).cpu().numpy(),
        similarity_map(query.vectors[:, None], patches)[: len(query.words)].cpu().numpy(),
        shaped(weights, -1), shaped(rollout),
    )  # fmt: skip


def selection(joint: Joint) -> SparseTokenAlignment | None:
    """Return the loss whose sparse selection the checkpoint was trained with, or None."""
    return next((loss for loss in joint.losses.values() if isinstance(loss, SparseTokenAlignment)), None)


def pooled_cells(encoder: ImageEncoder, image: Tensor, local: Tensor) -> Tensor:
    """Return one vector a cell, (1, P, D), in the place that the pooled vector has in the encoder.

    Args:
        encoder: of a checkpoint.
        image: (1, 1, H, W) in [-1, 1].
        local: (1, P, D) that the encoder gives of it.

    Raises:
        SistaError: an encoder that weighs its cells to pool them.
    """
    model: Any = getattr(encoder, "model", None)
    found: Tensor | None = None
    if encoder.has_tokens and encoder.local_dim == encoder.dim:
        if isinstance(encoder, TimmEncoder) and getattr(model, "attn_pool", None) is None:
            # as a sequence of its own, in all its places: whichever the head takes
            found = model.forward_head(local[0, :, None].expand(-1, model.num_prefix_tokens + 1, -1), pre_logits=True)
        elif isinstance(encoder, HuggingFaceEncoder) and getattr(model, "head", None) is None:
            found = encoder.tokens(image)[-1][0][0].flatten(1).T  # normalised, as what is pooled
        elif not isinstance(encoder, TimmEncoder | HuggingFaceEncoder):
            return local
    elif isinstance(encoder, TimmEncoder) and not encoder.has_tokens:
        last, _ = model.forward_intermediates(encoder.renormalise(image), output_fmt="NCHW")  # 1 D h w
        cells = last[0].flatten(1).T[:, :, None, None]  # each cell as an image of its own
        try:
            found = model.forward_head(cells.contiguous(), pre_logits=True)
        except RuntimeError:  # a head that takes another form
            found = None
    if found is not None and found.shape[1:] == (encoder.dim,):
        return found[None]
    raise SistaError(
        f"checkpoint: its losses compare no words with patches, and {getattr(encoder, 'name', 'its encoder')!r} pools "
        "films in a way that has no map; nothing can be shown, train with a token loss (`sista list losses`)"
    )


# --- the way back to the original's pixels ------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where the encoder's grid lies in a film: resize to the long side, padding, centre crop, undone.

    Args:
        width: pixels of the upright original.
        height: the same.
        how: size and crop.
    """

    width: int
    height: int
    how: Preparation

    def _axes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return (pixels, pixels in the square, offset in the square) along y and along x."""
        across, down = _scaled(self.width, self.height, self.how.size)
        _, dx, dy = fit(self.width, self.height, self.how.size)
        return (self.height, down, dy), (self.width, across, dx)

    def unfit(self, values: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Return a map of the grid (h, w) over the film, bilinear between the centres of cells.

        Args:
            values: (h, w), cells that tile the crop evenly.
            shape: rows and columns that the film is drawn with; (H, W) where not given.

        Returns:
            (rows, columns) float32, NaN where the encoder saw nothing.
        """
        rows, columns = shape or (self.height, self.width)
        (_, down, dy), (_, across, dx) = self._axes()
        vertical, seen_y = self._interpolation(rows, down, dy, values.shape[0])
        horizontal, seen_x = self._interpolation(columns, across, dx, values.shape[1])
        out = (vertical @ values.astype(np.float32) @ horizontal.T).astype(np.float32)
        out[~seen_y] = np.nan
        out[:, ~seen_x] = np.nan
        return out

    def _interpolation(self, count: int, scaled: int, offset: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (count, cells) of the cells for each pixel centre, and whether the encoder saw it."""
        crop, off = self.how.crop, (self.how.size - self.how.crop) // 2
        inside = (np.arange(count) + 0.5) / count * scaled + offset - off  # in pixels of the crop
        place = np.clip(inside / crop * cells - 0.5, 0, cells - 1)
        low = np.minimum(place.astype(int), max(0, cells - 2))
        weights = np.zeros((count, cells), np.float32)
        share = (place - low).astype(np.float32)
        each = np.arange(count)
        weights[each, low] = 1 - share
        weights[each, np.minimum(low + 1, cells - 1)] += share
        return weights, (inside >= 0) & (inside < crop)

    def boxes(self, chosen: np.ndarray) -> np.ndarray:
        """Return the cells where (h, w) bool is True as boxes (M, 4) x0 y0 x1 y1 in pixels of the original.

        A cell over the padding alone has no box, one over the edge is cut.
        """
        rows, columns = np.nonzero(chosen)
        edges = []
        for (pixels, scaled, offset), cells, first in zip(self._axes(), chosen.shape, (rows, columns), strict=True):
            off = (self.how.size - self.how.crop) // 2
            lines = (np.arange(cells + 1) / cells * self.how.crop + off - offset) / scaled * pixels
            lines = np.clip(lines, 0, pixels)
            edges.append((lines[first], lines[first + 1]))
        (top, bottom), (left, right) = edges
        found = np.stack([left, top, right, bottom], 1)
        return found[(right > left) & (bottom > top)]


def read_film(file: Path, how: Preparation) -> Tensor:
    """Return a film as the encoder wants it, (1, 1, crop, crop) in [-1, 1].

    Raises:
        BadImage: as `read_gray`.
    """
    square = torch.from_numpy(read_gray(file, how.size))[None, None]
    return transforms.normalise(transforms.build(how.size, how.crop, train=False)(square))


def show_film(file: Path, width: int, height: int, longest: int = 1024) -> np.ndarray:
    """Return the whole film (rows, columns) uint8 in its own aspect, its long side at most `longest` pixels."""
    side = min(longest, max(width, height))
    across, down = _scaled(width, height, side)
    _, dx, dy = fit(width, height, side)
    return read_gray(file, side)[dy : dy + down, dx : dx + across]
