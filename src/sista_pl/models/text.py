"""Text encoders: any Hugging Face encoder, or a small BERT from scratch whose tokenizer is trained on the corpus.

B reports, T sub-word tokens, L words, D dimension.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import pad

from sista_pl.errors import SistaError
from sista_pl.models.attention import run_once, watching
from sista_pl.models.hub import offline_where_unreachable
from sista_pl.models.tokens import TokenTable, tokenize
from sista_pl.pair import Features
from sista_pl.registry import Registry

PARTS = 4  # of a batch of reports: more save little padding and make the matrices small
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class TextEncoder(nn.Module):
    """A transformer encoder whose sub-word outputs are summed into words.

    The tokenizer and the model's configuration are part of the state dict (as bytes), so a checkpoint rebuilds the
    encoder without a hub and without the corpus.

    Args:
        model: a transformers encoder, head-less.
        tokenizer: a fast tokenizer, or None until `fit` has trained one.
        max_tokens: longest report in sub-word tokens, special tokens included; the rest is cut off.
        pooling: `cls` (first token) or `mean` over the real tokens.
        frozen: no gradient, and always in eval mode.

    Attributes:
        dim: D of `pooled`.
        local_dim: D of `local`.
        needs_attention: whether `forward` gives `attention`; `ask_attention` sets it.
    """

    needs_attention = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        max_tokens: int = 112,
        pooling: str = "cls",
        frozen: bool = False,
    ):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise SistaError(f"text encoder: pooling is {pooling!r}; write cls or mean")
        longest = _longest(model, max_tokens)
        if not 4 <= max_tokens <= longest:
            raise SistaError(f"text encoder: max_tokens is {max_tokens}; this model takes 4 to {longest}")
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.pooling, self.frozen = max_tokens, pooling, frozen
        self.dim = self.local_dim = model.config.hidden_size
        if frozen:
            self.requires_grad_(False)
            self.train(False)

    def train(self, mode: bool = True) -> TextEncoder:
        return super().train(mode and not self.frozen)

    def fit(self, texts: Iterable[str]) -> None:
        """Train a WordPiece tokenizer on the texts, unless the encoder has one."""
        if self.tokenizer is None:
            self.tokenizer = train_wordpiece(texts, self.model.config.vocab_size)  # type: ignore[arg-type]

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize reports once; batches are cut from the table."""
        if self.tokenizer is None:
            raise SistaError("text encoder: it has no tokenizer yet; fit() trains one, a checkpoint brings one")
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def ask_attention(self) -> None:
        """Let `forward` give the attention of the first token, [CLS], to the words.

        Raises:
            SistaError: a model whose attention can't be read.
        """
        self.needs_attention = True
        ids = torch.zeros(1, 2, dtype=torch.long)
        run_once(self, {"input_ids": ids, "attention_mask": ids + 1, "word_index": ids, "word_ids": ids[:, :1] + 1})

    def forward(self, tokens: dict[str, Tensor]) -> Features:
        """Encode a batch of a `TokenTable`.

        Args:
            tokens: `input_ids` (B, T), `attention_mask` (B, T), `word_index` (B, T) int64 place of the token's word
                in the report or -1, `word_ids` (B, L) int64 signed word identities, 0 for padding.

        Returns:
            pooled (B, D), local (B, L, D) sums over a word's sub-words, mask and ids (B, L), and attention (B, L)
            where it was asked for.
        """
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        place, length = tokens["word_index"], tokens["word_ids"].shape[1]
        with watching(self.needs_attention) as watched:
            hidden = self._hidden(ids, mask)
        attention = None
        if watched is not None:
            weights = watched.weights(f"text encoder {self.model.config.model_type!r}", ids.shape[1])  # B T
            attention = sum_words(weights.unsqueeze(-1), place, length).squeeze(-1)  # B L
        real = mask.unsqueeze(-1)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * real).sum(1) / real.sum(1).clamp_min(1)
        words = tokens["word_ids"]
        return Features(pooled, sum_words(hidden, place, length), words != 0, words, attention)

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model over a batch in parts of like length, each as long as its own longest report: (B, T, D).

        Padding is computed like words; a batch as long as its longest report is mostly padding. On an accelerator it
        is one call: the lengths would have to be waited for.
        """
        whole = self.needs_attention or torch.compiler.is_compiling()  # whose weights, and whose graph, are of one call
        if whole or ids.device.type != "cpu":
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)  # after the last real token
        order = ends.argsort()
        found = []
        for rows in order.chunk(PARTS):
            end = int(ends[rows[-1]])
            hidden = self.model(input_ids=ids[rows, :end], attention_mask=mask[rows, :end]).last_hidden_state
            found.append(pad(hidden, (0, 0, 0, mask.shape[1] - end)))
        return torch.cat(found)[order.argsort()]

    def get_extra_state(self) -> Tensor:
        state = {
            "config": self.model.config.to_dict(),
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_str(),
        }
        return torch.frombuffer(bytearray(json.dumps(state, default=str).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        tokenizer = json.loads(bytes(state.cpu().numpy().tobytes()))["tokenizer"]
        if tokenizer is not None:
            self.tokenizer = Tokenizer.from_str(tokenizer)


def sum_words(hidden: Tensor, word_index: Tensor, length: int) -> Tensor:
    """Sum sub-word vectors (B, T, D) into words (B, L, D); tokens with index -1 belong to no word."""
    batch, _, dim = hidden.shape
    place = torch.where(word_index < 0, length, word_index)  # one more row collects what is no word
    words = hidden.new_zeros(batch, length + 1, dim)
    words = words.scatter_add(1, place.unsqueeze(-1).expand(-1, -1, dim), hidden)
    return words[:, :length]


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer, BERT's kind; the same texts give the same tokenizer.

    The trainer numbers the pieces inside words (`##e`) in the order of a hash map, which differs from process to
    process. Given as special tokens they have their numbers before it starts; the tokenizer that is returned is built
    from the vocabulary alone.
    """
    texts = list(texts)
    draft = _wordpiece()
    words = (draft.normalizer.normalize_str(text) for text in texts)
    alphabet = sorted({letter for text in words for letter in text if not letter.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(SPECIAL) + 2 * len(alphabet)), min_frequency=2,
        special_tokens=SPECIAL + [f"##{letter}" for letter in alphabet], show_progress=False,
    )  # fmt: skip
    draft.train_from_iterator(texts, trainer)
    if draft.get_vocab_size() > vocab_size:
        raise SistaError(
            f"text encoder: vocab_size is {vocab_size} but the reports alone have {len(alphabet)} letters and signs; "
            f"give at least {draft.get_vocab_size()}"
        )
    tokenizer = _wordpiece(draft.get_vocab())
    tokenizer.add_special_tokens(SPECIAL)
    place = {token: i for i, token in enumerate(SPECIAL)}
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", place["[SEP]"]), ("[CLS]", place["[CLS]"]))
    return tokenizer


