"""Synthetic chest CT with reports, labels and questions, written in CT-RATE's own file layout.

`write_phantom_dataset` writes a folder that the CT-RATE reader reads as it reads CT-RATE v2: int16 HU, x to
Left, y to Posterior, z to Superior. `sample_patient` and `phantom_volume` make one scan in memory.
"""

import csv
import gzip
import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from reaf_hsenet.data.phantom.findings import LABELS, labels_of
from reaf_hsenet.data.phantom.patient import (
    QUESTIONS,
    REPORT,
    SHAPE,
    SPLITS,
    Patient,
    phantom_volume,
    sample_patient,
    scan_grid,
)
from reaf_hsenet.data.phantom.questions import QUESTION_COLUMNS, TEMPLATES, ask_questions
from reaf_hsenet.data.phantom.reports import write_report
from reaf_hsenet.data.pool import map_in_order
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write
from reaf_hsenet.progress import progress_bar

Scan = tuple[Patient, int]  # a patient and the number of the reconstruction

MINIMAL_SHAPE = (16, 32, 32)
PARAMETERS_FILE = "phantom.json"
# CT-RATE's 44 columns, of which a phantom fills about half.
METADATA_COLUMNS = (
    "VolumeName Manufacturer SeriesDescription ManufacturerModelName PatientSex PatientAge "
    "ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt TableHeight "
    "RotationDirection ExposureTime XRayTubeCurrent Exposure FilterType GeneratorPower FocalSpots "
    "ConvolutionKernel PatientPosition RevolutionTime SingleCollimationWidth TotalCollimationWidth "
    "TableSpeed TableFeedPerRotation SpiralPitchFactor DataCollectionCenterPatient "
    "ReconstructionTargetCenterPatient ExposureModulationType CTDIvol ImagePositionPatient "
    "ImageOrientationPatient SliceLocation SamplesPerPixel PhotometricInterpretation Rows Columns XYSpacing "
    "RescaleIntercept RescaleSlope RescaleType NumberofSlices ZSpacing StudyDate"
).split()
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")


def write_phantom_dataset(
    root: Path,
    train: int,
    valid: int,
    seed: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    workers: int = 1,
    reconstructions: float = 0.0,
    progress: bool = False,
) -> None:
    """Write a phantom dataset in CT-RATE's layout below `root`/dataset: volumes and all tables.

    train, valid: numbers of patients.
    shape: (D, H, W), D axial slices.
    workers: number of processes.
    reconstructions: probability that a scan has a second reconstruction with the same report.
    Volumes that exist are kept, so that an interrupted run continues. Raises InputError for values out of
    range, for a folder that holds a phantom made with other parameters, and when a file cannot be written.
    """
    root, shape = Path(root), tuple(shape)
    _check_range(train, valid, seed, shape=shape, workers=workers, reconstructions=reconstructions)
    parameters = {"version": 1, "train": int(train), "valid": int(valid), "seed": int(seed)}
    parameters |= {"shape": [int(size) for size in shape], "reconstructions": float(reconstructions)}
    _claim_folder(root, json.dumps(parameters, indent=2) + "\n")

    scans: dict[str, list[Scan]] = {}
    for split, count in zip(SPLITS, (train, valid), strict=True):
        patients = [sample_patient(seed, split, i, reconstructions) for i in range(1, count + 1)]
        scans[split] = [(patient, number) for patient in patients for number in patient.scan_numbers]
    missing = [scan for split in SPLITS for scan in scans[split] if not _volume_path(root, scan).exists()]
    with progress_bar(len(missing), "phantoms", "scan", shown=progress and bool(missing)) as bar:
        for _ in map_in_order(partial(_write_volume, root, shape), missing, workers):
            bar.update()
    for split in SPLITS:
        _write_tables(root / "dataset", split, scans[split], shape)


def _check_range(
    train: int, valid: int, seed: int, shape: tuple[int, ...], workers: int, reconstructions: float
) -> None:
    numbers = (("train", train, 0), ("valid", valid, 0), ("seed", seed, 0), ("workers", workers, 1))
    for name, value, least in numbers:
        if value < least:
            raise InputError(f"phantom {name}: expected a whole number of at least {least}, got {value}")
    if train + valid == 0:
        raise InputError("phantom train, valid: both are 0, ask for at least one patient")
    if len(shape) != 3 or any(size < least for size, least in zip(shape, MINIMAL_SHAPE, strict=True)):
        raise InputError(
            f"phantom shape: expected (slices, rows, columns) of at least {MINIMAL_SHAPE}, got {shape}"
        )
    if not 0 <= reconstructions <= 1:
        raise InputError(f"phantom reconstructions: expected a probability in [0, 1], got {reconstructions}")


