"""A healthy phantom chest: body, ribs, spine, lungs with lobes, airways, heart, vessels and upper abdomen.

Shapes are analytic, in mm, painted in Hounsfield units on a `Canvas`; every length follows from a `Body`.
"""

from dataclasses import dataclass, field

import numpy as np

from reaf_hsenet.data.phantom.canvas import AIR, Box, Canvas, Point
from reaf_hsenet.data.phantom.findings import LOBES

LUNG, FAT, FLUID, BLOOD, SOFT, LIVER, BONE, CALCIUM, METAL = -770, -100, 8, 42, 50, 60, 350, 800, 3000


@dataclass(frozen=True)
class Body:
    """The body of one healthy person. Lengths in mm; `shift` (y, x) in the field of view."""

    sex: str
    age: int
    half_width: float
    half_depth: float
    fat: float
    height: float
    field_of_view: float
    shift: tuple[float, float]
    tilt: float
    lung_base: float
    lung_apex: float
    cardiothoracic_ratio: float
    lung_hu: float
    noise: float

    @property
    def width(self) -> float:
        """Half the width inside the fat."""
        return self.half_width - self.fat

    @property
    def depth(self) -> float:
        """Half the depth inside the fat."""
        return self.half_depth - self.fat


def sample_body(rng: np.random.Generator) -> Body:
    """Draw a person: women and men of small to large build."""
    sex = "F" if rng.random() < 0.5 else "M"
    build = float(np.clip(rng.normal(1.0, 0.04), 0.92, 1.08)) * (0.95 if sex == "F" else 1.0)
    fat = float(rng.uniform(10, 24))
    half_width, half_depth = 142 * build + fat, 96 * build + fat
    height = float(rng.uniform(300, 340))
    base = height * float(rng.uniform(0.23, 0.27))
    return Body(
        sex=sex,
        age=int(rng.integers(20, 91)),
        half_width=half_width,
        half_depth=half_depth,
        fat=fat,
        height=height,
        field_of_view=max(2 * half_width + 24, float(rng.uniform(350, 390))),
        shift=(float(rng.uniform(-5, 5)), float(rng.uniform(-6, 6))),
        tilt=float(rng.uniform(-0.03, 0.03)),
        lung_base=base,
        lung_apex=height - float(rng.uniform(12, 24)),
        cardiothoracic_ratio=float(rng.uniform(0.40, 0.47)),
        lung_hu=LUNG + float(rng.uniform(-10, 10)),
        noise=float(rng.uniform(10, 20)),
    )


def scan_spacing(body: Body, shape: tuple[int, int, int]) -> Point:
    """Return the spacing (z, y, x) in mm with which a (D, H, W) scan covers the body."""
    pixel = round(body.field_of_view / min(shape[1:]), 3)
    return round(body.height / shape[0], 3), pixel, pixel


@dataclass
class Anatomy:
    """A painted chest and where its parts are.

    lobes: (D, H, W) int8, 0 outside the aerated lungs, else 1 + the index in LOBES.
    lung_radius: (D, H, W), 0 on a lung's axis and 1 at its pleura.
    landmarks: points (z, y, x) in mm.
    heart: centre and radii.
    paths: courses of vessels, airways and the oesophagus, as chains of points.
    """

    canvas: Canvas
    body: Body
    lobes: np.ndarray
    lung_radius: np.ndarray
    landmarks: dict[str, Point] = field(default_factory=dict)
    heart: tuple[Point, Point] = ((0, 0, 0), (1, 1, 1))
    paths: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def lungs(self) -> np.ndarray:
        """The mask of the aerated lungs."""
        return self.lobes > 0

    def lobe(self, name: str) -> tuple[Box, np.ndarray]:
        """Return the bounding box of a lobe and its mask in that box."""
        mask = self.lobes == 1 + LOBES.index(name)
        box = []
        for axis in range(3):
            others = tuple(i for i in range(3) if i != axis)
            used = np.flatnonzero(mask.any(axis=others))
            box.append(slice(used[0], used[-1] + 1) if used.size else slice(0, 0))
        return tuple(box), mask[tuple(box)]


