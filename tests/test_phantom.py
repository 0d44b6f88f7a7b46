"""The phantom: anatomy, findings, reports, the labeler that reads them back, and the dataset on disk."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.phantom.findings import LABELS, LOBES, Finding, find, labels_of, sample_findings
from reaf_hsenet.data.phantom.labeler import read_report
from reaf_hsenet.data.phantom.patient import phantom_volume, sample_patient
from reaf_hsenet.data.phantom.questions import ask_questions
from reaf_hsenet.data.phantom.reports import LUNG_LABELS, write_report
from reaf_hsenet.errors import InputError

CT_RATE_REPORTS = "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN"
QUESTION_HEADER = "Volumename,Anatomy,Abnormality,Size,Question,Answer"
SHAPE = (24, 48, 48)
CT_RATE_LABELS = (
    "Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,Coronary artery wall "
    "calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,Pulmonary "
    "fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial "
    "thickening,Consolidation,Bronchiectasis,Interlobular septal thickening"
)
CT_RATE_METADATA = (
    "VolumeName,Manufacturer,SeriesDescription,ManufacturerModelName,PatientSex,PatientAge,"
    "ReconstructionDiameter,DistanceSourceToDetector,DistanceSourceToPatient,GantryDetectorTilt,TableHeight,"
    "RotationDirection,ExposureTime,XRayTubeCurrent,Exposure,FilterType,GeneratorPower,FocalSpots,"
    "ConvolutionKernel,PatientPosition,RevolutionTime,SingleCollimationWidth,TotalCollimationWidth,TableSpeed,"
    "TableFeedPerRotation,SpiralPitchFactor,DataCollectionCenterPatient,ReconstructionTargetCenterPatient,"
    "ExposureModulationType,CTDIvol,ImagePositionPatient,ImageOrientationPatient,SliceLocation,SamplesPerPixel,"
    "PhotometricInterpretation,Rows,Columns,XYSpacing,RescaleIntercept,RescaleSlope,RescaleType,NumberofSlices,"
    "ZSpacing,StudyDate"
)


def healthy_patient(index: int = 1):
    return replace(sample_patient(0, "train", index), findings=())


def volume_with(*findings: Finding, index: int = 1, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    volume, _ = phantom_volume(replace(healthy_patient(index), findings=findings), shape)
    return volume.astype(np.float32)


def change(finding: Finding) -> np.ndarray:
    """Where a finding alters the volume of a healthy patient, well above the noise."""
    return np.abs(volume_with(finding) - volume_with()) > 120


def halves(mask: np.ndarray) -> tuple[int, int]:
    """Voxels set on the patient's (right, left); x runs to the Left."""
    middle = mask.shape[2] // 2
    return int(mask[:, :, :middle].sum()), int(mask[:, :, middle:].sum())


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantom")
    write_phantom_dataset(root, train=3, valid=2, seed=4, shape=SHAPE, reconstructions=0.7)
    return root


# Findings, reports and the labeler


def test_labels_are_ct_rates_in_its_order():
    assert ",".join(LABELS) == CT_RATE_LABELS
    assert labels_of([Finding("Hiatal hernia", size=40.0)]) == [0] * 5 + [1] + [0] * 12


@pytest.mark.slow
def test_labeler_inverts_two_thousand_reports():
    for index in range(2000):
        rng = np.random.default_rng([77, index])
        findings = sample_findings(rng)
        text, _ = write_report(findings, rng)
        assert read_report(text) == list(findings), text


def test_impressions_name_the_same_labels_as_findings():
    for index in range(200):
        rng = np.random.default_rng([78, index])
        findings = sample_findings(rng)
        _, impressions = write_report(findings, rng)
        assert labels_of(read_report(impressions)) == labels_of(findings), impressions


def test_reports_are_varied_partly_negated_and_fit_a_text_encoder():
    texts = [write_report((), np.random.default_rng(index))[0] for index in range(50)]
    assert len(set(texts)) == 50
    rng = np.random.default_rng(5)
    reports = [write_report(sample_findings(rng), rng)[0] for _ in range(500)]
    assert max(len(report.split()) for report in reports) <= 230
    negated = [report for report in reports if "No " in report or " not observed" in report]
    assert len(negated) > 400


