"""The dense probe: the ridge regression that it claims to be, strength and threshold the best of their grids."""

import numpy as np
import pytest
import torch

from sista_pl.metrics.segmentation import Segmentation

from .conftest import COMMON, overlap


def cells_and_masks(images=12, seed=0):
    """Maps (B, 6, 4, 4) that tell something of masks (B, 16, 16), a stripe of which is ignored."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, 16, 16, dtype=torch.uint8)
    for mask in masks[::2]:
        row, column = torch.randint(0, 9, (2,), generator=generator)
        mask[row : row + 7, column : column + 6] = 255
    masks[:, :, 13] = 127
    share = torch.nn.functional.adaptive_avg_pool2d((masks == 255).float(), (4, 4))
    maps = torch.randn(images, 6, 4, 4, generator=generator) * torch.arange(1, 7)[:, None, None] + 3
    maps[:, 2] += 4 * share
    maps[:, 5] -= 9 * share
    return maps, masks


def test_the_sums_give_the_weights_of_a_plain_ridge_regression():
    from sista_tasks.segmentation.ridge import STRENGTHS, Moments, shares
    from sklearn.linear_model import Ridge

    maps, masks = cells_and_masks()
    y, known = shares(masks, (4, 4))
    moments = Moments()
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        moments.add(maps[part].movedim(1, -1).flatten(0, 2), y[part].flatten(), known[part].flatten())
    mean, variance, weight, bias = moments.solve(STRENGTHS, eps=1e-5)

    rows = [  # one cell after the other
        (maps[b, :, i, j].double().numpy(), masks[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].numpy())
        for b in range(12) for i in range(4) for j in range(4)
    ]  # fmt: skip
    x = np.array([vector for vector, _ in rows])
    seen = np.array([(patch != 127).mean() for _, patch in rows])
    share = np.array([(patch == 255).sum() / (patch != 127).sum() for _, patch in rows])
    np.testing.assert_allclose(mean, np.average(x, axis=0, weights=seen), rtol=1e-5)
    np.testing.assert_allclose(variance, np.average((x - mean) ** 2, axis=0, weights=seen), rtol=1e-5)
    for k, strength in enumerate(STRENGTHS):
        plain = Ridge(alpha=strength * seen.sum()).fit((x - mean) / np.sqrt(variance + 1e-5), share, seen)
        np.testing.assert_allclose(weight[k], plain.coef_, atol=1e-5)
        np.testing.assert_allclose(bias[k], plain.intercept_, atol=1e-5)


def test_strength_and_threshold_are_the_best_of_all_on_validation():
    from sista_tasks.segmentation import ridge

    (maps, masks), (val_maps, val_masks) = cells_and_masks(), cells_and_masks(10, seed=1)

    def batches(maps, masks):
        return [{"image": maps[part], "mask": masks[part]} for part in (slice(0, 3), slice(3, None))]

    (mean, variance, weight, bias), strength, threshold = ridge.fit(
        lambda image: image, batches(maps, masks), batches(val_maps, val_masks), 1e-5,
        lambda family: family.figure("dice_positive"),
    )  # fmt: skip
    moments = ridge.Moments()
    y, known = ridge.shares(masks, (4, 4))
    moments.add(maps.movedim(1, -1).flatten(0, 2), y.flatten(), known.flatten())
    _, _, weights, biases = moments.solve(ridge.STRENGTHS, 1e-5)

    def dice(logits, threshold):
        large = torch.nn.functional.interpolate(logits[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
        counts = [overlap((one > threshold).numpy(), mask.numpy()) for one, mask in zip(large, val_masks, strict=True)]
        return Segmentation(*np.array(counts).T).figure("dice_positive")

    def predicted(weight, bias):
        standard = (val_maps.double() - torch.tensor(mean)[:, None, None]) / torch.tensor(variance + 1e-5)[
            :, None, None
        ].sqrt()
        return (torch.einsum("bdhw,d->bhw", standard, torch.tensor(weight)) + bias).float()

    found = {
        (s, t): dice(predicted(weights[k], biases[k]), t)
        for k, s in enumerate(ridge.STRENGTHS) for t in ridge.THRESHOLDS
    }  # fmt: skip
    assert max(found.values()) > 0.5 > np.mean(list(found.values()))  # there is something to choose
    assert found[strength, threshold] == pytest.approx(max(found.values()), abs=1e-6)
    assert dice(predicted(weight, bias), 0.0) == pytest.approx(max(found.values()), abs=1e-6)  # as a logit


def test_a_frozen_linear_decoder_is_solved_in_one_step_and_stays_in_the_checkpoint(siim_store, tmp_path, monkeypatch):
    from sista_pl.cli import main
    from sista_pl.runs import find_checkpoint

    monkeypatch.chdir(tmp_path)
    common = ["--config", "seg_siim.yaml", *COMMON, "--data.store", str(siim_store), "--model.image_size", "64"]
    assert main(["fit", *common, "--model.decoder", "linear", "--trainer.max_epochs", "3"]) == 0
    kept = torch.load(find_checkpoint(tmp_path / "runs", "seg_siim", "best"), weights_only=True)
    assert kept["global_step"] == 1
    variances = torch.cat([v for k, v in kept["state_dict"].items() if k.endswith("running_var") and "decoder" in k])
    assert len(variances) == 128 + 256 + 512
    assert (variances != 1).all()
    assert main(["test", *common, "--model.decoder", "linear"]) == 0
    again = torch.load(find_checkpoint(tmp_path / "runs", "seg_siim", "best"), weights_only=True)
    torch.testing.assert_close(again["state_dict"], kept["state_dict"])
