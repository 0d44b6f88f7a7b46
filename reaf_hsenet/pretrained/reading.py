"""Weights files -> dictionaries of tensors: .safetensors, and pickles (.bin, .pt, .pth) of which only tensors are read.

A pickle is looked over before it is loaded: an archive that unpacks to far more than it holds, and a tensor that claims
more numbers than there are bytes, are refused while nothing is in memory.
"""

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reaf_hsenet.data.reading import DAMAGED
from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import read_json

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# In this order, as transformers, peft and open_clip name them; a shard's index stands for its shards.
NAMES = (
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)
# torch stores tensors as they are. A file that was packed again may be smaller, but not by orders of magnitude.
MOST_UNPACKED = 16


def read_weights(folder: Path) -> State:
    """The weights of a folder. Raises InputError when there are none, or several that none of NAMES chooses from."""
    path = weights_file(Path(folder))
    state = read_weights_file(path)
    check_finite(state, str(path))
    return state


def weights_file(folder: Path) -> Path:
    """The file of a folder's weights: the first of NAMES, or the only one there is, in the folder or else below it."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*", "*/**/*"):  # beside it, else below
        others = sorted(path for path in folder.glob(pattern) if path.suffix in SUFFIXES and path.is_file())
        if len(others) == 1:
            return others[0]
        if others:
            raise InputError(f"{folder}: holds {first_six([str(p.relative_to(folder)) for p in others])}; name one of these files")
    raise InputError(f"{folder}: has none of {', '.join(NAMES)}, nor another file that ends in {', '.join(SUFFIXES)}")


def read_weights_file(path: Path) -> State:
    """The tensors of a file, or of the shards that an index lists; those of a training checkpoint's `model` or
    `state_dict`. Raises InputError, naming the file, for anything else."""
    path = Path(path)
    if path.suffix == ".json":
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _look_over(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:  # a zip file, or a pickle as torch wrote before 1.6
            pickled = file.read(1) in (b"P", b"\x80")
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        # Of the older format, what is cut short in mid-name asks for a class that is not there.
        problem = f"holds more than tensors{f' ({wanted[1]})' if wanted else ''}, which is not loaded, or is truncated"
        raise InputError(
            f"{path}: {problem}; save its state_dict alone" if pickled else f"{path}: is truncated or not a checkpoint"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, *DAMAGED) as error:
        raise InputError(
            f"{path}: is truncated or not a checkpoint ({' '.join(str(error).split())[:120] or type(error).__name__})"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise InputError(f"{path}: is not a dictionary of tensors by name")
    for name, tensor in state.items():
        if tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"{path}: {name} is a sparse, quantised or empty tensor; save plain ones")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path}: {name} claims {tensor.nbytes} bytes and holds {tensor.untyped_storage().nbytes()}; fetch it again"
            )
    return state


def _read_shards(index: Path) -> State:
    places = read_json(index)
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index}: has no weight_map of tensors to files; fetch it again")
    state: State = {}
    for file in dict.fromkeys(places.values()):
        if not (index.parent / file).is_file():
            raise InputError(f"{index.parent / file}: this shard is missing; fetch it again, or the whole folder")
        state |= read_weights_file(index.parent / file)
    absent = [name for name in places if name not in state]
    if absent:
        raise InputError(f"{index}: lists {first_six(absent)}, which the shards do not have; fetch them again")
    return state


def _look_over(path: Path) -> None:
    """Raise InputError for a pickle that would take far more memory than the file has bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
        if start != b"PK\x03\x04":  # by which torch tells the formats apart too
            file.seek(0)
            if start[:1] == b"\x80":  # torch before 1.6: three small pickles, the tensors' own, their bytes
                _require_room(path, max(_claimed(file) for _ in range(4)), size)
            return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_UNPACKED * size:
            raise InputError(
                f"{path}: unpacks to {unpacked} bytes from {size}, which no checkpoint does; it is not opened, fetch it from "
                "its authors"
            )
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    _require_room(path, _claimed(file), unpacked)


def _require_room(path: Path, claimed: int, held: int) -> None:
    if claimed > held:
        raise InputError(f"{path}: is truncated or damaged: a tensor claims {claimed} numbers, the file holds {held} bytes; fetch it again")


def _claimed(file: IO[bytes]) -> int:
    """The most numbers that a storage of the next pickle has: the last integer before each persistent id. Nothing is run."""
    most = last = 0
    try:
        for operation, argument, _ in pickletools.genops(file):
            if isinstance(argument, int) and operation.name.startswith(("BININT", "LONG", "INT")):
                last = argument
            elif operation.name == "BINPERSID":
                most = max(most, last)
    except (ValueError, LookupError, EOFError, OSError, MemoryError, zipfile.BadZipFile):
        return most  # damaged: for torch to say so
    return most


def is_finite(tensor: Tensor) -> bool:
    """Whole numbers always are."""
    if not tensor.is_floating_point():
        return True
    return bool((tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all())  # eight-bit floats have no isfinite


def check_finite(state: State, source: str) -> None:
    """Raise InputError that names the tensors with NaN or infinite values."""
    wrong = [n for n, t in state.items() if not is_finite(t)]
    if wrong:
        raise InputError(f"{source}: NaN or infinite values in {first_six(wrong)}; fetch the file again, or another checkpoint")


def summary(names: list[str]) -> str:
    """Names in short: those of a part with many are one, `text.blocks.* (192)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    short = [group if len(group) <= 2 else [f"{part}.* ({len(group)})"] for part, group in parts.items()]
    return ", ".join(name for group in short for name in group)