def test_findings_are_frequent_and_some_patients_are_healthy():
    patients = [sample_findings(np.random.default_rng([3, index])) for index in range(1500)]
    shares = np.mean([labels_of(findings) for findings in patients], axis=0)
    assert shares.min() > 0.12 and shares.max() < 0.42
    assert 4 < shares.sum() < 5
    assert 0.02 < np.mean([not findings for findings in patients]) < 0.1


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("There is no pericardial effusion.", []),
        ("Neither consolidation nor pleural effusion is present.", []),
        ("Lymphadenopathy has not been seen.", []),
        ("No pleural or pericardial effusion was detected.", []),
        (
            "A nodule of 6 mm is seen in the left upper lobe.",
            [Finding("Lung nodule", "left upper lobe", 6.0)],
        ),
        (
            "A 1.2 x 0.9 cm nodule without calcification lies in the lower lobe of the right lung.",
            [Finding("Lung nodule", "right lower lobe", 12.0)],
        ),
        (
            "Lymph node measuring 22x14 mm in the subcarinal area.",
            [Finding("Lymphadenopathy", "subcarinal", 14.0)],
        ),
        (
            "Right upper and middle lobes show consolidation and no atelectasis.",
            [Finding("Consolidation", f"right {part} lobe") for part in ("middle", "upper")],
        ),
        (
            "No emphysema, but diffuse ground-glass opacity of the left lung.",
            [Finding("Lung opacity", f"left {part} lobe", kind="diffuse") for part in ("lower", "upper")],
        ),
        (
            "Bilateral pleural effusions of 15 mm on the left and 3 cm on the right.",
            [Finding("Pleural effusion", "left", 15.0), Finding("Pleural effusion", "right", 30.0)],
        ),
        (
            "Calcified plaques in the aortic arch and the LAD.",
            [
                Finding("Arterial wall calcification", "aortic arch"),
                Finding("Coronary artery wall calcification", "left anterior descending artery"),
            ],
        ),
        ("The heart is enlarged (cardiothoracic ratio 0.61).", [Finding("Cardiomegaly", size=0.61)]),
    ],
)
def test_labeler_reads_sentences_the_generator_never_writes(sentence, expected):
    assert read_report(sentence) == expected


# Volumes


def test_volume_depends_only_on_seed_and_patient():
    first, spacing = phantom_volume(sample_patient(0, "train", 7), SHAPE)
    again, _ = phantom_volume(sample_patient(0, "train", 7), SHAPE)
    assert first.dtype == np.int16 and first.shape == SHAPE
    assert np.array_equal(first, again)
    assert 290 < spacing[0] * SHAPE[0] < 350 and 330 < spacing[1] * SHAPE[1] < 410
    for other in (
        sample_patient(1, "train", 7),
        sample_patient(0, "valid", 7),
        sample_patient(0, "train", 8),
    ):
        assert not np.array_equal(first, phantom_volume(other, SHAPE)[0])


def test_healthy_chest_has_plausible_hounsfield_units():
    for index in range(1, 6):
        volume = volume_with(index=index)
        assert volume.min() >= -1024
        body = volume > -300
        lung = (volume > -860) & (volume < -730)
        assert 0.2 < body.mean() < 0.7 and 0.03 < lung.mean() < 0.25
        assert ((volume > -140) & (volume < -60)).mean() > 0.03, "no fat"
        assert ((volume > 250) & (volume < 450)).mean() > 0.002, "no bone"
        assert volume.max() < 600, "a healthy chest has no metal"
        # Between the liver and the neck, both sides have lung.
        right, left = halves(lung[8:20])
        assert 0.5 < right / left < 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_effusion_is_denser_on_its_side_and_grows_with_its_size(side):
    counts = [halves(change(Finding("Pleural effusion", side, size))) for size in (10.0, 30.0, 60.0)]
    index = ("right", "left").index(side)
    assert all(count[index] > 20 * count[1 - index] for count in counts)
    assert counts[0][index] < counts[1][index] < counts[2][index]


def test_cardiomegaly_widens_the_heart():
    def blood(*findings: Finding) -> int:
        return int((np.abs(volume_with(*findings)[9:12] - 42) < 60).sum())

    assert blood() < blood(Finding("Cardiomegaly", size=0.55)) < blood(Finding("Cardiomegaly", size=0.7))


@pytest.mark.parametrize("label", LUNG_LABELS)
def test_lung_findings_appear_in_their_lobe(label):
    kind = {"Lung opacity": "diffuse", "Emphysema": "severe"}.get(label, "")
    middles = {}
    for lobe in LOBES:
        finding = Finding(label, lobe, size=28.0 if label == "Lung nodule" else 0.0, kind=kind)
        altered = change(finding)
        right, left = halves(altered)
        assert right + left > 10
        assert (right > 4 * left) if lobe.startswith("right") else (left > 4 * right), lobe
        middles[lobe] = np.argwhere(altered)[:, 0].mean()
    assert middles["right upper lobe"] > middles["right lower lobe"]
    assert middles["left upper lobe"] > middles["left lower lobe"]


