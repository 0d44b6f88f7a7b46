"""Small inputs that are whole, and faults that are made in a copy of them."""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import published
from language_run import write_dual_run, write_language_run
from reaf_hsenet.data.manifest import load_manifest


def write_originals(folder: Path, stages: Path, mrg: Path) -> Path:
    """data, with slice features; runs: run (clip1) and language (mrg) with random weights; clip1, clip2 and
    mrg, trained; a decoder; scans with their table; published weights.
    """
    for made in (*(stages / name for name in ("data", "clip1", "clip2", "decoder")), mrg):
        (folder / made.name).symlink_to(made)
    write_dual_run(folder / "run", folder / "data")
    write_language_run(folder / "language", folder / "data")
    files = [Path(e["source"]["file"]) for e in load_manifest(folder / "data").entries("train")[:3]]
    (folder / "scans").mkdir()
    for name, file in zip("abc", files, strict=True):
        shutil.copy(file, folder / f"scans/{name}.nii.gz")
    shutil.copy(files[0], folder / "scan.nii.gz")
    (folder / "scans/reports.csv").write_text("id,text\na,clear lungs\nb,right effusion\nc,small nodule\n")
    published.write_m3d_clip(folder / "m3d")
    published.write_vocabulary(folder / "words", 200, published.BERT["config"])
    published.write(folder / "words/model.safetensors", published.bert())
    published.write(folder / "encoder.bin", published.mae(48))
    published.write(folder / "packers.bin", published.language())
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


def change(name: str, *keys_and_value) -> Fault:
    """A json file in which the value that the keys lead to is another; ... removes it."""
    *keys, value = keys_and_value

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
        image = nib.load(scene.file(name))
        data = np.asarray(image.dataobj) if voxels is None else voxels
        made = nib.Nifti1Image(data, image.affine)
        head = made.to_bytes()
        raw = nib.Nifti1Header.from_fileobj(io.BytesIO(head), check=False)
        for field, value in fields.items():
            raw[field] = value
        content = raw.binaryblock + head[348:]
        path = scene.file(name)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    return make


class Opens:
    """Unpickled, it would open a file to write."""

    def __reduce__(self):
        return open, ("was_here", "w")


def pickled(name: str, value) -> Fault:
    return lambda scene: torch.save(value, scene.file(name))


def nan(name: str) -> Fault:
    def edit(state: dict) -> None:
        for key, tensor in state.items():
            state[key] = tensor * float("nan")

    return tensors(name, edit)


def all_of(*faults: Fault) -> Fault:
    return lambda scene: [make(scene) for make in faults]


def folder(name: str) -> Fault:
    return lambda scene: scene.file(name).mkdir(parents=True)


def sized(*shape: int) -> dict:
    return {"dim": [len(shape), *shape, *[1] * (7 - len(shape))]}


def spaced(mm: float) -> dict:
    return {"pixdim": [1, *[mm] * 3, 0, 0, 0, 0]} | {
        f"srow_{axis}": [mm * (i == j) for j in range(4)] for i, axis in enumerate("xyz")
    }


def volumes(count: int, spoil: Callable[[Path], object], split: str = "train", key: str = "volume") -> Fault:
    """The first volumes' files, or their slice features, are spoiled by a function of the path."""

    def make(scene: Scene) -> None:
        data = scene.path("data")
        for values in json.loads((data / "manifest.json").read_text())["splits"][split][:count]:
            spoil(data / values[key])

    return make


def full_disk(most: int) -> Fault:
    """No file of this process grows beyond so many bytes."""

    def make(scene: Scene) -> None:
        scene.most_bytes = most

    return make


def index(**metadata: str) -> Fault:
    return lambda scene: save_file({"image": torch.eye(3)}, scene.folder / "i.safetensors", metadata)


def nothing(scene: Scene) -> None:
    """The fault is in the command."""
