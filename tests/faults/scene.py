"""Small inputs that are whole, for faults to be made in: every attribute of a scene is a copy of its own,
made when asked for.
"""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import load_file

import published
import train
from language_run import write_language_run
from reaf_hsenet.data.manifest import load_manifest
from test_inference import with_slices, write_dual_run


def write_originals(folder: Path, prepared: Path) -> Path:
    """data, with slice features; run, a dual encoder's; language, a run of mrg; scans with their table;
    published weights.
    """
    with_slices(prepared, folder / "data")
    write_dual_run(folder / "run", folder / "data")
    write_language_run(folder / "language", folder / "data")
    files = [Path(e["source"]["file"]) for e in load_manifest(folder / "data").entries("train")[:3]]
    (folder / "scans").mkdir()
    for name, file in zip("abc", files, strict=True):
        shutil.copy(file, folder / f"scans/{name}.nii.gz")
    (folder / "scans/reports.csv").write_text("id,text\na,clear lungs\nb,right effusion\nc,small nodule\n")
    published.write_m3d_clip(folder / "m3d")
    published.write_vocabulary(folder / "words", 200, published.BERT["config"])
    published.write(folder / "words/model.safetensors", published.bert())
    published.write(folder / "encoder.bin", published.mae(48))
    published.write(folder / "packers.bin", published.language())
    flags = "--stage clip1 --preset hsenet-tiny --size 16 32 32 --batch-size 4 --max-steps 1 --device cpu"
    train.main([*flags.split(), "--data", str(folder / "data"), "--out", str(folder / "trained")])
    return folder


class Scene:
    """A folder of one fault. `scene.path("run")` copies that original into it."""

    def __init__(self, folder: Path, originals: Path):
        self.folder, self.originals = folder, originals
        self.most_bytes: int | None = None  # of any file that is written

    def path(self, name: str) -> Path:
        target, source = self.folder / name, self.originals / name
        if not target.exists() and source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target

    def file(self, name: str) -> Path:
        """A file in one of the originals: all of it is copied."""
        self.path(name.split("/")[0])
        return self.folder / name

    @cached_property
    def scan(self) -> Path:
        return Path(shutil.copy(self.originals / "scans/a.nii.gz", self.folder / "scan.nii.gz"))


Fault = Callable[[Scene], None]


def write(name: str, content: str | bytes) -> Fault:
    """A file with other content."""

    def make(scene: Scene) -> None:
        path = scene.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def cut(name: str, share: float = 0.5) -> Fault:
    """A file that was cut short."""

    def make(scene: Scene) -> None:
        path = scene.file(name)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return make


def remove(name: str) -> Fault:
    def make(scene: Scene) -> None:
        path = scene.file(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def change(name: str, *keys, value) -> Fault:
    """A json file in which one value, that these keys lead to, is another; ... removes it."""

    def make(scene: Scene) -> None:
        path = scene.file(name)
        inner = values = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(values))

    return make


def tensors(name: str, edit: Callable[[dict], None]) -> Fault:
    """A weights file whose tensors are edited."""

    def make(scene: Scene) -> None:
        path = scene.file(name)
        read = load_file if path.suffix == ".safetensors" else torch.load
        state = dict(read(path))
        edit(state)
        published.write(path, state)

    return make


def header(name: str, length: int, values: dict, body: bytes = b"") -> Fault:
    """A safetensors file of this header and body."""

    def make(scene: Scene) -> None:
        text = json.dumps(values).encode()
        path = scene.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((length or len(text)).to_bytes(8, "little") + text + body)

    return make


def scan(voxels=None, name: str = "scan.nii.gz", **fields) -> Fault:
    """A NIfTI file whose voxels or header's fields are others, packed as the ending says."""

    def make(scene: Scene) -> None:
        image = nib.load(scene.scan if name == "scan.nii.gz" else scene.file(name))
        data = np.asarray(image.dataobj) if voxels is None else voxels
        made = nib.Nifti1Image(data, image.affine)
        head = made.to_bytes()
        raw = nib.Nifti1Header.from_fileobj(io.BytesIO(head), check=False)
        for field, value in fields.items():
            raw[field] = value
        content = raw.binaryblock + head[348:]
        path = scene.folder / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    return make


def nothing(scene: Scene) -> None:
    """The fault is in the command."""