def draw_anatomy(
    body: Body,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    cardiothoracic_ratio: float | None = None,
    pericardial_effusion: float = 0.0,
) -> Anatomy:
    """Paint a chest that is healthy but for the heart's size (ratio) and the fluid (mm) around it."""
    canvas = Canvas(shape, scan_spacing(body, shape), body.shift)
    anatomy = Anatomy(canvas, body, np.zeros(shape, np.int8), np.ones(shape, np.float32))
    _place_landmarks(anatomy)
    cavity = _draw_body_wall(anatomy)
    for side in ("right", "left"):
        _draw_lung_and_abdomen(anatomy, side, cavity)
    _draw_spine(anatomy)
    _draw_mediastinum(anatomy, cardiothoracic_ratio or body.cardiothoracic_ratio, pericardial_effusion)
    anatomy.lobes[canvas.hu > -600] = 0
    _draw_airways_and_vessels(anatomy, rng)
    return anatomy


def _place_landmarks(anatomy: Anatomy) -> None:
    body = anatomy.body
    depth, top = body.depth, body.height
    carina = body.lung_base + 0.58 * (body.lung_apex - body.lung_base)
    arch = carina + 32
    anatomy.landmarks = {
        "carina": (carina, 0.05 * depth, 0.0),
        "right hilum": (carina - 22, 0.08 * depth, -42.0),
        "left hilum": (carina - 18, 0.08 * depth, 42.0),
        "heart": (body.lung_base + 34, -0.22 * depth, 0.0),
        "right axilla": (body.lung_apex - 50, -0.35 * depth, 0.06 * depth - body.half_width + body.fat),
        "left axilla": (body.lung_apex - 50, -0.35 * depth, body.width - 0.06 * depth),
        "hiatus": (body.lung_base + 8, 0.30 * depth, 8.0),
        "spine": (0.0, 0.60 * depth, 0.0),
        "sternum": (body.lung_base + 0.5 * (body.lung_apex - body.lung_base), -0.90 * depth, 0.0),
    }
    arch_start, arch_end = (arch - 12, -0.30 * depth, -14), (arch - 14, 0.36 * depth, 25)
    anatomy.paths = {
        "ascending aorta": [(carina - 40, -0.25 * depth, -4), arch_start],
        "aortic arch": [arch_start, (arch, -0.10 * depth, 2), (arch, 0.15 * depth, 18), arch_end],
        "descending aorta": [arch_end, (body.lung_base, 0.36 * depth, 22), (0, 0.34 * depth, 14)],
        "trachea": [(top, -0.12 * depth, 0), anatomy.landmarks["carina"]],
        "oesophagus": [(top, 0.14 * depth, 4), (carina, 0.26 * depth, 4), (0, 0.26 * depth, 12)],
        "superior vena cava": [(arch + 25, -0.22 * depth, -26), (carina - 40, -0.18 * depth, -28)],
    }


def _draw_body_wall(anatomy: Anatomy) -> np.ndarray:
    """Paint fat, muscle, breasts, ribs and sternum; return the mask of the cavity inside the ribs."""
    canvas, body = anatomy.canvas, anatomy.body
    z, y, x = canvas.coordinates()
    # The chest narrows towards the neck. An exponent above 2 gives the boxy outline of a chest.
    narrow = 1 - 0.35 * np.clip((z - (body.lung_apex - 25)) / 90, 0, 1) ** 1.5
    inner_width, inner_depth = body.width * narrow, body.depth * narrow
    outer = np.abs(x / (inner_width + body.fat)) ** 2.4 + np.abs(y / (inner_depth + body.fat)) ** 2.4
    inner = np.abs(x / inner_width) ** 2.4 + np.abs(y / inner_depth) ** 2.4
    canvas.hu[outer < 1] = FAT
    canvas.hu[inner < 1] = SOFT
    canvas.hu[inner < 0.85**2.4] = FAT + 20
    if body.sex == "F":
        for x_center in (-0.48 * body.half_width, 0.48 * body.half_width):
            center = (anatomy.landmarks["heart"][0] + 25, -body.half_depth, x_center)
            canvas.ellipsoid(center, (50, 22 + body.fat, 48), FAT + 15, within=inner >= 1)
    for side in ("right axilla", "left axilla"):
        canvas.ellipsoid(anatomy.landmarks[side], (40, 26, 20), FAT, within=outer < 0.94)
    # Ribs run downwards from the spine to the front; cartilage, not bone, joins them to the sternum.
    rib_phase = np.mod((z - 0.45 * y) / 27, 1)
    ribs = (inner < 0.94**2.4) & (inner > 0.86**2.4) & (rib_phase < 0.42) & (z > 45)
    canvas.hu[ribs & (y > -0.72 * inner_depth)] = BONE
    bottom, front, _ = anatomy.landmarks["sternum"]
    sternum = canvas.box((bottom - 35, front - 5, -17), (bottom + 75, front + 7, 17))
    canvas.blend(sternum, np.float32(1), BONE - 240)
    return inner < 0.86**2.4


