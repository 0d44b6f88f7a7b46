"""Pictures: files appear, curves are the metrics' own, and saliency is drawn where it is."""

import builtins

import numpy as np
import pytest
import torch

from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import figures


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def no_matplotlib(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(InputError, match="--figures: matplotlib is not installed; pip install matplotlib"):
        figures.recall_figure(tmp_path / "recall.png", {"a": torch.tensor([1, 2])})


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at what they hold."""
    pytest.importorskip("matplotlib")
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_roc_figure_has_a_curve_a_class_and_none_for_a_class_without_positives(drawn, tmp_path):
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.4, 0.2], [0.6, 0.9]])
    figures.roc_figure(tmp_path / "new/roc.png", labels, scores, ["Emphysema", "Hernia"])
    assert is_png(tmp_path / "new/roc.png")
    first, second, _ = drawn[0].axes[0].lines
    assert first.get_label() == "Emphysema 0.750" and second.get_label() == "Hernia -"
    assert list(zip(*first.get_data(), strict=True)) == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)]
    assert len(second.get_xdata()) == 0


def test_the_recall_figure_is_recall_at_every_k(drawn, tmp_path):
    ranks = {"report_to_volume": torch.tensor([1, 3, 3, 7]), "volume_to_report": torch.tensor([2, 1, 1, 1])}
    figures.recall_figure(tmp_path / "recall.png", ranks)
    assert is_png(tmp_path / "recall.png")
    lines = drawn[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["report to volume", "volume to report"]
    for line, found in zip(lines, ranks.values(), strict=True):
        assert np.allclose(line.get_ydata(), [(found <= k).double().mean() for k in line.get_xdata()])
    assert lines[0].get_xdata()[-1] == 7


def region(at: tuple[int, int, int], grid=(6, 6, 6), value: float = 1.0) -> torch.Tensor:
    values = torch.zeros(grid)
    values[tuple(slice(i, i + 2) for i in at)] = value
    return values


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_the_overlay_changes_the_picture_where_the_region_is(drawn, tmp_path):
    volume = torch.rand(12, 18, 24, generator=torch.Generator().manual_seed(0))
    figures.saliency_figure(tmp_path / "a.png", volume, {"scan": region((0, 2, 4))}, "a")
    figures.saliency_figure(tmp_path / "b.png", volume, {"scan": region((0, 2, 4)) * 0 + 1e-9}, "a")
    one, other = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert is_png(tmp_path / "a.png")
    coloured = one.max(-1) - one.min(-1) > 0.02  # grey has none; the overlay has
    assert 0.02 < coloured.mean() < 0.5 and (other.max(-1) - other.min(-1) > 0.02).mean() > coloured.mean()
    for axes, rows, columns in zip(
        drawn[0].axes, ((6, 12), (8, 12), (8, 12)), ((16, 24), (16, 24), (6, 12)), strict=True
    ):
        mask = ~np.ma.getmaskarray(axes.images[1].get_array())
        expected = np.zeros_like(mask)
        expected[slice(*rows), slice(*columns)] = True
        assert np.array_equal(mask, expected)


@pytest.mark.slow
def test_the_planes_go_through_the_strongest_region_superior_up(drawn, tmp_path):
    """Two regions; the second is stronger. Depth is turned so that superior is up in coronal and sagittal
    planes.
    """
    volume = torch.arange(12 * 18 * 24.0).reshape(12, 18, 24)
    regions = torch.maximum(region((0, 0, 0)), region((4, 2, 3), value=2))
    figures.saliency_figure(tmp_path / "a.png", volume, {"scan": regions, "slice": region((0, 0, 0))}, "a")
    titles = [axes.get_title() for axes in drawn[0].axes]
    d, h, w = (int(t.split()[-1]) for t in titles[:3])
    assert 8 <= d < 12 and 6 <= h < 12 and 12 <= w < 20
    assert titles[:3] == [f"scan: axial plane {d}", f"scan: coronal plane {h}", f"scan: sagittal plane {w}"]
    assert titles[3].startswith("slice: axial plane") and int(titles[3].split()[-1]) < 4
    axial, coronal, sagittal = (np.asarray(axes.images[0].get_array()) for axes in drawn[0].axes[:3])
    assert np.array_equal(axial, volume[d])
    assert np.array_equal(coronal, volume[:, h].flip(0)) and np.array_equal(sagittal, volume[:, :, w].flip(0))


def test_arrays_of_another_axis_order_give_the_same_pictures(drawn, tmp_path):
    """HSENet's volumes run to superior, left, posterior."""
    volume, regions = torch.rand(12, 18, 24), region((4, 2, 3))
    figures.saliency_figure(tmp_path / "a.png", volume, {"scan": regions}, "a", "SPL", (3, 1, 2))
    turned = {"scan": regions.permute(0, 2, 1)}
    figures.saliency_figure(tmp_path / "b.png", volume.permute(0, 2, 1), turned, "a", "SLP", (3, 2, 1))
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert [axes.get_aspect() for axes in drawn[0].axes] == [1 / 2, 3 / 2, 3]


def test_the_strongest_patch_is_in_the_middle_of_its_own_region():
    values = torch.zeros(9, 9, 9)
    values[3:6, 0:3, 6:9] = torch.rand(3, 3, 3) + 1
    values[0:3, 3:6, 3:6] = 0.5
    assert figures.strongest(values) == [4, 1, 7]