def _claim_folder(root: Path, parameters: str) -> None:
    """Write the parameters into the folder, or refuse a folder that holds something made with others."""
    path = root / PARAMETERS_FILE
    if path.exists():
        present = path.read_text(encoding="utf-8", errors="replace")
        if present != parameters:
            present, wanted = " ".join(present.split()), " ".join(parameters.split())
            raise InputError(
                f"{root}: holds a phantom dataset with {PARAMETERS_FILE} {present}, asked for {wanted}; "
                "choose another folder, the same parameters, or delete this one"
            )
    elif (root / "dataset").exists():
        raise InputError(
            f"{root}: holds a dataset that is not a phantom (no {PARAMETERS_FILE}); choose another folder"
        )
    else:
        with atomic_write(path) as file:
            file.write(parameters)


def _volume_path(root: Path, scan: Scan) -> Path:
    patient, number = scan
    name = f"{patient.split}_{patient.index}"
    return root / "dataset" / patient.split / name / f"{name}_a" / patient.scan_name(number)


def _write_volume(root: Path, shape: tuple[int, int, int], scan: Scan) -> None:
    patient, number = scan
    hu, spacing = phantom_volume(patient, shape, number)
    with atomic_write(_volume_path(root, scan), "wb") as file:
        file.write(nifti_bytes(hu, spacing))


def _first_voxel(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return the position (x, y, z) of voxel 0 in mm to Left, Posterior, Superior: ImagePositionPatient."""
    return -shape[2] * spacing[2] / 2, -shape[1] * spacing[1] / 2, 0.0


def nifti_bytes(hu: np.ndarray, spacing: tuple[float, float, float]) -> bytes:
    """Return a .nii.gz of (D, H, W) int16 HU: x to Left, y to Posterior, z to Superior, both codes 1."""
    sz, sy, sx = spacing
    left, posterior, superior = _first_voxel(hu.shape, spacing)
    affine = np.diag([-sx, -sy, sz, 1.0])
    affine[:3, 3] = -left, -posterior, superior
    image = nib.Nifti1Image(hu.T, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=0, mtime=0)


def _write_tables(dataset: Path, split: str, scans: list[Scan], shape: tuple[int, int, int]) -> None:
    metadata, reports, labels = [], [], []
    questions: dict[str, list[dict]] = {kind: [] for kind in TEMPLATES}
    for patient, number in scans:
        name = patient.scan_name(number)
        metadata.append(_metadata_row(patient, number, shape))
        texts = write_report(patient.findings, patient.rng(REPORT))
        cells = (name, "Not given.", "Non-contrast axial sections of the thorax.", *texts)
        reports.append(dict(zip(REPORT_COLUMNS, cells, strict=True)))
        labels.append({"VolumeName": name, **dict(zip(LABELS, labels_of(patient.findings), strict=True))})
        for kind, rows in ask_questions(name, patient.findings, patient.rng(QUESTIONS)).items():
            questions[kind] += rows
    # CT-RATE names the tables of labels valid_, the others validation_.
    prefix = "validation" if split == "valid" else split
    tables = {
        f"metadata/{prefix}_metadata.csv": (METADATA_COLUMNS, metadata),
        f"radiology_text_reports/{prefix}_reports.csv": (REPORT_COLUMNS, reports),
        f"multi_abnormality_labels/{split}_predicted_labels.csv": (("VolumeName", *LABELS), labels),
    }
    for kind, rows in questions.items():
        tables[f"radgenome_files/{prefix}_vqa_{kind}.csv"] = (QUESTION_COLUMNS, rows)
    for name, (columns, rows) in tables.items():
        with atomic_write(dataset / name) as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _metadata_row(patient: Patient, number: int, shape: tuple[int, int, int]) -> dict:
    """Return CT-RATE's row for a scan, with the intercept that CT-RATE lists though its files hold HU."""
    (slices, rows, columns), spacing = scan_grid(patient, shape, number)
    style = patient.second_reconstruction if number == 2 else ""
    first = [round(value, 4) for value in _first_voxel((slices, rows, columns), spacing)]
    return {
        "VolumeName": patient.scan_name(number),
        "Manufacturer": "Phantom",
        "SeriesDescription": style or "standard",
        "ManufacturerModelName": "reaf_hsenet",
        "PatientSex": patient.body.sex,
        "PatientAge": f"{patient.body.age:03d}Y",
        "ReconstructionDiameter": round(min(rows, columns) * spacing[1], 1),
        "GantryDetectorTilt": 0,
        "ConvolutionKernel": "sharp" if style == "sharp" else "soft",
        "PatientPosition": "HFS",
        "ImagePositionPatient": str(first),
        "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
        "SliceLocation": first[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "XYSpacing": str([spacing[1], spacing[2]]),
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "NumberofSlices": slices,
        "ZSpacing": spacing[0],
        "StudyDate": 20240101 + patient.index % 28,
    }
