"""Thousands of mutated files, seeded: every reader ends in a result or in an InputError of one line, within
10 s and 2 GB.

python -m pytest tests/faults/test_fuzz.py
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save

import published
from faults.limits import limited
from reaf_hsenet.config import RECIPES, ClipConfig, TrainConfig
from reaf_hsenet.data.labels import read_label_table
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.reading import read_input
from reaf_hsenet.data.sources.bimcv import read_bimcv
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.hsenet_json import read_hsenet_json
from reaf_hsenet.data.sources.nifti import read_nifti_folder
from reaf_hsenet.data.sources.radgenome import read_questions
from reaf_hsenet.data.sources.reaf_dataset import read_reaf
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.comparison import read_table
from reaf_hsenet.evaluate.search_index import read_index
from reaf_hsenet.evaluate.zeroshot import load_prompts
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import open_source
from reaf_hsenet.runs.trained import published_run
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.weights.adapters import adapter_settings
from reaf_hsenet.weights.decoder import stored_tensors
from reaf_hsenet.weights.files import read_weights_file
from reaf_hsenet.weights.shapes import bert_config

RECIPE = from_dict(type(RECIPES["hsenet"]), {**vars(RECIPES["hsenet"]), "size": [4, 8, 8]})
ODD = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "x" * 10_000,
    "../..",
    [],
    [[]],
    {},
    {"a": 1},
    [None] * 3,
]
HEADER = 348


def mutated(content: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """One to four changes between two places: bits, spans, numbers, lengths."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = min(last or len(data), len(data))
        i = rng.randrange(first, max(end, first + 1))
        span = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            data[i : i + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[i : i + span] = bytes(rng.choice((0, 255)) for _ in range(1)) * span
        elif kind == 2:
            data[i : i + span] = rng.randbytes(span)
        elif kind == 3:
            del data[i : len(data) if rng.random() < 0.3 else i + span]
        elif kind == 4:
            data[i:i] = data[max(0, i - span) : i] * rng.choice((1, 3))
        elif kind == 5:
            data[i:i] = rng.choice((b"\0", b"9" * 30, b'"', b",", b"\n", b"[" * 2000, b"\xff", b"-", b"nan"))
        else:
            data[i : i + 4] = rng.choice(
                (np.float32(np.inf), np.float32(np.nan), np.int32(2**31 - 1), np.int32(-1))
            ).tobytes()
    return bytes(data)


def with_odd_value(values, rng: random.Random):
    """A JSON value in which one part is another, or is gone."""
    values = json.loads(json.dumps(values))
    inner, place = [values], 0
    while True:
        here = inner[place]
        if not (isinstance(here, dict | list) and here) or rng.random() < 0.15:
            break
        inner, place = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
    if rng.random() < 0.2 and isinstance(inner, dict):
        del inner[place]
    else:
        inner[place] = rng.choice(ODD)
    return values if inner is not values else inner


def mutated_json(values, rng: random.Random) -> bytes:
    text = json.dumps(with_odd_value(values, rng) if rng.random() < 0.75 else values).encode()
    return mutated(text, rng) if rng.random() < 0.3 else text


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Its bytes, or its header with its length kept right."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        return mutated(content, rng, 0, rng.choice((8, length, None)))
    head = mutated_json(json.loads(content[8 : 8 + length]), rng)
    return len(head).to_bytes(8, "little") + head + content[8 + length :]


def ends_well(read: Callable, *arguments) -> bool:
    """Whether there was a result. Anything but it and an InputError of one line is an error of the test."""
    with limited():
        try:
            read(*arguments)
        except InputError as error:
            assert "\n" not in str(error) and str(error)
            return False
    return True


def feed(
    count: int, seed: str, make: Callable[[random.Random], bytes], path: Path, read: Callable, *arguments
) -> None:
    """`count` mutations, each written to `path` and read; some must be refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    good = 0
    for number in range(count):
        content = make(random.Random(f"{seed} {number}"))
        path.write_bytes(content)
        try:
            good += ends_well(read, *arguments)
        except BaseException as error:
            error.add_note(f"{seed} {number}: {content[:300]!r}") if hasattr(error, "add_note") else None
            raise
    assert good < count


def nifti() -> bytes:
    voxels = np.random.default_rng(0).integers(-1000, 500, (6, 7, 8)).astype(np.int16)
    return nib.Nifti1Image(voxels, np.diag([-2.0, -2.0, 3.0, 1.0])).to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_thousand_mutated_scans(tmp_path, ending):
    whole, path = nifti(), tmp_path / f"scan{ending}"
    packed = gzip.compress(whole)

    def make(rng: random.Random) -> bytes:
        if ending == ".nii.gz" and rng.random() < 0.4:
            return mutated(packed, rng)
        content = mutated(whole, rng, *rng.choice(((0, HEADER), (40, 60), (70, 124), (0, len(whole)))))
        return content if ending == ".nii" else gzip.compress(content, 1)

    feed(500, ending, make, path, read_input, path, RECIPE)


TABLES = {
    "nifti": (
        b'id,text,scan,split\na,clear,s,train\nb/c,"large, right",t,test\n',
        lambda path: read_nifti_folder(path.parent, path),
    ),
    "labels": (b"VolumeName,Cardiomegaly\na.nii.gz,1\nb.nii.gz,0\n", read_label_table),
    "questions": (
        b"Volumename,Anatomy,Abnormality,Question,Answer\na.nii.gz,lung,nodule,Where?,left\n",
        lambda path: read_questions(path.parent, "train", ["a"]),
    ),
    "ranks": (
        b"id,report_to_volume_rank,volume_to_report_rank\na,1,2\nb,2,1\n",
        lambda path: read_table(path, "retrieval", path.parent),
    ),
    "bimcv": (
        b"path,Report_en\nsub-S1_ses-E2_x.nii.gz,clear\n/x/sub-S2/ses-E3/mod-ct,nodule\n",
        lambda path: read_bimcv(path.parents[1], path),
    ),
    "ct-rate": (
        b"VolumeName,Findings_EN,Impressions_EN\ntrain_1_a_1.nii.gz,clear,none\ntrain_2_a_1.nii.gz,nodule,\n",
        lambda path: read_ct_rate(path.parents[1]),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_hundreds_of_mutated_tables(tmp_path, name):
    content, read = TABLES[name]
    (tmp_path / "CT1/ct").mkdir(parents=True)
    (tmp_path / "CT1/ct/sub-S1_ses-E2_x.nii.gz").write_bytes(b"")
    files = {
        "questions": "train_vqa_location.csv",
        "ct-rate": "radiology_text_reports/train_reports.csv",
        "bimcv": "t/t.csv",
    }
    path = tmp_path / files.get(name, "t.csv")
    feed(110, name, lambda rng: mutated(content, rng), path, read, path)


def run_settings(path: Path) -> None:
    values = Run(path.parent).read_config()
    from_dict(MllmConfig if values["stage"] == "mrg" else ClipConfig, values["model"])
    from_dict(TrainConfig, values.get("train", {}))


@pytest.fixture(scope="module")
def documents(originals, tmp_path_factory) -> dict[str, tuple]:
    """JSON of every kind that is read, the name of its file, and its reader."""
    folder, decoder = originals, published.write_decoder(tmp_path_factory.mktemp("documents") / "decoder")

    def known(path: Path):
        return json.loads(path.read_text())

    adapter = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["qkv_proj"],
        "bias": "none",
    }
    prompts = {
        "template": "{} is seen",
        "classes": {"Nodule": {"positive": "a nodule", "negative": "no nodule"}},
    }
    hsenet = {
        "train": [{"image": "a.npy", "text": "clear", "biomedclip_features": "a_2d.npy"}],
        "validation": [],
    }
    reaf = [
        {
            "image": "a.pt",
            "conversations": [{"from": "human", "value": "report?"}, {"from": "gpt", "value": "clear"}],
        }
    ]
    return {
        "manifest": (
            known(folder / "data/manifest.json"),
            "manifest.json",
            lambda path: load_manifest(path.parent),
        ),
        "run": (known(folder / "clip1/config.json"), "config.json", run_settings),
        "language run": (known(folder / "language/config.json"), "config.json", run_settings),
        "prompts": (prompts, "p.json", lambda path: load_prompts(str(path))),
        "HSENet's data": (hsenet, "h.json", read_hsenet_json),
        "REAF's reports": (reaf, "train/reports/r.json", lambda path: read_reaf(path.parents[2])),
        "BERT": (known(folder / "words/config.json"), "config.json", lambda path: bert_config(path.parent)),
        "decoder": (
            known(decoder / "config.json"),
            "config.json",
            lambda path: DecoderConfig.from_folder(path.parent),
        ),
        "adapter": (adapter, "adapter_config.json", adapter_settings),
        "tokenizer": (
            known(folder / "language/tokenizer.json"),
            "tokenizer.json",
            lambda path: load_tokenizer(path.parent),
        ),
    }


NAMES = (
    "manifest",
    "run",
    "language run",
    "prompts",
    "HSENet's data",
    "REAF's reports",
    "BERT",
    "decoder",
    "adapter",
    "tokenizer",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hundreds_of_mutated_json_files(documents, tmp_path, name):
    values, file, read = documents[name]
    (tmp_path / "train/volumes").mkdir(parents=True)
    torch.save(torch.zeros(2, 2, 2), tmp_path / "train/volumes/a.pt")
    feed(80, name, lambda rng: mutated_json(values, rng), tmp_path / file, read, tmp_path / file)


@pytest.mark.slow
def test_a_thousand_mutated_safetensors(tmp_path):
    small = save(
        {"image": torch.eye(3), "b": torch.ones(2, dtype=torch.bfloat16)},
        {"ids": "a\nb\nc", "model": "0" * 64},
    )
    path = tmp_path / "model.safetensors"

    def make(rng: random.Random) -> bytes:
        return mutated_safetensors(small, rng)

    feed(350, "weights", make, path, read_weights_file, path)
    feed(250, "index", make, path, read_index, path)
    feed(150, "decoder", make, path, lambda: [stored.read() for stored in stored_tensors(tmp_path).values()])
    whole = save(published.m3d_clip())
    published.write_vocabulary(tmp_path, published.BERT["config"]["vocab_size"], published.HEADS)
    feed(
        150,
        "m3d-clip",
        lambda rng: mutated_safetensors(whole, rng),
        path,
        lambda: published_run(open_source(str(path))),
    )


def test_hundreds_of_mutated_pickles(tmp_path):
    path = tmp_path / "x.pt"
    for old in (False, True):
        torch.save(
            {"a": torch.arange(30.0).reshape(5, 6), "b": torch.ones(3)},
            path,
            _use_new_zipfile_serialization=not old,
        )
        whole = path.read_bytes()
        feed(
            150, f"pickle {old}", lambda rng, whole=whole: mutated(whole, rng), path, read_weights_file, path
        )
    torch.save(torch.rand(6, 7, 8), path)
    whole = path.read_bytes()
    feed(150, "volume", lambda rng: mutated(whole, rng), path, read_input, path, RECIPE)
