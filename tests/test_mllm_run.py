"""Runs of the language stages, read again."""

from functools import lru_cache

import numpy as np
import pytest
import torch

from language_run import write_language_run
from reaf_hsenet import files
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, fingerprint
from reaf_hsenet.models.build import trained_state
from reaf_hsenet.models.packed import PackedLinear
from reaf_hsenet.runs.trained import load_trained


def test_a_run_is_rebuilt_from_its_folder(prepared, tmp_path):
    folder = write_language_run(tmp_path / "run", prepared)
    run, again = load_trained(folder), load_trained(folder)
    assert (run.stage, run.config.vision, run.guided, run.data) == ("mrg", "stage1", False, prepared)
    assert not run.model.training and run.model.visual_tokens == 8
    for name, tensor in trained_state(run.model).items():
        assert torch.equal(tensor, trained_state(again.model)[name])
    assert (
        run.tokenizer.decode(run.tokenizer.encode("No pleural effusion.", special_tokens=False))
        == "No pleural effusion."
    )


def test_a_processors_decoder_is_packed_for_its_kernels(prepared, tmp_path):
    run = load_trained(write_language_run(tmp_path / "run", prepared))
    run.place(torch.device("cpu"))
    packed = sum(isinstance(layer, PackedLinear) for layer in run.model.decoder.modules())
    assert packed == 4 * len(run.model.decoder.layers) + 1 and not run.compiled
    with pytest.raises(InputError, match="--compile: is for a GPU"):
        run.place(torch.device("cpu"), compiled=True)


def test_a_fingerprint_tells_files_apart_by_any_block_and_reads_little(tmp_path):
    data = bytearray(
        (8000).to_bytes(8, "little") + np.random.default_rng(0).bytes(1 << 22)
    )  # a header of 8,000 bytes
    (tmp_path / "a").write_bytes(data)
    known = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "a") == known
    for place in (0, 100, 7900, len(data) - 1):
        (tmp_path / "b").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fingerprint(tmp_path / "b") != known
    (tmp_path / "b").write_bytes(data[:-1])
    assert fingerprint(tmp_path / "b") != known


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(files, "_sha256", lru_cache(lambda *key: hashed.append(key) or str(len(hashed))))
    (tmp_path / "a").write_text("one")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "a") and len(hashed) == 1
    (tmp_path / "a").write_text("three")
    assert file_sha256(tmp_path / "a") == "2"