@pytest.mark.parametrize(
    "finding",
    [
        Finding("Medical material", "left", kind="pacemaker"),
        Finding("Medical material", "right", kind="port catheter"),
        Finding("Medical material", kind="sternal wires"),
        Finding("Medical material", kind="spinal screws"),
        Finding("Arterial wall calcification", "descending aorta"),
        Finding("Coronary artery wall calcification", "circumflex artery"),
    ],
)
def test_metal_and_calcium_are_bright(finding):
    assert volume_with(finding, shape=(48, 96, 96)).max() > volume_with(shape=(48, 96, 96)).max() + 80


@pytest.mark.parametrize(
    "finding",
    [
        Finding("Hiatal hernia", size=60.0),
        Finding("Pericardial effusion", size=20.0),
        Finding("Lymphadenopathy", "right hilar", 30.0),
        Finding("Lymphadenopathy", "left axillary", 30.0),
    ],
)
def test_mediastinal_findings_alter_the_volume(finding):
    assert change(finding).sum() > 10


# The dataset on disk


def test_dataset_has_ct_rates_files_and_columns(dataset):
    folder = dataset / "dataset"
    columns = {
        "metadata/train_metadata.csv": CT_RATE_METADATA,
        "metadata/validation_metadata.csv": CT_RATE_METADATA,
        "radiology_text_reports/train_reports.csv": CT_RATE_REPORTS,
        "radiology_text_reports/validation_reports.csv": CT_RATE_REPORTS,
        "multi_abnormality_labels/train_predicted_labels.csv": "VolumeName," + CT_RATE_LABELS,
        "multi_abnormality_labels/valid_predicted_labels.csv": "VolumeName," + CT_RATE_LABELS,
    }
    for split in ("train", "validation"):
        for kind in ("location", "abnormality", "presence", "size"):
            columns[f"radgenome_files/{split}_vqa_{kind}.csv"] = QUESTION_HEADER
    for name, header in columns.items():
        assert (folder / name).read_text().splitlines()[0] == header
    assert (folder / "train/train_1/train_1_a/train_1_a_1.nii.gz").exists()
    assert (folder / "valid/valid_2/valid_2_a/valid_2_a_1.nii.gz").exists()
    listed = {row["VolumeName"] for row in read_table(folder / "metadata/train_metadata.csv")}
    assert listed == {path.name for path in (folder / "train").rglob("*.nii.gz")}


def test_volumes_are_ct_rate_v2_nifti_and_agree_with_the_metadata(dataset):
    rows = read_table(dataset / "dataset/metadata/train_metadata.csv")
    for row in rows:
        patient = int(row["VolumeName"].split("_")[1])
        folder = dataset / f"dataset/train/train_{patient}/train_{patient}_a"
        image = nib.load(folder / row["VolumeName"])
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.get_data_dtype() == np.int16
        assert int(image.header["sform_code"]) == 1 and int(image.header["qform_code"]) == 1
        assert image.shape == (int(row["Columns"]), int(row["Rows"]), int(row["NumberofSlices"]))
        sx, sy = json.loads(row["XYSpacing"])
        assert image.header.get_zooms() == pytest.approx((sx, sy, float(row["ZSpacing"])))
        assert (row["RescaleSlope"], row["RescaleIntercept"]) == ("1", "-1024")
        assert row["ImageOrientationPatient"] == "[1, 0, 0, 0, 1, 0]"
        voxels = np.asarray(image.dataobj)
        assert voxels.min() >= -1024 and voxels.max() > 250, "Hounsfield units, not raw values"


def test_stored_effusion_lies_on_the_stated_side_of_the_patient(tmp_path):
    write_phantom_dataset(tmp_path, train=16, valid=0, seed=2, shape=SHAPE)
    checked = set()
    for index in range(1, 17):
        patient = sample_patient(2, "train", index)
        effusions = find(patient.findings, "Pleural effusion")
        if len(effusions) == 1:
            name = f"train_{index}"
            image = nib.load(tmp_path / f"dataset/train/{name}/{name}_a/{name}_a_1.nii.gz")
            rest = tuple(finding for finding in patient.findings if finding not in effusions)
            without = phantom_volume(replace(patient, findings=rest), SHAPE)[0].T.astype(np.float32)
            fluid = np.abs(np.asarray(image.dataobj) - without) > 150
            x = nib.affines.apply_affine(image.affine, np.argwhere(fluid))[:, 0]
            # World coordinates are RAS: positive x is the patient's right.
            assert ("right" if np.median(x) > 0 else "left") == effusions[0].place
            checked.add(effusions[0].place)
    assert checked == {"right", "left"}


