"""What goes wrong, and how it is said: every fault is made, the command is run, and it must end with the exit
code and the one line that the table says, never with a traceback.

    python -m pytest tests/faults                               # all of it
    python -m pytest tests/faults/test_faults.py -k truncated   # the faults with this word in their name

faults(command, what, file, *rows, code): {data} in the command is a copy of that original, {out} a folder
that is not there. A row is the rest of the fault's name; how it is made (scene.py), or the flags that are the
fault; the words of the line after `file`, in which ... stands for any words; more flags. code: 2: refused; 3:
preprocess.py went on without some files; 0: the line is printed.
"""

import gzip
import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import evaluate
import infer
import preprocess
import train
from conftest import error_line, script
from faults.limits import SECONDS, limited, no_file_above
from faults.scene import Fault as Make
from faults.scene import (
    Opens,
    Scene,
    all_of,
    change,
    cut,
    folder,
    full_disk,
    header,
    index,
    nan,
    nothing,
    pickled,
    remove,
    scan,
    sized,
    spaced,
    tensors,
    volumes,
    write,
)
from reaf_hsenet.script import run_script
from tiny import start

MAIN = {"preprocess": preprocess.main, "train": train.main, "evaluate": evaluate.main, "infer": infer.main}


class Fault(NamedTuple):
    make: Make
    command: str
    code: int
    words: str
    slow: bool


class Row(NamedTuple):
    name: str
    how: Make | str
    words: str
    flags: str = ""


FAULTS: dict[str, Fault] = {}


def faults(command: str, what: str, file: str, *rows: Row, code: int = 2) -> None:
    for row in rows:
        name = f"{command.split()[0]}: {what} {row.name}".replace("  ", " ")
        assert name not in FAULTS, name
        quick = isinstance(row.how, str)  # nothing is trained, and no file is changed
        make, flags = (nothing, row.how) if quick else (row.how, row.flags)
        FAULTS[name] = Fault(make, f"{command} {flags}", code, file + row.words, slow=not quick or code == 0)


SHORT = "--batch-size 4 --max-steps 1 --out {out} --device cpu"
NIFTI = "preprocess --dataset nifti --root {scans} --out {out} --size 8 16 16"
SLICES = "preprocess --slices {encoder.bin} --out {data} --device cpu"
CLIP1 = f"train --stage clip1 --data {{data}} --preset hsenet-tiny --size 16 32 32 {SHORT}"
CLIP2 = f"train --stage clip2 --init {{clip1}} {SHORT}"
LANGUAGE = f"train --stage mrg --init {{clip2}} {SHORT}"
RESUME = "train --stage clip1 --resume --out {clip1} --device cpu"
RETRIEVAL = "evaluate --task retrieval --run {run} --device cpu"
ZEROSHOT = "evaluate --task zeroshot --run {run} --device cpu --bootstrap 0"
MRG = "evaluate --task mrg --run {language} --device cpu --limit 1 --new-tokens 1"
READ = "evaluate --task mrg --predictions {p.json} --data {data} --out {out} --device cpu"
REPORT = "infer report {scan} --run {language} --device cpu --new-tokens 2"
EMBED = "infer embed {scan} --run {run} --device cpu"
SEARCH = "infer search {i.safetensors} --text effusion --run {run} --device cpu"

SCAN, TABLE, MANIFEST = "scans/a.nii.gz", "scans/reports.csv", "data/manifest.json"
RUN, RUN_WEIGHTS = "run/config.json", "run/checkpoints/step-000001/model.safetensors"
TRAINED, STEP = "clip1/config.json", "clip1/checkpoints/step-000002"
M3D, BERT, WORDS = "m3d/model.safetensors", "words/model.safetensors", "language/tokenizer.json"
RANKS = "run/eval/retrieval"

# Flags.
AS_CLIP1 = "--patch 8 16 16 --out {clip1}"
DROPOUT = "--decoder {decoder} --frozen-dropout --no-augment"
TWO_BAD = "--epochs 1 --max-bad 1"
ALL_BAD = "--data {data} --max-bad 99"
BEST = "--checkpoint best"
CLASSIFY = "classify {scan} --run {run} --prompts {p.json}"

DEEP = '{"a":' * 50_000
CT = np.linspace(-1000, 500, 6 * 6 * 6).reshape(6, 6, 6).astype(np.int16)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ONES, UNET = [1, 1, 0, 0], {"unet.weight": torch.ones(3)}
STRETCHED = torch.zeros(1).expand(20000, 20000, 20000)
HUGE = {"a": {"dtype": "F32", "shape": [10**7, 10**8], "data_offsets": [0, 4 * 10**15]}}


# Of a manifest: what a table says of a volume, and values of its recipe. None is possible.
PLAIN = {"spacing": [1, 1, 3], "slope": 1, "intercept": None}
TABLE_ROWS = [
    *({**PLAIN, **other} for other in ({"slope": "steep"}, {"spacing": [1, 2]}, {"spacing": 3})),
    *({"slope": 1}, [1], []),
]
RECIPE_VALUES = [
    *(
        ("axes", "SSS"),
        ("axes", ""),
        ("spacing", [-1, 1, 1]),
        ("window", [5, 1]),
        ("std", 0),
        ("mean", 1e300),
    ),
    *(("size", size) for size in ([0, 1, 1], [10**9] * 3, [1, 2], [True, 2, 3])),
    *(("fit", "x"), ("name", 3), ("more", 1)),
]


# One value of a file, by its keys; an entry of the manifest is the first of a split.
manifest, run, trained = (partial(change, name) for name in (MANIFEST, RUN, TRAINED))
language, bert, m3d = (partial(change, f"{name}/config.json") for name in ("language", "words", "m3d"))
table = partial(write, TABLE)
listed = partial(scan, name=SCAN)


WINDOW, WINDOWS = (
    manifest("recipe", "window", [-1150, 350]),
    "window -1150x350, but ...clip1 needs window -1000x200",
)
FEATURES, OTHER = manifest("slices", "sha256", "0" * 64), "its slice features have another sha256"


def entry(key: str, value, split: str = "train") -> Make:
    return manifest("splits", split, 0, key, value)


def listed_twice(scene: Scene) -> None:
    first = json.loads(scene.file(MANIFEST).read_text())["splits"]["validation"][0]
    manifest("splits", "validation", 1, first)(scene)


BIG = sized(30000, 30000, 30000)


def vocabulary(name: str, words: int) -> Make:
    return write(f"{name}/vocab.txt", "\n".join([*SPECIAL, *(f"w{i}" for i in range(words))]))


def unhashed(name: str, make: Callable[..., Make], *arguments) -> Make:
    """A fault in a file of a checkpoint as earlier versions saved it, without the hashes that would tell."""
    return all_of(remove(f"{Path(name).parent}/checkpoint.json"), make(name, *arguments))


