"""Grounding: the map of a phrase's words over an image, against the region that was drawn by hand.

B images, K classes, H W pixels of the encoder's input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_info
from sista_tasks.grounding.frame import OBJECT, centre_map, highest, original_point, regions
from torch import Tensor

from sista_pl.data.images import film
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.evaluation import EvaluationTask
from sista_pl.metrics.grounding import COLUMNS, Grounding, contrast, mean_iou, pointing
from sista_pl.predictions import Predicted
from sista_pl.similarity_map import content_words, similarity_map, upsample

NOWHERE = -1  # x and y of no point
WIDTH = 1 + len(COLUMNS) + 2  # of a class in `Predicted.values`: present, `COLUMNS`, x and y of the highest point


class GroundingTask(EvaluationTask):
    """Where a phrase points on an image, without any training for it.

    The map of a phrase is the mean cosine of its words with the patches, in the joint space of the token loss; negated
    words and boilerplate are left out, and the phrases of a class are averaged. It is brought to the encoder's input by
    bilinear interpolation; padding counts nowhere, so that figures are those of the original frame. Each class is
    measured on the images that show it: `pointing` (highest point inside the region), `cnr` and `miou`, see
    `sista_pl.metrics.grounding`. Beside each stand what a random point would hit and a prior that looks at no image:
    the mean region of the validation split, or the image's centre where that split has no region.

    Args:
        weights: checkpoint of the pre-training, see `EvaluationTask`; without a token loss its maps mean nothing, and
            it says so.
        phrases: by class a phrase or a list of them, as `{opacity: [pneumonia, consolidation]}`; the classes are the
            boxes' categories, or with `target: mask` any one name. None takes the phrases that stand with the boxes of
            each image, as MS-CXR has them.
        draws: bootstrap resamples of the intervals.
    """

    targets = ("mask", "boxes")
    monitor = "val/pointing_macro"

    def __init__(
        self, weights: str | None = None, phrases: dict[str, str | list[str]] | None = None, draws: int = 1000
    ):
        super().__init__(weights, draws)
        self.phrases = {name: [said] if isinstance(said, str) else list(said) for name, said in (phrases or {}).items()}
        self.own = phrases is None
        if not self.own and not (self.phrases and all(self.phrases.values())):
            raise SistaError("model: phrases is empty; give each class one, as {pneumothorax: [pneumothorax]}")
        self.classes = list(self.phrases)
        # a class, or a phrase where they are the images' own: (n, L, D) words of the phrases, (n, L) which count
        self.words: dict[str, tuple[Tensor, Tensor]] = {}
        self.prior = np.zeros((0, 0, 0))  # (K, H, W)
        self.save_hyperparameters()
        self.build()

    def configure_texts(self) -> None:
        for name, phrases in self.phrases.items():
            text = self.joint.encode_text(phrases)
            assert text.ids is not None  # of images alone it is None
            used = content_words(text.ids)
            for phrase, usable in zip(phrases, used.any(1).tolist(), strict=True):
                if not usable:
                    raise SistaError(
                        f"model: phrases of {name!r}: {phrase!r} has no word to look for, negated and boilerplate ones "
                        "left out; name the finding"
                    )
            self.words[name] = text.local, used

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        if self.own:
            self._read_phrases(stage)
        elif data.files:
            pass  # films without regions: each phrase is pointed at
        elif data.target == "boxes":
            for name in data.classes:
                if name not in self.phrases:
                    raise SistaError(f"model: no phrase of {name!r}; {did_you_mean(name, self.phrases)}")
            self.classes = list(data.classes)
        elif len(self.phrases) != 1:
            raise SistaError(f"model: phrases of {', '.join(self.phrases)}, but masks have one class; give one")
        if not self.joint.tokens_trained:
            rank_zero_info(
                "grounding: the pre-training had no token loss, so that its words and patches are not aligned"
            )

    def _read_phrases(self, stage: str) -> None:
        """Embed the phrases that stand with the boxes."""
        data = self.trainer.datamodule
        if data.files or data.target != "boxes":
            raise SistaError("model: phrases is null, and the data group gives no boxes with phrases; give phrases")
        self.classes, self.words = list(data.classes), {}
        rows = np.concatenate(list(data.rows.values())).tolist()
        said = sorted({phrase for row in rows for phrase in data.phrases[row]})
        if "" in said:
            raise SistaError(
                f"model: phrases is null, but boxes of {data.store_path} have none; give model.phrases, by category"
            )
        mute = 0
        for start in range(0, len(said), 64):
            text = self.joint.encode_text(said[start : start + 64])
            assert text.ids is not None  # of images alone it is None
            used = content_words(text.ids)
            silent = ~used.any(1)
            used[silent] = (text.ids != 0)[silent]
            mute += int(silent.sum())
            for place, phrase in enumerate(said[start : start + 64]):
                self.words[phrase] = text.local[place][None], used[place][None]
        if mute:
            rank_zero_info(f"grounding: {mute} phrases are negated or boilerplate as a whole; all their words count")

    def said(self, row: int, k: int) -> list[str]:
        """Return the keys in `words` of what class k is called in an image, [] where it isn't."""
        if not self.own:
            return [self.classes[k]]
        data = self.trainer.datamodule
        return sorted({said for kind, said in zip(data.boxes[row][1], data.phrases[row], strict=True) if kind == k})

    def maps(self, image: Tensor, rows: np.ndarray) -> Tensor:
        """Return the maps (B, K, H, W) of images (B, 1, H, W) of these rows; 0 where an image's phrases name none."""
        if not self.own:
            return self(image)
        patches = self.joint.encode_image(image).local
        side = round(patches.shape[1] ** 0.5)
        found = patches.new_zeros(len(image), len(self.classes), side, side)
        for place, row in enumerate(rows.tolist()):
            for k in range(len(self.classes)):
                each = [[x.to(image.device) for x in self.words[phrase]] for phrase in self.said(row, k)]
                if each:
                    maps = [similarity_map(local, patches[place], used) for local, used in each]
                    found[place, k] = torch.cat(maps).mean(0)
        return upsample(found, image.shape[-1])

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) → maps (B, K, H, W) in [-1, 1]."""
        patches = self.joint.encode_image(image).local[:, None]  # B 1 P D
        maps = []
        for name in self.classes:
            local, used = (x.to(image.device) for x in self.words[name])
            maps.append(similarity_map(local, patches, used).mean(1))
        return upsample(torch.stack(maps, 1), image.shape[-1])

    # --- the baseline ------------------------------------------------------------

    def on_test_start(self) -> None:
        self.prior = self._prior(self.trainer.datamodule.rows["val"])

    def on_validation_start(self) -> None:
        self.prior = self._prior(np.zeros(0, np.int64))  # the split itself would know the answer

    def _prior(self, rows: np.ndarray) -> np.ndarray:
        """Return (K, H, W): of each class the mean region in these images, or the image's centre."""
        data, crop = self.trainer.datamodule, self.trainer.datamodule.crop
        sums, count = np.zeros((len(self.classes), crop, crop)), np.zeros(len(self.classes))
        for row in rows:
            inside = regions(data, int(row), crop) == OBJECT
            sums += inside
            count += inside.any((1, 2))
        if blind := [name for name, images in zip(self.classes, count, strict=True) if not images]:
            names = ", ".join(blind)
            rank_zero_info(f"grounding: no region of {names} in the validation split; its prior is the image's centre")
        middle = centre_map(crop)
        return np.stack([total / n if n else middle for total, n in zip(sums, count, strict=True)])

    # --- the figures -------------------------------------------------------------

    def outputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        maps = self.maps(batch["image"], batch["index"].cpu().numpy()).cpu().numpy()
        values = torch.from_numpy(np.stack([
            self._measure(int(row), found) for row, found in zip(batch["index"].tolist(), maps, strict=True)
        ]))  # fmt: skip
        return {"rows": batch["index"], "values": values.to(batch["index"].device)}

    def _measure(self, row: int, maps: np.ndarray) -> np.ndarray:
        """Return (K · WIDTH,) of an image and its maps (K, H, W)."""
        data = self.trainer.datamodule
        width, height = (int(data.store.manifest[side].iat[row]) for side in ("width", "height"))
        truth, seen = regions(data, row, data.crop), film(width, height, data.size, data.crop)
        found = np.zeros((len(self.classes), WIDTH), np.float32)
        for k, values in enumerate(maps):
            if not np.isfinite(values).all():
                found[k] = np.nan
                continue
            inside, known = truth[k] == OBJECT, seen & ((truth[k] == OBJECT) | (truth[k] == 0))
            inside &= known
            if inside.any():
                found[k, 0] = 1
                found[k, 1] = inside.sum() / known.sum()
                for place, of in ((2, values), (5, self.prior[k])):
                    found[k, place : place + 3] = [measure(of, inside, known) for measure in MEASURES]
            found[k, -2:] = highest(values, seen) if self.said(row, k) else NOWHERE
        return found.reshape(-1)

    def by_class(self, found: Predicted) -> np.ndarray:
        """Return (N, K, WIDTH)."""
        return found.values.astype(np.float64).reshape(len(found.rows), len(self.classes), WIDTH)

    def family(self, found: Predicted, stage: str) -> Grounding:
        values = self.by_class(found)
        return Grounding(values[..., 1:-2], values[..., 0] > 0, self.classes)

    # --- what a test and a prediction leave --------------------------------------

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        values = self.by_class(found)
        sizes = self.original_sizes({"index": torch.from_numpy(found.rows)})
        columns: dict[str, list[Any]] = {}
        for k, name in enumerate(self.classes):
            present = values[:, k, 0] > 0
            for place, column in enumerate(COLUMNS, 1):
                key = f"truth_share_{name}" if column == "share" else f"{column}_{name}"
                columns[key] = np.where(present, values[:, k, place], np.nan).tolist()
            columns |= self._points(name, values[:, k, -2:], sizes)
        return columns

    def _points(self, name: str, points: np.ndarray, sizes: list[tuple[int, int]]) -> dict[str, list[Any]]:
        """Return the columns of highest points (N, 2) in pixels of the originals, of these widths and heights."""
        data = self.trainer.datamodule
        moved = [
            original_point(*point, *size, data.size, data.crop) if point[0] != NOWHERE else (np.nan, np.nan)
            for point, size in zip(points, sizes, strict=True)
        ]
        return {f"point_x_{name}": [x for x, _ in moved], f"point_y_{name}": [y for _, y in moved]}

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        from sista_tasks.grounding.pictures import draw_cases

        draw_cases(self, found, folder / "cases.png", notice)

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        bad, size, data = batch.get("bad", []), batch.get("original_size"), self.trainer.datamodule
        points: list[np.ndarray] = []
        if len(batch["index"]):
            rows = batch["index"].cpu().numpy()
            maps = self.maps(batch["image"], rows).cpu().numpy()
            if np.isnan(maps).any():
                raise SistaError("predict: the model gives NaN; set trainer.precision to 32-true")
            for row, (width, height), values in zip(rows.tolist(), self.original_sizes(batch), maps, strict=True):
                seen = film(width, height, data.size, data.crop)
                of_image = np.array([(*highest(of, seen), of[seen].max(), of[seen].mean()) for of in values])
                of_image[[not self.said(row, k) for k in range(len(values))]] = NOWHERE, NOWHERE, np.nan, np.nan
                points.append(of_image)
        found: dict[str, Any] = {"index": batch["index"].cpu(), "points": points, "bad": bad}
        return found if size is None else found | {"original_size": size.cpu()}

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        table = pd.DataFrame({"image": self.image_names(batch["index"].tolist())})
        points = np.array(batch["points"]).reshape(len(table), len(self.classes), 4)
        for k, name in enumerate(self.classes):
            columns = self._points(name, points[:, k, :2], self.original_sizes(batch))
            table = table.assign(**columns, **{f"highest_{name}": points[:, k, 2], f"mean_{name}": points[:, k, 3]})
        return table


MEASURES = (pointing, contrast, mean_iou)
