"""Files that are not what their names say: one line with the name, never a traceback, never memory for
what is not there.
"""

import csv
import json
import os
import pickle
import struct
import zipfile
import zlib
from tokenize import TokenError

import numpy as np
import pytest
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from safetensors import SafetensorError

from conftest import error_line, script
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.each_volume import Journal, read_refused
from reaf_hsenet.data.loader import _load
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.prepare import Options, differs, prepare
from reaf_hsenet.data.reading import load_tensor, read_input
from reaf_hsenet.data.sources.nifti import read_nifti_folder
from reaf_hsenet.data.workers import batches
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.search_index import SearchIndex
from reaf_hsenet.files import named, read_json
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece
from reaf_hsenet.weights.files import read_weights_file
from scans import image, table

TINY = Options(RECIPES["reaf"].__class__(**{**vars(RECIPES["reaf"]), "size": (4, 8, 8)}))


def zip_bomb(path):
    torch.save(torch.zeros(64, 64, 64), path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data + bytes(2**26) if name.endswith("data/0") else data)


def negative(path):
    """A view whose numbers are read with their signs turned."""
    torch.save(torch.full((4, 4, 4), 2j).conj().imag, path)


VOLUMES = {
    "zip bomb": (zip_bomb, "unpacks to .* bytes from .*, which no checkpoint does"),
    "meta": (
        lambda p: torch.save(torch.empty(4, 4, 4, device="meta"), p),
        "sparse, quantised, nested or empty|truncated",
    ),
    "nested": (
        lambda p: torch.save(torch.nested.nested_tensor([torch.ones(2, 2)] * 2), p),
        "sparse, quantised, nested|truncated|more than",
    ),
    "sparse": (lambda p: torch.save(torch.eye(4).to_sparse(), p), "sparse, quantised, nested or empty"),
    "stretched": (
        lambda p: torch.save(torch.zeros(1).expand(10**6, 10**6, 10), p),
        "claims .* bytes and holds 4",
    ),
    "text": (lambda p: p.write_text("text"), "is truncated or damaged"),
    "nothing": (lambda p: p.write_bytes(b""), "is truncated or damaged"),
    "list": (lambda p: torch.save([1, 2], p), "holds a list; expected one tensor"),
    "folder": (lambda p: p.mkdir(), "is a folder, expected a file"),
    "pipe": (os.mkfifo, "is a pipe or a device, expected a file"),
}


@pytest.mark.parametrize(("make", "words"), VOLUMES.values(), ids=VOLUMES)
def test_a_tensor_file_that_holds_no_plain_tensor_is_refused(tmp_path, make, words):
    make(tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"x.pt: .*({words})") as caught:
        load_tensor(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_tensor_with_the_negative_bit_is_read_with_its_signs(tmp_path):
    negative(tmp_path / "x.pt")
    assert torch.equal(load_tensor(tmp_path / "x.pt"), torch.full((4, 4, 4), -2.0))


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


HEADERS = {
    "not closed": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2",
    "no dictionary": b"[1, 2]\n",
    "a number": b"3\n",
    "unhashable": b"{[]: 1}\n",
    "deep": b"(" * 5000 + b"\n",
    "keys of two kinds": b"{1: 2, 'a': 3}\n",
    "no descr": b"{'fortran_order': False, 'shape': (2,)}\n",
    "odd descr": b"{'descr': [('a', '<f4', -1)], 'fortran_order': False, 'shape': (2,)}\n",
    "descr of nothing": b"{'descr': '', 'fortran_order': False, 'shape': (2,)}\n",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3)}\n",
    "huge": b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,)}\n",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}\n",
    "NUL": b"{'descr': '<f4\0', 'fortran_order': False, 'shape': (2,)}\n",
    "bytes": b"\xff\xfe\0\n",
    "nothing": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_npy_header_of_any_damage_is_one_line(tmp_path, header):
    (tmp_path / "x.npy").write_bytes(npy(header) + bytes(16))
    with pytest.raises(InputError, match=r"x\.npy: (cannot be read|holds)"):
        _load(tmp_path / "x.npy", "run preprocess.py again")