def trainer(edit: Callable[[dict], object]) -> Make:
    """A trainer.pt without its hash that holds what `edit` returns, or leaves."""

    def make(scene: Scene) -> None:
        path = scene.file(f"{STEP}/trainer.pt")
        state = torch.load(path)
        torch.save(edit(state) or state, path)

    return all_of(remove(f"{STEP}/checkpoint.json"), make)


def progress(**values) -> Make:
    return trainer(lambda state: state["progress"].update(**values))


def other_moments(state: dict) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def fewer_parameters(state: dict) -> None:
    state["optimizer"]["param_groups"].pop()


def no_scale(state: dict) -> None:
    del state["logit_scale"]


def predictions(**change) -> Make:
    """Reports of two volumes, of which the second is of another form."""
    cases = [{"input_image_name": f"valid_{i}_a_1.nii.gz", "report": "Clear."} for i in (2, 1)]
    cases[1] |= change
    return write("p.json", json.dumps({"generated_reports": cases}))


first_volume = partial(volumes, 1)
cut_off = lambda path: path.write_bytes(path.read_bytes()[:999])
zeros = lambda path: path.write_bytes(bytes(path.stat().st_size))
with_nan = lambda path: np.save(path, np.full((16, 32, 32), np.nan, np.float16))
turned = lambda path: np.save(path, np.zeros((1, 32, 16, 32), np.float16))


def killed(rank: int, moment: str) -> Make:
    """Two processes train into {out}; when this file is there, one is killed with SIGKILL, and the other
    must end by itself.
    """

    def make(scene: Scene) -> None:
        more = "--max-steps 8 --batch-size 2 --save-every 1 --keep 9 --validate-every 1"
        ranks = start(filled(f"{CLIP1} {more}", scene)[1:], 2)
        while not (scene.folder / "out" / moment).exists() and ranks[rank].is_alive():
            time.sleep(0.001)
        ranks[rank].kill()
        for process in ranks:
            process.join(60)
        assert ranks[rank].exitcode == -signal.SIGKILL and ranks[1 - rank].exitcode == 1

    return make


