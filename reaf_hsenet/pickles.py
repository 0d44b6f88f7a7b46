"""torch's pickles (.pt, .bin, .pth), of which only tensors are ever made.

A pickle is looked over before it is loaded: an archive that unpacks to far more than it holds, and a tensor
that claims more numbers than there are bytes, are refused while nothing is in memory.
"""

import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import named

# torch stores tensors as they are. A file that was packed again may be smaller, but not by orders of
# magnitude.
MOST_UNPACKED = 16


def load_pickle(path: Path, data: bytes | None = None, problem: str = "is truncated or damaged"):
    """Return what `path`, or `data` that was unpacked from it, holds.

    Raises InputError, naming the file, for anything but tensors in plain containers; problem: what it says of
    damage.
    """
    path = Path(path)
    with named(path, problem):
        file = io.BytesIO(data) if data is not None else open(path, "rb")
        with file:
            start = file.read(1)
            _look_over(path, file, path.stat().st_size if data is None else len(data))
            file.seek(0)
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                if start not in (b"P", b"\x80"):  # neither a zip file, nor a pickle as torch wrote before 1.6
                    raise InputError(f"{path}: {problem} (it is no file of torch.save)") from error
                # Of the older format, what is cut short in mid-name asks for a class that is not there.
                wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise InputError(
                    f"{path}: holds more than tensors{f' ({wanted[1]})' if wanted else ''}, which is not "
                    "loaded, or is truncated; save the tensors alone with torch.save"
                ) from error


def plain(tensor: Tensor, what: str) -> Tensor:
    """Return the tensor with its numbers as they are. Raises InputError, beginning with `what`, for one
    without any.
    """
    odd = (
        tensor.is_sparse
        or tensor.is_quantized
        or tensor.is_meta
        or tensor.is_nested
        or tensor.layout != torch.strided
    )
    if odd:
        raise InputError(f"{what} is a sparse, quantised, nested or empty tensor; save plain ones")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{what} claims {tensor.nbytes} bytes and holds {tensor.untyped_storage().nbytes()}; fetch it "
            f"again, or save it whole"
        )
    return tensor.detach().resolve_conj().resolve_neg()


def _look_over(path: Path, file: IO[bytes], size: int) -> None:
    """Raise InputError for a pickle that would take far more memory than the file has bytes."""
    file.seek(0)
    start = file.read(4)
    if start != b"PK\x03\x04":  # by which torch tells the formats apart too
        file.seek(0)
        if start[:1] == b"\x80":  # torch before 1.6: three small pickles, the tensors' own, their bytes
            _require_room(path, max(_claimed(file) for _ in range(4)), size)
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_UNPACKED * size:
            raise InputError(
                f"{path}: unpacks to {unpacked} bytes from {size}, which no checkpoint does; it is not "
                "opened, fetch it from its authors"
            )
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as part:
                    _require_room(path, _claimed(part), unpacked)


def _require_room(path: Path, claimed: int, held: int) -> None:
    if claimed > held:
        raise InputError(
            f"{path}: is truncated or damaged: a tensor claims {claimed} numbers, the file holds {held} "
            f"bytes; fetch it again"
        )


def _claimed(file: IO[bytes]) -> int:
    """Return the most numbers that a storage of the next pickle has: the last integer before each persistent
    id.

    Nothing is run.
    """
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
