"""A phantom patient, and a patient's scans.

Everything about patient i of a split follows from (seed, split, i) alone, whatever else is generated and in
what order.
"""

from dataclasses import dataclass

import numpy as np

from reaf_hsenet.data.phantom.anatomy import Body, draw_anatomy, sample_body, scan_spacing
from reaf_hsenet.data.phantom.canvas import AIR, Canvas, Point
from reaf_hsenet.data.phantom.drawing import draw_findings
from reaf_hsenet.data.phantom.findings import Finding, find, sample_findings

SPLITS = ("train", "valid")
SHAPE = (32, 64, 64)  # of a scan: twice the grid that the tiny presets see
# Random streams of one patient: a change to one must not move the others.
FINDINGS, BODY, DRAWING, REPORT, QUESTIONS, RECONSTRUCTION = range(6)


@dataclass(frozen=True)
class Patient:
    """A person with findings. `second_reconstruction` is "" (there is none), "thick" or "sharp"."""

    seed: int
    split: str
    index: int
    body: Body
    findings: tuple[Finding, ...]
    second_reconstruction: str = ""

    def rng(self, stream: int) -> np.random.Generator:
        """Return a fresh generator for one aspect of this patient."""
        return _generator(self.seed, self.split, self.index, stream)

    @property
    def scan_numbers(self) -> tuple[int, ...]:
        """The numbers of this patient's reconstructions."""
        return (1, 2) if self.second_reconstruction else (1,)

    def scan_name(self, number: int = 1) -> str:
        """Return CT-RATE's file name, e.g. train_1_a_1.nii.gz."""
        return f"{self.split}_{self.index}_a_{number}.nii.gz"


def _generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def sample_patient(seed: int, split: str, index: int, reconstructions: float = 0.0) -> Patient:
    """Draw patient `index` (from 1) of a split, with the probability of a second reconstruction."""
    rng = _generator(seed, split, index, RECONSTRUCTION)
    has_second, style = rng.random() < reconstructions, ("thick", "sharp")[rng.integers(2)]
    return Patient(
        seed=seed,
        split=split,
        index=index,
        body=sample_body(_generator(seed, split, index, BODY)),
        findings=sample_findings(_generator(seed, split, index, FINDINGS)),
        second_reconstruction=style if has_second else "",
    )


def scan_grid(
    patient: Patient, shape: tuple[int, int, int], number: int
) -> tuple[tuple[int, int, int], Point]:
    """Return shape (D, H, W) and spacing (z, y, x) in mm of a scan; `shape` is the first reconstruction's."""
    spacing = scan_spacing(patient.body, shape)
    if number == 2 and patient.second_reconstruction == "thick":
        return (shape[0] // 2, *shape[1:]), (round(2 * spacing[0], 3), *spacing[1:])
    return shape, spacing


def phantom_volume(
    patient: Patient, shape: tuple[int, int, int] = SHAPE, number: int = 1
) -> tuple[np.ndarray, Point]:
    """Paint one scan: ((D, H, W) int16 HU with axes Superior, Posterior, Left; spacing (z, y, x) in mm).

    Scan number 2 shows the same patient in slices twice as thick, or with a sharper, noisier kernel.
    """
    rng = patient.rng(DRAWING)
    enlarged = find(patient.findings, "Cardiomegaly")
    fluid = find(patient.findings, "Pericardial effusion")
    anatomy = draw_anatomy(
        patient.body,
        shape,
        rng,
        cardiothoracic_ratio=enlarged[0].size if enlarged else None,
        pericardial_effusion=fluid[0].size if fluid else 0.0,
    )
    draw_findings(anatomy, patient.findings)
    canvas = anatomy.canvas
    _tilt(canvas, patient.body.tilt)
    _draw_table(canvas, patient.body)
    hu, noise = canvas.hu, patient.body.noise
    (slices, rows, columns), spacing = scan_grid(patient, shape, number)
    if number == 2:
        rng = patient.rng(RECONSTRUCTION)
        if patient.second_reconstruction == "thick":
            hu = hu[: 2 * slices].reshape(slices, 2, rows, columns).mean(axis=1)
            noise *= 0.7
        else:
            hu, noise = _sharpen(hu), 2 * noise
    hu = hu + np.float32(noise) * rng.standard_normal(hu.shape, dtype=np.float32)
    # CT files hold the lowest value outside the circle that the scanner reconstructs.
    _, y, x = np.ogrid[:1, :rows, :columns]
    outside = (y + 0.5 - rows / 2) ** 2 + (x + 0.5 - columns / 2) ** 2 > (min(rows, columns) / 2) ** 2
    np.copyto(hu, -1024, where=outside)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), spacing


def _tilt(canvas: Canvas, tilt: float) -> None:
    """Shift slices sideways in proportion to their height: nobody lies perfectly straight."""
    z = canvas.axes[0]
    steps = np.rint(tilt * (z - z.mean()) / canvas.spacing[2]).astype(int)
    for index in np.flatnonzero(steps):
        canvas.hu[index] = np.roll(canvas.hu[index], steps[index], axis=1)


def _draw_table(canvas: Canvas, body: Body) -> None:
    """Paint a curved carbon table below the patient's back."""
    _, y, x = canvas.coordinates()
    surface = body.half_depth + 4 - (x / 60) ** 2
    shell = (y > surface) & (y < surface + 12) & (np.abs(x) < 190)
    canvas.hu[shell & (canvas.hu < AIR + 50)] = -250


def _sharpen(hu: np.ndarray) -> np.ndarray:
    smooth = (np.roll(hu, 1, 1) + np.roll(hu, -1, 1) + np.roll(hu, 1, 2) + np.roll(hu, -1, 2)) / 4
    return hu + 0.3 * (hu - smooth)