def test_labels_and_answers_follow_from_the_reports_text(dataset):
    folder = dataset / "dataset"
    labels = {
        row["VolumeName"]: row
        for row in read_table(folder / "multi_abnormality_labels/train_predicted_labels.csv")
    }
    for row in read_table(folder / "radiology_text_reports/train_reports.csv"):
        expected = labels_of(read_report(row["Findings_EN"]))
        assert [int(labels[row["VolumeName"]][label]) for label in LABELS] == expected
    for row in read_table(folder / "radgenome_files/train_vqa_presence.csv"):
        present = labels[row["Volumename"]][
            next(label for label in LABELS if label.lower() == row["Abnormality"])
        ]
        assert row["Answer"] == ("yes" if present == "1" else "no")


def test_questions_are_answered_from_the_findings():
    findings = [Finding("Lung nodule", "left upper lobe", 9.0)]
    rows = ask_questions("a.nii.gz", findings, np.random.default_rng(0))
    assert [row["Answer"] for row in rows["location"]] == ["left upper lobe"]
    assert [(row["Size"], row["Answer"]) for row in rows["size"]] == [("9 mm", "9 mm")]
    assert {row["Answer"] for row in rows["presence"]} == {"yes", "no"}
    lung = [row for row in rows["abnormality"] if row["Anatomy"] == "lung"]
    assert all(row["Answer"] == "lung nodule" for row in lung)


def test_second_reconstruction_shares_report_and_labels_but_not_voxels(dataset):
    reports = {
        row["VolumeName"]: row["Findings_EN"]
        for row in read_table(dataset / "dataset/radiology_text_reports/train_reports.csv")
    }
    seconds = [name for name in reports if name.endswith("_2.nii.gz")]
    assert seconds
    for name in seconds:
        first = name.replace("_2.nii.gz", "_1.nii.gz")
        assert reports[name] == reports[first]
        paths = [next((dataset / "dataset/train").rglob(file)) for file in (first, name)]
        assert paths[0].read_bytes() != paths[1].read_bytes()


def test_workers_and_number_of_patients_do_not_change_a_patient(dataset, tmp_path):
    write_phantom_dataset(tmp_path, train=2, valid=1, seed=4, shape=SHAPE, reconstructions=0.7, workers=2)
    paths = sorted(path.relative_to(tmp_path) for path in (tmp_path / "dataset").rglob("*.nii.gz"))
    assert len(paths) >= 3
    for path in paths:
        assert (tmp_path / path).read_bytes() == (dataset / path).read_bytes()


def test_restart_writes_only_what_is_missing(dataset):
    tables = {path: path.read_bytes() for path in dataset.rglob("*.csv")}
    volumes = sorted((dataset / "dataset").rglob("*.nii.gz"))
    lost, content = volumes[0], volumes[0].read_bytes()
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in volumes[1:]}
    write_phantom_dataset(dataset, train=3, valid=2, seed=4, shape=SHAPE, reconstructions=0.7)
    assert lost.read_bytes() == content
    assert times == {path: path.stat().st_mtime_ns for path in volumes[1:]}
    assert tables == {path: path.read_bytes() for path in dataset.rglob("*.csv")}
    assert not list(dataset.rglob("*.tmp"))


@pytest.mark.parametrize(
    "other", [{"seed": 5}, {"shape": (24, 48, 64)}, {"train": 4}, {"reconstructions": 0.0}]
)
def test_folder_of_other_parameters_is_refused_and_untouched(dataset, other):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    arguments = {"train": 3, "valid": 2, "seed": 4, "shape": SHAPE, "reconstructions": 0.7} | other
    with pytest.raises(InputError, match="phantom.json") as refused:
        write_phantom_dataset(dataset, **arguments)
    assert str(dataset) in str(refused.value) and "\n" not in str(refused.value)
    assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}


def test_folder_of_a_real_dataset_is_refused(tmp_path):
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="not a phantom"):
        write_phantom_dataset(tmp_path, train=1, valid=0, shape=SHAPE)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"train": -1}, "train"),
        ({"train": 0, "valid": 0}, "train, valid"),
        ({"seed": -3}, "seed"),
        ({"workers": 0}, "workers"),
        ({"shape": (4, 96, 96)}, "shape"),
        ({"shape": (48, 96)}, "shape"),
        ({"reconstructions": 1.5}, "reconstructions"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(tmp_path, wrong, named):
    with pytest.raises(InputError, match=f"phantom {named}"):
        write_phantom_dataset(tmp_path / "new", **({"train": 1, "valid": 1} | wrong))
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="file"):
        write_phantom_dataset(tmp_path / "file" / "root", train=1, valid=0, shape=SHAPE)