def _draw_lung_and_abdomen(anatomy: Anatomy, side: str, cavity: np.ndarray) -> None:
    """Paint one lung, mark its lobes, and paint what is below the diaphragm: liver, or stomach and spleen."""
    canvas, body = anatomy.canvas, anatomy.body
    sign, columns = (-1, canvas.axes[2] < 0) if side == "right" else (1, canvas.axes[2] >= 0)
    used = np.flatnonzero(columns)
    half = (slice(None), slice(None), slice(used[0], used[-1] + 1))
    z, y, x = canvas.coordinates(half)
    width, depth = body.width, body.depth
    rise = (z - (body.lung_base - 30)) / (body.lung_apex - body.lung_base + 30)
    across = ((x - sign * 0.48 * width) / (0.42 * width)) ** 2
    deep = ((y - 0.04 * depth) / (0.84 * depth)) ** 2
    anatomy.lung_radius[half] = across + deep + np.clip(rise, 0, None) ** 4
    dome = body.lung_base + (8 if side == "right" else -4) + 34 * (0.5 - across - 0.6 * deep)
    in_cavity = cavity[half]
    lung = (anatomy.lung_radius[half] < 1) & (z > dome) & in_cavity
    below = (z <= dome) & in_cavity
    region = canvas.hu[half]
    np.copyto(region, body.lung_hu + 0.25 * y, where=lung)
    if side == "right":
        region[below] = LIVER
        names = ("right upper lobe", "right middle lobe", "right lower lobe")
    else:
        stomach = (body.lung_base - 32, -0.1 * depth, 0.45 * width)
        canvas.ellipsoid(stomach, (38, 42, 42), 25, within=cavity)
        canvas.ellipsoid((stomach[0], stomach[1] - 24, stomach[2]), (24, 12, 24), AIR, within=cavity)
        spleen = (body.lung_base - 35, 0.5 * depth, 0.62 * width)
        canvas.ellipsoid(spleen, (40, 34, 28), SOFT, within=cavity)
        left_liver = (body.lung_base - 42, -0.35 * depth, 0.05 * width)
        canvas.ellipsoid(left_liver, (36, 34, 60), LIVER, within=cavity)
        names = ("left upper lobe", "left upper lobe", "left lower lobe")
    upper, middle, lower = (1 + LOBES.index(name) for name in names)
    # The oblique fissure climbs backwards; the horizontal fissure parts the right upper and middle lobes.
    center = body.lung_base + 0.38 * (body.lung_apex - body.lung_base)
    fissure = center + 0.85 * (y - 0.04 * depth)
    above_oblique = np.where(z > center + 14, upper, middle)
    anatomy.lobes[half] = np.where(lung, np.where(z < fissure, lower, above_oblique), 0)


def _draw_spine(anatomy: Anatomy) -> None:
    canvas, body = anatomy.canvas, anatomy.body
    _, back, _ = anatomy.landmarks["spine"]
    box = canvas.box((-1, back - 24, -40), (body.height + 1, body.depth, 40))
    z, y, x = canvas.coordinates(box)
    region = canvas.hu[box]
    region[((x / 34) ** 2 + ((y - back - 22) / 40) ** 2 < 1) & (z > -1)] = SOFT
    vertebra = (x / 18) ** 2 + ((y - back) / 15) ** 2
    np.copyto(region, np.where(np.mod(z / 26, 1) < 0.78, BONE - 200, 80), where=vertebra < 1)
    canal = (x / 9) ** 2 + ((y - back - 23) / 8) ** 2
    arch = (np.abs(x) < 24) & (np.abs(y - back - 25) < 10) & (np.mod(z / 26, 1) < 0.6)
    region[arch & (canal > 1)] = BONE
    region[(canal < 1) & (z > -1)] = 25
    spinous = (np.abs(x) < 5) & (y > back + 33) & (y < back + 52) & (np.mod(z / 26, 1) < 0.5)
    region[spinous] = BONE