# What numpy, torch, safetensors, csv, json, zlib and nibabel raise for files that are damaged.
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError),
    *(RuntimeError, MemoryError, SyntaxError, TokenError, struct.error, zlib.error, csv.Error),
    *(zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError, HeaderDataError, RecursionError),
    *(UnicodeDecodeError, ImageFileError, WrapStructError),
)


@pytest.mark.parametrize("error", DAMAGED, ids=lambda kind: kind.__name__)
def test_whatever_a_reader_raises_names_the_file(tmp_path, error):
    (tmp_path / "x").write_text("")
    made = error("utf-8", b"", 0, 1, "two\nlines") if error is UnicodeDecodeError else error("two\nlines")
    with (
        pytest.raises(InputError, match=r"x: is damaged \(.*\); fetch it again") as caught,
        named(tmp_path / "x", "is damaged", "fetch it again"),
    ):
        raise made
    assert "\n" not in str(caught.value)


def test_a_readers_own_error_line_passes_unchanged(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="^ours$"), named(tmp_path / "x"):
        raise InputError("ours")
    for name, words in (("none", "no such file"), ("", "is a folder")):
        with pytest.raises(InputError, match=words), named(tmp_path / name):
            raise AssertionError("not reached")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[" * 100_000, b'{"a": NaN', b""])
def test_json_of_any_damage_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match="x.json: is not valid JSON"):
        read_json(tmp_path / "x.json")


def scans(folder, names="ab"):
    for name in names:
        (folder / f"{name}.nii").write_bytes(image().to_bytes())
    return read_nifti_folder(
        folder, table(folder / "r.csv", "id,text,split", *(f"{n},Text {n}.,train" for n in names))
    )


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe half\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"id": 3}\n',
        b'{"stamp": "x"}\n',
        b'{"id": "a"}\n',
        b'{"id": "a", "source": {}}\n',
        b'{"id": "a", "source": {"sha256": NaN}}\n',
        b"{" * 10_000 + b"\n",
    ],
)
def test_a_damaged_line_of_a_journal_costs_only_that_volume(tmp_path, damage):
    (tmp_path / "in").mkdir()
    source, out = scans(tmp_path / "in"), tmp_path / "out"
    prepare(source, out, TINY, progress=False)
    head, first, second = (out / "progress.jsonl").read_bytes().splitlines(keepends=True)
    (out / "progress.jsonl").write_bytes(head + damage + second)
    before = {n: (out / f"volumes/{n}.npy").stat().st_mtime_ns for n in "ab"}
    manifest, refused = prepare(source, out, TINY, progress=False)
    kept = json.loads(second)["id"]
    assert refused == [] and len(manifest.splits["train"]) == 2
    assert {n for n in "ab" if (out / f"volumes/{n}.npy").stat().st_mtime_ns == before[n]} == {kept}


@pytest.mark.parametrize("head", [b"\xff\n", b"[]\n", b"nonsense\n"])
def test_a_journal_whose_first_line_is_damaged_is_named(tmp_path, head):
    (tmp_path / "in").mkdir()
    source, out = scans(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "progress.jsonl").write_bytes(head)
    with pytest.raises(
        InputError,
        match="progress.jsonl: its first line is damaged, which says how volumes prepared were made",
    ):
        prepare(source, out, TINY, progress=False)


def test_a_journal_of_another_setting_is_refused_whether_it_has_or_lacks_it(tmp_path):
    Journal(tmp_path / "j", {"a": 1, "b": 2}, "volumes").read(lambda record: True)
    for head, words in (
        ({"a": 1}, "another b"),
        ({"a": 1, "b": 2, "c": 3}, "another c"),
        ({"a": 5, "b": 2}, "another a"),
    ):
        with pytest.raises(InputError, match=words):
            Journal(tmp_path / "j", head, "volumes").read(lambda record: True)
    assert Journal(tmp_path / "j", {"a": 1}, "volumes", ignored=("b",)).read(lambda record: True) == {}


def test_a_damaged_refused_csv_is_named(tmp_path):
    (tmp_path / "refused.csv").write_bytes(b"file,reason\na,\xff\n")
    with pytest.raises(InputError, match="refused.csv: is not a UTF-8 csv file"):
        read_refused(tmp_path)


