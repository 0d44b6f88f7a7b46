"""Published BERT folders load under every layout they come in, and wrong ones are refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fill
import train
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.runs.trained import locate_run
from reaf_hsenet.weights.files import load_strictly, read_checkpoint, read_weights
from reaf_hsenet.weights.names import BERT, import_state
from reaf_hsenet.weights.shapes import bert_config
from tiny import tiny

GOLDEN = Path(__file__).parent / "golden"
CASE = json.loads((GOLDEN / "bert_tiny.json").read_text())
STORED = load_file(GOLDEN / "bert_tiny.safetensors")
PUBLISHED = {n: torch.from_numpy(fill.fill(n, s, CASE["seed"])) for n, s in CASE["weights"].items()}
MASKED_LM_HEADS = {
    "cls.predictions.bias": torch.zeros(200),
    "cls.predictions.decoder.weight": torch.zeros(200, 64),
    "cls_projection_head.dense_to_hidden.weight": torch.zeros(8, 64),
}


def old_names(state):
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }


LAYOUTS = {
    "BertModel": (PUBLISHED, "model.safetensors"),
    "BertForMaskedLM (BiomedBERT)": (
        {f"bert.{n}": t for n, t in PUBLISHED.items() if "pooler" not in n} | MASKED_LM_HEADS,
        "pytorch_model.bin",
    ),
    "CXR-BERT": (
        {f"bert.{n}": t for n, t in PUBLISHED.items() if "pooler" not in n}
        | MASKED_LM_HEADS
        | {"bert.embeddings.position_ids": torch.arange(64)[None]},
        "model.safetensors",
    ),
    "oldest bert-base-uncased": (
        old_names({f"bert.{n}": t for n, t in PUBLISHED.items()}),
        "pytorch_model.bin",
    ),
}


def write_folder(folder: Path, state, file: str, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CASE["config"], **config}))
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / file)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_gives_the_golden_hidden_states(tmp_path, layout):
    folder = write_folder(tmp_path / "bert", *LAYOUTS[layout])
    model = TextEncoder(**vars(bert_config(folder))).eval()
    load_strictly(model, import_state(BERT, read_weights(folder)), str(folder))
    with torch.no_grad():
        hidden = model(STORED["input.ids"], STORED["input.mask"], STORED["input.token_type_ids"])
    assert (hidden - STORED["last_hidden_state"]).abs().max() < 1e-5


def test_training_starts_from_a_bert_folder(prepared, tmp_path, capsys):
    folder = write_folder(tmp_path / "bert", *LAYOUTS["CXR-BERT"], vocab_size=400)
    grown = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    grown[name] = torch.cat([grown[name], grown[name]])
    save_file(grown, folder / "model.safetensors")
    shutil.copy(GOLDEN / "tokenizers/wordpiece/vocab.txt", folder)
    out = tmp_path / "run"
    flags = tiny(prepared, out, "--max-steps", 1, "--text-model", folder)
    assert train.main(flags) == 0
    config = json.loads((out / "config.json").read_text())["model"]
    assert config["text"]["width"] == 64 and config["text"]["vocab"] == 400 and config["max_text"] == 64
    assert (out / "vocab.txt").read_text() == (folder / "vocab.txt").read_text()
    # The first step's learning rate is 0: the weights are still those of the folder.
    step = (out / "checkpoints/last").read_text().strip()
    trained = load_file(out / "checkpoints" / step / "model.safetensors")
    assert torch.equal(trained["text.word_embed.weight"], grown[name])


def test_a_folder_that_does_not_fit_lists_tensors_by_name(tmp_path):
    state = {n: t for n, t in PUBLISHED.items() if n != "encoder.layer.1.output.dense.bias"}
    state["embeddings.LayerNorm.weight"] = torch.ones(63)
    state["adapter.weight"] = torch.ones(1)
    folder = write_folder(tmp_path / "bert", state, "model.safetensors")
    model = TextEncoder(**vars(bert_config(folder)))
    with pytest.raises(InputError) as caught:
        load_strictly(model, import_state(BERT, read_weights(folder)), "the folder")
    for words in (
        "blocks.1.mlp.fc2.bias is missing",
        "adapter.weight is not known",
        r"norm.weight is (63,), expected (64,)",
    ):
        assert words in str(caught.value)


def test_pickles_are_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "bert").mkdir()
    torch.save({"weight": Trap()}, tmp_path / "bert/pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: holds more than tensors"):
        read_weights(tmp_path / "bert")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_a_config_that_this_encoder_does_not_compute_is_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        bert_config(write_folder(tmp_path / "bert", PUBLISHED, "model.safetensors", **change))


def test_damaged_or_absent_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "bert", PUBLISHED, "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="truncated or not a checkpoint"):
        read_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has none of model.safetensors"):
        read_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        read_weights(folder)


def test_a_bin_file_of_anything_else_is_one_line(tmp_path):
    legacy = tmp_path / "whole.bin"
    torch.save({"a": torch.zeros(100, 100)}, legacy, _use_new_zipfile_serialization=False)
    (tmp_path / "text.bin").write_text("hello, this is text\n" * 20)
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.bin")
    wrong = {
        "text.bin": "truncated or not a checkpoint",
        "numbers.bin": "is not a dictionary of tensors by name",
    }
    for size in (50, 200, 300, 1000):
        (tmp_path / f"{size}.bin").write_bytes(legacy.read_bytes()[:size])
        wrong[f"{size}.bin"] = "truncated"
    for name, words in wrong.items():
        with pytest.raises(InputError, match=f"{name}: .*{words}") as caught:
            read_checkpoint(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_only_a_hub_id_is_looked_for_on_the_hub():
    with pytest.raises(InputError, match="no such folder or file; expected one, or a hub id"):
        find_folder("bert-base", ["config.json"])
    with pytest.raises(InputError, match="the hub does not give it.*fetch config.json by hand"):
        find_folder("someone/bert@main", ["config.json"])


@pytest.mark.parametrize(
    "name", ["runs/typo", "Runs/typo", "data/typo", "./x/y", "../y", "/x/y", "x", "x/y/z", "typo.bin"]
)
def test_a_path_that_is_not_there_is_asked_of_nobody(tmp_path, monkeypatch, name):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **options: pytest.fail(f"{name} was asked of the hub")
    )
    with pytest.raises(InputError, match=f"^{re.escape(name)}: no such folder or file"):
        read_checkpoint(name)
    assert locate_run(name) == Path(name)
