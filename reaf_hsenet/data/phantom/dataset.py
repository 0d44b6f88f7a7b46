"""Synthetic chest CT with reports, labels and questions, written in CT-RATE's own file layout.

`write_phantom_dataset` writes a folder that the CT-RATE reader reads as it reads CT-RATE v2: int16 HU, x to
Left, y to Posterior, z to Superior. `sample_patient` and `phantom_volume` make one scan in memory.
"""

import csv
import gzip
import io
import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from reaf_hsenet.data.phantom.anatomy import scan_spacing
from reaf_hsenet.data.phantom.findings import LABELS, labels_of
from reaf_hsenet.data.phantom.patient import (
    QUESTIONS,
    REPORT,
    SPLITS,
    Patient,
    phantom_volume,
    sample_patient,
)
from reaf_hsenet.data.phantom.questions import QUESTION_COLUMNS, QUESTION_TYPES, ask_questions
from reaf_hsenet.data.phantom.reports import write_report
from reaf_hsenet.data.pool import map_in_order
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write
from reaf_hsenet.progress import progress_bar

MINIMAL_SHAPE = (16, 32, 32)
# CT-RATE names metadata, reports and questions train_ and validation_, but the labels train_ and valid_.
TABLE_PREFIX = {"train": "train", "valid": "validation"}
PARAMETERS_FILE = "phantom.json"
PARAMETERS_VERSION = 1
METADATA_COLUMNS = """
    VolumeName Manufacturer SeriesDescription ManufacturerModelName PatientSex PatientAge
    ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt TableHeight
    RotationDirection ExposureTime XRayTubeCurrent Exposure FilterType GeneratorPower FocalSpots
    ConvolutionKernel PatientPosition RevolutionTime SingleCollimationWidth TotalCollimationWidth
    TableSpeed TableFeedPerRotation SpiralPitchFactor DataCollectionCenterPatient
    ReconstructionTargetCenterPatient ExposureModulationType CTDIvol ImagePositionPatient
    ImageOrientationPatient SliceLocation SamplesPerPixel PhotometricInterpretation Rows Columns XYSpacing
    RescaleIntercept RescaleSlope RescaleType NumberofSlices ZSpacing StudyDate
""".split()
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")


def write_phantom_dataset(
    root: Path,
    train: int,
    valid: int,
    seed: int = 0,
    shape: tuple[int, int, int] = (48, 96, 96),
    workers: int = 1,
    reconstructions: float = 0.0,
    progress: bool = False,
) -> None:
    """Write a phantom dataset in CT-RATE's layout below `root`/dataset: volumes and all tables.

    train, valid: numbers of patients. shape: (D, H, W), D axial slices. workers: processes. reconstructions:
    the probability that a scan has a second reconstruction with the same report. Volumes that exist are kept,
    so that an interrupted run continues. Raises InputError for values out of range, for a folder that holds a
    phantom made with other parameters, and when a file cannot be written.
    """
    root = Path(root)
    parameters = _checked_parameters(train, valid, seed, shape, workers, reconstructions)
    _claim_folder(root, parameters)
    draw = partial(_write_patient_volumes, root, tuple(shape))
    patients = {
        split: [sample_patient(seed, split, index, reconstructions) for index in range(1, count + 1)]
        for split, count in (("train", train), ("valid", valid))
    }
    everyone = patients["train"] + patients["valid"]
    missing = [
        patient for patient in everyone if not all(path.exists() for path in _volume_paths(root, patient))
    ]
    with progress_bar(len(missing), "phantoms", "scan", shown=progress and bool(missing)) as bar:
        for _ in map_in_order(draw, missing, workers):
            bar.update()
    for split in SPLITS:
        _write_tables(root / "dataset", split, patients[split], tuple(shape))


def _checked_parameters(
    train: int, valid: int, seed: int, shape: tuple[int, int, int], workers: int, reconstructions: float
) -> dict:
    counts = {"train": train, "valid": valid, "seed": seed, "workers": workers}
    for name, value in counts.items():
        if value < (least := int(name == "workers")):
            raise InputError(f"phantom {name}: expected a whole number of at least {least}, got {value}")
    if train + valid == 0:
        raise InputError("phantom train, valid: both are 0, ask for at least one patient")
    if len(shape) != 3 or any(size < least for size, least in zip(shape, MINIMAL_SHAPE, strict=False)):
        raise InputError(
            f"phantom shape: expected (slices, rows, columns) of at least {MINIMAL_SHAPE}, got {shape}"
        )
    if not 0 <= reconstructions <= 1:
        raise InputError(f"phantom reconstructions: expected a probability in [0, 1], got {reconstructions}")
    return {
        "version": PARAMETERS_VERSION,
        "train": int(train),
        "valid": int(valid),
        "seed": int(seed),
        "shape": [int(size) for size in shape],
        "reconstructions": float(reconstructions),
    }


