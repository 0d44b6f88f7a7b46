"""Settings of the language model that sees: what is built, trained and saved."""

import json
from dataclasses import replace

import pytest
import torch

from networks import SMALL_DECODER
from reaf_hsenet.config import GuidedVisionConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.models import build, mllm_config
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.lora import LoraLinear
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.settings import from_dict, to_dict

PLAIN = PRESETS["hsenet-tiny"].vision
GUIDED = GuidedVisionConfig(**vars(PLAIN), slices=8, slice_width=16)
DUAL = MllmConfig(
    "dual", (PLAIN, GUIDED), replace(SMALL_DECODER, pad_id=None), kernel=(1, 2, 2), r=2, alpha=4
)


def test_settings_survive_json():
    for config in (DUAL, MllmConfig("reaf", (PRESETS["reaf-tiny"].vision,), SMALL_DECODER, full=True)):
        assert from_dict(MllmConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_packers_and_adapters_are_trained_and_saved_the_rest_is_not():
    model = build_mllm(DUAL)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        all(n.startswith("projectors.") or "lora_" in n for n in trained)
        and set(trained_state(model)) == trained
    )
    assert sum(isinstance(m, LoraLinear) for m in model.modules()) == 4 * SMALL_DECODER.layers  # not lm_head
    full = build_mllm(replace(DUAL, full=True))
    saved = set(trained_state(full))
    assert {n.split(".")[0] for n in saved} == {"projectors", "decoder"}
    assert {n for n in full.state_dict() if n.startswith("decoder.")} <= saved


def test_adapters_are_of_the_parts_that_the_family_has_on_disk():
    phi, llama = (
        build_mllm(replace(DUAL, decoder=replace(DUAL.decoder, family=f))) for f in ("phi3", "llama")
    )
    assert phi.decoder.layers[0].self_attn.qkv_proj.adapted == ()
    assert llama.decoder.layers[0].self_attn.qkv_proj.adapted == ("q_proj", "k_proj", "v_proj")


def test_a_decoder_with_weights_is_taken_as_it_is():
    torch.manual_seed(3)
    decoder = build_mllm(replace(DUAL, full=True)).decoder
    assert build_mllm(replace(DUAL, full=True), decoder).decoder is decoder


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"vision": "both"}, "--vision both"),
        ({"encoders": (PLAIN,)}, "--vision dual"),
        ({"projector": "pool"}, "--projector pool"),
        ({"kernel": (3, 2, 2)}, "--kernel"),
        ({"vision": "stage1", "encoders": (PLAIN,), "projector": "text_guided"}, "needs slice features"),
    ],
)
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(InputError, match=named):
        build_mllm(replace(DUAL, **changes))


def test_settings_name_the_projectors_that_are_built():
    assert tuple(build.PROJECTORS) == mllm_config.PROJECTORS