faults(
    NIFTI,
    "scan",
    "a.nii.gz: ",
    Row("truncated", cut(SCAN), "is truncated or damaged (Compressed file"),
    Row("is text", write(SCAN, "not a scan"), "is truncated or damaged (Not a gzipped"),
    Row("is empty", write(SCAN, ""), "is not a readable NIfTI file (Binary"),
    Row("is a folder", all_of(remove(SCAN), folder(SCAN)), "is listed in the table but absent"),
    Row("of four dimensions", listed(np.stack([CT] * 3, 3)), "is a 4D image of shape (6, 6, 6, 3)"),
    Row("that claims 10^13 voxels", listed(**BIG), "is truncated or damaged (its header"),
    Row("that claims as many and a scale", listed(**BIG, scl_slope=2.0), "is truncated or damaged (its"),
    Row("that claims no voxels", listed(**sized(0, 5, 5)), "is a 2D image of shape (0, 5, 5)"),
    Row("of a negative size", listed(**sized(-4, 5, 5)), "is a 2D image of shape (-4, 5, 5)"),
    Row("whose data lie beyond its end", listed(vox_offset=1e9), "is truncated or damaged (its header tells"),
    Row("whose data lie at infinity", listed(vox_offset=np.inf), "is not a readable NIfTI file (cannot"),
    Row("that unpacks to 64 MB", write(SCAN, gzip.compress(bytes(2**26))), "...spacing is 0 x 0 x 0 mm"),
    Row("with NaN", listed(np.where(CT > 400, np.nan, CT)), "15 voxels are NaN or infinite, or beyond"),
    Row("of one value", listed(np.zeros((6, 6, 6), np.int16)), "every voxel is 0; expected a CT"),
    Row("is a mask", listed((CT > 0).astype(np.int16)), "holds only whole numbers from 0 to 1"),
    Row("of air", listed((CT // 12 - 940).astype(np.int16)), "the values are not HU: only 0.0% of"),
    Row("of complex numbers", listed(CT.astype(np.complex64)), "holds complex64 values; expected integers"),
    Row("without orientation", listed(sform_code=0, qform_code=0), "the header has no orientation (sform"),
    Row("without spacing", listed(pixdim=[1, *[0] * 7]), "the header's spacing is 0 x 0 x 0 mm"),
    Row("of two parallel axes", listed(sform_code=2, srow_x=ONES, srow_y=ONES), "...affine is degenerate"),
    Row("that is listed but absent", remove(SCAN), "is listed in the table but absent"),
    Row("without a report", table("id,text\na,\nb,x\nc,y\n"), "has an empty text in reports.csv"),
    code=3,
)
faults(
    NIFTI,
    "table",
    "reports.csv: ",
    Row("without its column", table("id,words\na,x\n"), "has no column text; its columns are"),
    Row("is empty", table(""), "has no column id, text; its columns"),
    Row("without rows", table("id,text\n"), "has no rows; expected an id and a text"),
    Row("with NUL bytes", table(b"id,text\na,\0\0\n"), "line 2 holds a NUL byte; save the"),
    Row("with a field of 200 kB", table("id,text\na," + "x" * 200_000), "line 2: the quotes do not balance"),
    Row("with too many fields", table("id,text\na,x,y\n"), "line 2 has more fields than the"),
    Row("with too few fields", table("id,text\na\n"), "line 2 has fewer fields than the header"),
    Row("in Latin-1", table("id,text\na,Müller\n".encode("latin-1")), "is not a UTF-8 csv file ('utf-8'"),
    Row("that lists a volume twice", table("id,text\na,x\na,y\n"), "id a is listed twice, the second time"),
    Row("that lists it by its file too", table("id,text\na,x\na.nii.gz,y\n"), "...are the same volume"),
    Row("that leaves its folder", table("id,text\n../a,x\n"), "id '../a' is not a path below"),
    Row("whose id has a NUL byte", table("id,text\na\0b,x\n"), "line 2 holds a NUL byte; save the"),
    Row("whose id is 5,000 letters long", table(f"id,text\n{'a' * 5000},x\n"), "id"),
)
faults(
    NIFTI,
    "",
    "",
    Row("two tables", write("scans/more.csv", "id,text\na,x\n"), "scans: has 2 csv files; name the one with"),
    Row("no such root", "--root {none}", "none: no such folder"),
    Row("out is a file", write("out", "x"), "out: cannot be used as a folder to write into (File"),
    Row("size of zero", "--size 0 16 16", "--size (0, 16, 16): expected three positive numbers"),
    Row("window turned round", "--window 200 -1000", "--window (200.0, -1000.0): expected LOW HIGH in HU"),
    Row("spacing of NaN", "--spacing nan 1 1", "--spacing (nan, 1.0, 1.0): expected three positive"),
    Row("unknown flag", "--quick", "unrecognized arguments: --quick; see __main__.py"),
    Row("recipe of no name", "--recipe m3d", "--recipe...m3d"),
    Row("axis codes of no kind", "--assume-orientation LPX", "--assume-orientation: 'LPX' is not an"),
    Row("no workers", "--workers 0", "--workers 0: expected 1 or more"),
)
faults(
    "preprocess --out {out} --dataset",
    "data set",
    "",
    Row("without root", "nifti", "--dataset nifti needs --root, the folder of the raw"),
    Row("of no questions", "radgenome --root {scans} --out {data}", "scans: has no RadGenome-ChestCT tables"),
    Row(
        "of REAF whose reports are no list",
        all_of(write("reaf/train/reports/r.json", "{}"), folder("reaf/train/volumes")),
        "r.json: holds no list; expected a list of image and",
        "reaf --root {reaf}",
    ),
    Row(
        "held out whole", "nifti --root {scans} --development 2", "--development 2: there are 2 training pat"
    ),
    Row("held out less than not", "nifti --root {scans} --development -1", "--development -1: expected 0 or"),
    Row("held out of questions", "radgenome --development 1", "--development: needs the --dataset that"),
    Row("of CT-RATE, empty", "ct-rate --root {scans}", "train_reports.csv or validation_reports.csv below"),
)
faults(
    SLICES,
    "slice encoder",
    "encoder.bin: ",
    Row("of an unknown family", pickled("encoder.bin", UNET), "is not a 2D ViT such as BiomedCLIP's"),
    Row("with NaN", nan("encoder.bin"), "NaN or infinite values in cls_token"),
    Row("truncated", cut("encoder.bin"), "is truncated or not a checkpoint (File"),
    Row("that would run code", pickled("encoder.bin", {"a": Opens()}), "holds more than tensors (io.open)"),
)
faults(
    SLICES,
    "slice features",
    "",
    Row("of another encoder", "", "data: holds slice features with another sha256"),
    Row("of an encoder that is not there", "--slices {none}", "none: no such folder"),
    Row("in batches of none", "--slice-batch 0", "--slice-batch 0: expected 1 or more"),
    Row("without volumes", "--out {out}", "manifest.json: no such file; prepare volumes first"),
    Row("for a list", write(MANIFEST, "[]"), "manifest.json: expected an object of settings"),
)

faults(
    "preprocess --out {out}",
    "flags:",
    "",
    Row("no data set", "", "--dataset is missing; say which, or give --slices"),
    *(
        Row(
            f"{flag.split()[0]} without slices",
            f"--dataset phantom {flag}",
            f"{flag.split()[0]}: needs --slices",
        )
        for flag in (
            "--jpeg-slices",
            "--replace-slices",
            "--slice-batch 8",
            "--slice-recipe hsenet",
            "--device cpu",
        )
    ),
)

faults(
    CLIP1,
    "manifest",
    "manifest.json: ",
    Row("is not there", "--data {none}", "no such file; make it with"),
    Row("is no JSON", write(MANIFEST, "{"), "is not valid JSON (Expecting"),
    Row("is a list", write(MANIFEST, "[]"), "expected an object of settings"),
    Row("nested 50,000 deep", write(MANIFEST, DEEP), "is not valid JSON (maximum recursion"),
    Row("is binary", write(MANIFEST, b"\xff\xfe\0"), "is not valid JSON ('utf-8' codec"),
    Row("of another schema", manifest("schema", 9), "schema 9, expected 1; prepare the"),
    Row("without recipe", manifest("recipe", ...), "Manifest lacks recipe; put the"),
    Row("whose recipe is a number", manifest("recipe", 3), "recipe of Manifest is 3; expected Recipe"),
    Row("whose window is a text", manifest("recipe", "window", "wide"), "window of Recipe is 'wide'"),
    Row("whose size is of floats", manifest("recipe", "size", [1.5, 2, 3]), "size of Recipe is [1.5, 2, 3]"),
    Row("of another dtype", manifest("dtype", "float99"), "dtype of Manifest is 'float99'"),
    Row("whose splits are a list", manifest("splits", []), "splits of Manifest is []; expected"),
    Row("whose split is a text", manifest("splits", "train", "abc"), "train is 'abc'"),
    Row("whose entry is null", manifest("splits", "train", 0, None), "train entry 0: it is None; prepare"),
    Row("whose entry has no id", entry("id", ...), "train entry 0: id is 'missing'; prepare"),
    Row("whose id is a list", entry("id", [1]), "train entry 0: id is [1]; prepare"),
    Row("whose volume is a number", entry("volume", 3), "train entry 0: volume is 3; prepare"),
    Row("whose volume has a NUL byte", entry("volume", "a\0.npy"), "train entry 0: volume is"),
    Row("whose report is null", entry("text", None), "train entry 0: text is None; prepare"),
    Row("whose report is empty", entry("text", " "), "the report of train_1_a_1 is empty"),
    Row("whose report is empty, not bad", entry("text", " "), "...of train_1_a_1 is empty", "--max-bad 9"),
    Row("whose labels are a text", entry("labels", "yes", "validation"), "validation entry 0: labels is"),
    Row("whose source is a text", entry("source", "here", "validation"), "validation entry 0: source is"),
    Row("whose questions are numbers", entry("qa", [3], "validation"), "validation entry 0: qa is [3]"),
    Row("of unknown reading", manifest("reading", {"rescale": "maybe"}), "rescale of Reading is 'maybe'"),
    Row("of unknown axes", manifest("reading", {"orientation": "up"}), "orientation of Reading is 'up'"),
    Row("of another reading", manifest("reading", {"slices": 3}), "Reading has no setting slices"),
    Row(
        "that assumes two left sides",
        manifest("reading", {"assume_orientation": "LLS"}),
        "assume_orientation 'LLS': expected axis codes",
    ),
    Row("whose source has no name", entry("source", {"file": 3}), "train entry 0: source is {'file': 3"),
    Row("of no rescale", entry("source", {"file": "a", "rescale": {}}), "train entry 0: source is"),
    Row("whose report is half a letter", entry("text", "half \udc80"), "train entry 0: text is"),
    *(Row(f"whose table is {row}", entry("table", row), "train entry 0: table is") for row in TABLE_ROWS),
    *(
        Row(f"whose recipe's {name} is {value}", manifest("recipe", name, value), "")
        for name, value in RECIPE_VALUES
    ),
    Row("that lists a volume twice", listed_twice, "id valid_1_a_1 is listed twice; keep"),
    Row("without training volumes", manifest("splits", "train", []), "the train split is empty; prepare"),
    Row("of another size", "--size 32 64 64", "its volumes have size 16x32x32, but"),
    Row(
        "of no preset's size",
        "--preset hsenet-base --size 32 256 256",
        "...16x32x32, but preset hsenet-base needs size 32x256x256...preprocess.py",
    ),
    Row("of another recipe", "--model reaf --preset reaf-tiny", "its volumes have recipe hsenet, but"),
    Row("of no --init's window", WINDOW, f"...{WINDOWS}", "--patch 8 16 16 --init {clip1}"),
)
faults(
    CLIP1,
    "volume",
    "train_1_a_1.npy: ",
    Row("is missing", first_volume(Path.unlink), "is in the manifest but absent; run"),
    Row("truncated", first_volume(cut_off), "has 999 bytes, expected 32896 for"),
    Row("of zeros of the right length", first_volume(zeros), "cannot be read (This file contains"),
    Row("with NaN", first_volume(with_nan), "holds NaN", "--max-bad 0"),
    Row("with NaN that a loader reads", first_volume(with_nan), "holds NaN", "--workers 1"),
    Row("of another shape", first_volume(turned), "has shape (1, 32, 16, 32), the"),
)
faults(
    CLIP1,
    "",
    "",
    Row("two bad volumes", volumes(2, with_nan), "holds NaN...(bad volume 2, with --max-bad 1)", TWO_BAD),
    Row("validation volume cut", first_volume(cut_off, "validation"), "valid_1_a_1.npy: has 999 bytes"),
    Row("full disk when the checkpoint is written", full_disk(200_000), "cannot be written"),
    Row("HSENet's json of no form", write("h", '{"train": 3}'), "h: train is no list", "--data {h}"),
    Row("HSENet's json is a scan", "--data {scan}", "scan.nii.gz: is not valid JSON ('utf-8' codec can't"),
    Row("run is there", f"{AS_CLIP1} --max-steps 2 --seed 7", "clip1: holds a run already; continue it with"),
    Row("longer run is there", AS_CLIP1, "clip1: holds a run already; continue it with --resume"),
)
faults(
    CLIP1,
    "flag:",
    "",
    Row("stage of no name", "--stage clip9", "--stage...clip9...clip1"),
    Row("model of no name", "--model m3d", "--model...m3d"),
    Row("precision of no name", "--precision fp8", "--precision...fp8"),
    Row("flag of no name", "--learning-rate 1", "--learning-rate"),
    Row("unknown preset", "--preset huge", "--preset huge: hsenet has hsenet-base, hsenet-tiny"),
    Row("batch of none", "--batch-size 0", "--batch-size 0: expected more than 0"),
    Row("batch of -1", "--batch-size -1", "--batch-size -1: expected more than 0"),
    Row("batch of one", "--batch-size 1", "--batch-size 1"),
    Row("batch too large", "--batch-size 400", "--batch-size 400: with 1 processes a batch...there are"),
    Row("step larger than the data", "--accumulate 5", "--accumulate 5: a step needs 20 samples, there are"),
    Row("accumulation of none", "--accumulate 0", "--accumulate 0"),
    Row("epochs of none", "--epochs 0", "--epochs 0"),
    Row("steps of none", "--max-steps 0", "--max-steps 0"),
    Row("workers of -1", "--workers -1", "--workers -1"),
    Row("seed of -1", "--seed -1", "--seed -1"),
    Row("warmup of two", "--warmup 2", "--warmup 2"),
    Row("clip norm of NaN", "--clip-norm nan", "--clip-norm nan"),
    Row("learning rate of zero", "--lr 0", "--lr 0"),
    Row("learning rate of 10^38", "--lr 1e38", "--lr 1e+38: expected"),
    Row("learning rate of NaN", "--lr nan", "--lr nan: expected more than 0"),
    Row("negative weight decay", "--weight-decay -1", "--weight-decay -1.0: expected 0 or more"),
    Row("size that no patch divides", "--size 17 32 32", "input size (17, 32, 32) is not a multiple of the"),
    Row("patch that divides no size", "--patch 5 16 16", "not a multiple of the patch"),
    Row("no such device", "--device cuda:99", "--device cuda:99: torch sees no GPU here; leave the"),
    Row("device of no kind", "--device abacus", "--device abacus: expected cpu, cuda or cuda:N"),
    Row("log that is not installed", "--log wandb", "--log wandb...not installed"),
    Row("best by loss", "--best-by loss", "--best-by loss: the validation measures report_to_volume/R@1, "),
    Row("text encoder in no folder", "--text-model ./nowhere", "./nowhere: no such folder"),
    Row("text encoder on no hub", "--text-model some/bert", "some/bert...hub"),
    Row("relation in stage 1", "--relation 0.5", "--relation: is an option of --stage clip2"),
    Row("relation of none in stage 1", "--relation 0", "--relation: is an option of --stage clip2"),
    Row("relation steps, stage 1", "--relation-steps 9", "--relation-steps: is an option of --stage clip2"),
    Row("teacher in stage 1", "--teacher nowhere", "--teacher: is an option of --stage clip2"),
    Row("guidance in stage 1", "--no-guidance", "--no-guidance: is an option of --stage clip2"),
    Row("slices' augmentation in stage 1", "--slices-stay", "--slices-stay: is an option of --stage clip2"),
    Row("sharding in stage 1", "--shard", "--shard: is an option of --stage mrg and vqa; leave it out"),
    Row("encoders in stage 1", "--vision dual", "--vision: is an option of --stage mrg and vqa"),
    Row("frozen in stage 1", "--no-train-vision", "--no-train-vision: is an option of --stage mrg and vqa"),
)
faults(
    f"{CLIP1} --epochs 1 --max-bad 1",
    "bad volumes",
    "",
    Row("as many as are allowed", first_volume(zeros), "train_1_a_1"),
    code=0,
)
faults(
    f"{CLIP1} --max-steps 4 --lr 1e15 --clip-norm 1e30 --validate-every 1",
    "not finite:",
    "",
    Row("more steps than are allowed", nothing, "--max-skipped 0", "--max-skipped 0"),
    Row("last validation", nothing, "step 4: the last validation is not finite, embeddings of"),
)
faults(
    f"{CLIP1} --init {{m3d}}/model.safetensors",
    "start from weights",
    "model.safetensors: ",
    Row("truncated", cut(M3D), "is truncated or not a checkpoint"),
    Row("with NaN", nan(M3D), "NaN or infinite values in"),
    Row("of another size", "--patch 8 16 16", "has positions (1, 64, 48), not"),
)
faults(
    f"{CLIP1} --init {{x.pt}}",
    "start from file",
    "x.pt: ",
    Row("of an unknown family", pickled("x.pt", UNET), "is not a checkpoint of REAF, HLIP, M3D-CLIP"),
    Row("that would run code", pickled("x.pt", {"a": Opens()}), "holds more than tensors (io.open), which"),
    Row("of a list", pickled("x.pt", [torch.ones(3)]), "is not a dictionary of tensors by name"),
)
faults(
    f"{CLIP1} --init",
    "start from",
    "",
    Row("a folder without weights", "{scans}", "scans: has none of model.safetensors"),
    Row("a run that is not there", "runs/typo", "runs/typo: no such folder or file; expected one, or a hub"),
    Row("a file that is in no folder", "data/typo", "data/typo: no such folder or file; expected one"),
)
faults(
    f"{CLIP1} --text-model {{words}}",
    "text encoder",
    "",
    Row("without vocabulary", remove("words/vocab.txt"), "vocab.txt: no such file; expected BERT"),
    Row("of binary words", write("words/vocab.txt", b"\xff\xfe\0"), "vocab.txt: is not UTF-8 text"),
    Row("of another vocabulary", vocabulary("words", 900), "vocab.txt has 905 tokens, its encoder 200"),
    Row("whose settings are a list", write("words/config.json", "[]"), "config.json: expected an object of"),
    Row("of other settings", bert("hidden_size", 128), "words: does not fit this model: word_embed.weight"),
    Row("of a width of a billion", bert("hidden_size", 10**9), "width of TextConfig is 1000000"),
)
faults(
    RESUME,
    "resumed run",
    "config.json: ",
    Row("whose settings are cut", write(TRAINED, "{"), "is not valid JSON (Expecting property"),
    Row("whose settings are a list", write(TRAINED, "[]"), "expected an object of settings, found"),
    Row("whose rate is a text", trained("train", "lr", "fast"), "lr of TrainConfig is 'fast'; expected"),
    Row("without its settings", trained("train", ...), "has no train as a run that was trained"),
    Row("whose world is a text", trained("world", "all"), "world of RunSettings is 'all'; expected"),
    Row("that accumulates -1 batches", trained("train", "accumulate", -1), "accumulate of TrainConfig is -1"),
    Row("of betas above 1", trained("train", "betas", [2, 3]), "betas of TrainConfig is (2, 3); expected"),
    Row("of no precision", trained("train", "precision", "fp8"), "precision of TrainConfig is 'fp8'"),
    Row("of a world of none", trained("world", 0), "world of RunSettings is 0; expected more"),
    Row("that flips more than always", trained("train", "augment", "flip", 2), "flip of Augmentation is 2"),
)
faults(
    RESUME,
    "resumed run",
    "trainer.pt: ",
    Row("whose state is truncated", cut(f"{STEP}/trainer.pt"), "is damaged: it has "),
    Row("whose state is a list", pickled(f"{STEP}/trainer.pt", [1]), "is damaged: it has 1261 bytes, "),
    Row("whose state is a number", trainer(lambda s: 3), "is not the state of this run's training"),
    Row("whose state is empty", trainer(lambda s: s.clear()), "is not the state of this run's training"),
    Row("without its progress", trainer(lambda s: s.pop("progress") and None), "TrainerFile lacks progress"),
    Row("whose step is a text", progress(step="1"), "step of Progress is '1'; expected int"),
    Row("whose best score is a tensor", progress(best=torch.ones(2)), "best of Progress is tensor"),
    Row("whose step is another", progress(step=7), "is of step 7; put the one of this step"),
    Row("whose batch is negative", progress(batch=-7), "batch of Progress is -7; expected 0 or"),
    Row("of bad numbers", trainer(lambda s: s.update(bad={3: 4})), "bad of TrainerFile is {3: 4}; expected"),
    Row("with other moments", trainer(other_moments), "...its optimizer has other moments of parameter 0"),
    Row("with other parameters", trainer(fewer_parameters), "...its optimizer has other parameters"),
)
faults(
    RESUME,
    "resumed run",
    "",
    Row("that is not there", "--out {out}", "out: holds no run to resume; name one with --out"),
    Row("of no files", change(f"{STEP}/checkpoint.json", "files", {}), "is damaged; no other"),
    Row("of cut weights", cut(f"{STEP}/model.safetensors"), "model.safetensors: is damaged: it has "),
    Row("whose last is binary", write(f"{STEP}/../last", b"\xff\0\xfe"), "write the name of a step's folder"),
    Row("whose data are gone", trained("data", "/nowhere"), "manifest.json: no such file; make it with"),
    Row(
        "killed early", killed(0, "config.json"), "has no checkpoint to resume from; start it", "--out {out}"
    ),
    Row("of another stage", "--stage clip2", "clip1: is a clip1 run of hsenet, not clip2 of"),
    Row(
        "named by a step",
        "--out {clip1}/checkpoints/last",
        "is a checkpoint of a run; name the run's folder, ...clip1",
    ),
    Row("at another rate", "--lr 1", "--lr: with --resume"),
    Row("with another seed", "--seed 0", "--seed: with --resume"),
    Row("with more steps", "--max-steps 9", "--max-steps...has 2"),
    Row("with epochs", "--epochs 9", "--epochs 9: ... started with --max-steps 2"),
    Row("with another choice of the best", "--best-by loss", "--best-by: with --resume"),
)
faults(
    RESUME,
    "resumed run",
    "",
    Row("killed later", killed(1, "checkpoints/step-000001"), "finished; best checkpoint", "--out {out}"),
    Row("whose settings are repeated", "--seed 42 --size 16 32 32 --max-steps 2 --batch-size 4", "finished"),
    code=0,
)
faults(
    CLIP2,
    "stage 2",
    "",
    Row("without a teacher", "--teacher {none}", "none: no run of stage clip1, the teacher; train it"),
    Row("taught by itself", "--teacher {clip2}", "is a clip2 run of hsenet; the teacher is hsenet's clip1"),
    Row("of REAF", "--model reaf", "clip2: is a stage of hsenet"),
    Row("from a run of REAF", trained("model", "model", "reaf"), "is a run of reaf; ...start --model hsenet"),
    Row("of another preset", "--preset hsenet-base", "hsenet-base: has width 768, the teacher ... 128"),
    Row("of another size", "--size 32 32 32", "--size: stage clip2 has its teacher's"),
    Row("of another vocabulary", "--text-model {words}", "words: has another vocabulary than the teacher"),
    Row("with a relation of NaN", "--relation nan", "--relation nan...: expected 0 or more"),
    Row("with a relation of -1", "--relation -1", "--relation -1...: expected 0 or more"),
    Row("with an infinite relation", "--relation inf", "--relation inf...: expected 1000 or less"),
    Row("with no steps of the relation", "--relation-steps 0", "--relation-steps 0: expected more than 0"),
    Row("with -5 steps of the relation", "--relation-steps -5", "--relation-steps -5: expected more than 0"),
    Row("of no slices", "--no-guidance --slices-stay", "...with --no-guidance there are no slice"),
    Row("sharded", "--shard", "--shard: is an option of --stage mrg and vqa; leave it out"),
)
faults(
    f"{CLIP2} --data {{data}}",
    "stage 2, data",
    "",
    Row("without features", manifest("slices", None), "manifest.json: has no slice features...--slices"),
    Row("without a volume's features", entry("slices", ...), "train_1_a_1 has no slice features...--slices"),
    Row("of a number for a volume's features", entry("slices", 3), "train entry 0: slices is 3"),
    Row("of a number for features", manifest("slices", 3), "slices of Manifest is 3; expected dict"),
    Row("of nobody's features", manifest("slices", "sha256", ...), "sha256 of its slice features is None"),
    Row("of uncounted features", manifest("slices", "slices", ...), "slices of its slice features is None"),
    Row("of features of no width", manifest("slices", "width", "24"), "width of its slice features is '24'"),
    Row("of cut features", first_volume(cut_off, key="slices"), "train_1_a_1.npy: has 999 bytes, expected"),
    Row("of lost features", first_volume(Path.unlink, key="slices"), "...is in the manifest but absent"),
    Row("of another window", WINDOW, WINDOWS),
    Row("of other features than --init", FEATURES, f"{OTHER} than --init ...clip2", "--init {clip2}"),
    Row("of other features than before", FEATURES, f"{OTHER} than ...clip2", "--out {clip2} --resume"),
)
faults(
    LANGUAGE,
    "language",
    "",
    Row("from no run", "--init {none}", "no run of stage clip2, whose encoder --vision...train it first"),
    Row("from a language run", "--init {mrg}", "is a run of stage 'mrg'; expected a dual encoder"),
    Row("of REAF's encoder", "--vision reaf", "--vision reaf: is not of --model hsenet"),
    Row("from stage 2", "--vision stage1", "is a clip2 run of hsenet; --vision stage1 needs a clip1 run"),
    Row("whose decoder is not there", "--decoder {none}", "none: no such folder"),
    Row("whose decoder has no tokenizer", "--decoder {scans}", "scans: no tokenizer found; looked for"),
    Row("whose decoder is int8 and full", "--decoder {decoder} --int8 --full", "--int8: ...leave out --full"),
    Row("full with adapters", "--decoder {decoder} --full --lora-r 4", "...trained whole has no adapters"),
    Row("with int8 from scratch", "--int8", "--full, --int8, --lora-*: are of a --decoder with weights"),
    Row("with adapters from scratch", "--lora-r 4", "are of a --decoder with weights"),
    Row("of a kernel of 3", "--kernel 3 1 1", "--kernel (3, 1, 1)"),
    Row(
        "of long texts",
        "--max-text 2000",
        "--max-text: 4 visual tokens, 256 of cues and 2000 of text do not fit the decoder's context of 1024",
    ),
    Row("of short texts", nothing, "raise the text length (--max-text)", "--max-text 5"),
    Row("cached and trained", "--cache-features", "--cache-features: encoders that are trained have no"),
    Row("cached and dropped", f"{DROPOUT} --cache-features", "--cache-features: features under dropout"),
    Row("of a size", "--size 16 32 32", "--size: is an option of --stage clip1 and clip2"),
    Row("of questions", "--questions location", "--questions: is an option of --stage vqa"),
    Row("with cached gradients", "--grad-cache 2", "--grad-cache: is an option of --stage clip1 and clip2"),
    Row("batch larger than the data", "--batch-size 400", "--batch-size 400: ...there are 18"),
    Row("run is there already", "--out {mrg} --max-steps 9", "holds a run already...--resume"),
    Row("of bad volumes", volumes(99, with_nan), "first 18 training volumes, ...none can be read", ALL_BAD),
)
faults(
    "train --stage mrg --resume --out {mrg} --device cpu",
    "resumed language run",
    "",
    Row("of another kernel", "--kernel 2 1 1", "--kernel: with --resume...(1, 2, 2)"),
    Row("of frozen encoders", "--no-train-vision", "--no-train-vision: with --resume...has True"),
    Row("of another teacher", "--teacher {scans}", "--teacher: with --resume...has ...clip1"),
    Row("of another stage", "--stage vqa", "is a mrg run of hsenet, not vqa"),
)

faults(
    RETRIEVAL,
    "run",
    "config.json: ",
    Row("without stage", run("stage", ...), "RunSettings lacks stage; put the file"),
    Row("whose settings are null", write(RUN, "null"), "expected an object of settings, found"),
    Row("whose settings are nested 50,000 deep", write(RUN, DEEP), "is not valid JSON (maximum recursion"),
    Row("of another setting", run("model", "flavour", "mild"), "ClipConfig has no setting flavour"),
    Row("whose width is a text", run("model", "vision", "width", "wide"), "width of VisionConfig is 'wide'"),
    Row("whose width is 10^9", run("model", "vision", "width", 10**9), "width of VisionConfig is 1000000000"),
    Row("whose depth is 10^9", run("model", "text", "depth", 10**9), "depth of TextConfig is 1000000000;"),
    Row("whose heads are none", run("model", "text", "heads", 0), "heads of TextConfig is 0; expected more"),
    Row("of another scale", run("model", "logit_scale", "loud"), "logit_scale of ClipConfig is 'loud'"),
    Row("whose patch has two sizes", run("model", "vision", "patch", [4, 8]), "patch of VisionConfig is [4"),
    Row("whose recipe is incomplete", run("recipe", "window", ...), "Recipe lacks window; put the file back"),
    Row("whose data are a number", run("data", 3), "data of RunSettings is 3; expected"),
    Row("whose best is chosen on nothing", run("best_of", "luck"), "best_of of RunSettings is 'luck'"),
    Row("whose slices are a text", run("slices", "many"), "slices of RunSettings is 'many'"),
)
faults(
    RETRIEVAL,
    "run",
    "model.safetensors: ",
    Row("of another depth", run("model", "vision", "depth", 1), "does not fit this model: vision.blocks.1"),
    Row("whose width is twice its weights'", run("model", "vision", "width", 256), "does not fit this model"),
    Row("whose weights are truncated", cut(RUN_WEIGHTS), "is damaged: it has 1494770"),
    Row("of 10^15 bytes", unhashed(RUN_WEIGHTS, header, 0, HUGE), "is truncated or not a checkpoint"),
    Row("of a header of 10^12 bytes", unhashed(RUN_WEIGHTS, header, 10**12, {}), "is truncated or not"),
    Row("whose weights are not there", remove(RUN_WEIGHTS), "cannot be read (No such file or"),
    Row("without a tensor", unhashed(RUN_WEIGHTS, tensors, no_scale), "does not fit this model"),
    Row("whose weights were changed", nan(RUN_WEIGHTS), "is damaged: its sha256 is not"),
)
faults(
    RETRIEVAL,
    "run",
    "",
    Row("is not there", "--run {none}", "none: holds no run (no config.json); train one with train.py"),
    Row("of a language model", "--run {language}", "is a run of stage 'mrg'; expected a dual encoder"),
    Row("without a checkpoint", remove("run/checkpoints"), "run: has no checkpoint yet; let train.py reach"),
    Row("without a step 7", "--checkpoint step-000007", "has no checkpoint step-000007; ...step-000001"),
    Row("without a best", remove("run/checkpoints/best"), "has no checkpoint best; there are step-", BEST),
    Row("without a newest", "--checkpoint newest", "--checkpoint newest: expected last, best or a step"),
    Row(
        "of two checkpoints",
        f"--run {{run}}/checkpoints/last {BEST}",
        f"{BEST}: the path names another, last; leave",
    ),
    Row("with NaN", unhashed(RUN_WEIGHTS, nan), "queries: expected finite embeddings, found NaN or"),
    Row("whose model is empty", run("model", {}), "vocab.txt: has ... tokens, the run's text encoder 30522"),
    Row("without vocabulary", remove("run/vocab.txt"), "vocab.txt: no such file; expected BERT"),
    Row("of another vocabulary", vocabulary("run", 0), "vocab.txt: has 5 tokens, the run's text encoder"),
    Row("of too many words", vocabulary("run", 5000), "vocab.txt: has 5005 tokens, the run's text encoder"),
)
faults(
    RETRIEVAL,
    "",
    "",
    Row("reports of a dual encoder", "--task mrg", "run: is a run of stage 'clip1', which has no"),
    Row("no such split", "--split test", "manifest.json: the test split is empty; prepare"),
    Row("out is a file", write("out", "x"), "out: is a file; expected a folder to write into", "--out {out}"),
    Row("flag of another task", "--questions size", "--questions: is an option of --task vqa"),
    Row("protocol of no name", "--protocol last_all", "--protocol: invalid choice: 'last_all'"),
    Row(
        "no list of heads", "--protocol first_nohead", "--protocol first_nohead: ...put the...no_chest_*.txt"
    ),
    Row("three label tables", "--labels a b c", "--labels: expected one or two tables, found 3"),
    Row(
        "labels of volumes that retrieval does not have",
        write("l.csv", "id,Cardiomegaly\nother,1\n"),
        "l.csv: has no labels of volume valid_1_a_1",
        "--labels {l.csv}",
    ),
)
faults(
    f"{RETRIEVAL} --data {{data}}",
    "data",
    "",
    Row("of another recipe", manifest("recipe", "name", "reaf"), "recipe reaf, but ...recipe hsenet"),
    Row("of another window", WINDOW, "have window -1150x350, but ...run needs window -1000x200"),
    Row("of other slice features", FEATURES, OTHER, "--run {clip2}"),
)
faults(
    MRG,
    "language run",
    "",
    Row("whose tokenizer is damaged", write(WORDS, "{}"), "tokenizer.json: cannot be read as a tokenizer"),
    Row("whose tokenizer is deep", write(WORDS, DEEP), "tokenizer.json: cannot be read as a tokenizer"),
    Row("without its decoder's settings", language("model", "decoder", ...), "MllmConfig lacks decoder"),
    Row("of rotary text", language("model", "decoder", "rope", "dims", "x"), "dims of RopeConfig is 'x'"),
    Row(
        "without an origin",
        all_of(language("origin", ...), language("model", "full", False)),
        "origin does not say where",
    ),
    Row("whose classifier is no folder", "--classifier {none}", "none: no such folder; expected one with"),
    Row("of an empty classifier", remove(BERT), "has none of model.safetensors", "--classifier {words}"),
    Row("of packers alone", "--run {packers.bin} --data {data}", "holds packers and adapters only"),
)
faults(
    READ,
    "predictions",
    "",
    Row("of an unknown volume", predictions(input_image_name="valid_9"), "'valid_9' is no volume of the"),
    Row(
        "without a name", predictions(input_image_name=5), "p.json: input_image_name is 5; expected the name"
    ),
    Row(
        "given twice",
        predictions(input_image_name="x/valid_2_a_1.mha"),
        "volume valid_2_a_1 has two reports; keep one",
    ),
    Row("that are no text", predictions(report=None), "'valid_1_a_1.nii.gz': its report is None; expected a"),
    Row("with half a character", predictions(report="\ud800"), "its report is ... expected a text"),
    Row(
        "with one label", predictions(labels={"Cardiomegaly": 1}), "labels from 0 to 1 by CT-RATE's 18 names"
    ),
    Row(
        "with a label of 2", predictions(probabilities=[2.0] * 18), "expected labels from 0 to 1 by CT-RATE's"
    ),
    Row("of a volume less", predictions(), "p.json: has no report of valid_3_a_1"),
    Row("of another form", write("p.json", "[5]"), "p.json: expected generated_reports, a list of"),
    Row("nested 50,000 deep", write("p.json", DEEP), "is not valid JSON (maximum recursion depth"),
    Row("that are not there", "", "p.json: no such file"),
    Row("of a run", "--limit 1", "--limit: is of a run, and --predictions has none"),
    Row("of another task", "--task vqa", "--predictions: is an option of --task mrg; leave it out"),
)
faults(
    "evaluate --task mrg --predictions {p.json}",
    "predictions",
    "--predictions: ",
    Row("without data", "", "needs the data set whose volumes they are of; name it with --data"),
)
faults(
    "evaluate --task retrieval --compare {run} {run}",
    "compared results",
    "retrieval_queries.csv: ",
    Row("are not there", "", "no such file; run"),
    Row(
        "are a list",
        all_of(write(f"{RANKS}.json", "[]"), write(f"{RANKS}_queries.csv", "[]")),
        "has no column",
    ),
)
faults(
    f"{ZEROSHOT} --prompts {{p.json}}",
    "prompts",
    "p.json: ",
    Row("are a list", write("p.json", "[]"), "expected the keys classes, template; found"),
    Row("nested 50,000 deep", write("p.json", DEEP), "is not valid JSON (maximum recursion depth"),
    Row("without a place", write("p.json", '{"template": "x", "classes": {}}'), "template is 'x'; expected"),
)
faults(
    f"{ZEROSHOT} --labels {{l.csv}}",
    "labels",
    "",
    Row("with NUL bytes", write("l.csv", b"id,a\n\0,\0\n"), "l.csv: line 2 holds a NUL byte; save the table"),
    Row("of others", write("l.csv", "id,Cardiomegaly\nother,1\n"), "has no labels of volume valid_1_a_1"),
    Row("are a folder", "--labels {scans}", "scans: is a folder, expected a file"),
)
faults(
    "evaluate --task retrieval --run {m3d} --device cpu",
    "published weights",
    "",
    Row("without their data", "", "m3d has no data set of its own; name a prepared one"),
    Row("on data of another size", "--data {data}", "m3d needs size 16x64x64; prepare them so with"),
    Row("with NaN", nan(M3D), "m3d: NaN or infinite values in", "--data {data}"),
    Row("of other settings", m3d("hidden_size", 96), "config.json: hidden_size is 96, the", "--data {data}"),
)

faults(
    "infer embed --run {run} --device cpu",
    "scan",
    "",
    Row("is not there", "{none.nii.gz}", "none.nii.gz: no such file; expected a scan that"),
    Row("of another ending", write("x.dcm", "x"), "x.dcm: expected a scan that ends in .pt, .pt", "{x.dcm}"),
    Row("is a folder", "{scans}", "scans: no such file; expected a scan that ends in"),
    Row("that would run code", pickled("x.pt", Opens()), "x.pt: holds more than tensors (io.open)", "{x.pt}"),
    Row("as .pt of a dictionary", pickled("x.pt", {}), "x.pt: holds a dict; expected one tensor", "{x.pt}"),
    Row("of one voxel", pickled("x.pt", STRETCHED), "claims 32000000000000 bytes and holds 4;", "{x.pt}"),
)
faults(
    EMBED,
    "scan",
    "scan.nii.gz: ",
    Row("truncated", cut("scan.nii.gz"), "is truncated or damaged (Compressed"),
    Row("that claims 10^13 voxels", scan(**BIG), "is truncated or damaged (its header"),
    Row("of three voxels", scan(np.zeros((1, 1, 3), np.int16)), "is a 1D image of shape (1, 1, 3)"),
    Row("of a millimetre in all", scan(CT, **spaced(1e-3)), "by its header the scan is 0.006 x"),
    Row("of a kilometre a voxel", scan(CT, **spaced(1e6)), "by its header the scan is 6e+06 x"),
    Row("in micrometres", run("recipe", "spacing", [1e-3] * 3), "its 24 x 48 x 48 voxels of 13.98 x"),
)
faults(
    EMBED,
    "run",
    "",
    Row("is not there", "--run {none}", "none: holds no run (no config.json); train one with"),
    Row("with NaN", unhashed(RUN_WEIGHTS, nan), "gives embeddings with NaN or infinity"),
    Row("whose settings are a text", write(RUN, '"x"'), "config.json: expected an object of settings, found"),
    Row("of a size of zero", run("recipe", "size", [0, 1, 1]), "config.json: --size (0, 1, 1): expected"),
    Row("of a language model", "--run {language}", "language: is a run of stage mrg, a language model"),
    Row("without slices", "--slice-encoder {encoder.bin}", "run takes no slice features; leave the flag out"),
)
faults(
    EMBED,
    "flag:",
    "",
    Row("spacing of NaN", "--spacing nan 1 1", "--spacing [nan, 1.0, 1.0]: expected three positive"),
    Row("slope of zero", "--slope 0", "--slope 0: expected a finite number, and a slope"),
    Row("orientation of no kind", "--assume-orientation XYZ", "--assume-orientation: 'XYZ' is not an"),
    Row("out of another ending", "--out {here}/index.txt", "index.txt: expected a file to write that ends"),
)
faults(
    REPORT,
    "language run",
    "",
    Row("without its weights", remove("language/checkpoints"), "has no checkpoint yet; let train.py"),
    Row("whose tokenizer is gone", remove(WORDS), "language: no tokenizer found; looked for"),
    Row("whose encoders are a text", language("model", "encoders", "x"), "encoders of MllmConfig is 'x'"),
    Row("whose kernel is zero", language("model", "kernel", [0, 2, 2]), "kernel of MllmConfig is (0, 2, 2)"),
    Row("is a dual encoder's", "--run {run}", "run: is a run of stage clip1, which has no decoder"),
    Row("of packers alone", "--run {packers.bin}", "packers.bin: holds packers and adapters only; name"),
)
faults(
    REPORT,
    "flag:",
    "",
    Row("empty prompt", "--prompt ''", '--prompt is empty; expected some words, such as "Is'),
    Row("temperature below zero", "--temperature -1", "temperature -1.0: expected 0 (greedy), or 0.0001"),
    Row("top-p of 7", "--temperature 1 --top-p 7", "top_p 7.0: expected a probability above 0, at most 1"),
    Row("too many tokens", "--new-tokens 99999", "--new-tokens 99999: a question of 18 tokens, 8 of"),
)
faults(
    "infer",
    "",
    "",
    Row("empty question", "ask {scan} ' ' --run {language}", "the question is empty; expected some words"),
    Row("nothing to explain", "explain {scan} --run {run}", "run: its encoder weighs no patches; stage"),
    Row("search for nothing", "search {scan} --text ' '", "--text: is empty; expected words of a report"),
    Row("prompts that are none", write("p.json", "3"), "p.json: expected the keys classes", CLASSIFY),
)
faults(
    SEARCH,
    "index",
    "",
    Row("is not there", "", "i.safetensors: no such file; make an index with"),
    Row("is text", write("i.safetensors", "x"), "i.safetensors: is truncated or not a safetensors"),
    Row("without names", index(model="0"), "i.safetensors: is no index: expected unit vectors"),
    Row("of another model", index(ids="a\nb\nc", model="0" * 64), "step-000001 has 7e7403c3f4fd; name that"),
    Row("of 10^15 bytes", header("i.safetensors", 0, HUGE), "i.safetensors: is truncated or not a"),
)


def filled(command: str, scene: Scene) -> list[str]:
    """The command's words, with paths of the scene for what is in braces."""

    def place(match: re.Match) -> str:
        name = "scan.nii.gz" if match[1] == "scan" else match[1]
        return str(scene.folder if name == "here" else scene.path(name))

    return [re.sub(r"\{([\w.]+)\}", place, word) for word in shlex.split(command)]


def said(words: str, line: str) -> bool:
    return re.search(".*".join(map(re.escape, words.split("..."))), line) is not None


ROWS = [
    pytest.param(fault, id=name, marks=[pytest.mark.slow] if fault.slow else [])
    for name, fault in FAULTS.items()
]


@pytest.mark.usefixtures("forks")
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
    every = err.replace("\r", "\n").splitlines()
    lines = [line for line in every if line.startswith(("error: ", "refused: "))]
    assert any(said(fault.words, line) for line in (lines if fault.code else (out + err).splitlines())), err
    assert sum(line.startswith("error: ") for line in lines) == (fault.code == 2), err
    assert "Traceback" not in err
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
    fault, scene = FAULTS[name], Scene(tmp_path, originals)
    fault.make(scene)
    program, *arguments = filled(fault.command, scene)
    assert said(fault.words, error_line(script(f"{program}.py", *arguments, cwd=tmp_path)))
