"""Decoder folders: written and read back bit for bit, in every published layout; what does not fit is
refused by name.
"""

import copy
import json
import random
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity_case import Case
from parity_decoder import build, load_decoder_state
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import LARGEST, DecoderConfig
from reaf_hsenet.models.int8 import Int8Linear, quantise, quantise_decoder
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.packed import pack
from reaf_hsenet.weights import decoder as pretrained_decoder
from reaf_hsenet.weights.decoder import (
    INDEX,
    SINGLE,
    decoder_state,
    load_decoder,
    resize_vocabulary,
    save_decoder,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("phi3_mini_tiny", "phi4mini_tiny", "phi4_14b_tiny", "llama2_tiny", "llama3_tiny")
CASES = {name: Case(GOLDEN / f"{name}.json", GOLDEN) for name in NAMES}
PHI4 = CASES["phi4mini_tiny"]["config"]
IDS = torch.tensor([[1, 5, 9, 200, 7, 30, 4, 18, 2, 77]])
QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"
SHARD = 60_000  # bytes: every tiny decoder takes several


def logits(decoder):
    with torch.no_grad():
        return decoder(IDS)


def equal_states(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def folder_of(path: Path, name="phi3_mini_tiny", shard_bytes=10**9, **config) -> Path:
    """A decoder's folder, with changes to its config.json (None takes the key away)."""
    save_decoder(build(CASES[name]), path, shard_bytes=shard_bytes)
    change_config(path, **config)
    return path


def change_config(folder: Path, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def change_weights(folder: Path, change, file=SINGLE) -> Path:
    """change: given the tensors of a file, which it alters."""
    state = load_file(folder / file)
    change(state)
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / file)
    return folder


def refusal(folder, **settings) -> str:
    with pytest.raises(InputError) as error:
        load_decoder(str(folder), **settings)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700, line
    return line


# Round trips


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_saved_decoder_loads_bit_for_bit_from_one_file_and_from_shards(tmp_path, name, dtype):
    decoder = build(CASES[name]).to(dtype)
    save_decoder(decoder, tmp_path / "one")
    save_decoder(decoder, tmp_path / "shards", shard_bytes=SHARD)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for form in ("one", "shards"):
        loaded = load_decoder(str(tmp_path / form))
        assert loaded.config == decoder.config and not loaded.training
        assert equal_states(loaded.state_dict(), decoder.state_dict())
        assert torch.equal(logits(loaded), logits(decoder)) and logits(loaded).dtype == dtype


def test_a_shard_is_at_most_as_large_as_asked_or_one_tensor(tmp_path):
    folder = folder_of(tmp_path, shard_bytes=SHARD)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SHARD
    total = sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == total


def test_files_keep_their_type_and_dtype_converts(tmp_path):
    decoder = build(CASES["llama3_tiny"])
    save_decoder(decoder, tmp_path, dtype=torch.bfloat16)
    rounded = {n: t.bfloat16() for n, t in decoder.state_dict().items()}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert equal_states(load_decoder(str(tmp_path)).state_dict(), rounded)
    wide = load_decoder(str(tmp_path), dtype=torch.float32).state_dict()
    assert equal_states(wide, {n: t.float() for n, t in rounded.items()})


def test_llama_has_separate_projections_on_disk_and_fused_ones_load_too(tmp_path):
    decoder, folder = build(CASES["llama3_tiny"]), folder_of(tmp_path / "published", "llama3_tiny")
    stored = load_file(folder / SINGLE)
    assert {n: list(t.shape) for n, t in stored.items()} == CASES["llama3_tiny"]["weights"]
    rows = [stored[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(decoder.layers[0].self_attn.qkv_proj.weight, torch.cat(rows))
    save_file(
        {n if n.startswith("lm_head") else f"model.{n}": t for n, t in decoder.state_dict().items()},
        folder / SINGLE,
    )
    assert equal_states(load_decoder(str(folder)).state_dict(), decoder.state_dict())


def test_a_phi_folder_with_separate_projections_loads(tmp_path):
    decoder, folder = build(CASES["phi3_mini_tiny"]), folder_of(tmp_path)

    def separate(state):
        for name in [n for n in state if "qkv_proj" in n or "gate_up_proj" in n]:
            parts = ("q_proj", "k_proj", "v_proj") if "qkv" in name else ("gate_proj", "up_proj")
            fused = "qkv_proj" if "qkv" in name else "gate_up_proj"
            for part, rows in zip(parts, state.pop(name).chunk(len(parts)), strict=True):
                state[name.replace(fused, part)] = rows

    change_weights(folder, separate)
    assert equal_states(load_decoder(str(folder)).state_dict(), decoder.state_dict())


def test_a_tied_decoder_has_no_head_in_its_file_and_takes_one_that_equals_the_embedding(tmp_path):
    folder = folder_of(tmp_path, "phi4mini_tiny")
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    change_weights(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert equal_states(load_decoder(str(folder)).state_dict(), build(CASES["phi4mini_tiny"]).state_dict())
    for head in (lambda e: e + 1, lambda e: e[:-1], lambda e: e.half(), lambda e: e.to(torch.int8)):
        change_weights(
            folder, lambda s, head=head: s.update({"lm_head.weight": head(s["model.embed_tokens.weight"])})
        )
        line = refusal(folder)
        assert str(folder) in line and "lm_head.weight is another matrix" in line


def test_old_rotary_frequencies_in_a_file_are_ignored(tmp_path):
    folder = folder_of(tmp_path, "llama2_tiny")
    change_weights(
        folder,
        lambda s: s.update(
            {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
        ),
    )
    assert equal_states(load_decoder(str(folder)).state_dict(), build(CASES["llama2_tiny"]).state_dict())


def test_saving_one_file_over_shards_and_shards_over_one_file_leaves_the_newer_weights(tmp_path):
    decoder = build(CASES["phi3_mini_tiny"])
    for shard_bytes in (SHARD, 10**9, SHARD):
        with torch.no_grad():
            decoder.norm.weight += 1
        save_decoder(decoder, tmp_path, shard_bytes=shard_bytes)
        assert torch.equal(load_decoder(str(tmp_path)).norm.weight, decoder.norm.weight)


def test_an_interrupted_save_over_an_older_one_is_refused(tmp_path, monkeypatch):
    """At every file that it writes: what is there is of two saves, or incomplete."""
    decoder = build(CASES["phi3_mini_tiny"])
    save_decoder(decoder, tmp_path, shard_bytes=SHARD)
    files = len(list(tmp_path.iterdir()))

    def interrupted_at(count):
        def write(function):
            def counted(*args, **settings):
                nonlocal count
                count -= 1
                if count < 0:
                    raise KeyboardInterrupt
                return function(*args, **settings)

            return counted

        return {name: write(getattr(pretrained_decoder, name)) for name in ("save_file", "write_json")}

    for shard_bytes, written in ((SHARD, files), (10**9, 2)):
        for count in range(written):
            save_decoder(decoder, tmp_path, shard_bytes=SHARD)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                for name, function in interrupted_at(count).items():
                    patch.setattr(pretrained_decoder, name, function)
                save_decoder(decoder, tmp_path, shard_bytes=shard_bytes)
            assert "config.json: no such file" in refusal(tmp_path)


def test_shards_of_an_older_save_in_another_number_are_removed(tmp_path):
    decoder = build(CASES["phi3_mini_tiny"])
    for shard_bytes in (SHARD, 3 * SHARD, 10**9):
        save_decoder(decoder, tmp_path / "same", shard_bytes=shard_bytes)
        save_decoder(decoder, tmp_path / str(shard_bytes), shard_bytes=shard_bytes)
        assert {p.name for p in (tmp_path / "same").iterdir()} == {
            p.name for p in (tmp_path / str(shard_bytes)).iterdir()
        }


@pytest.mark.parametrize("name", ("phi3_mini_tiny", "phi4mini_tiny"))
def test_loading_in_int8_is_loading_and_quantising(tmp_path, name):
    folder = folder_of(tmp_path, name)
    loaded, expected = load_decoder(str(folder), int8=True), load_decoder(str(folder))
    quantise_decoder(expected)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [
        (n, type(m)) for n, m in expected.named_modules()
    ]
    assert equal_states(loaded.state_dict(), expected.state_dict()) and torch.equal(
        logits(loaded), logits(expected)
    )
    assert type(loaded.layers[0].mlp.down_proj) is Int8Linear
    assert type(loaded.lm_head) is (type(None) if loaded.config.tied else torch.nn.Linear)


def test_adapters_are_saved_in_the_matrices_they_adapt(tmp_path):
    decoder = build(CASES["phi3_mini_tiny"])
    add_lora(decoder, ("qkv_proj", "down_proj"), r=2, alpha=4)
    for name, parameter in decoder.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_decoder(decoder, tmp_path)
    loaded = load_decoder(str(tmp_path))
    assert not any("lora" in n for n in loaded.state_dict())
    assert (logits(loaded) - logits(decoder)).abs().max() < 1e-5
    assert (logits(loaded) - logits(build(CASES["phi3_mini_tiny"]))).abs().max() > 0.1


def test_an_int8_decoder_is_not_saved(tmp_path):
    decoder = load_decoder(str(folder_of(tmp_path / "a")), int8=True)
    with pytest.raises(InputError, match="int8 or packed"):
        save_decoder(decoder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out.*choose another folder"):
        save_decoder(build(CASES["phi3_mini_tiny"]), tmp_path / "file" / "out")


@pytest.mark.parametrize("dtype", ("bfloat16", torch.int8, torch.float64, torch.bool))
def test_a_type_that_no_decoder_has_is_refused_when_loading_and_when_saving(tmp_path, dtype):
    folder = folder_of(tmp_path / "in")
    named = f"dtype {dtype!r}: expected torch.float32, torch.float16, torch.bfloat16"
    assert refusal(folder, dtype=dtype) == named
    with pytest.raises(InputError) as error:
        save_decoder(load_decoder(str(folder)), tmp_path / "out", dtype=dtype)
    assert str(error.value) == named and not (tmp_path / "out").exists()


def test_a_decoder_of_doubles_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="dtype torch.float64: expected"):
        save_decoder(build(CASES["phi3_mini_tiny"]).double(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ("gpu", "cuda:x", "", "cuda:99", "hpu"))
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    assert refusal(folder_of(tmp_path), device=device).startswith(f"device {device}: expected cpu, or cuda")


def test_a_weights_file_is_refused_with_its_folder_and_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path / "decoder").parent)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert refusal(f"decoder/{SINGLE}").startswith(f"decoder/{SINGLE}: is a file; name its folder, decoder,")


def test_the_hub_is_asked_for_every_file_of_the_decoder_and_its_tokeniser(tmp_path, monkeypatch):
    folder, asked = folder_of(tmp_path), []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, allow_patterns, **__: asked.extend(allow_patterns) or folder,
    )
    load_decoder("microsoft/Phi-3-mini-4k-instruct")
    needed = [INDEX, SINGLE, "model-00001-of-00002.safetensors", "merges.txt", "tokenizer.model", "vocab.txt"]
    parts = ("config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab")
    needed += [f"{part}.json" for part in parts]
    assert [file for file in needed if not any(fnmatch(file, pattern) for pattern in asked)] == []
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in asked)


# config.json


# What transformers 4 writes of every model's settings beside the model's own (Config.to_dict()).
FALSE = (
    "output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_encoder_decoder "
    "is_decoder add_cross_attention tie_encoder_decoder do_sample early_stopping output_scores "
    "return_dict_in_generate remove_invalid_values"
)
NONE = (
    "cross_attention_hidden_size bad_words_ids forced_bos_token_id forced_eos_token_id prefix sep_token_id "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task tokenizer_class "
    "decoder_start_token_id task_specific_params problem_type"
)
DUMP = {
    **dict.fromkeys(FALSE.split(), False),
    **dict.fromkeys(NONE.split()),
    **dict.fromkeys("temperature top_p typical_p repetition_penalty length_penalty".split(), 1.0),
    **dict.fromkeys("num_beams num_beam_groups num_return_sequences".split(), 1),
    **dict.fromkeys("min_length no_repeat_ngram_size encoder_no_repeat_ngram_size".split(), 0),
    **{"return_dict": True, "pruned_heads": {}, "chunk_size_feed_forward": 0, "max_length": 20, "top_k": 50},
    **{"diversity_penalty": 0.0, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "added", (DUMP, {"unsloth_fixed": True, "unsloth_version": "2024.9"}), ids=("dump", "unsloth")
)
def test_settings_that_change_nothing_are_read_past(name, added):
    values = CASES[name]["config"]
    assert DecoderConfig.from_json({**added, **values}) == DecoderConfig.from_json(values)


@pytest.mark.parametrize(
    "key, value",
    (
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("num_beams", 4),
        ("repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [5]),
        ("forced_eos_token_id", 2),
        ("cross_attention_hidden_size", 96),
    ),
)
def test_the_same_settings_are_refused_where_they_would_change_something(key, value):
    with pytest.raises(InputError, match=f"{key}.* not implemented"):
        DecoderConfig.from_json({**DUMP, **PHI4, key: value})


def test_layer_types_may_say_full_attention_of_every_layer_only():
    values = {**CASES["llama3_tiny"]["config"], "num_hidden_layers": 3}
    assert DecoderConfig.from_json(
        {**values, "layer_types": ["full_attention"] * 3}
    ) == DecoderConfig.from_json(values)
    for kinds in (
        ["full_attention"] * 2,
        ["full_attention"] * 2 + ["sliding_attention"],
        [],
        {},
        "full_attention",
        3,
    ):
        with pytest.raises(
            InputError, match="layer_types .* is not implemented; expected full_attention of every layer"
        ):
            DecoderConfig.from_json({**values, "layer_types": kinds})
    with pytest.raises(InputError, match="no sliding_window beside it"):
        DecoderConfig.from_json(
            {**PHI4, "sliding_window": 8, "layer_types": ["full_attention"] * PHI4["num_hidden_layers"]}
        )


def test_a_pad_id_of_minus_one_is_none():
    values = CASES["llama2_tiny"]["config"]
    assert DecoderConfig.from_json({**values, "pad_token_id": -1}) == replace(
        DecoderConfig.from_json(values), pad_id=None
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_being_written_and_read(name):
    config = DecoderConfig.from_json(CASES[name]["config"])
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json("float32")))) == config
    for changed in (
        replace(config, eos_ids=(3, 5), pad_id=None, bos_id=None),
        replace(config, eos_ids=()),
        replace(config, tied=not config.tied, eps=1e-6),
    ):
        assert DecoderConfig.from_json(changed.to_json("float32")) == changed


def test_a_head_size_of_its_own_survives():
    for name in ("phi4_14b_tiny", "llama3_tiny"):
        config = DecoderConfig.from_json(CASES[name]["config"])
        config = replace(config, head_dim=32, rope=replace(config.rope, dims=32))
        assert DecoderConfig.from_json(config.to_json("float32")) == config


@pytest.mark.parametrize("name", NAMES)
def test_the_rope_parameters_of_transformers_5_are_read(name):
    """There rope_theta and the like are inside, `type` and `rope_type` are both written, and some stay
    outside too.
    """
    values = dict(CASES[name]["config"])
    inside = dict(values.pop("rope_scaling", None) or {"rope_type": "default"})
    inside["rope_type"] = inside.get("rope_type", inside.get("type"))
    inside["rope_theta"] = values.pop("rope_theta")
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key in values and inside["rope_type"] != "default":
            inside[key] = values[key]
    values["dtype"] = values.pop("torch_dtype")
    assert DecoderConfig.from_json({**values, "rope_parameters": inside}) == DecoderConfig.from_json(
        CASES[name]["config"]
    )


# What is refused: files


def shards(tmp_path):
    folder = folder_of(tmp_path, shard_bytes=SHARD)
    return folder, sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("shard_bytes", (SHARD, 10**9), ids=("shards", "one file"))
def test_a_missing_a_truncated_and_a_garbage_file_are_named(tmp_path, shard_bytes):
    file = sorted(folder_of(tmp_path, shard_bytes=shard_bytes).glob("*.safetensors"))[:2][-1]
    for content in (file.read_bytes()[:-100], b"not safetensors at all" * 9, b""):
        file.write_bytes(content)
        assert f"{file}: is truncated or not safetensors" in refusal(tmp_path)
    file.unlink()
    missing = f"{file}: this shard is missing; fetch it again"
    assert (missing if shard_bytes == SHARD else f"has neither {SINGLE} nor {INDEX}") in refusal(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_does_not_have_is_refused(tmp_path):
    folder, files = shards(tmp_path)
    change_weights(folder, lambda s: s.pop(next(iter(s))), file=files[2].name)
    line = refusal(folder)
    assert f"{folder / INDEX}: places model." in line and files[2].name in line and "does not have it" in line


def test_a_tensor_of_a_shard_that_the_index_leaves_out_is_not_passed_over(tmp_path):
    folder, files = shards(tmp_path)
    change_weights(folder, lambda s: s.update({"model.extra.weight": torch.ones(2)}), file=files[0].name)
    assert "model.extra.weight is not known" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    (
        *((INDEX, content, "has no weight_map") for content in ("{}", "[]", '{"weight_map": null}')),
        *(
            (INDEX, content, "has no weight_map")
            for content in ('{"weight_map": {"a": 3}}', '{"weight_map": {}}')
        ),
        (INDEX, '{"weight_map": {', "is not valid JSON"),
        ("config.json", "{", "is not valid JSON"),
        ("config.json", "[]", "expected an object"),
        ("config.json", None, "no such file"),
    ),
)
def test_a_broken_index_and_a_broken_config_are_named(tmp_path, name, content, words):
    file = shards(tmp_path)[0] / name
    file.unlink() if content is None else file.write_text(content)
    assert f"{file}: {words}" in refusal(tmp_path)


def test_a_pickle_alone_is_refused_with_what_to_do(tmp_path):
    folder = folder_of(tmp_path)
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    line = refusal(folder)
    assert str(folder) in line and "pytorch_model.bin is a pickle" in line and "safetensors" in line
    (folder / "pytorch_model.bin").unlink()
    assert f"{folder}: has neither {SINGLE} nor {INDEX}" in refusal(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")


# What is refused: tensors


def test_missing_unknown_and_misshapen_tensors_are_listed_together(tmp_path):
    folder = folder_of(tmp_path)

    def spoil(state):
        del state[QKV]
        state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        state[GATE_UP] = state[GATE_UP][:-2]

    change_weights(folder, spoil)
    line = refusal(folder)
    assert str(folder) in line and f"{QKV} is missing" in line and "q_norm.weight is not known" in line
    assert f"{GATE_UP} is (510, 96), expected (512, 96)" in line


def test_a_llama_part_that_is_missing_is_named(tmp_path):
    folder = folder_of(tmp_path, "llama3_tiny")
    change_weights(folder, lambda s: s.pop("model.layers.2.mlp.up_proj.weight"))
    line = refusal(folder)
    assert "model.layers.2.mlp.up_proj.weight is missing" in line and "gate" not in line


def test_many_problems_are_counted_not_listed(tmp_path):
    folder = folder_of(tmp_path)
    change_weights(folder, lambda s: s.update({f"extra.{i}": torch.ones(1) for i in range(50)}))
    assert "and 44 more" in refusal(folder)


@pytest.mark.parametrize("dtype, name", ((torch.int8, "I8"), (torch.float64, "F64")))
def test_tensors_of_a_type_that_no_decoder_has_are_refused_even_with_a_dtype(tmp_path, dtype, name):
    folder = folder_of(tmp_path)
    change_weights(folder, lambda s: s.update({QKV: s[QKV].to(dtype)}))
    for settings in ({}, {"dtype": torch.float32}):
        assert f"{QKV} is {name}, expected F32, F16, BF16" in refusal(folder, **settings)


def test_shards_of_two_types_load_only_with_one_named(tmp_path):
    folder = tmp_path
    save_decoder(build(CASES["phi3_mini_tiny"]), folder, dtype=torch.bfloat16, shard_bytes=SHARD)
    files = sorted(folder.glob("*.safetensors"))
    change_weights(folder, lambda s: s.update({n: t.half() for n, t in s.items()}), file=files[3].name)
    spoilt = next(iter(load_file(files[3])))
    line = refusal(folder)
    assert f"{spoilt} is F16, the others are BF16: name one dtype" in line
    assert load_decoder(str(folder), dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_refused_state_leaves_the_decoder_as_it_was():
    decoder = build(CASES["phi3_mini_tiny"])
    before, other = copy.deepcopy(decoder.state_dict()), {n: t + 1 for n, t in decoder_state(decoder).items()}
    spoilt = (
        {n: t for n, t in other.items() if n != "model.norm.weight"},
        {**other, "extra": torch.ones(1)},
        {**other, "model.norm.weight": torch.ones(3)},
        {**other, "lm_head.weight": other["lm_head.weight"].double()},
    )
    for state in spoilt:
        with pytest.raises(InputError, match="somewhere: does not fit"):
            load_decoder_state(decoder, state, "somewhere")
        assert equal_states(decoder.state_dict(), before)
    load_decoder_state(decoder, other, "somewhere")
    assert torch.equal(decoder.norm.weight, before["norm.weight"] + 1)


# What is refused: settings


ROPE = PHI4["rope_scaling"]
REFUSED = {
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "attention bias": ({"attention_bias": True}, "attention_bias True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "phi3small": ({"model_type": "phi3small"}, "model_type 'phi3small'"),
    "qwen2": ({"model_type": "qwen2"}, "model_type 'qwen2'"),
    "no model type": ({"model_type": None}, "model_type None"),
    "null size": ({"hidden_size": None}, "hidden_size is None"),
    "text size": ({"intermediate_size": "192"}, "intermediate_size is '192'"),
    "float size": ({"vocab_size": 320.0}, "vocab_size is 320.0"),
    "bool size": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "zero size": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "absurd size": ({"vocab_size": LARGEST + 1}, "vocab_size is"),
    "text eps": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    "null eps": ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    "null theta": ({"rope_theta": None}, "rope_theta is None"),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    "infinite theta": ({"rope_theta": float("inf")}, "rope_theta is inf"),
    "heads that do not divide": ({"num_key_value_heads": 4}, "6 attention heads"),
    "text window": ({"sliding_window": "8"}, "sliding_window is '8'"),
    "window true": ({"sliding_window": True}, "sliding_window is True"),
    "no window": ({"sliding_window": 0}, "sliding_window is 0"),
    "eos beyond the vocabulary": (
        {"eos_token_id": [313, 320]},
        "320] are not all tokens of a vocabulary of 320",
    ),
    "negative eos": ({"eos_token_id": -1}, "-1"),
    "eos true": ({"eos_token_id": True}, "True"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    "rope as text": ({"rope_scaling": "longrope"}, "rope_scaling is"),
    "rope off by 0": ({"rope_scaling": 0}, "rope_scaling is [0]"),
    "rope twice": ({"rope_parameters": ROPE}, "rope_parameters"),
    "rope type": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    "rope type of llama": (
        {"rope_scaling": {"type": "llama3"}},
        "rope type 'llama3' is not implemented for phi3",
    ),
    "rope types": ({"rope_scaling": {**ROPE, "rope_type": "default"}}, "rope type 'default'"),
    "rope type as a list": ({"rope_scaling": {**ROPE, "type": ["longrope"]}}, "rope type ['longrope']"),
    "other rope key": ({"rope_scaling": {**ROPE, "short_mscale": 1.2}}, "short_mscale"),
    "no long factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": ROPE["short_factor"]}},
        "long_factor",
    ),
    "too few factors": (
        {"rope_scaling": {**ROPE, "long_factor": [1.0]}},
        "long_factor has 1 factors; expected 6",
    ),
    "a zero factor": ({"rope_scaling": {**ROPE, "long_factor": [0.0] * 6}}, "long_factor is [0.0"),
    "a factor for all": ({"rope_scaling": {**ROPE, "short_factor": 1.0}}, "short_factor is 1.0"),
    "two thetas": ({"rope_scaling": {**ROPE, "rope_theta": 5.0}}, "rope_theta is 10000.0, but 5.0"),
    "original of one token": (
        {"original_max_position_embeddings": 1},
        "original_max_position_embeddings is 1",
    ),
    "no original": ({"original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
    "rotating too much": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
    "rotating an odd number": ({"partial_rotary_factor": 0.7}, "partial_rotary_factor 0.7"),
    "unknown key": ({"num_experts": 8}, "num_experts not implemented"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_setting_that_is_not_implemented_or_of_another_kind_is_named(what):
    changes, named = REFUSED[what]
    with pytest.raises(InputError) as error:
        DecoderConfig.from_json({**PHI4, **changes}, "FOLDER/config.json")
    line = str(error.value)
    assert line.startswith("FOLDER/config.json: ") and named in line and "\n" not in line, line


def test_more_attention_features_than_any_matrix_has_are_refused():
    many = {"num_attention_heads": 2**20, "head_dim": 2**20}
    with pytest.raises(InputError, match="1048576 attention heads of 1048576 features"):
        DecoderConfig.from_json({**CASES["llama3_tiny"]["config"], **many})


def test_what_phi_alone_has_is_refused_of_llama():
    values = CASES["llama3_tiny"]["config"]
    wrong = {**values["rope_scaling"], "low_freq_factor": 4.0}
    for changes, named in (
        ({"sliding_window": 8}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": ROPE}, "longrope"),
        ({"rope_scaling": wrong}, "low_freq_factor"),
    ):
        with pytest.raises(InputError, match=named):
            DecoderConfig.from_json({**values, **changes})


@pytest.mark.parametrize(
    "key",
    (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
        "max_position_embeddings model_type"
    ).split(),
)
def test_a_missing_setting_is_named(tmp_path, key):
    folder = folder_of(tmp_path, **{key: None})
    line = refusal(folder)
    assert f"{folder / 'config.json'}: {key}" in line


def test_more_layers_than_the_files_have_are_refused_before_they_are_made(tmp_path):
    start = time.perf_counter()
    line = refusal(folder_of(tmp_path, num_hidden_layers=LARGEST))
    assert f"config.json has {LARGEST} layers, the files have 3" in line
    assert time.perf_counter() - start < 5


MUTANTS = (None, "x", -1, 0, [], {}, True, 1e9, 10**9, float("nan"), LARGEST)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("phi4mini_tiny", "llama3_tiny"))
def test_no_value_of_a_config_ends_in_anything_but_a_decoder_or_one_line(tmp_path, name):
    folder, values = folder_of(tmp_path, name), CASES[name]["config"]
    places = [(values, k) for k in values] + [(values["rope_scaling"], k) for k in values["rope_scaling"]]
    mutations = [(owner is values, key, mutant) for owner, key in places for mutant in MUTANTS]
    random.Random(0).shuffle(mutations)
    loaded = 0
    for top, key, mutant in mutations:
        mutated = copy.deepcopy(values)
        (mutated if top else mutated["rope_scaling"])[key] = mutant
        (folder / "config.json").write_text(json.dumps(mutated))
        start = time.perf_counter()
        try:
            found = logits(load_decoder(str(folder)))
            assert found.shape == (1, 10, values["vocab_size"]) and found.isfinite().all(), (key, mutant)
            loaded += 1
        except InputError as error:
            assert "\n" not in str(error) and str(folder) in str(error), (key, mutant)
        assert time.perf_counter() - start < 5, (key, mutant)  # tens of milliseconds on an idle machine
    assert 0 < loaded < len(mutations) / 2


# The vocabulary


@pytest.mark.parametrize("name", ("phi4mini_tiny", "phi3_mini_tiny"))
@pytest.mark.parametrize("own", (320, 317))
def test_added_rows_are_the_mean_of_the_tokenisers_own(tmp_path, name, own):
    """At 320 all rows of the file are tokens; at 317 the last 3 are surplus and dropped."""
    before, decoder = build(CASES[name]), build(CASES[name]).requires_grad_(False)
    resize_vocabulary(decoder, own + 4, 4)
    assert (decoder.lm_head is None) == before.config.tied and decoder.config.vocab == own + 4
    for layer, old in ((decoder.embed_tokens, before.embed_tokens), (decoder.lm_head, before.lm_head)):
        if layer is not None:
            assert torch.equal(layer.weight[:own], old.weight[:own]) and layer.weight.shape == (own + 4, 96)
            assert (
                layer.weight[own:] - old.weight[:own].mean(0)
            ).abs().max() < 1e-6 and not layer.weight.requires_grad
    found = logits(decoder)
    assert found.shape[-1] == own + 4 and torch.allclose(
        found[..., :own], logits(before)[..., :own], atol=1e-5
    )
    assert decoder.embed_tokens.num_embeddings == own + 4 and (
        decoder.lm_head is None or decoder.lm_head.out_features == own + 4
    )
    save_decoder(decoder, tmp_path)
    assert torch.equal(logits(load_decoder(str(tmp_path))), found)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_added_rows_of_half_precision_are_the_mean_rounded_once(dtype):
    decoder = build(CASES["phi3_mini_tiny"]).to(dtype)
    with torch.no_grad():
        decoder.embed_tokens.weight.add_(250)  # the sum of 320 rows is more than float16 holds
    exact = decoder.embed_tokens.weight.double().mean(0).to(dtype)
    resize_vocabulary(decoder, 324, 4)
    assert decoder.embed_tokens.weight.dtype == dtype and (decoder.embed_tokens.weight[320:] == exact).all()


def adapted_head(decoder):
    add_lora(decoder, ("lm_head",), r=2, alpha=4)


@pytest.mark.parametrize(
    "change",
    (adapted_head, pack, lambda decoder: quantise(decoder, "lm_head")),
    ids=("lora", "packed", "int8"),
)
def test_a_head_that_is_no_plain_matrix_is_refused_and_nothing_is_resized(change):
    decoder = build(CASES["phi3_mini_tiny"])
    change(decoder)
    before, config = decoder.embed_tokens.weight.clone(), decoder.config
    with pytest.raises(
        InputError,
        match=f"a {type(decoder.lm_head).__name__} is not resized: .* before adapters, int8 and packing",
    ):
        resize_vocabulary(decoder, 324, 4)
    assert torch.equal(decoder.embed_tokens.weight, before) and decoder.config is config


def test_a_decoder_with_fewer_rows_than_the_tokeniser_has_tokens_is_refused_and_left_as_it_was():
    decoder = build(CASES["phi4mini_tiny"])
    with pytest.raises(InputError, match="has 321 tokens of its own, the decoder 320 rows"):
        resize_vocabulary(decoder, 325, 4)
    with pytest.raises(InputError, match="313"):  # the end token would be cut off
        resize_vocabulary(decoder, 304, 4)
    assert decoder.config.vocab == 320 and len(decoder.embed_tokens.weight) == 320


# Against the library


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard_bytes", (10**9, SHARD))
def test_transformers_reads_an_export_and_gives_the_same_logits(tmp_path, name, shard_bytes):
    """Within the original context only: past it the library's cached and padded calls have known errors."""
    transformers = pytest.importorskip("transformers")
    decoder = build(CASES[name])
    save_decoder(decoder, tmp_path, shard_bytes=shard_bytes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (model.eval()(IDS).logits - logits(decoder)).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "again")
    again = load_decoder(str(tmp_path / "again"))
    assert again.config == decoder.config and equal_states(again.state_dict(), decoder.state_dict())


def test_a_new_decoder_of_a_config_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_json(PHI4))
    save_decoder(decoder, tmp_path)
    assert equal_states(load_decoder(str(tmp_path)).state_dict(), decoder.state_dict())