def _draw_mediastinum(anatomy: Anatomy, cardiothoracic_ratio: float, pericardial_effusion: float) -> None:
    """Paint the fat between the lungs and, in it, thyroid, great vessels, oesophagus and heart."""
    canvas, body, depth = anatomy.canvas, anatomy.body, anatomy.body.depth
    box = canvas.box((body.lung_base - 25, -0.86 * depth, -40), (body.height + 1, 0.6 * depth, 40))
    _, y, x = canvas.coordinates(box)
    core = (np.abs(x) / 36) ** 3 + np.abs((y + 0.05 * depth) / (0.72 * depth)) ** 3
    np.copyto(canvas.hu[box], FAT + 15, where=np.broadcast_to(core < 1, canvas.hu[box].shape))
    # The cardiothoracic ratio compares the heart's width with the inner width of the chest. The heart leans
    # to the left.
    half_width = cardiothoracic_ratio * 0.86 * body.width
    growth = cardiothoracic_ratio / 0.44
    radii = (46 * growth**0.7, 0.45 * depth * growth**0.6, half_width)
    z_heart, y_heart, _ = anatomy.landmarks["heart"]
    center = (z_heart + 10 * (growth - 1), y_heart, 0.30 * half_width)
    anatomy.heart = (center, radii)
    sac = (pericardial_effusion + 4) if pericardial_effusion else 0
    for layer, hu in ((sac, FLUID), (4 if sac else 2, FAT), (0, BLOOD)):
        if layer or hu == BLOOD:
            canvas.ellipsoid(center, tuple(radius + layer for radius in radii), hu)
    right, left = anatomy.landmarks["right hilum"], anatomy.landmarks["left hilum"]
    height = right[0] - 2
    trunk = (height, -0.2 * depth, 16)
    canvas.tube([right, (height, 0.0, -8), trunk], 10, BLOOD)
    canvas.tube([left, trunk], 10, BLOOD)
    canvas.tube([trunk, (height - 30, -0.25 * depth, 14)], 10, BLOOD)
    for part in ("ascending aorta", "aortic arch", "descending aorta"):
        canvas.tube(anatomy.paths[part], 13.5, BLOOD)
    canvas.tube(anatomy.paths["superior vena cava"], 8, BLOOD)
    canvas.tube(anatomy.paths["oesophagus"], 8, SOFT - 15)
    for x_center in (-16, 16):
        canvas.ellipsoid((body.height - 8, -0.14 * depth, x_center), (18, 9, 8), 100)


def _draw_airways_and_vessels(anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Paint trachea, main bronchi, and the vessels that fan out from each hilum."""
    canvas, landmarks = anatomy.canvas, anatomy.landmarks
    z_low, z_high = anatomy.body.lung_base + 20, anatomy.body.lung_apex - 40
    width, depth, lungs = anatomy.body.width, anatomy.body.depth, anatomy.lungs
    for sign, side in ((-1, "right"), (1, "left")):
        hilum = landmarks[f"{side} hilum"]
        for _ in range(10):
            angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.8)
            end = (
                float(rng.uniform(z_low, z_high)),
                0.04 * depth + 0.84 * depth * reach * np.sin(angle),
                sign * 0.48 * width + 0.42 * width * reach * np.cos(angle),
            )
            middle = tuple(0.45 * np.array(hilum) + 0.55 * np.array(end) + rng.uniform(-9, 9, 3))
            canvas.tube([hilum, middle], 3.2, BLOOD, within=lungs)
            canvas.tube([middle, end], 1.9, BLOOD, within=lungs)
        canvas.tube([landmarks["carina"], hilum], 6, AIR)
    canvas.tube(anatomy.paths["trachea"], 9, AIR)
