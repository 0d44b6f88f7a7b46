"""Adapters as peft writes them: read strictly, written so that peft reads them, of fused and of separate
matrices.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fill
from parity_case import Case
from parity_decoder import build
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.int8 import quantise
from reaf_hsenet.models.lora import LoraLinear, add_lora
from reaf_hsenet.weights.adapters import (
    CONFIG,
    WEIGHTS,
    adapter_state,
    load_adapter,
    load_adapter_state,
    save_adapter,
)
from reaf_hsenet.weights.decoder import save_decoder

GOLDEN = Path(__file__).parent / "golden"
PHI, LLAMA = (Case(GOLDEN / f"{name}.json", GOLDEN) for name in ("lora_phi3_tiny", "llama3_tiny"))
PUBLISHED = {n: torch.from_numpy(fill.fill(n, s, PHI["seed"])) for n, s in PHI["adapter_weights"].items()}
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QKV = "base_model.model.model.layers.1.self_attn.qkv_proj"
IDS, MASK = PHI.stored["input.ids"], PHI.stored["input.mask"]


def logits(decoder):
    with torch.no_grad():
        return decoder(IDS)


def trained(case, targets, **settings):
    """A decoder whose adapters are not zero."""
    decoder = build(case)
    torch.manual_seed(3)
    add_lora(decoder, targets, **{"r": 3, "alpha": 6, **settings})
    for name, parameter in decoder.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def published_folder(folder: Path, state=PUBLISHED, **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**PHI["adapter_config.json"], **config}))
    return folder


def refusal(decoder, folder) -> str:
    """The one line of the error, after which the decoder is what it was."""
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(InputError) as error:
        load_adapter(decoder, str(folder))
    after = decoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    line = str(error.value)
    assert "\n" not in line and str(folder) in line, line
    return line


# In and out


def test_a_folder_of_peft_gives_the_published_logits(tmp_path):
    decoder = build(PHI)
    load_adapter(decoder, str(published_folder(tmp_path)))
    with torch.no_grad():
        difference = decoder(IDS, mask=MASK) - PHI.stored["logits"]
    assert difference[MASK.bool()].abs().max() < 2e-4


def test_the_settings_of_the_folder_are_those_of_the_adapters(tmp_path):
    decoder = build(PHI)
    load_adapter(decoder, str(published_folder(tmp_path, lora_alpha=6, lora_dropout=0.25)))
    layers = [layer for layer in decoder.modules() if isinstance(layer, LoraLinear)]
    assert len(layers) == 12 and {(m.r, m.scale, m.dropout.p) for m in layers} == {(4, 1.5, 0.25)}
    assert torch.equal(logits(decoder), logits(decoder))  # dropout is off in a decoder that is in eval mode
    assert decoder.train().layers[0].mlp.down_proj.training


def test_in_memory_names_load_as_those_of_files_do():
    state = {n.replace(".weight", ".default.weight"): t for n, t in PUBLISHED.items()}
    decoder, other = build(PHI), build(PHI)
    load_adapter_state(decoder, state, alpha=8)
    load_adapter_state(other, PUBLISHED, alpha=8)
    assert torch.equal(logits(decoder), logits(other))
    assert list(adapter_state(decoder)) == list(adapter_state(other)) and set(adapter_state(decoder)) == set(
        PUBLISHED
    )


@pytest.mark.parametrize(
    "case, targets",
    (
        (PHI, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        (PHI, ("o_proj",)),
        (PHI, ("k_proj", "up_proj")),
        (LLAMA, SEPARATE),
        (LLAMA, ("q_proj", "v_proj")),
        (LLAMA, ("k_proj",)),
        (LLAMA, ("up_proj", "lm_head")),
    ),
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x.name,
)
def test_a_saved_adapter_loads_bit_for_bit(tmp_path, case, targets):
    decoder, loaded = trained(case, targets, dropout=0.1), build(case)
    save_adapter(decoder, tmp_path / "new" / "adapter", base="microsoft/Phi-4-mini-instruct")
    config = json.loads((tmp_path / "new" / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == sorted(targets) and (
        config["r"],
        config["lora_alpha"],
        config["lora_dropout"],
    ) == (3, 6, 0.1)
    assert config["base_model_name_or_path"] == "microsoft/Phi-4-mini-instruct"
    load_adapter(loaded, str(tmp_path / "new" / "adapter"))
    before, after = decoder.state_dict(), loaded.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(logits(decoder), logits(loaded))


def test_llama_adapters_have_the_names_of_its_separate_projections():
    state = adapter_state(trained(LLAMA, ("k_proj", "gate_proj")))
    layers = [
        f"base_model.model.model.layers.{i}.{part}"
        for i in range(3)
        for part in ("self_attn.k_proj", "mlp.gate_proj")
    ]
    assert set(state) == {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    assert state[f"{layers[0]}.lora_A.weight"].shape == (3, 128) and state[
        f"{layers[0]}.lora_B.weight"
    ].shape == (32, 3)


def test_one_adapter_of_a_whole_matrix_is_one_of_each_part_in_a_llama_file(tmp_path):
    decoder, loaded = trained(LLAMA, ("qkv_proj", "gate_up_proj")), build(LLAMA)
    save_adapter(decoder, tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["target_modules"]) == set(SEPARATE) - {
        "o_proj",
        "down_proj",
    }
    load_adapter(loaded, str(tmp_path))
    assert (
        (logits(decoder) - logits(loaded)).abs().max()
        < 1e-4
        < (logits(decoder) - logits(build(LLAMA))).abs().max()
    )


def test_only_the_layers_that_the_tensors_name_are_adapted_and_saved_as_such(tmp_path):
    some = {n: t for n, t in PUBLISHED.items() if ".1.self_attn." in n}
    decoder = build(PHI)
    load_adapter(
        decoder, str(published_folder(tmp_path / "in", some, target_modules=r".*\.1\.self_attn\..*"))
    )
    assert [n for n, m in decoder.named_modules() if isinstance(m, LoraLinear)] == [
        "layers.1.self_attn.qkv_proj",
        "layers.1.self_attn.o_proj",
    ]
    save_adapter(decoder, tmp_path / "out")
    targets = json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.qkv_proj"]
    again = build(PHI)
    load_adapter(again, str(tmp_path / "out"))
    assert torch.equal(logits(again), logits(decoder))


def test_an_int8_decoder_takes_adapters():
    decoder = build(PHI)
    for name in [n for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]:
        quantise(decoder, name)
    base = logits(decoder)
    load_adapter_state(decoder, PUBLISHED, alpha=8)
    assert set(adapter_state(decoder)) == set(PUBLISHED)
    exact = PHI.stored["logits"][MASK.bool()]
    assert (logits(decoder)[MASK.bool()] - exact).std() < 0.1 < (base[MASK.bool()] - exact).std()


def test_half_precision_adapters_become_float32():
    decoder = build(PHI).bfloat16()
    load_adapter_state(decoder, {n: t.bfloat16() for n, t in PUBLISHED.items()}, alpha=8)
    layer = decoder.layers[0].mlp.down_proj
    assert layer.lora_a.dtype == torch.float32 and layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(
        layer.lora_a,
        PUBLISHED["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].bfloat16().float(),
    )


# What is refused


NOT_IMPLEMENTED = {
    "use_dora": True,
    "use_rslora": True,
    "rank_pattern": {"qkv_proj": 8},
    "alpha_pattern": {"qkv_proj": 8},
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "peft_type": "LOHA",
    "init_lora_weights": "pissa",
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "target_parameters": ["x"],
    "exclude_modules": ["o_proj"],
    "something_new": 1,
}


@pytest.mark.parametrize("key", NOT_IMPLEMENTED)
def test_a_setting_that_is_not_implemented_is_refused_by_name(tmp_path, key):
    line = refusal(build(PHI), published_folder(tmp_path, **{key: NOT_IMPLEMENTED[key]}))
    assert f"{CONFIG}: {key} {NOT_IMPLEMENTED[key]!r} is not implemented" in line


@pytest.mark.parametrize(
    "key, value",
    (
        ("r", None),
        ("r", 0),
        ("r", True),
        ("r", "4"),
        ("r", 4.0),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", {}),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_dropout", []),
        ("lora_dropout", None),
    ),
)
def test_a_number_of_another_kind_is_refused_by_name(tmp_path, key, value):
    assert f"{CONFIG}: {key} is {value!r}; expected" in refusal(
        build(PHI), published_folder(tmp_path, **{key: value})
    )


def without(*names):
    return {n: t for n, t in PUBLISHED.items() if n not in names}


A, B = f"{QKV}.lora_A.weight", f"{QKV}.lora_B.weight"
SPOILT = {
    "no B": (without(B), f"{B} is missing"),
    "a layer without": (
        without(A, B),
        f"{A} is missing; {B} is missing",
    ),  # the config says qkv_proj of every layer
    "other rank": ({**PUBLISHED, A: torch.ones(5, 96)}, f"{A} is (5, 96), expected (4, 96)"),
    "other rows": ({**PUBLISHED, B: torch.ones(96, 4)}, f"{B} is (96, 4), expected (160, 4)"),
    "no matrix": ({**PUBLISHED, A: torch.ones(4)}, f"{A} is (4,), expected (4, 96)"),
    "whole numbers": ({**PUBLISHED, A: torch.ones(4, 96, dtype=torch.int8)}, f"{A} is int8"),
    "a layer too many": (
        {**PUBLISHED, A.replace(".1.", ".3."): torch.ones(4, 96)},
        f"{A.replace('.1.', '.3.')} is not known",
    ),
    "no linear layer": (
        {**PUBLISHED, "base_model.model.model.norm.lora_A.weight": torch.ones(4, 96)},
        "model.norm.lora_A.weight is not known",
    ),
    "an embedding": (
        {**PUBLISHED, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)},
        "lora_embedding_A is not known",
    ),
    "dora": (
        {**PUBLISHED, f"{QKV}.lora_magnitude_vector": torch.ones(160)},
        "lora_magnitude_vector is not known",
    ),
    "packer": (
        {**PUBLISHED, "base_model.model.model.mm_projector.weight": torch.ones(2)},
        "mm_projector.weight is not known",
    ),
    "both names": (
        {**PUBLISHED, A.replace(".weight", ".default.weight"): PUBLISHED[A].clone()},
        "is there under peft's other name too",
    ),
    "whole and part": (
        {
            **PUBLISHED,
            f"{QKV[:-8]}k_proj.lora_A.weight": torch.ones(4, 96),
            f"{QKV[:-8]}k_proj.lora_B.weight": torch.ones(32, 4),
        },
        "change the same matrix",
    ),
    "nothing": ({"base_model.model.x": torch.ones(1)}, "base_model.model.x is not known"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, what):
    state, named = SPOILT[what]
    line = refusal(build(PHI), published_folder(tmp_path, state))
    assert f"{tmp_path / WEIGHTS}: does not fit this decoder: " in line and named in line


def test_problems_are_listed_together(tmp_path):
    state = {**without(B), f"{QKV}.lora_C.weight": torch.ones(1), A: torch.ones(4, 97)}
    line = refusal(build(PHI), published_folder(tmp_path, state))
    assert f"{B} is missing" in line and "lora_C.weight is not known" in line and f"{A} is (4, 97)" in line


def test_many_problems_are_counted_not_listed(tmp_path):
    line = refusal(
        build(PHI),
        published_folder(tmp_path, {f"extra.{i}": torch.ones(1) for i in range(50)}, target_modules="x"),
    )
    assert line.count("is not known") == 6 and line.endswith(" and 44 more")


def test_tensors_alone_are_refused_by_name_too():
    decoder = build(PHI)
    for state, named in (
        (without(A), f"{A} is missing"),
        ({**PUBLISHED, A: torch.ones(5, 96)}, r"\(5, 96\), expected \(4, 96\)"),
        ({}, "it has no adapters"),
        ({A: torch.ones(0, 96), B: torch.ones(160, 0)}, r"\(0, 96\)"),
        ({A.replace(".weight", ".other.weight"): torch.ones(4, 96)}, "other.weight is not known"),
    ):
        with pytest.raises(InputError, match=f"^run/mm.bin: does not fit this decoder: .*{named}"):
            load_adapter_state(decoder, state, alpha=8, source="run/mm.bin")
    assert not any(isinstance(m, LoraLinear) for m in decoder.modules())


def test_a_second_adapter_is_refused(tmp_path):
    decoder = build(PHI)
    load_adapter(decoder, str(published_folder(tmp_path)))
    assert "has adapters already" in refusal(decoder, tmp_path)


def test_files_that_are_absent_or_damaged_are_named(tmp_path):
    folder, decoder = published_folder(tmp_path), build(PHI)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    assert f"{folder / WEIGHTS}: is truncated" in refusal(decoder, folder)
    (folder / WEIGHTS).unlink()
    assert f"{folder}: has no {WEIGHTS}: save the adapter as safetensors" in refusal(decoder, folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is a pickle" in refusal(decoder, folder)
    for text, named in (
        ("{", "is not valid JSON"),
        ("[]", "expected an object"),
        ("{}", "peft_type None is not"),
    ):
        (folder / CONFIG).write_text(text)
        assert f"{folder / CONFIG}: {named}" in refusal(decoder, folder)
    (folder / CONFIG).unlink()
    assert f"{folder / CONFIG}: no such file" in refusal(decoder, folder)
    assert "no such folder" in refusal(decoder, tmp_path / "absent")


def test_adapters_of_two_kinds_or_none_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="0 kinds"):
        save_adapter(build(PHI), tmp_path)
    decoder = trained(PHI, ("o_proj",))
    add_lora(decoder, ("down_proj",), r=4, alpha=6)
    with pytest.raises(ValueError, match="2 kinds"):
        save_adapter(decoder, tmp_path)
    assert not list(tmp_path.iterdir())


# Against the library


@pytest.mark.parametrize(
    "case, targets",
    (
        (PHI, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        (LLAMA, SEPARATE),
        (LLAMA, ("qkv_proj", "down_proj")),
        (LLAMA, ("q_proj", "v_proj")),
    ),
)
def test_peft_reads_a_saved_adapter_and_gives_the_same_logits_and_what_it_saves_is_read(
    tmp_path, case, targets
):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder = trained(case, targets)
    save_decoder(build(case), tmp_path / "base")
    save_adapter(decoder, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (model(IDS).logits - logits(decoder)).abs().max() < 2e-4
    model.save_pretrained(tmp_path / "again")
    loaded = build(case)
    load_adapter(loaded, str(tmp_path / "again"))
    first, second = load_file(tmp_path / "adapter" / WEIGHTS), adapter_state(loaded)
    assert set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


def test_peft_reads_an_adapter_of_some_layers(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder = build(PHI)
    load_adapter_state(decoder, {n: t for n, t in PUBLISHED.items() if ".2.mlp." in n}, alpha=8)
    save_decoder(build(PHI), tmp_path / "base")
    save_adapter(decoder, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert (model(IDS).logits - logits(decoder)).abs().max() < 2e-4
