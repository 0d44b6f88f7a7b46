"""Paints findings into a phantom chest: each at its stated place, in its stated size, with plausible HU.

They are painted larger than life: a small model that sees voxels of 1 to 2 cm has to recognise them, their
side and size.
"""

from collections.abc import Iterable

import numpy as np

from reaf_hsenet.data.phantom.anatomy import BLOOD, CALCIUM, FAT, FLUID, METAL, SOFT, Anatomy
from reaf_hsenet.data.phantom.canvas import AIR, Box, Point
from reaf_hsenet.data.phantom.findings import RIGHT_LUNG, Finding


def draw_findings(anatomy: Anatomy, findings: Iterable[Finding]) -> None:
    """Paint findings into `anatomy.canvas`, textures first and fluid last.

    A texture is the same in every patient, but for the body and the lobe: a patch embedding is linear, and
    finds a known pattern from some thousand scans, not one whose phase is drawn for each of them.
    Cardiomegaly and pericardial effusion are part of the heart that `draw_anatomy` paints.
    """
    findings = list(findings)
    for label, draw in DRAWINGS.items():
        for finding in findings:
            if finding.label == label:
                draw(anatomy, finding, np.random.default_rng(0))


def _waves(anatomy: Anatomy, box: Box, wavelength: float, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth random pattern of patches, positive in about half of the box."""
    z, y, x = anatomy.canvas.coordinates(box)
    slants = rng.uniform(-0.5, 0.5, 3).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
    slanted = z + slants[0] * y, y + slants[1] * x, x + slants[2] * z
    scale = np.float32(2 * np.pi / wavelength)
    waves = [np.sin(axis * scale + phase) for axis, phase in zip(slanted, phases, strict=True)]
    return waves[0] + waves[1] + waves[2]


def _nearest_share(anatomy: Anatomy, lobe: str, target: Point, share: float) -> tuple[Box, np.ndarray]:
    """Return the box of a lobe and the mask of the given share of its voxels that is nearest to a point."""
    box, mask = anatomy.lobe(lobe)
    if not mask.any():
        return box, mask
    z, y, x = anatomy.canvas.coordinates(box)
    distance = (z - target[0]) ** 2 + (y - target[1]) ** 2 + (x - target[2]) ** 2
    return box, mask & (distance < np.quantile(distance[mask], share))


def _points_in_lobe(
    anatomy: Anatomy, lobe: str, count: int, rng: np.random.Generator, depth: float
) -> list[Point]:
    """Draw random points (mm) of a lobe, if possible away from the pleura (lung radius < `depth`)."""
    box, mask = anatomy.lobe(lobe)
    inner = mask & (anatomy.lung_radius[box] < depth)
    indices = np.argwhere(inner if inner.any() else mask)
    if not len(indices):
        return []
    axes = [axis[part] for axis, part in zip(anatomy.canvas.axes, box, strict=True)]
    chosen = indices[rng.integers(len(indices), size=count)]
    return [tuple(float(axis[i]) for axis, i in zip(axes, index, strict=True)) for index in chosen]


def _emphysema(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    box, mask = anatomy.lobe(finding.place)
    hu, bullae = {"mild": (-940, 4), "moderate": (-970, 6), "severe": (-1000, 8)}[finding.kind]
    anatomy.canvas.blend(box, 0.9 * mask, hu)
    for point in _points_in_lobe(anatomy, finding.place, bullae, rng, 0.8):
        anatomy.canvas.ellipsoid(point, (rng.uniform(10, 20),) * 3, AIR, within=anatomy.lungs)


def _mosaic(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    box, mask = anatomy.lobe(finding.place)
    patches = np.clip(3 * _waves(anatomy, box, 80, rng), -1, 1)
    anatomy.canvas.hu[box] += mask * (160 + 240 * patches)


def _ground_glass(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    box, mask = anatomy.lobe(finding.place)
    share = (
        0.75 if finding.kind == "diffuse" else 0.95 * np.clip(2 * _waves(anatomy, box, 60, rng) + 0.4, 0, 1)
    )
    anatomy.canvas.blend(box, share * mask, -330)


def _septal_thickening(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint a net of thin walls around secondary lobules, about 26 mm apart."""
    box, mask = anatomy.lobe(finding.place)
    z, y, x = anatomy.canvas.coordinates(box)
    offsets = rng.uniform(0, 26, 3)
    slanted = z, y + 0.3 * x, x - 0.3 * y
    walls = [np.mod(axis + offset, 26) < 7.5 for axis, offset in zip(slanted, offsets, strict=True)]
    net = walls[0] | walls[1] | walls[2]
    anatomy.canvas.blend(box, (0.75 * (mask & net)).astype(np.float32), -80)


def _fibrotic_sequela(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint coarse bands that reach the pleura, and thicken the pleura."""
    box, mask = anatomy.lobe(finding.place)
    z, y, x = anatomy.canvas.coordinates(box)
    radius = anatomy.lung_radius[box]
    bands = mask & (radius > 0.72)
    for point in _points_in_lobe(anatomy, finding.place, 4, rng, 1.0):
        normal = rng.normal(size=3)
        normal /= np.linalg.norm(normal)
        height = (z - point[0]) * normal[0] + (y - point[1]) * normal[1] + (x - point[2]) * normal[2]
        bands |= mask & (np.abs(height) < 7) & (radius > 0.30)
    anatomy.canvas.blend(box, bands.astype(np.float32), 20)


def _peribronchial_thickening(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint bronchi with thick walls on the way from the hilum into the lobe."""
    hilum, lungs = np.array(anatomy.landmarks[f"{finding.side} hilum"]), anatomy.lungs
    for end in _points_in_lobe(anatomy, finding.place, 4, rng, 0.6):
        path = [tuple(0.8 * hilum + 0.2 * np.array(end)), end]
        anatomy.canvas.tube(path, 16, SOFT, within=lungs)
        anatomy.canvas.tube(path, 4, AIR, within=lungs)


def _bronchiectasis(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint a cluster of wide airways: air inside a thick wall."""
    lungs = anatomy.lungs
    for end in _points_in_lobe(anatomy, finding.place, 20, rng, 0.6):
        radius = rng.uniform(14, 20)
        anatomy.canvas.ellipsoid(end, (radius * 1.5, radius, radius), SOFT, within=lungs)
        anatomy.canvas.ellipsoid(end, (radius * 1.2, radius - 9, radius - 9), AIR, within=lungs)


def _consolidation(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Fill more than half of the lobe, from the chest wall inwards, and leave air bronchograms."""
    sign = -1 if finding.side == "right" else 1
    z = anatomy.canvas.axes[0][anatomy.lobe(finding.place)[0][0]]
    middle = float(z.mean()) if z.size else 0.0
    wall = (middle, float(rng.uniform(-20, 40)), sign * anatomy.body.half_width)
    box, filled = _nearest_share(anatomy, finding.place, wall, float(rng.uniform(0.55, 0.75)))
    bronchograms = _waves(anatomy, box, 17, rng) > 1.7
    anatomy.canvas.blend(box, (0.97 * (filled & ~bronchograms)).astype(np.float32), 35)


def _atelectasis(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint the part of the lobe that is nearest to the hilum as if collapsed: dense and without air."""
    z, y, x = anatomy.landmarks[f"{finding.side} hilum"]
    box, collapsed = _nearest_share(anatomy, finding.place, (z, y, 0.4 * x), float(rng.uniform(0.30, 0.42)))
    anatomy.canvas.blend(box, collapsed.astype(np.float32), 55)


def _nodule(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    hu = CALCIUM if finding.kind == "calcified" else SOFT - 10
    # In the middle of its lobe.
    points = _points_in_lobe(anatomy, finding.place, 100, rng, 0.8)
    if points:
        anatomy.canvas.ellipsoid(tuple(np.mean(points, 0)), (finding.size / 2,) * 3, hu)


def _pleural_effusion(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint fluid behind the lung of a lying patient: as thick as stated at the base, less to the apex."""
    canvas = anatomy.canvas
    is_right = anatomy.lobes <= len(RIGHT_LUNG)
    lung = anatomy.lungs & (is_right if finding.place == "right" else ~is_right)
    z, y, _ = canvas.coordinates()
    last = lung.shape[1] - 1 - lung[:, ::-1].argmax(axis=1)
    back = canvas.axes[1][last][:, None, :]
    level = (z - anatomy.body.lung_base) / (anatomy.body.lung_apex - anatomy.body.lung_base)
    thickness = finding.size * np.clip(1.5 - 1.5 * level, 0, 1)
    canvas.hu[lung & (y > back - thickness)] = FLUID


def _hiatal_hernia(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint the stomach behind the heart: a round wall, fluid below and gas above an air-fluid level."""
    radius = finding.size / 2
    z, y, x = anatomy.landmarks["hiatus"]
    center = (z + 0.8 * radius, y - 6, x + float(rng.uniform(0, 8)))
    anatomy.canvas.ellipsoid(center, (radius,) * 3, SOFT)
    gas = (center[0], center[1] - 0.15 * radius, center[2])
    anatomy.canvas.ellipsoid(gas, (0.8 * radius, 0.65 * radius, 0.8 * radius), AIR)


def _lymphadenopathy(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    body, (carina, y_carina, _) = anatomy.body, anatomy.landmarks["carina"]
    z, y, x = {
        "right paratracheal": (carina + 28, y_carina - 4, -24),
        "prevascular": (carina + 18, -0.55 * body.half_depth, 8),
        "subcarinal": (carina - 24, y_carina + 8, 0),
        "right hilar": (carina - 24, y_carina, -52),
        "left hilar": (carina - 22, y_carina, 52),
        "right axillary": anatomy.landmarks["right axilla"],
        "left axillary": anatomy.landmarks["left axilla"],
    }[finding.place]
    # The short axis is as stated. Nodes are longer than wide along the body.
    short = finding.size / 2
    for step in (-1.4, 0, 1.4):
        anatomy.canvas.ellipsoid(
            (z + step * short, y, x), (1.5 * short, 1.4 * short, 1.6 * short), SOFT + 110
        )


def _aortic_calcification(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint plaques along the wall of one part of the aorta, as arcs around the patent lumen."""
    path = anatomy.paths[finding.place]
    anatomy.canvas.tube(path, 25, CALCIUM)
    anatomy.canvas.tube(path, 9, BLOOD)


def _coronary_calcification(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Paint plaques on the heart's surface, along the course of one artery."""
    center, radii = anatomy.heart
    # The directions (z, y, x), from the heart's centre, of the two ends of the artery.
    start, stop = {
        "left anterior descending artery": ((0.75, -0.55, 0.25), (-0.2, -0.85, 0.5)),
        "circumflex artery": ((0.6, 0.5, 0.5), (-0.3, 0.75, 0.6)),
        "right coronary artery": ((0.5, -0.6, -0.6), (-0.6, -0.2, -0.78)),
    }[finding.place]
    for share in np.linspace(0, 1, 6):
        direction = (1 - share) * np.array(start) + share * np.array(stop)
        point = np.array(center) + 1.15 * np.array(radii) * direction / np.linalg.norm(direction)
        anatomy.canvas.ellipsoid(tuple(point), (22, 19, 19), CALCIUM + 200)


def _metal(anatomy: Anatomy, center: Point, radii: Point) -> None:
    """Paint a metal part, and the dark band that beam hardening leaves around metal in its slices."""
    z, y, x = radii
    canvas = anatomy.canvas
    inside = 0.7 * (canvas.hu > FAT - 50)
    canvas.ellipsoid(center, (z + 12, y + 34, x + 60), -600, within=inside)
    canvas.ellipsoid(center, radii, METAL)


def _medical_material(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    canvas, body = anatomy.canvas, anatomy.body
    sign = -1 if finding.place == "right" else 1
    cava = anatomy.paths["superior vena cava"]
    pocket = (body.lung_apex - 45, -0.80 * body.half_depth, sign * 0.52 * body.half_width)
    if finding.kind == "pacemaker":
        _metal(anatomy, pocket, (34, 14, 34))
        canvas.tube([pocket, cava[0], cava[1], anatomy.heart[0]], 2.5, METAL - 800)
    elif finding.kind == "port catheter":
        _metal(anatomy, pocket, (20, 12, 20))
        canvas.tube([pocket, cava[0], cava[1]], 2.5, 900)
    elif finding.kind == "sternal wires":
        z, y, x = anatomy.landmarks["sternum"]
        for height in np.linspace(z - 25, z + 65, 5):
            _metal(anatomy, (height, y - 2, x), (8, 10, 18))
    else:
        _, back, _ = anatomy.landmarks["spine"]
        for height in np.arange(body.lung_base + 25, body.lung_base + 115, 26):
            _metal(anatomy, (height, back + 20, 0), (6, 8, 24))
            for side in (-15, 15):
                canvas.tube([(height, back - 6, 0.5 * side), (height, back + 34, 1.3 * side)], 4.5, METAL)


DRAWINGS = {
    "Emphysema": _emphysema,
    "Mosaic attenuation pattern": _mosaic,
    "Lung opacity": _ground_glass,
    "Interlobular septal thickening": _septal_thickening,
    "Pulmonary fibrotic sequela": _fibrotic_sequela,
    "Bronchiectasis": _bronchiectasis,
    "Peribronchial thickening": _peribronchial_thickening,
    "Consolidation": _consolidation,
    "Atelectasis": _atelectasis,
    "Lung nodule": _nodule,
    "Pleural effusion": _pleural_effusion,
    "Lymphadenopathy": _lymphadenopathy,
    "Hiatal hernia": _hiatal_hernia,
    "Arterial wall calcification": _aortic_calcification,
    "Coronary artery wall calcification": _coronary_calcification,
    "Medical material": _medical_material,
}
