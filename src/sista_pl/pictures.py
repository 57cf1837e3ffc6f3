"""The picture of an epoch: report words over image patches.

P patches, L words.
"""

from __future__ import annotations

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import FSDPStrategy

from sista_pl import tracking
from sista_pl.callbacks import PHANTOM, RunFolder
from sista_pl.data import transforms
from sista_pl.figures import WordMaps, draw_word_maps, informative
from sista_pl.models.tokens import surfaces
from sista_pl.words import STOP_WORDS, word_id


class WordMapPicture(Callback):
    """Draws, after each validation, where the words of a few fixed validation reports light up.

    Args:
        studies: rows of the picture.
        words: maps a study.
    """

    def __init__(self, studies: int = 4, words: int = 4):
        self.studies, self.words = studies, words

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, task) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not task.needs_tokens or trainer.state.fn != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy):  # this rank alone has but a share of the parameters
            return
        data = trainer.datamodule
        transform = transforms.build(data.size, data.crop, train=False)
        rows, maps = self._rows(data), []
        tokens = task.tokens.batch([int(data.report_ids[row]) for row in rows])
        images = transforms.normalise(transform(torch.from_numpy(data.store.images(rows))[:, None]))
        words = task.encode_text({k: v.to(task.device) for k, v in tokens.items()})
        patches = task.encode_image(images.to(task.device, task.dtype))
        similarity = torch.nn.functional.normalize(words.local.float(), dim=-1) @ torch.nn.functional.normalize(
            patches.local.float(), dim=-1
        ).transpose(1, 2)  # B L P
        side = round(similarity.shape[2] ** 0.5)
        for i, row in enumerate(rows):
            report = data.reports[data.report_ids[row]]
            written = surfaces(task.text_encoder.tokenizer, report)
            ids = words.ids[i, : len(written)].tolist()
            usable = [j > 0 and j not in _STOP and w.isalpha() for j, w in zip(ids, written, strict=True)]
            values = similarity[i, : len(written)].cpu().numpy()
            chosen = informative(written, values, usable, self.words)
            maps.append(
                WordMaps(
                    images[i, 0].numpy() * transforms.STD + transforms.MEAN, report, [written[j] for j in chosen],
                    [values[j].reshape(side, side) for j in chosen],
                )
            )  # fmt: skip
        folder = next(c for c in trainer.callbacks if isinstance(c, RunFolder))
        path = folder.path / "pictures" / f"words-epoch-{trainer.current_epoch:03d}.png"
        title = f"{folder.name}, epoch {trainer.current_epoch}: report words over patches (brighter: more alike)"
        draw_word_maps(maps, path, title + (f"\n{PHANTOM}" if data.store.phantom else ""))
        tracking.publish(trainer, path, "pictures")

    def _rows(self, data) -> list[int]:
        """Return the validation studies whose reports have the most words that are neither negated nor boilerplate."""
        rows = data.rows["val"][:256]
        table = data.trainer.lightning_module.tokens
        score = []
        for row in rows:
            report = data.report_ids[row]
            words = table.words[table.word_start[report] : table.word_start[report + 1]]
            score.append(sum(1 for w in words.tolist() if w > 0 and w not in _STOP) / (1 + len(words)))
        return [int(rows[i]) for i in np.argsort(score)[::-1][: self.studies]]


_STOP = {word_id(word) for word in STOP_WORDS}
