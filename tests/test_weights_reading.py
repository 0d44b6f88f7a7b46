"""Weights files are read as tensors and nothing else; one that would do more, or take more, is refused in
one line.
"""

import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder
from reaf_hsenet.weights.files import read_checkpoint, read_weights, read_weights_file
from reaf_hsenet.weights.names import BERT, import_state, places
from reaf_hsenet.weights.shapes import flat_reaf, initial_state

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def line(read, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
@pytest.mark.parametrize("nesting", [None, "model", "state_dict"])
def test_every_ending_and_nesting_gives_the_same_tensors(tmp_path, name, nesting):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(TENSORS, path)
    else:
        torch.save({nesting: OrderedDict(TENSORS), "epoch": 3, "name": "run"} if nesting else TENSORS, path)
    for found in (read_weights_file(path), read_checkpoint(str(path)), read_checkpoint(str(tmp_path))):
        assert list(found) == sorted(found, key=list(found).index) and all(
            torch.equal(found[n], t) for n, t in TENSORS.items()
        )


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(tmp_path):
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "one.safetensors")
    save_file({"a.bias": TENSORS["a.bias"]}, tmp_path / "two.safetensors")
    places = {"a.weight": "one.safetensors", "a.bias": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert set(read_weights(tmp_path)) == set(TENSORS)
    index.write_text(json.dumps({"weight_map": {**places, "b": "two.safetensors"}}))
    assert "places b in two.safetensors, which does not have it" in line(read_weights, tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors: this shard is missing" in line(read_weights, tmp_path)


def test_a_folder_with_several_files_asks_for_one(tmp_path):
    for name in ("a.pt", "b.pth"):
        torch.save(TENSORS, tmp_path / name)
    assert "holds a.pt, b.pth; name one of these files" in line(read_weights, tmp_path)
    below = tmp_path / "hub"
    for name in ("reports", "answers"):
        (below / name).mkdir(parents=True)
        torch.save(TENSORS, below / name / "packers.bin")
        found = read_weights(below) if name == "reports" else line(read_weights, below)  # one, then two
    assert "holds answers/packers.bin, reports/packers.bin; name one" in found


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_asks_for_more_than_tensors_is_refused_with_what_it_asks_for(tmp_path):
    for name, old in (("new.pt", True), ("old.pt", False)):
        torch.save({"a": Trap(str(tmp_path / "ran"))}, tmp_path / name, _use_new_zipfile_serialization=old)
        assert "holds more than tensors (io.open), which is not loaded" in line(
            read_weights_file, tmp_path / name
        )
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": Trap(str(tmp_path / "ran"))}, protocol=2))
    assert "bare.pt: " in line(read_weights_file, tmp_path / "bare.pt")
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch
):
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert read_weights_file(tmp_path / "plain.pt")["a"].shape == (4_000_000,)
    monkeypatch.setattr(torch, "load", None)  # is not reached
    assert "bomb.pt: unpacks to 1600" in line(read_weights_file, tmp_path / "bomb.pt")


@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_that_claims_more_numbers_than_the_file_holds_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch, new
):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt", _use_new_zipfile_serialization=new)
    few, many = b"M" + (1000).to_bytes(2, "little"), b"J" + (2**31 - 1).to_bytes(4, "little")
    if new:
        with (
            zipfile.ZipFile(tmp_path / "plain.pt") as plain,
            zipfile.ZipFile(tmp_path / "liar.pt", "w") as liar,
        ):
            for name in plain.namelist():
                liar.writestr(name, plain.read(name).replace(few, many))
    else:
        (tmp_path / "liar.pt").write_bytes((tmp_path / "plain.pt").read_bytes().replace(few, many))
    monkeypatch.setattr(torch, "load", None)
    assert "liar.pt: is truncated or damaged: a tensor claims 2147483647 numbers" in line(
        read_weights_file, tmp_path / "liar.pt"
    )


def test_a_view_that_repeats_a_few_bytes_is_no_weight(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    assert "a claims 4000000000000 bytes and holds 4" in line(read_weights_file, tmp_path / "wide.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    state = {"a": torch.rand(50, 50), "b": torch.rand(7)}
    save_file(state, whole) if suffix == "safetensors" else torch.save(state, whole)
    content = whole.read_bytes()
    for size in (0, 1, 7, 100, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / f"cut.{suffix}").write_bytes(content[:size])
        assert "truncated" in line(read_weights_file, tmp_path / f"cut.{suffix}"), size


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    for value in (float("nan"), float("inf")):
        torch.save({**TENSORS, "a.bias": torch.tensor([0.0, value])}, tmp_path / "x.pt")
        assert "x.pt: NaN or infinite values in a.bias" in line(read_checkpoint, str(tmp_path / "x.pt"))
        assert "NaN or infinite values in a.bias" in line(read_weights, tmp_path)


def test_tensors_that_cannot_be_joined_or_laid_out_are_named_not_crashed_on():
    names = [f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key", "value")]
    uneven = dict(zip(names, (torch.ones(3, 4), torch.ones(5, 4), torch.ones(4, 4)), strict=True))
    assert "have the shapes [(3, 4), (4, 4), (5, 4)]; expected one shape" in line(import_state, BERT, uneven)
    assert "has two tensors for " in line(
        import_state, BERT, {"embeddings.x": torch.ones(1), "bert.embeddings.x": torch.ones(1)}
    )
    assert "patch_embed.proj.weight is (3,)" in line(
        flat_reaf, {"vision.patch_embed.proj.weight": torch.ones(3)}, (1, 1, 1)
    )
    assert "spatial_posemb is (1, 8, 3)" in line(
        flat_reaf, {"vision.pos_embed": torch.ones(1, 8, 3)}, (2, 2, 2)
    )
    ragged = {
        "pos_embed": torch.ones(1, 12, 6),
        "cls_token": torch.ones(1, 1, 6),
        "patch_embed.proj.weight": torch.ones(6, 3, 4, 4),
    }
    assert "pos_embed is (1, 12, 6); expected 1, rows of a square" in line(
        initial_state, ragged, "x", "reaf", (1, 4, 4), (2, 2, 2)
    )


def test_what_one_of_our_tensors_is_made_of_is_read_off_the_table():
    names = [f"bert.encoder.layer.3.attention.self.{part}.bias" for part in ("value", "query", "key")] + [
        "bert.pooler.dense.bias"
    ]
    assert places(BERT, names) == {"blocks.3.attn.qkv.bias": [names[1], names[2], names[0]]}
    with pytest.raises(InputError, match="has 2 of 3 parts of blocks.3.attn.qkv.bias"):
        places(BERT, names[:2])


def test_a_hub_id_is_downloaded_at_its_revision_and_offline_the_line_says_what_to_fetch(
    tmp_path, monkeypatch
):
    asked = []
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *names, **flags: asked.append((names, flags)) or str(tmp_path),
    )
    assert set(read_checkpoint("someone/model@a1b2c3")) == set(TENSORS)
    assert asked[0][0] == ("someone/model",) and asked[0][1]["revision"] == "a1b2c3"

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = line(find_folder, "someone/model@a1b2c3", ["config.json", "vocab.txt"])
    assert (
        "fetch config.json, vocab.txt by hand from huggingface.co/someone/model/tree/a1b2c3 and name their "
        "folder" in message
    )
