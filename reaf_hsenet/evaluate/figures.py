"""Pictures of an evaluation or of one scan, written as PNG files. Nothing else needs matplotlib."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.classification import area_under_roc, both_values, reliability, roc_curve


def new_figure(width: float, height: float, wanted_by: str = "--figures"):
    """Return an empty figure, size in inches. Raises InputError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{wanted_by}: matplotlib is not installed; pip install matplotlib") from error
    return Figure((width, height), layout="constrained")


def roc_figure(path: Path, labels: np.ndarray, scores: np.ndarray, names: list[str]) -> None:
    """Draw a ROC curve for each class with its AUROC, - for a class with one label value.

    labels: (N, C) bool. scores: (N, C).
    """
    figure = new_figure(9, 6)
    from matplotlib import colormaps

    axes, colours = figure.subplots(), colormaps["turbo"]
    auroc = area_under_roc(labels, scores)
    for j, defined in enumerate(both_values(labels)):
        points = roc_curve(labels[:, j], scores[:, j]) if defined else ([], [])
        area = f"{auroc[j]:.3f}" if defined else "-"
        colour = colours(j / max(1, len(names) - 1))
        axes.plot(*points, color=colour, linestyle="-" if j % 2 else "--", label=f"{names[j]} {area}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    figure.legend(loc="outside right upper", fontsize="small", title="AUROC", frameon=False)
    save(figure, path)


def recall_figure(path: Path, ranks: dict[str, Tensor]) -> None:
    """Draw recall at every k for each direction of retrieval. ranks: {direction: (Q,) from 1}."""
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    for direction, found in ranks.items():
        hits = torch.bincount(found.cpu(), minlength=2)[1:].cumsum(0) / len(found)
        axes.plot(
            range(1, len(hits) + 1), hits.numpy(), drawstyle="steps-post", label=direction.replace("_", " ")
        )
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="k", ylabel="recall at k")
    largest = max(int(found.max()) for found in ranks.values())
    ticks = [k for e in range(len(str(largest))) for k in (10**e, 2 * 10**e, 5 * 10**e) if k <= largest]
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def reliability_figure(path: Path, labels: np.ndarray, probabilities: dict[str, np.ndarray]) -> None:
    """Draw the share of positives over the mean probability, in bins over all classes.

    labels: (N, C) bool. probabilities: {"before calibration": (N, C), ...}.
    """
    figure = new_figure(5, 4.5)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, found in probabilities.items():
        axes.plot(*reliability(labels, found)[:2], marker="o", label=name)
    axes.set(xlabel="mean probability", ylabel="share of positives", aspect="equal")
    axes.legend(frameon=False)
    save(figure, path)


def saliency_figure(path: Path, volume: Tensor, regions: dict[str, Tensor], title: str, *grid) -> None:
    """Draw planes through the strongest region, with all chosen regions over them.

    regions: {branch: (d, h, w)}, the saliency inside the chosen regions and 0 elsewhere. volume, grid: as of
    `planes`.
    """

    def draw(place, values: np.ndarray, ratio) -> None:
        mask = values > 0
        overlay = np.ma.masked_equal(mask.astype(float), 0)
        place.imshow(overlay, aspect=ratio, cmap="autumn", vmin=0, vmax=2, alpha=0.3)
        if mask.any() and not mask.all():
            place.contour(mask.astype(float), [0.5], colors="red", linewidths=1)

    save(planes(volume, regions, title, draw, strongest, *grid), path)


def score_figure(path: Path, volume: Tensor, scores: dict[str, Tensor], title: str, *grid) -> None:
    """Draw planes through the patch with the highest score, every patch in the colour of its score.

    scores: {name: (d, h, w)}. volume, grid (axes, spacing): as of `planes`.
    """
    every = torch.cat([s.flatten() for s in scores.values()])
    style = {"cmap": "inferno", "alpha": 0.3, "vmin": float(every.min()), "vmax": float(every.max())}

    def draw(place, values: np.ndarray, ratio) -> None:
        place.imshow(values, aspect=ratio, **style)

    figure = planes(volume, scores, title, draw, highest, *grid)
    figure.colorbar(figure.axes[-1].images[-1], ax=figure.axes, shrink=0.6, label="patch score")
    save(figure, path)


def planes(
    volume: Tensor,
    maps: dict[str, Tensor],
    title: str,
    draw: Callable,
    centre_of: Callable[[Tensor], list[int]],
    axes: str = "SPL",
    spacing: tuple[float, float, float] | None = None,
):
    """Return a figure of the CT in axial, coronal and sagittal planes, superior up, a row a map.

    volume: (D, H, W). maps: {name: (d, h, w)}; the planes go through the patch centre_of(map).
    draw: takes matplotlib's axes, the map in that plane at the CT's size, the pixels' height over width.
    axes: what D, H, W run to (S superior, P posterior, L left). spacing: mm in D, H, W; None when the grid
    does not keep proportions.
    """
    figure = new_figure(12, 4.3 * len(maps))
    turned = ["SPL".index(a) for a in axes]
    order = [turned.index(i) for i in range(3)]  # to superior, posterior, left
    volume = volume.permute(order).float().cpu()
    grey = {"cmap": "gray", "vmin": float(volume.min()), "vmax": float(volume.max())}
    for row, (name, values) in enumerate(maps.items()):
        values = values.permute(order).float().cpu()
        patch, shapes = centre_of(values), zip(volume.shape, values.shape, strict=True)
        centre = [int((p + 0.5) * n / g) for p, (n, g) in zip(patch, shapes, strict=True)]
        enlarged = F.interpolate(values[None, None], volume.shape, mode="nearest")[0, 0]
        for column, plane in enumerate(("axial", "coronal", "sagittal")):
            place = figure.add_subplot(len(maps), 3, 3 * row + column + 1)
            picture, overlay = (t.select(column, centre[column]) for t in (volume, enlarged))
            if column:  # superior is up
                picture, overlay = picture.flip(0), overlay.flip(0)
            ratio = "auto"
            if spacing is not None:
                in_plane = [spacing[order[i]] for i in range(3) if i != column]
                ratio = in_plane[0] / in_plane[1]
            place.imshow(picture.numpy(), aspect=ratio, **grey)
            place.set_title(f"{name}: {plane} plane {centre[column]}", fontsize="medium")
            place.set_axis_off()
            draw(place, overlay.numpy(), ratio)
    figure.suptitle(title)
    return figure


def highest(values: Tensor) -> list[int]:
    """(d, h, w) -> the patch with the largest value."""
    return [int(i) for i in np.unravel_index(int(values.argmax()), values.shape)]


def strongest(values: Tensor) -> list[int]:
    """(d, h, w) -> the patch nearest to the centre of the connected patches around the largest value."""
    chosen, region = values > 0, values == values.max()
    while True:
        grown = region[None, None].float()
        for axis in range(3):  # by faces, not by corners: one axis at a time, inside what is chosen
            kernel = [1, 1, 1]
            kernel[axis] = 3
            grown = F.max_pool3d(grown, kernel, 1, [k // 2 for k in kernel]) * chosen
        grown = grown[0, 0] > 0
        if torch.equal(grown, region):
            break
        region = grown
    patches = region.nonzero().double()
    return patches[(patches - patches.mean(0)).square().sum(1).argmin()].int().tolist()


def save(figure, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