def test_a_file_of_weights_is_read_by_the_same_rules(tmp_path):
    zip_bomb(tmp_path / "x.pt")
    with pytest.raises(InputError, match="unpacks to"):
        read_weights_file(tmp_path / "x.pt")
    torch.save({"a": torch.empty(2, device="meta")}, tmp_path / "y.pt")
    with pytest.raises(
        InputError, match="y.pt: (a is a sparse, quantised, nested or empty tensor|is truncated)"
    ):
        read_weights_file(tmp_path / "y.pt")


def test_voxels_beyond_float32_are_refused_in_every_kind_of_file(tmp_path):
    voxels = np.linspace(-1000, 500, 512).reshape(8, 8, 8)
    voxels[0, 0, 0] = 1e300
    torch.save(torch.from_numpy(voxels), tmp_path / "x.pt")
    with pytest.raises(InputError, match="1 voxels are NaN or infinite, or beyond float32"):
        read_input(tmp_path / "x.pt", TINY.recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"latin-\xe9"), "bell\x07"])
def test_odd_names_of_folders_end_in_one_line(tmp_path, name):
    ended = script(
        "preprocess.py", "--dataset", "nifti", "--root", tmp_path / name, "--out", tmp_path / "out"
    )
    assert "no such folder" in error_line(ended)


def test_a_folder_whose_name_is_not_utf8_is_prepared(tmp_path):
    folder = tmp_path / os.fsdecode(b"latin-\xe9")
    folder.mkdir()
    scans(folder)
    flags = ("--root", folder, "--out", folder / "out", *"--dataset nifti --size 4 8 8".split())
    ended = script("preprocess.py", *flags)
    assert ended.returncode == 0, ended.stderr
    assert len(load_manifest(folder / "out").splits["train"]) == 2


def test_a_file_with_the_longest_name_is_prepared(tmp_path):
    (tmp_path / "in").mkdir()
    manifest, refused = prepare(scans(tmp_path / "in", ["x" * 248]), tmp_path / "out", TINY, progress=False)
    assert refused == [] and len(manifest.splits["train"]) == 1


def test_slices_are_added_to_a_folder_whose_spacing_was_recorded_in_another_order():
    source = {"file": "a.nii", "spacing": [10.0, 8.0, 7.0], "shape": [4, 4, 4]}
    found = {"spacing": [7.0, 8.0, 10.0], "shape": [4, 4, 4]}
    assert differs(source, found) == [] and differs(source, {**found, "spacing": [7.0, 8.0, 9.0]}) == [
        "spacing"
    ]


@pytest.mark.parametrize(
    "held",
    [5, [], {"sha256": None, "shape": [], "rescale": ""}, {"sha256": "0", "shape": "x", "rescale": {}}],
)
def test_a_record_whose_source_is_damaged_is_prepared_again(tmp_path, held):
    (tmp_path / "in").mkdir()
    source, out = scans(tmp_path / "in"), tmp_path / "out"
    whole, _ = prepare(source, out, TINY, progress=False)
    head, first, second = map(json.loads, (out / "progress.jsonl").read_text().splitlines())
    lines = [head, {**first, "source": held}, second]
    (out / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, _ = prepare(source, out, TINY, progress=False)
    assert again.splits == whole.splits


def test_the_death_of_a_loader_process_is_not_blamed_on_the_file_that_is_read(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(RuntimeError, match="^DataLoader worker"), named(tmp_path / "x"):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, FileNotFoundError])
def test_a_batch_that_was_cut_off_is_one_line(error):
    class Loader:
        num_workers = 1

        def __iter__(self):
            raise error
            yield

    with pytest.raises(
        InputError, match=f"loader worker died .{error.__name__}.; start with fewer --workers"
    ):
        next(batches(Loader(), torch.device("cpu")))


def test_text_that_is_no_utf8_is_one_line(tmp_path):
    with pytest.raises(InputError, match="holds bytes that are no UTF-8 text"):
        train_wordpiece(["a b"], 20).encode(os.fsdecode(b"a \xff"))
    with pytest.raises(InputError, match="one line of UTF-8 text; rename the file"):
        SearchIndex(torch.ones(1, 2), [os.fsdecode(b"caf\xe9.nii")], "0").write(tmp_path / "index")