def _wordpiece(vocab: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab or {}, unk_token="[UNK]", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def hugging_face(
    name: str,
    layers: int | None = None,
    pooling: str = "cls",
    max_tokens: int = 112,
    frozen: bool = False,
) -> TextEncoder:
    """Build a text encoder from a hub id or a local folder of Hugging Face.

    Args:
        name: hub id (`emilyalsentzer/Bio_ClinicalBERT`) or folder.
        layers: keep the first n transformer layers; all by default.
        pooling: `cls` or `mean`.
        max_tokens: longest report in sub-word tokens.
        frozen: no gradient, eval mode.

    Raises:
        SistaError: no such folder or hub not reached, weights that don't cover the model, no fast tokenizer, too many
            layers wanted.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    step = "give a local folder with config.json, the weights and tokenizer.json as its name, or use small-bert"
    try:
        with offline_where_unreachable():
            config = AutoConfig.from_pretrained(name)
            if layers is not None:
                if not 1 <= layers <= config.num_hidden_layers:
                    raise SistaError(f"text encoder {name!r}: layers is {layers}; it has {config.num_hidden_layers}")
                config.num_hidden_layers = layers
            model, info = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as why:
        near = difflib.get_close_matches(name, list(TEXT_ENCODERS), n=1, cutoff=0.6)
        if near:
            step = f"did you mean {near[0]}? Else {step}"
        where = "that folder can't be loaded" if Path(name).is_dir() else "it is no folder here, and the hub is no help"
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0][:160]
        raise SistaError(f"text encoder {name!r}: {where} ({reason}); {step}") from why
    if lost := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise SistaError(
            f"text encoder {name!r}: its weights lack {len(lost)} tensors (first: {lost[0]}); is it of this model?"
        )
    return TextEncoder(without_pooler(model), tokenizer, max_tokens, pooling, frozen)


def _longest(model: nn.Module, otherwise: int) -> int:
    """Return how many tokens a model takes; those of RoBERTa's kind count positions from after their padding's."""
    positions = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    first = getattr(positions, "padding_idx", None)
    return getattr(model.config, "max_position_embeddings", otherwise) - (0 if first is None else first + 1)


def without_pooler(model: nn.Module) -> nn.Module:
    """Drop BERT's pooler: nothing uses it, and parameters without a gradient stop DDP."""
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010  a plain assignment of None is no module to mypy
    return model


def from_state(state: Tensor, **options: Any) -> TextEncoder:
    """Rebuild an encoder of the shape that `TextEncoder.get_extra_state` wrote, its weights not yet loaded."""
    from transformers import AutoConfig, AutoModel

    stored = json.loads(bytes(state.cpu().numpy().tobytes()))
    # of half precision would be built what is trained in full
    config = AutoConfig.for_model(**{k: v for k, v in stored["config"].items() if k not in ("dtype", "torch_dtype")})
    model = without_pooler(AutoModel.from_config(config))
    tokenizer = None if stored["tokenizer"] is None else Tokenizer.from_str(stored["tokenizer"])
    return TextEncoder(model, tokenizer, **options)


TEXT_ENCODERS = Registry("text encoder", fallback=hugging_face)


@TEXT_ENCODERS.register("small-bert")
def small_bert(
    layers: int = 2,
    dim: int = 128,
    vocab_size: int = 4096,
    pooling: str = "mean",
    max_tokens: int = 112,
    dropout: float = 0.1,
) -> TextEncoder:
    """Build a small BERT from scratch; its WordPiece tokenizer is trained on the training reports.

    Args:
        layers: transformer layers.
        dim: hidden size, a multiple of 32 (a head is 32 wide).
        vocab_size: most entries that the tokenizer may learn.
        pooling: `mean` (from scratch it learns faster than `cls`) or `cls`.
        max_tokens: longest report in sub-word tokens.
        dropout: of hidden states. Attention has none: random numbers for each pair of tokens would cost a CPU
            more than the attention itself.
    """
    from transformers import BertConfig, BertModel

    if dim % 32 or dim <= 0:
        raise SistaError(f"text encoder 'small-bert': dim is {dim}; give a multiple of 32")
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=dim // 32,
        intermediate_size=4 * dim, max_position_embeddings=max(128, max_tokens),
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return TextEncoder(BertModel(config, add_pooling_layer=False), None, max_tokens, pooling)
