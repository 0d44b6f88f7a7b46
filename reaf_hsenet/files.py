"""Files that are whole or absent: atomic writes, errors that name the file, a lock so that one run at a
time writes into a folder, and folders of the Hugging Face hub.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from reaf_hsenet.errors import InputError, OutputError, one_line


@contextmanager
def named(path: Path, problem: str = "is truncated or damaged", advice: str = "") -> Iterator[None]:
    """Turn whatever a reader of `path` raises inside the block into an InputError that names the file.

    The message is `PATH: problem (the reader's words); advice`. A damaged file makes numpy, torch, nibabel
    and others raise nearly any exception. A pipe, which could block for ever, is not opened.
    """
    path, then = Path(path), advice and f"; {advice}"
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            held = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
            raise InputError(f"{path}: is {held}, expected a file{then}")
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{then.replace('delete it and ', '')}") from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}){then}") from error
    except InputError:
        raise
    except Exception as error:
        # torch's signal handler raises this one in the midst of anything.
        if str(error).startswith("DataLoader worker (pid"):
            raise
        raise InputError(f"{path}: {problem} ({one_line(error)}){then}") from error


def is_text(value: str) -> bool:
    """Return whether a string has neither bytes that are not UTF-8 nor a JSON's half of a character."""
    return not re.search("[\ud800-\udfff]", value)


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` that replaces it when the block ends well, and is removed
    otherwise.

    Raises OutputError, naming the file, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")  # a long name has room for no more
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file name that is no UTF-8 is written with its bytes escaped.
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}): free space or choose another folder; "
            "what was complete before is kept"
        ) from error
    finally:
        with suppress(OSError):  # `path` is below a file, and nothing was written
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, allow_nan=False)


def read_json(path: Path):
    """Return the file's JSON. Raises InputError when it is absent or not JSON."""
    with named(path, "is not valid JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_object(path: Path) -> dict:
    """Return a file's JSON object. Raises InputError for another kind."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object of settings, found {type(values).__name__}")
    return values


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted files below `folder` that match, without hidden ones such as ._NAME of macOS."""
    found = Path(folder).glob(pattern)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes. A process reads an unchanged file once."""
    found = Path(path).stat()
    return _sha256(str(Path(path).absolute()), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: str, *unchanged: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: Path, blocks: int = 64, block: int = 4096) -> str:
    """Return a hash of a safetensors file's size, its header and blocks spread over it.

    Little of a large file is read. Another training's weights differ in every block; a change between blocks
    is not seen.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, size)))
        for i in range(blocks):
            file.seek(i * max(0, size - block) // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock ends with the process, however it ends.

    Raises InputError when another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # held open as long as the lock
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as a folder to write into ({error.strerror})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not held by forked processes
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{folder}: {holder} is writing into it; wait for it or choose another folder"
            ) from error
        os.ftruncate(file.fileno(), 0)
        with suppress(OSError):  # a full disk: then the holder has no name
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file or folder can be ORGANISATION/NAME[@REVISION] of the Hugging Face hub.

    A path is not: what begins with a folder that is here, or with `runs`.
    """
    first = name.partition("/")[0]
    there = first.startswith(".") or first.lower() == "runs" or Path(first).is_dir()
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name)) and not there


def find_folder(name: str, patterns: list[str]) -> Path:
    """Return a local folder, or the folder of a hub id ORGANISATION/NAME[@REVISION], fetched."""
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise InputError(
            f"{name}: no such folder or file; expected one, or a hub id such as google-bert/bert-base-uncased"
        )
    repository, _, revision = name.partition("@")
    from huggingface_hub import snapshot_download  # slow to import, and needed for a hub id only

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these kinds
        raise InputError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}); fetch "
            f"{', '.join(patterns)} by hand from huggingface.co/{repository}/tree/{revision or 'main'} and "
            f"name their folder"
        ) from error
