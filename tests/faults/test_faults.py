"""What goes wrong, and how it is said: every fault is made, the command is run, and it must end with the exit
code and the one line that the table says, never with a traceback.

    python -m pytest tests/faults                               # all of it
    python -m pytest tests/faults/test_faults.py -k truncated   # the faults with this word in their name

A row: the fault's name, how it is made (scene.py), the command ({data} is a copy of that original; {out} a
folder that is not there), the exit code (2: refused; 3: preprocess.py went on without some files), and words
of the line.
"""

import gzip
import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluate
import infer
import preprocess
import train
from conftest import error_line, script
from faults.limits import SECONDS, limited, no_file_above
from faults.scene import Fault as Make
from faults.scene import Scene, change, cut, header, nothing, remove, scan, tensors, write, write_originals
from reaf_hsenet.script import run_script
from test_killed_runs import forks, start  # noqa: F401

MAIN = {"preprocess": preprocess.main, "train": train.main, "evaluate": evaluate.main, "infer": infer.main}


class Fault(NamedTuple):
    name: str
    make: Make
    command: str
    code: int
    words: str


NIFTI = "preprocess --dataset nifti --root {scans} --out {out} --size 8 16 16"
CLIP1 = (
    "train --stage clip1 --data {data} --preset hsenet-tiny --size 16 32 32 --batch-size 4 --max-steps "
    "1 --out {out} --device cpu"
)
RETRIEVAL = "evaluate --task retrieval --run {run} --device cpu"
ZEROSHOT = "evaluate --task zeroshot --run {run} --device cpu --bootstrap 0"
REPORT = "infer report {scan} --run {language} --device cpu --new-tokens 2"
EMBED = "infer embed {scan} --run {run} --device cpu"
RESUME = "train --stage clip1 --resume --out {trained} --device cpu"
DEEP = '{"a":' * 50_000
CT = np.linspace(-1000, 500, 6 * 6 * 6).reshape(6, 6, 6).astype(np.int16)


class Opens:
    """Unpickled, it would open a file to write."""

    def __reduce__(self):
        return open, ("was_here", "w")


def pickled(name: str, value) -> Make:
    return lambda scene: torch.save(value, scene.file(name))


def nan(name: str) -> Make:
    def edit(state: dict) -> None:
        for key, tensor in state.items():
            state[key] = tensor * float("nan")

    return tensors(name, edit)


def unhashed(make: Make) -> Make:
    """A fault in a checkpoint as earlier versions saved it, without the hashes that would tell."""

    def made(scene: Scene) -> None:
        remove("run/checkpoints/step-000001/checkpoint.json")(scene)
        make(scene)

    return made


def trainer_state(edit: Callable[[dict], object]) -> Make:
    """A trainer.pt, as earlier versions saved it without its hash, that holds what `edit` returns, or
    leaves.
    """

    def make(scene: Scene) -> None:
        remove("trained/checkpoints/step-000001/checkpoint.json")(scene)
        path = scene.file("trained/checkpoints/step-000001/trainer.pt")
        state = torch.load(path)
        torch.save(edit(state) or state, path)

    return make


def volumes(count: int, write_it) -> Make:
    """The first training volumes' files, by a function of their path."""

    def make(scene: Scene) -> None:
        data = scene.path("data")
        for entry in json.loads((data / "manifest.json").read_text())["splits"]["train"][:count]:
            write_it(data / entry["volume"])

    return make


def first_volume(write_it) -> Make:
    return volumes(1, write_it)


def full_disk(most: int) -> Make:
    """No file of this process grows beyond so many bytes."""

    def make(scene: Scene) -> None:
        scene.most_bytes = most

    return make


def killed(rank: int, moment: str) -> Make:
    """Two processes train into {out}; when this file is there, one is killed with SIGKILL, and the other
    must end by itself.
    """

    def make(scene: Scene) -> None:
        argv = filled(
            f"{CLIP1} --max-steps 8 --batch-size 2 --save-every 1 --keep 9 --validate-every 1", scene
        )[1:]
        ranks = start(argv, 2)
        while not (scene.folder / "out" / moment).exists() and ranks[rank].is_alive():
            time.sleep(0.001)
        ranks[rank].kill()
        for process in ranks:
            process.join(60)
        assert ranks[rank].exitcode == -signal.SIGKILL and ranks[1 - rank].exitcode == 1

    return make