def _claim_folder(root: Path, parameters: dict) -> None:
    """Note the parameters in the folder, or refuse when it holds something made with others."""
    path = root / PARAMETERS_FILE
    if path.exists():
        try:
            present = json.loads(path.read_text())
        except ValueError:
            present = "unreadable"
        if present != parameters:
            raise InputError(
                f"{root}: holds a phantom dataset with {PARAMETERS_FILE} {present}, asked for {parameters}; "
                "choose another folder, the same parameters, or delete this one"
            )
    elif (root / "dataset").exists():
        raise InputError(
            f"{root}: holds a dataset that is not a phantom (no {PARAMETERS_FILE}); choose another folder"
        )
    else:
        with atomic_write(path) as file:
            file.write(json.dumps(parameters, indent=2) + "\n")


def _volume_paths(root: Path, patient: Patient) -> list[Path]:
    patient_name = f"{patient.split}_{patient.index}"
    folder = root / "dataset" / patient.split / patient_name / f"{patient_name}_a"
    return [folder / patient.scan_name(number) for number in patient.scan_numbers]


def _write_patient_volumes(root: Path, shape: tuple[int, int, int], patient: Patient) -> None:
    for number, path in zip(patient.scan_numbers, _volume_paths(root, patient), strict=True):
        if not path.exists():
            hu, spacing = phantom_volume(patient, shape, number)
            with atomic_write(path, "wb") as file:
                file.write(nifti_bytes(hu, spacing))


def _first_voxel(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> tuple[float, float, float]:
    """Position (x, y, z) of voxel 0 in mm to Left, Posterior, Superior: DICOM's ImagePositionPatient."""
    return -shape[2] * spacing[2] / 2, -shape[1] * spacing[1] / 2, 0.0


def nifti_bytes(hu: np.ndarray, spacing: tuple[float, float, float]) -> bytes:
    """A .nii.gz of (D, H, W) int16 HU: x to Left, y to Posterior, z to Superior, qform and sform codes 1."""
    sz, sy, sx = spacing
    left, posterior, superior = _first_voxel(hu.shape, spacing)
    affine = np.diag([-sx, -sy, sz, 1.0])
    affine[:3, 3] = -left, -posterior, superior
    image = nib.Nifti1Image(hu.T, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _write_tables(dataset: Path, split: str, patients: list[Patient], shape: tuple[int, int, int]) -> None:
    metadata, reports, labels = [], [], []
    questions: dict[str, list[dict]] = {name: [] for name in QUESTION_TYPES}
    for patient in patients:
        findings, impressions = write_report(patient.findings, patient.rng(REPORT))
        for number in patient.scan_numbers:
            name = patient.scan_name(number)
            metadata.append(_metadata_row(patient, number, shape))
            texts = (name, "Not given.", "Non-contrast axial sections of the thorax.", findings, impressions)
            reports.append(dict(zip(REPORT_COLUMNS, texts, strict=True)))
            labels.append({"VolumeName": name, **dict(zip(LABELS, labels_of(patient.findings), strict=True))})
            for kind, rows in ask_questions(name, patient.findings, patient.rng(QUESTIONS)).items():
                questions[kind] += rows
    prefix = TABLE_PREFIX[split]
    _write_csv(dataset / "metadata" / f"{prefix}_metadata.csv", METADATA_COLUMNS, metadata)
    _write_csv(dataset / "radiology_text_reports" / f"{prefix}_reports.csv", REPORT_COLUMNS, reports)
    folder = dataset / "multi_abnormality_labels"
    _write_csv(folder / f"{split}_predicted_labels.csv", ("VolumeName", *LABELS), labels)
    for kind, rows in questions.items():
        _write_csv(dataset / "radgenome_files" / f"{prefix}_vqa_{kind}.csv", QUESTION_COLUMNS, rows)


def _metadata_row(patient: Patient, reconstruction: int, shape: tuple[int, int, int]) -> dict:
    """CT-RATE's row for a scan, with the intercept that CT-RATE lists though its files hold HU already."""
    spacing = scan_spacing(patient.body, shape)
    slices = shape[0]
    style = patient.second_reconstruction if reconstruction == 2 else ""
    if style == "thick":
        slices, spacing = slices // 2, (round(2 * spacing[0], 3), *spacing[1:])
    first = [round(value, 4) for value in _first_voxel((slices, *shape[1:]), spacing)]
    return {
        "VolumeName": patient.scan_name(reconstruction),
        "Manufacturer": "Phantom",
        "SeriesDescription": style or "standard",
        "ManufacturerModelName": "reaf_hsenet",
        "PatientSex": patient.body.sex,
        "PatientAge": f"{patient.body.age:03d}Y",
        "ReconstructionDiameter": round(min(shape[1:]) * spacing[1], 1),
        "GantryDetectorTilt": 0,
        "ConvolutionKernel": "sharp" if style == "sharp" else "soft",
        "PatientPosition": "HFS",
        "ImagePositionPatient": str(first),
        "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
        "SliceLocation": first[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": shape[1],
        "Columns": shape[2],
        "XYSpacing": str([spacing[1], spacing[2]]),
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "NumberofSlices": slices,
        "ZSpacing": spacing[0],
        "StudyDate": 20240101 + patient.index % 28,
    }


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path, "wb") as file:
        file.write(text.getvalue().encode())