PREPROCESS = [
    Fault(
        "scan truncated",
        cut("scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: is truncated or damaged (Compressed file",
    ),
    Fault(
        "scan is text",
        write("scans/a.nii.gz", "not a scan"),
        NIFTI,
        3,
        "a.nii.gz: is truncated or damaged (Not a gzipped",
    ),
    Fault(
        "scan is empty",
        write("scans/a.nii.gz", ""),
        NIFTI,
        3,
        "a.nii.gz: is not a readable NIfTI file (Binary",
    ),
    Fault(
        "scan is a folder",
        lambda s: (remove("scans/a.nii.gz")(s), s.file("scans/a.nii.gz").mkdir()),
        NIFTI,
        3,
        "a.nii.gz: is listed in the table but absent",
    ),
    Fault(
        "scan of four dimensions",
        scan(np.stack([CT] * 3, 3), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: is a 4D image of shape (6, 6, 6, 3)",
    ),
    Fault(
        "scan that claims 10^13 voxels",
        scan(name="scans/a.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        NIFTI,
        3,
        "a.nii.gz: is truncated or damaged (its header tells",
    ),
    Fault(
        "scaled scan that claims 10^13 voxels",
        scan(name="scans/a.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1], scl_slope=2.0),
        NIFTI,
        3,
        "a.nii.gz: is truncated or damaged (its header tells",
    ),
    Fault(
        "scan that claims no voxels",
        scan(name="scans/a.nii.gz", dim=[3, 0, 5, 5, 1, 1, 1, 1]),
        NIFTI,
        3,
        "a.nii.gz: is a 2D image of shape (0, 5, 5)",
    ),
    Fault(
        "scan of a negative size",
        scan(name="scans/a.nii.gz", dim=[3, -4, 5, 5, 1, 1, 1, 1]),
        NIFTI,
        3,
        "a.nii.gz: is a 2D image of shape (-4, 5, 5)",
    ),
    Fault(
        "scan whose data lie beyond its end",
        scan(name="scans/a.nii.gz", vox_offset=1e9),
        NIFTI,
        3,
        "a.nii.gz: is truncated or damaged (its header tells",
    ),
    Fault(
        "scan whose data lie at infinity",
        scan(name="scans/a.nii.gz", vox_offset=np.inf),
        NIFTI,
        3,
        "a.nii.gz: is not a readable NIfTI file (cannot",
    ),
    Fault(
        "scan that unpacks to a thousand times its size",
        write("scans/a.nii.gz", gzip.compress(bytes(2**26))),
        NIFTI,
        3,
        "a.nii.gz: the header's spacing is 0 x 0 x 0 mm",
    ),
    Fault(
        "scan with NaN",
        scan(np.where(CT > 400, np.nan, CT).astype(np.float32), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: 15 voxels are NaN or infinite, or beyond",
    ),
    Fault(
        "scan of one value",
        scan(np.zeros((6, 6, 6), np.int16), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: every voxel is 0; expected a CT",
    ),
    Fault(
        "scan is a mask",
        scan((CT > 0).astype(np.int16), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: holds only whole numbers from 0 to 1",
    ),
    Fault(
        "scan of air",
        scan(np.linspace(-1024, -900, 216).reshape(6, 6, 6).astype(np.int16), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: the values are not HU: only 0.0% of",
    ),
    Fault(
        "scan of complex numbers",
        scan(CT.astype(np.complex64), "scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: holds complex64 values; expected integers",
    ),
    Fault(
        "scan without orientation",
        scan(name="scans/a.nii.gz", sform_code=0, qform_code=0),
        NIFTI,
        3,
        "a.nii.gz: the header has no orientation (sform and",
    ),
    Fault(
        "scan without spacing",
        scan(name="scans/a.nii.gz", pixdim=[1, 0, 0, 0, 0, 0, 0, 0]),
        NIFTI,
        3,
        "a.nii.gz: the header's spacing is 0 x 0 x 0 mm",
    ),
    Fault(
        "scan of two parallel axes",
        scan(name="scans/a.nii.gz", sform_code=2, srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]),
        NIFTI,
        3,
        "affine is degenerate",
    ),
    Fault(
        "scan that is listed but absent",
        remove("scans/a.nii.gz"),
        NIFTI,
        3,
        "a.nii.gz: is listed in the table but absent",
    ),
    Fault(
        "table without its column",
        write("scans/reports.csv", "id,words\na,x\n"),
        NIFTI,
        2,
        "reports.csv: has no column text; its columns are",
    ),
    Fault(
        "table is empty",
        write("scans/reports.csv", ""),
        NIFTI,
        2,
        "reports.csv: has no column id, text; its columns",
    ),
    Fault(
        "table without rows",
        write("scans/reports.csv", "id,text\n"),
        NIFTI,
        2,
        "reports.csv: has no rows; expected an id and a text",
    ),
    Fault(
        "table with NUL bytes",
        write("scans/reports.csv", b"id,text\na,\0\0\n"),
        NIFTI,
        2,
        "reports.csv: line 2 holds a NUL byte; save the",
    ),
    Fault(
        "table with a field of 200 kB",
        write("scans/reports.csv", "id,text\na," + "x" * 200_000),
        NIFTI,
        2,
        "reports.csv: line 2: the quotes do not balance, or",
    ),
    Fault(
        "table with too many fields",
        write("scans/reports.csv", "id,text\na,x,y\n"),
        NIFTI,
        2,
        "reports.csv: line 2 has more fields than the",
    ),
    Fault(
        "table with too few fields",
        write("scans/reports.csv", "id,text\na\n"),
        NIFTI,
        2,
        "reports.csv: line 2 has fewer fields than the header",
    ),
    Fault(
        "table in Latin-1",
        write("scans/reports.csv", "id,text\na,Müller\n".encode("latin-1")),
        NIFTI,
        2,
        "reports.csv: is not a UTF-8 csv file ('utf-8' codec",
    ),
    Fault(
        "table that lists a volume twice",
        write("scans/reports.csv", "id,text\na,x\na,y\n"),
        NIFTI,
        2,
        "reports.csv: id a is listed twice, the second time",
    ),
    Fault(
        "table that leaves its folder",
        write("scans/reports.csv", "id,text\n../a,x\n"),
        NIFTI,
        2,
        "reports.csv: id '../a' is not a path below",
    ),
    Fault(
        "table whose id has a NUL byte",
        write("scans/reports.csv", "id,text\na\0b,x\n"),
        NIFTI,
        2,
        "reports.csv: line 2 holds a NUL byte; save the",
    ),
    Fault(
        "table whose id is 5,000 letters long",
        write("scans/reports.csv", f"id,text\n{'a' * 5000},x\n"),
        NIFTI,
        2,
        "reports.csv: id",
    ),
    Fault(
        "table with an empty report",
        write("scans/reports.csv", "id,text\na,\nb,x\nc,y\n"),
        NIFTI,
        3,
        "a.nii.gz: has an empty text in reports.csv",
    ),
    Fault(
        "two tables",
        write("scans/more.csv", "id,text\na,x\n"),
        NIFTI,
        2,
        "scans: has 2 csv files; name the one with id and",
    ),
    Fault("no such root", nothing, NIFTI.replace("{scans}", "{none}"), 2, "none: no such folder"),
    Fault(
        "no root",
        nothing,
        "preprocess --dataset nifti --out {out}",
        2,
        "--dataset nifti needs --root, the folder of the raw",
    ),
    Fault(
        "out is a file", write("out", "x"), NIFTI, 2, "out: cannot be used as a folder to write into (File"
    ),
    Fault(
        "size of zero",
        nothing,
        NIFTI.replace("8 16 16", "0 16 16"),
        2,
        "--size (0, 16, 16): expected three positive numbers",
    ),
    Fault(
        "window the wrong way round",
        nothing,
        f"{NIFTI} --window 200 -1000",
        2,
        "--window (200.0, -1000.0): expected LOW HIGH in HU",
    ),
    Fault(
        "spacing of NaN",
        nothing,
        f"{NIFTI} --spacing nan 1 1",
        2,
        "--spacing (nan, 1.0, 1.0): expected three positive",
    ),
    Fault("unknown flag", nothing, f"{NIFTI} --quick", 2, "unrecognized arguments: --quick; see __main__.py"),
    Fault("no workers", nothing, f"{NIFTI} --workers 0", 2, "--workers 0: expected 1 or more"),
    Fault(
        "slice encoder of an unknown family",
        pickled("x.pt", {"unet.weight": torch.ones(3)}),
        "preprocess --slices {x.pt} --out {data}",
        2,
        "x.pt: is not a 2D ViT such as BiomedCLIP's",
    ),
    Fault(
        "slice encoder with NaN",
        nan("encoder.bin"),
        "preprocess --slices {encoder.bin} --out {data}",
        2,
        "encoder.bin: NaN or infinite values in cls_token",
    ),
    Fault(
        "slice encoder truncated",
        cut("encoder.bin"),
        "preprocess --slices {encoder.bin} --out {data}",
        2,
        "encoder.bin: is truncated or not a checkpoint (File",
    ),
    Fault(
        "slice encoder that would run code",
        pickled("x.pt", {"a": Opens()}),
        "preprocess --slices {x.pt} --out {data}",
        2,
        "x.pt: holds more than tensors (io.open), which is",
    ),
    Fault(
        "slice features of another encoder",
        nothing,
        "preprocess --slices {encoder.bin} --out {data} --device cpu",
        2,
        "data: holds slice features with another sha256",
    ),
    Fault(
        "slices without volumes",
        nothing,
        "preprocess --slices {encoder.bin} --out {out} --device cpu",
        2,
        "manifest.json: no such file; prepare volumes first",
    ),
    Fault(
        "manifest to add slices to is a list",
        write("data/manifest.json", "[]"),
        "preprocess --slices {encoder.bin} --out {data} --device cpu",
        2,
        "manifest.json: expected an object of settings",
    ),
    Fault(
        "questions without tables",
        nothing,
        "preprocess --dataset radgenome --root {scans} --out {data}",
        2,
        "scans: has no RadGenome-ChestCT tables; expected",
    ),
    Fault(
        "REAF's reports are no list",
        lambda s: (write("reaf/train/reports/r.json", "{}")(s), (s.folder / "reaf/train/volumes").mkdir()),
        "preprocess --dataset reaf --root {reaf} --out {out}",
        2,
        "r.json: holds no list; expected a list of image and",
    ),
    Fault(
        "CT-RATE folder without tables",
        nothing,
        "preprocess --dataset ct-rate --root {scans} --out {out}",
        2,
        "train_reports.csv or validation_reports.csv below it",
    ),
]

TRAIN = [
    Fault(
        "no data", nothing, CLIP1.replace("{data}", "{none}"), 2, "manifest.json: no such file; make it with"
    ),
    Fault(
        "manifest is no JSON",
        write("data/manifest.json", "{"),
        CLIP1,
        2,
        "manifest.json: is not valid JSON (Expecting",
    ),
    Fault(
        "manifest is a list",
        write("data/manifest.json", "[]"),
        CLIP1,
        2,
        "manifest.json: expected an object of settings",
    ),
    Fault(
        "manifest nested 50,000 deep",
        write("data/manifest.json", DEEP),
        CLIP1,
        2,
        "manifest.json: is not valid JSON (maximum recursion",
    ),
    Fault(
        "manifest is binary",
        write("data/manifest.json", b"\xff\xfe\x00"),
        CLIP1,
        2,
        "manifest.json: is not valid JSON ('utf-8' codec",
    ),
    Fault(
        "manifest of another schema",
        change("data/manifest.json", "schema", value=9),
        CLIP1,
        2,
        "manifest.json: schema 9, expected 1; prepare the",
    ),
    Fault(
        "manifest without recipe",
        change("data/manifest.json", "recipe", value=...),
        CLIP1,
        2,
        "manifest.json: Manifest lacks recipe; put the",
    ),
    Fault(
        "manifest whose recipe is a number",
        change("data/manifest.json", "recipe", value=3),
        CLIP1,
        2,
        "manifest.json: Recipe is 3; expected an object of",
    ),
    Fault(
        "manifest whose window is a text",
        change("data/manifest.json", "recipe", "window", value="wide"),
        CLIP1,
        2,
        "manifest.json: window of Recipe is 'wide'; expected",
    ),
    Fault(
        "manifest whose size is of floats",
        change("data/manifest.json", "recipe", "size", value=[1.5, 2, 3]),
        CLIP1,
        2,
        "manifest.json: size of Recipe is [1.5, 2, 3]",
    ),
    Fault(
        "manifest of another dtype",
        change("data/manifest.json", "dtype", value="float99"),
        CLIP1,
        2,
        "manifest.json: dtype of Manifest is 'float99'",
    ),
    Fault(
        "manifest whose splits are a list",
        change("data/manifest.json", "splits", value=[]),
        CLIP1,
        2,
        "manifest.json: splits of Manifest is []; expected",
    ),
    Fault(
        "manifest whose split is a text",
        change("data/manifest.json", "splits", "train", value="abc"),
        CLIP1,
        2,
        "manifest.json: train is 'abc'; prepare the data set",
    ),
    Fault(
        "manifest whose entry is null",
        change("data/manifest.json", "splits", "train", 0, value=None),
        CLIP1,
        2,
        "manifest.json: train entry 0: it is None; prepare",
    ),
    Fault(
        "manifest whose entry has no id",
        change("data/manifest.json", "splits", "train", 0, "id", value=...),
        CLIP1,
        2,
        "manifest.json: train entry 0: id is 'missing'; prepare",
    ),
    Fault(
        "manifest whose id is a list",
        change("data/manifest.json", "splits", "train", 0, "id", value=[1]),
        CLIP1,
        2,
        "manifest.json: train entry 0: id is [1]; prepare",
    ),
    Fault(
        "manifest whose volume is a number",
        change("data/manifest.json", "splits", "train", 0, "volume", value=3),
        CLIP1,
        2,
        "manifest.json: train entry 0: volume is 3; prepare",
    ),
    Fault(
        "manifest whose volume has a NUL byte",
        change("data/manifest.json", "splits", "train", 0, "volume", value="a\0.npy"),
        CLIP1,
        2,
        "manifest.json: train entry 0: volume is",
    ),
    Fault(
        "manifest whose report is null",
        change("data/manifest.json", "splits", "train", 0, "text", value=None),
        CLIP1,
        2,
        "manifest.json: train entry 0: text is None; prepare",
    ),
    Fault(
        "manifest whose labels are a text",
        change("data/manifest.json", "splits", "validation", 0, "labels", value="yes"),
        CLIP1,
        2,
        "manifest.json: validation entry 0: labels is 'yes'",
    ),
    Fault(
        "manifest whose source is a text",
        change("data/manifest.json", "splits", "validation", 0, "source", value="here"),
        CLIP1,
        2,
        "manifest.json: validation entry 0: source is",
    ),
    Fault(
        "manifest whose questions are numbers",
        change("data/manifest.json", "splits", "validation", 0, "qa", value=[3]),
        CLIP1,
        2,
        "manifest.json: validation entry 0: qa is [3]",
    ),
    Fault(
        "manifest whose reading is unknown",
        change("data/manifest.json", "reading", value={"rescale": "maybe"}),
        CLIP1,
        2,
        "manifest.json: rescale of Reading is 'maybe'",
    ),
    Fault(
        "manifest that lists a volume twice",
        lambda s: change(
            "data/manifest.json",
            "splits",
            "validation",
            1,
            value=json.loads(s.file("data/manifest.json").read_text())["splits"]["validation"][0],
        )(s),
        CLIP1,
        2,
        "manifest.json: id valid_1_a_1 is listed twice; keep",
    ),
    Fault(
        "manifest without training volumes",
        change("data/manifest.json", "splits", "train", value=[]),
        CLIP1,
        2,
        "manifest.json: the train split is empty; prepare",
    ),
    Fault(
        "an empty report",
        change("data/manifest.json", "splits", "train", 0, "text", value=" "),
        CLIP1,
        2,
        "manifest.json: the report of train_1_a_1 is empty",
    ),
    Fault(
        "a volume is missing",
        first_volume(Path.unlink),
        CLIP1,
        2,
        "train_1_a_1.npy: is in the manifest but absent; run",
    ),
    Fault(
        "a volume truncated",
        first_volume(lambda p: p.write_bytes(p.read_bytes()[:999])),
        CLIP1,
        2,
        "train_1_a_1.npy: has 999 bytes, expected 32896 for",
    ),
    Fault(
        "a volume of zeros of the right length",
        first_volume(lambda p: p.write_bytes(bytes(p.stat().st_size))),
        CLIP1,
        2,
        "train_1_a_1.npy: cannot be read (This file contains",
    ),
    Fault(
        "a volume with NaN",
        first_volume(lambda p: np.save(p, np.full((1, 16, 32, 32), np.nan, np.float16))),
        CLIP1,
        2,
        "train_1_a_1.npy: has shape (1, 16, 32, 32), the",
    ),
    Fault(
        "a volume of another shape",
        first_volume(lambda p: np.save(p, np.zeros((1, 32, 16, 32), np.float16))),
        CLIP1,
        2,
        "train_1_a_1.npy: has shape (1, 32, 16, 32), the",
    ),
    Fault(
        "more bad volumes than are allowed",
        volumes(2, lambda p: p.write_bytes(bytes(p.stat().st_size))),
        f"{CLIP1} --max-bad 1",
        2,
        "--max-bad 1",
    ),
    Fault(
        "as many bad volumes as are allowed",
        volumes(1, lambda p: p.write_bytes(bytes(p.stat().st_size))),
        f"{CLIP1.replace('--max-steps 1', '--epochs 1')} --max-bad 1",
        0,
        "train_1_a_1",
    ),
    Fault(
        "steps that are not finite",
        nothing,
        f"{CLIP1.replace('--max-steps 1', '--max-steps 4')} --lr 1e15 --clip-norm 1e30 --validate-every 1 "
        f"--max-skipped 0",
        2,
        "--max-skipped 0",
    ),
    Fault(
        "a last validation that is not finite",
        nothing,
        f"{CLIP1.replace('--max-steps 1', '--max-steps 4')} --lr 1e15 --clip-norm 1e30 --validate-every 1",
        2,
        "step 4: the last validation is not finite, embeddings of",
    ),
    Fault(
        "a disk that is full when the checkpoint is written",
        full_disk(200_000),
        CLIP1,
        2,
        "cannot be written",
    ),
    Fault(
        "HSENet's json of another form",
        write("h.json", '{"train": 3}'),
        CLIP1.replace("{data}", "{h.json}"),
        2,
        "h.json: train is no list; expected entries of image",
    ),
    Fault(
        "HSENet's json is a scan",
        nothing,
        CLIP1.replace("{data}", "{scan}"),
        2,
        "scan.nii.gz: is not valid JSON ('utf-8' codec can't",
    ),
    Fault(
        "batch of none",
        nothing,
        CLIP1.replace("--batch-size 4", "--batch-size 0"),
        2,
        "--batch-size 0: expected more than 0",
    ),
    Fault(
        "batch larger than the data",
        nothing,
        CLIP1.replace("--batch-size 4", "--batch-size 400"),
        2,
        "--batch-size 400: with 1 processes a batch needs",
    ),
    Fault("learning rate of 10^38", nothing, f"{CLIP1} --lr 1e38", 2, "--lr 1e+38: expected"),
    Fault("learning rate of NaN", nothing, f"{CLIP1} --lr nan", 2, "--lr nan: expected more than 0"),
    Fault(
        "negative weight decay",
        nothing,
        f"{CLIP1} --weight-decay -1",
        2,
        "--weight-decay -1.0: expected 0 or more",
    ),
    Fault(
        "size that no patch divides",
        nothing,
        CLIP1.replace("16 32 32", "17 32 32"),
        2,
        "input size (17, 32, 32) is not a multiple of the",
    ),
    Fault(
        "data of another size",
        nothing,
        CLIP1.replace("16 32 32", "32 64 64"),
        2,
        "manifest.json: its volumes have size 16x32x32, but",
    ),
    Fault(
        "unknown preset",
        nothing,
        CLIP1.replace("hsenet-tiny", "huge"),
        2,
        "--preset huge: hsenet has hsenet-base, hsenet-tiny",
    ),
    Fault(
        "data of another recipe",
        nothing,
        CLIP1.replace("--preset hsenet-tiny", "--model reaf --preset reaf-tiny"),
        2,
        "manifest.json: its volumes have recipe hsenet, but",
    ),
    Fault(
        "no such device",
        nothing,
        CLIP1.replace("--device cpu", "--device cuda:99"),
        2,
        "--device cuda:99: torch sees no GPU here; leave the",
    ),
    Fault(
        "a device of no kind",
        nothing,
        CLIP1.replace("--device cpu", "--device abacus"),
        2,
        "--device abacus: expected cpu, cuda or cuda:N",
    ),
    Fault(
        "start from a truncated file",
        cut("m3d/model.safetensors"),
        f"{CLIP1} --init {{m3d}}/model.safetensors",
        2,
        "model.safetensors: is truncated or not a checkpoint",
    ),
    Fault(
        "start from weights of an unknown family",
        pickled("x.pt", {"unet.weight": torch.ones(3)}),
        f"{CLIP1} --init {{x.pt}}",
        2,
        "x.pt: is not a checkpoint of REAF, HLIP, M3D-CLIP",
    ),
    Fault(
        "start from weights with NaN",
        nan("m3d/model.safetensors"),
        f"{CLIP1} --init {{m3d}}/model.safetensors",
        2,
        "model.safetensors: NaN or infinite values in",
    ),
    Fault(
        "start from weights of another size",
        nothing,
        f"{CLIP1} --init {{m3d}}/model.safetensors",
        2,
        "model.safetensors: has positions (1, 64, 48), not",
    ),
    Fault(
        "start from a file that would run code",
        pickled("x.pt", {"model": Opens()}),
        f"{CLIP1} --init {{x.pt}}",
        2,
        "x.pt: holds more than tensors (io.open), which is",
    ),
    Fault(
        "start from a list",
        pickled("x.pt", [torch.ones(3)]),
        f"{CLIP1} --init {{x.pt}}",
        2,
        "x.pt: is not a dictionary of tensors by name",
    ),
    Fault(
        "start from a folder without weights",
        nothing,
        f"{CLIP1} --init {{scans}}",
        2,
        "scans: has none of model.safetensors",
    ),
    Fault(
        "text encoder without vocabulary",
        remove("words/vocab.txt"),
        f"{CLIP1} --text-model {{words}}",
        2,
        "vocab.txt: no such file; expected BERT",
    ),
    Fault(
        "text encoder whose vocabulary is binary",
        write("words/vocab.txt", b"\xff\xfe\0"),
        f"{CLIP1} --text-model {{words}}",
        2,
        "vocab.txt: is not UTF-8 text (",
    ),
    Fault(
        "text encoder of another vocabulary",
        write(
            "words/vocab.txt",
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(900))]),
        ),
        f"{CLIP1} --text-model {{words}}",
        2,
        "words: vocab.txt has 905 tokens, its encoder 200",
    ),
    Fault(
        "text encoder whose settings are a list",
        write("words/config.json", "[]"),
        f"{CLIP1} --text-model {{words}}",
        2,
        "config.json: expected an object of settings, found",
    ),
    Fault(
        "text encoder whose settings contradict its weights",
        change("words/config.json", "hidden_size", value=128),
        f"{CLIP1} --text-model {{words}}",
        2,
        "words: does not fit this model: word_embed.weight",
    ),
    Fault(
        "text encoder of a width of a billion",
        change("words/config.json", "hidden_size", value=10**9),
        f"{CLIP1} --text-model {{words}}",
        2,
        "config.json: width of TextConfig is 1000000000; expected",
    ),
    Fault(
        "nothing to resume",
        nothing,
        "train --stage clip1 --resume --out {out} --device cpu",
        2,
        "out: holds no run to resume; name one with --out",
    ),
    Fault(
        "resumed run whose config.json is damaged",
        write("trained/config.json", "{"),
        RESUME,
        2,
        "config.json: is not valid JSON (Expecting property",
    ),
    Fault(
        "resumed run whose config.json is a list",
        write("trained/config.json", "[]"),
        RESUME,
        2,
        "config.json: expected an object of settings, found",
    ),
    Fault(
        "resumed run whose settings have another kind",
        change("trained/config.json", "train", "lr", value="fast"),
        RESUME,
        2,
        "config.json: lr of TrainConfig is 'fast'; expected",
    ),
    Fault(
        "resumed run without its settings",
        change("trained/config.json", "train", value=...),
        RESUME,
        2,
        "config.json: has no train as a run that was trained",
    ),
    Fault(
        "resumed run whose world is a text",
        change("trained/config.json", "world", value="all"),
        RESUME,
        2,
        "config.json: world of RunSettings is 'all'; expected",
    ),
    Fault(
        "resumed run whose trainer state is truncated",
        cut("trained/checkpoints/step-000001/trainer.pt"),
        RESUME,
        2,
        "trainer.pt: is damaged: it has ",
    ),
    Fault(
        "resumed run whose trainer state is a list",
        pickled("trained/checkpoints/step-000001/trainer.pt", [1]),
        RESUME,
        2,
        "trainer.pt: is damaged: it has 1261 bytes, ",
    ),
    Fault(
        "resumed run whose trainer state is a number",
        trainer_state(lambda s: 3),
        RESUME,
        2,
        "trainer.pt: is not the state of this run's training",
    ),
    Fault(
        "resumed run whose trainer state is empty",
        trainer_state(lambda s: s.clear()),
        RESUME,
        2,
        "trainer.pt: is not the state of this run's training ('optimizer')",
    ),
    Fault(
        "resumed run without its progress",
        trainer_state(lambda s: s.pop("progress") and None),
        RESUME,
        2,
        "trainer.pt: Saved lacks progress",
    ),
    Fault(
        "resumed run whose step is a text",
        trainer_state(lambda s: s["progress"].update(step="1")),
        RESUME,
        2,
        "trainer.pt: step of Progress is '1'; expected int",
    ),
    Fault(
        "resumed run whose best score is a tensor",
        trainer_state(lambda s: s["progress"].update(best=torch.ones(2))),
        RESUME,
        2,
        "trainer.pt: best of Progress is tensor",
    ),
    Fault(
        "resumed run whose step is another",
        trainer_state(lambda s: s["progress"].update(step=7)),
        RESUME,
        2,
        "trainer.pt: is of step 7; put the one of this step",
    ),
    Fault(
        "resumed run whose batch is negative",
        trainer_state(lambda s: s["progress"].update(batch=-7)),
        RESUME,
        2,
        "trainer.pt: batch of Progress is -7; expected 0 or",
    ),
    Fault(
        "resumed run with moments of another shape",
        trainer_state(lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3))),
        RESUME,
        2,
        "its optimizer has other moments of parameter 0",
    ),
    Fault(
        "resumed run with an optimizer of other parameters",
        trainer_state(lambda s: s["optimizer"]["param_groups"].pop() and None),
        RESUME,
        2,
        "its optimizer has other parameters",
    ),
    Fault(
        "resumed run whose bad volumes are numbers",
        trainer_state(lambda s: s.update(bad={3: 4})),
        RESUME,
        2,
        "trainer.pt: bad of Saved is {3: 4}; expected",
    ),
    Fault(
        "resumed run that accumulates -1 batches",
        change("trained/config.json", "train", "accumulate", value=-1),
        RESUME,
        2,
        "config.json: accumulate of TrainConfig is -1; expected more",
    ),
    Fault(
        "resumed run of betas above 1",
        change("trained/config.json", "train", "betas", value=[2, 3]),
        RESUME,
        2,
        "config.json: betas of TrainConfig is (2, 3); expected",
    ),
    Fault(
        "resumed run of an unknown precision",
        change("trained/config.json", "train", "precision", value="fp8"),
        RESUME,
        2,
        "config.json: precision of TrainConfig is 'fp8'; expected",
    ),
    Fault(
        "resumed run of a world of none",
        change("trained/config.json", "world", value=0),
        RESUME,
        2,
        "config.json: world of RunSettings is 0; expected more",
    ),
    Fault(
        "resumed run that flips twice as often as always",
        change("trained/config.json", "train", "augment", "flip", value=2),
        RESUME,
        2,
        "config.json: flip of Augmentation is 2; expected 1 or",
    ),
    Fault(
        "resumed run whose checkpoint.json lists no file",
        change("trained/checkpoints/step-000001/checkpoint.json", "files", value={}),
        RESUME,
        2,
        "checkpoint.json: is damaged; no other checkpoint",
    ),
    Fault(
        "start from a run that is not there",
        nothing,
        f"{CLIP1} --init runs/typo",
        2,
        "runs/typo: no such folder or file; expected one, or a hub",
    ),
    Fault(
        "start from a file that is not in a folder",
        nothing,
        f"{CLIP1} --init data/typo",
        2,
        "data/typo: no such folder or file; expected one, or a hub",
    ),
    Fault(
        "resumed run whose weights are truncated",
        cut("trained/checkpoints/step-000001/model.safetensors"),
        RESUME,
        2,
        "model.safetensors: is damaged: it has 1939186",
    ),
    Fault(
        "resumed run whose last step is binary",
        write("trained/checkpoints/last", b"\xff\0\xfe"),
        RESUME,
        2,
        "write the name of a step's folder into it",
    ),
    Fault(
        "resumed run whose data are gone",
        change("trained/config.json", "data", value="/nowhere"),
        RESUME,
        2,
        "manifest.json: no such file; make it with",
    ),
    Fault(
        "resumed run that lost a process",
        killed(1, "checkpoints/step-000001"),
        RESUME.replace("{trained}", "{out}"),
        0,
        "out: finished; best checkpoint",
    ),
    Fault(
        "resumed run that lost a process before its first checkpoint",
        killed(0, "config.json"),
        RESUME.replace("{trained}", "{out}"),
        2,
        "out: has no checkpoint to resume from; start it",
    ),
    Fault(
        "resumed run of another stage",
        nothing,
        RESUME.replace("clip1", "clip2"),
        2,
        "trained: is a clip1 run of hsenet, not clip2 of",
    ),
    Fault(
        "a run is there already",
        nothing,
        f"{CLIP1.replace('{out}', '{trained}')} --seed 7",
        2,
        "trained: holds a run already; continue it with",
    ),
    Fault(
        "reports without a stage-2 run",
        nothing,
        "train --stage mrg --init {none} --device cpu --out {out}",
        2,
        "none: no run of stage clip2, whose encoder --vision",
    ),
    Fault(
        "decoder without settings",
        nothing,
        "train --stage mrg --vision stage1 --init {run} --decoder {scans} --data {data} --device cpu --out "
        "{out}",
        2,
        "scans: no tokenizer found; looked for",
    ),
    Fault(
        "stage 2 without a teacher",
        nothing,
        "train --stage clip2 --teacher {none} --data {data} --device cpu --out {out}",
        2,
        "none: no run of stage clip1, the teacher; train it",
    ),
]

EVALUATE = [
    Fault(
        "no run",
        nothing,
        RETRIEVAL.replace("{run}", "{none}"),
        2,
        "none: holds no run (no config.json); train one with",
    ),
    Fault(
        "run without stage",
        change("run/config.json", "stage", value=...),
        RETRIEVAL,
        2,
        "config.json: RunSettings lacks stage; put the file",
    ),
    Fault(
        "run whose settings are null",
        write("run/config.json", "null"),
        RETRIEVAL,
        2,
        "config.json: expected an object of settings, found",
    ),
    Fault(
        "run whose settings are nested 50,000 deep",
        write("run/config.json", DEEP),
        RETRIEVAL,
        2,
        "config.json: is not valid JSON (maximum recursion",
    ),
    Fault(
        "run whose model is empty",
        change("run/config.json", "model", value={}),
        RETRIEVAL,
        2,
        "model.safetensors: does not fit this model",
    ),
    Fault(
        "run whose model has another setting",
        change("run/config.json", "model", "flavour", value="mild"),
        RETRIEVAL,
        2,
        "config.json: ClipConfig has no setting flavour",
    ),
    Fault(
        "run whose width is a text",
        change("run/config.json", "model", "vision", "width", value="wide"),
        RETRIEVAL,
        2,
        "config.json: width of VisionConfig is 'wide'",
    ),
    Fault(
        "run whose width is 10^9",
        change("run/config.json", "model", "vision", "width", value=10**9),
        RETRIEVAL,
        2,
        "config.json: width of VisionConfig is 1000000000;",
    ),
    Fault(
        "run whose width is twice its weights'",
        change("run/config.json", "model", "vision", "width", value=256),
        RETRIEVAL,
        2,
        "model.safetensors: does not fit this model",
    ),
    Fault(
        "run whose depth is 10^9",
        change("run/config.json", "model", "text", "depth", value=10**9),
        RETRIEVAL,
        2,
        "config.json: depth of TextConfig is 1000000000;",
    ),
    Fault(
        "run whose heads are none",
        change("run/config.json", "model", "text", "heads", value=0),
        RETRIEVAL,
        2,
        "config.json: heads of TextConfig is 0; expected more",
    ),
    Fault(
        "run of another kind of scale",
        change("run/config.json", "model", "logit_scale", value="loud"),
        RETRIEVAL,
        2,
        "config.json: logit_scale of ClipConfig is 'loud'",
    ),
    Fault(
        "run whose patch has two sizes",
        change("run/config.json", "model", "vision", "patch", value=[4, 8]),
        RETRIEVAL,
        2,
        "config.json: patch of VisionConfig is [4, 8]",
    ),
    Fault(
        "run whose recipe is incomplete",
        change("run/config.json", "recipe", "window", value=...),
        RETRIEVAL,
        2,
        "config.json: Recipe lacks window; put the file back",
    ),
    Fault(
        "run whose data are a number",
        change("run/config.json", "data", value=3),
        RETRIEVAL,
        2,
        "config.json: data of RunSettings is 3; expected",
    ),
    Fault(
        "run whose best is chosen on nothing",
        change("run/config.json", "best_of", value="luck"),
        RETRIEVAL,
        2,
        "config.json: best_of of RunSettings is 'luck'",
    ),
    Fault(
        "run whose slices are a text",
        change("run/config.json", "slices", value="many"),
        RETRIEVAL,
        2,
        "config.json: slices of RunSettings is 'many'",
    ),
    Fault(
        "run without a checkpoint",
        remove("run/checkpoints"),
        RETRIEVAL,
        2,
        "run: has no checkpoint yet; let train.py reach its",
    ),
    Fault(
        "run whose weights are truncated",
        cut("run/checkpoints/step-000001/model.safetensors"),
        RETRIEVAL,
        2,
        "model.safetensors: is damaged: it has 1494770",
    ),
    Fault(
        "run whose weights claim 10^15 bytes",
        unhashed(
            header(
                "run/checkpoints/step-000001/model.safetensors",
                0,
                {"a": {"dtype": "F32", "shape": [10**7, 10**8], "data_offsets": [0, 4 * 10**15]}},
            )
        ),
        RETRIEVAL,
        2,
        "model.safetensors: is truncated or not a checkpoint",
    ),
    Fault(
        "run whose weights have a header of 10^12 bytes",
        unhashed(header("run/checkpoints/step-000001/model.safetensors", 10**12, {})),
        RETRIEVAL,
        2,
        "model.safetensors: is truncated or not a checkpoint",
    ),
    Fault(
        "run whose weights are not there",
        remove("run/checkpoints/step-000001/model.safetensors"),
        RETRIEVAL,
        2,
        "model.safetensors: cannot be read (No such file or",
    ),
    Fault(
        "run whose weights lack a tensor",
        unhashed(tensors("run/checkpoints/step-000001/model.safetensors", lambda t: t.pop("logit_scale"))),
        RETRIEVAL,
        2,
        "model.safetensors: does not fit this model",
    ),
    Fault(
        "run with NaN",
        unhashed(nan("run/checkpoints/step-000001/model.safetensors")),
        RETRIEVAL,
        2,
        "queries: expected finite embeddings, found NaN or",
    ),
    Fault(
        "run whose weights were changed",
        nan("run/checkpoints/step-000001/model.safetensors"),
        RETRIEVAL,
        2,
        "model.safetensors: is damaged: its sha256 is not",
    ),
    Fault(
        "run without vocabulary",
        remove("run/vocab.txt"),
        RETRIEVAL,
        2,
        "vocab.txt: no such file; expected BERT",
    ),
    Fault(
        "run of another vocabulary",
        write("run/vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"),
        RETRIEVAL,
        2,
        "vocab.txt: has 5 tokens, the run's text encoder",
    ),
    Fault(
        "run whose vocabulary has too many words",
        write(
            "run/vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(f"w{i}" for i in range(5000))
        ),
        RETRIEVAL,
        2,
        "vocab.txt: has 5005 tokens, the run's text encoder",
    ),
    Fault(
        "reports of a dual encoder",
        nothing,
        RETRIEVAL.replace("retrieval", "mrg"),
        2,
        "run: is a run of stage 'clip1', which has no",
    ),
    Fault(
        "retrieval with a language model",
        nothing,
        RETRIEVAL.replace("{run}", "{language}"),
        2,
        "language: is a run of stage 'mrg'; expected a dual",
    ),
    Fault(
        "language run whose tokenizer is damaged",
        write("language/tokenizer.json", "{}"),
        "evaluate --task mrg --run {language} --device cpu",
        2,
        "tokenizer.json: cannot be read as a tokenizer",
    ),
    Fault(
        "language run whose tokenizer is nested deep",
        write("language/tokenizer.json", DEEP),
        "evaluate --task mrg --run {language} --device cpu",
        2,
        "tokenizer.json: cannot be read as a tokenizer",
    ),
    Fault(
        "language run without its decoder's settings",
        change("language/config.json", "model", "decoder", value=...),
        "evaluate --task mrg --run {language} --device cpu",
        2,
        "config.json: MllmConfig lacks decoder; put the file",
    ),
    Fault(
        "language run whose rotary dims are a text",
        change("language/config.json", "model", "decoder", "rope", "dims", value="x"),
        "evaluate --task mrg --run {language} --device cpu",
        2,
        "config.json: dims of RopeConfig is 'x'; expected int",
    ),
    Fault(
        "language run without an origin",
        lambda s: [
            change("language/config.json", *k, value=v)(s)
            for k, v in ((("origin",), ...), (("model", "full"), False))
        ],
        "evaluate --task mrg --run {language} --device cpu",
        2,
        "config.json: origin does not say where the decoder",
    ),
    Fault(
        "no such split",
        nothing,
        f"{RETRIEVAL} --split test",
        2,
        "manifest.json: the test split is empty; prepare",
    ),
    Fault(
        "results that cannot be compared",
        nothing,
        "evaluate --task retrieval --compare {run} {run}",
        2,
        "retrieval_queries.csv: no such file; run",
    ),
    Fault(
        "results to compare are a list",
        lambda s: [write(f"run/eval/{n}", "[]")(s) for n in ("retrieval.json", "retrieval_queries.csv")],
        "evaluate --task retrieval --compare {run} {run}",
        2,
        "retrieval_queries.csv: has no column id, report_to",
    ),
    Fault(
        "prompts are a list",
        write("p.json", "[]"),
        f"{ZEROSHOT} --prompts {{p.json}}",
        2,
        "p.json: expected the keys classes, template; found",
    ),
    Fault(
        "prompts nested 50,000 deep",
        write("p.json", DEEP),
        f"{ZEROSHOT} --prompts {{p.json}}",
        2,
        "p.json: is not valid JSON (maximum recursion depth",
    ),
    Fault(
        "prompts without a place",
        write("p.json", '{"template": "x", "classes": {}}'),
        f"{ZEROSHOT} --prompts {{p.json}}",
        2,
        "p.json: template is 'x'; expected a text with one",
    ),
    Fault(
        "labels with NUL bytes",
        write("l.csv", b"id,a\n\0,\0\n"),
        f"{ZEROSHOT} --labels {{l.csv}}",
        2,
        "l.csv: line 2 holds a NUL byte; save the table as",
    ),
    Fault(
        "labels of other volumes",
        write("l.csv", "id,Cardiomegaly\nother,1\n"),
        f"{ZEROSHOT} --labels {{l.csv}}",
        2,
        "l.csv: has no labels of volume valid_1_a_1; add its",
    ),
    Fault(
        "labels are a folder",
        nothing,
        f"{ZEROSHOT} --labels {{scans}}",
        2,
        "scans: is a folder, expected a file",
    ),
    Fault(
        "classifier is no folder",
        nothing,
        "evaluate --task mrg --run {language} --classifier {none}",
        2,
        "none: no such folder; expected one with",
    ),
    Fault(
        "classifier without weights",
        remove("words/model.safetensors"),
        "evaluate --task mrg --run {language} --classifier {words} --device cpu --limit 1 --new-tokens 1",
        2,
        "words: has none of model.safetensors",
    ),
    Fault(
        "out is a file",
        write("out", "x"),
        f"{RETRIEVAL} --out {{out}}",
        2,
        "out: is a file; expected a folder to write into",
    ),
    Fault(
        "published packers alone",
        nothing,
        "evaluate --task mrg --run {packers.bin} --data {data} --device cpu",
        2,
        "packers.bin: holds packers and adapters only; name",
    ),
    Fault(
        "published weights without their data",
        nothing,
        "evaluate --task retrieval --run {m3d} --device cpu",
        2,
        "m3d has no data set of its own; name a prepared one",
    ),
    Fault(
        "published weights on data of another size",
        nothing,
        "evaluate --task retrieval --run {m3d} --data {data} --device cpu",
        2,
        "m3d needs size 16x64x64; prepare them so with",
    ),
    Fault(
        "published weights with NaN",
        nan("m3d/model.safetensors"),
        "evaluate --task retrieval --run {m3d} --data {data} --device cpu",
        2,
        "m3d: NaN or infinite values in",
    ),
    Fault(
        "published weights whose settings contradict them",
        change("m3d/config.json", "hidden_size", value=96),
        "evaluate --task retrieval --run {m3d} --data {data} --device cpu",
        2,
        "config.json: hidden_size is 96, the tensors have",
    ),
    Fault(
        "a flag of another task",
        nothing,
        f"{RETRIEVAL} --questions size",
        2,
        "--questions: is an option of --task vqa",
    ),
]

INFER = [
    Fault(
        "no scan",
        nothing,
        EMBED.replace("{scan}", "{none.nii.gz}"),
        2,
        "none.nii.gz: no such file; expected a scan that",
    ),
    Fault(
        "scan of another ending",
        write("x.dcm", "x"),
        EMBED.replace("{scan}", "{x.dcm}"),
        2,
        "x.dcm: expected a scan that ends in .pt, .pt.gz",
    ),
    Fault(
        "scan is a folder",
        nothing,
        EMBED.replace("{scan}", "{scans}"),
        2,
        "scans: no such file; expected a scan that ends in",
    ),
    Fault(
        "scan truncated",
        lambda s: s.scan.write_bytes(s.scan.read_bytes()[:500]),
        EMBED,
        2,
        "scan.nii.gz: is truncated or damaged (Compressed",
    ),
    Fault(
        "scan that claims 10^13 voxels",
        scan(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        EMBED,
        2,
        "scan.nii.gz: is truncated or damaged (its header",
    ),
    Fault(
        "scan of three voxels",
        scan(np.zeros((1, 1, 3), np.int16)),
        EMBED,
        2,
        "scan.nii.gz: is a 1D image of shape (1, 1, 3)",
    ),
    Fault(
        "scan of a millimetre in all",
        scan(
            CT,
            pixdim=[1, 1e-3, 1e-3, 1e-3, 0, 0, 0, 0],
            srow_x=[1e-3, 0, 0, 0],
            srow_y=[0, 1e-3, 0, 0],
            srow_z=[0, 0, 1e-3, 0],
        ),
        EMBED,
        2,
        "scan.nii.gz: by its header the scan is 0.006 x",
    ),
    Fault(
        "scan of a kilometre a voxel",
        scan(
            CT,
            pixdim=[1, 1e6, 1e6, 1e6, 0, 0, 0, 0],
            srow_x=[1e6, 0, 0, 0],
            srow_y=[0, 1e6, 0, 0],
            srow_z=[0, 0, 1e6, 0],
        ),
        EMBED,
        2,
        "scan.nii.gz: by its header the scan is 6e+06 x",
    ),
    Fault(
        "scan as .pt that would run code",
        pickled("x.pt", Opens()),
        EMBED.replace("{scan}", "{x.pt}"),
        2,
        "x.pt: holds more than tensors (io.open), which is",
    ),
    Fault(
        "scan as .pt of a dictionary",
        pickled("x.pt", {"a": torch.ones(3)}),
        EMBED.replace("{scan}", "{x.pt}"),
        2,
        "x.pt: holds a dict; expected one tensor",
    ),
    Fault(
        "scan as .pt of one stretched voxel",
        pickled("x.pt", torch.zeros(1).expand(20000, 20000, 20000)),
        EMBED.replace("{scan}", "{x.pt}"),
        2,
        "x.pt: it claims 32000000000000 bytes and holds 4;",
    ),
    Fault(
        "no run",
        nothing,
        EMBED.replace("{run}", "{none}"),
        2,
        "none: holds no run (no config.json); train one with",
    ),
    Fault(
        "run with NaN",
        unhashed(nan("run/checkpoints/step-000001/model.safetensors")),
        EMBED,
        2,
        "gives embeddings with NaN or infinity",
    ),
    Fault(
        "run whose settings are a text",
        write("run/config.json", '"x"'),
        EMBED,
        2,
        "config.json: expected an object of settings, found",
    ),
    Fault(
        "run whose recipe has a size of zero",
        change("run/config.json", "recipe", "size", value=[0, 1, 1]),
        EMBED,
        2,
        "config.json: --size (0, 1, 1): expected three",
    ),
    Fault(
        "run whose recipe has a spacing of a micrometre",
        change("run/config.json", "recipe", "spacing", value=[1e-3] * 3),
        EMBED,
        2,
        "scan.nii.gz: its 24 x 48 x 48 voxels of 13.98 x",
    ),
    Fault(
        "classes of a language model",
        nothing,
        EMBED.replace("{run}", "{language}"),
        2,
        "language: is a run of stage mrg, a language model",
    ),
    Fault(
        "report of a dual encoder",
        nothing,
        REPORT.replace("{language}", "{run}"),
        2,
        "run: is a run of stage clip1, which has no decoder",
    ),
    Fault(
        "language run without its weights",
        remove("language/checkpoints/step-000001"),
        REPORT,
        2,
        "language: has no checkpoint yet; let train.py reach",
    ),
    Fault(
        "language run whose tokenizer is gone",
        remove("language/tokenizer.json"),
        REPORT,
        2,
        "language: no tokenizer found; looked for",
    ),
    Fault(
        "language run whose encoders are a text",
        change("language/config.json", "model", "encoders", value="x"),
        REPORT,
        2,
        "config.json: encoders of MllmConfig is 'x'",
    ),
    Fault(
        "language run whose kernel is zero",
        change("language/config.json", "model", "kernel", value=[0, 2, 2]),
        REPORT,
        2,
        "config.json: kernel of MllmConfig is (0, 2, 2)",
    ),
    Fault(
        "empty question",
        nothing,
        "infer ask {scan} ' ' --run {language}",
        2,
        "the question is empty; expected some words, such as",
    ),
    Fault(
        "empty prompt",
        nothing,
        f"{REPORT} --prompt ''",
        2,
        '--prompt is empty; expected some words, such as "Is',
    ),
    Fault(
        "temperature below zero",
        nothing,
        f"{REPORT} --temperature -1",
        2,
        "temperature -1.0: expected 0 (greedy), or 0.0001",
    ),
    Fault(
        "top-p of 7",
        nothing,
        f"{REPORT} --temperature 1 --top-p 7",
        2,
        "top_p 7.0: expected a probability above 0, at most 1",
    ),
    Fault(
        "more tokens than the context has",
        nothing,
        REPORT.replace("--new-tokens 2", "--new-tokens 99999"),
        2,
        "--new-tokens 99999: a question of 18 tokens, 8 of",
    ),
    Fault(
        "spacing of NaN",
        nothing,
        f"{EMBED} --spacing nan 1 1",
        2,
        "--spacing [nan, 1.0, 1.0]: expected three positive",
    ),
    Fault(
        "slope of zero", nothing, f"{EMBED} --slope 0", 2, "--slope 0: expected a finite number, and a slope"
    ),
    Fault(
        "orientation of no kind",
        nothing,
        f"{EMBED} --assume-orientation XYZ",
        2,
        "argument --assume-orientation: 'XYZ' is not an",
    ),
    Fault(
        "slice encoder that nobody asked for",
        nothing,
        f"{EMBED} --slice-encoder {{encoder.bin}}",
        2,
        "run takes no slice features; leave the flag out",
    ),
    Fault(
        "nothing to explain",
        nothing,
        "infer explain {scan} --run {run} --device cpu",
        2,
        "run: its encoder weighs no patches; stage clip2 of",
    ),
    Fault(
        "index is not there",
        nothing,
        "infer search {none.safetensors} --text effusion --run {run} --device cpu",
        2,
        "none.safetensors: no such file; make an index with",
    ),
    Fault(
        "index is text",
        write("i.safetensors", "x"),
        "infer search {i.safetensors} --text effusion --run {run} --device cpu",
        2,
        "i.safetensors: is truncated or not a safetensors",
    ),
    Fault(
        "index without names",
        lambda s: published_index(s, {"model": "0"}),
        "infer search {i.safetensors} --text effusion --run {run} --device cpu",
        2,
        "i.safetensors: is no index: expected unit vectors",
    ),
    Fault(
        "index of another model",
        lambda s: published_index(s, {"ids": "a\nb\nc", "model": "0" * 64}),
        "infer search {i.safetensors} --text effusion --run {run} --device cpu",
        2,
        "step-000001 has 7e7403c3f4fd; name that model's",
    ),
    Fault(
        "index that claims 10^15 bytes",
        header(
            "i.safetensors",
            0,
            {"image": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}},
        ),
        "infer search {i.safetensors} --text effusion --run {run} --device cpu",
        2,
        "i.safetensors: is truncated or not a safetensors",
    ),
    Fault(
        "search for nothing",
        nothing,
        "infer search {scan} --text ' '",
        2,
        "--text: is empty; expected words of a report, such",
    ),
    Fault(
        "out of another ending",
        nothing,
        f"{EMBED} --out {{here}}/index.txt",
        2,
        "index.txt: expected a file to write that ends in",
    ),
    Fault(
        "prompts that are none",
        write("p.json", "3"),
        "infer classify {scan} --run {run} --prompts {p.json} --device cpu",
        2,
        "p.json: expected the keys classes, template; found",
    ),
    Fault(
        "published packers alone",
        nothing,
        REPORT.replace("{language}", "{packers.bin}"),
        2,
        "packers.bin: holds packers and adapters only; name",
    ),
]


def published_index(scene: Scene, metadata: dict) -> None:
    save_file({"image": torch.eye(3)}, scene.folder / "i.safetensors", metadata)


FAULTS = {"preprocess": PREPROCESS, "train": TRAIN, "evaluate": EVALUATE, "infer": INFER}
ROWS = [
    pytest.param(fault, id=f"{name}: {fault.name}") for name, faults in FAULTS.items() for fault in faults
]


@pytest.fixture(scope="session")
def originals(prepared, tmp_path_factory) -> Path:
    return write_originals(tmp_path_factory.mktemp("originals"), prepared)


def filled(command: str, scene: Scene) -> list[str]:
    """The command's words, with paths of the scene for what is in braces."""

    def place(match: re.Match) -> str:
        name = match[1]
        if name == "scan":
            return str(
                scene.folder / "scan.nii.gz" if (scene.folder / "scan.nii.gz").exists() else scene.scan
            )
        return str(scene.folder if name == "here" else scene.path(name))

    return [re.sub(r"\{([\w.]+)\}", place, word) for word in shlex.split(command)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ROWS)
def test_a_fault_ends_in_its_exit_code_and_its_one_line(fault, originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path, originals)
    fault.make(scene)
    name, *arguments = filled(fault.command, scene)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, limited(3 * SECONDS), no_file_above(scene.most_bytes):
        run_script(MAIN[name], arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == fault.code, err
    lines = [
        line for line in err.replace("\r", "\n").splitlines() if line.startswith(("error: ", "refused: "))
    ]
    assert any(fault.words in line for line in (lines if fault.code else (out + err).splitlines())), err
    assert "Traceback" not in err and sum(line.startswith("error: ") for line in lines) == (
        fault.code == 2
    ), err
    assert before <= {path for path in tmp_path.rglob("*") if path.is_file()}  # what was there is there


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "preprocess: table is empty",
        "train: manifest nested 50,000 deep",
        "evaluate: run whose width is 10^9",
        "infer: scan of a kilometre a voxel",
    ],
)
def test_a_process_of_its_own_ends_in_the_same_line(name, originals, tmp_path):
    fault, scene = next(row.values[0] for row in ROWS if row.id == name), Scene(tmp_path, originals)
    fault.make(scene)
    program, *arguments = filled(fault.command, scene)
    assert fault.words in error_line(script(f"{program}.py", *arguments, cwd=tmp_path))


def test_the_names_of_the_faults_differ():
    for faults in FAULTS.values():
        assert len({fault.name for fault in faults}) == len(faults)
    assert sum(map(len, FAULTS.values())) >= 60
