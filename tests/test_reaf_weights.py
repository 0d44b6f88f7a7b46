"""REAF, HLIP and MAE checkpoints load under their published names, from every file they come in, and
start a run.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fill
import train
from conftest import ROOT, error_line, script
from published import REAF as CONFIG
from published import reaf as published
from published import reaf_shapes
from reaf_hsenet.data.prepare import Options, prepare
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.positions import resample_3d
from reaf_hsenet.weights.files import load_matching, load_strictly, read_checkpoint
from reaf_hsenet.weights.names import REAF, import_state
from reaf_hsenet.weights.shapes import flat_reaf, initial_state
from tiny import same_weights, weights

GRID = CONFIG.vision.grid


def published_mae(width=24, side=4) -> dict[str, torch.Tensor]:
    shapes = {
        n.removeprefix("visual.trunk."): s for n, s in reaf_shapes().items() if ".blocks." in n or "norm" in n
    }
    shapes = {n: s for n, s in shapes.items() if not n.startswith("text.")}
    shapes |= {
        "cls_token": [1, 1, width],
        "pos_embed": [1, side * side + 1, width],
        "patch_embed.proj.weight": [width, 3, 16, 16],
        "patch_embed.proj.bias": [width],
        "mask_token": [1, 1, 8],
        "decoder_embed.weight": [8, width],
    }
    return {n: torch.from_numpy(np.array(fill.fill(n, s, 0))) for n, s in shapes.items()}


def fixed(model) -> dict[str, torch.Tensor]:
    """What no checkpoint of REAF holds: the fusion's constant weights."""
    return {n: t for n, t in model.state_dict().items() if n.startswith("vision.fusion.")}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_whole_dual_encoder_loads_strictly_under_reafs_names(prefix):
    model, source = build_dual_encoder(CONFIG), published(prefix=prefix)
    load_strictly(model, flat_reaf(import_state(REAF, source), GRID) | fixed(model), "REAF")
    state, plain = model.state_dict(), published()
    kernel = plain["visual.trunk.patch_embed.proj.weight"]
    conv = torch.nn.functional.conv3d(torch.ones(1, 1, 8, 16, 16), kernel, stride=(4, 8, 8)).flatten(2).mT
    ours = model.vision.patch_embed(torch.ones(1, 1, 8, 16, 16)) - state["vision.patch_embed.proj.bias"]
    assert torch.allclose(ours, conv, atol=1e-5)
    query = plain["text.transformer.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(state["text.blocks.0.attn.qkv.weight"][:16], query)
    assert torch.equal(state["vision.pos_embed"], plain["visual.trunk.spatial_posemb"].flatten(1, 3))
    assert model.scale().item() == pytest.approx(plain["logit_scale"].exp().item())


def test_every_tensor_of_the_checkpoint_has_a_place():
    """Each changes the model when it is changed, except BERT's pooler, which REAF does not use."""
    model = build_dual_encoder(CONFIG)
    expected = {
        n: t.clone() for n, t in (flat_reaf(import_state(REAF, published()), GRID) | fixed(model)).items()
    }
    for name in reaf_shapes():
        other = published()
        other[name] = other[name] + 1
        state = flat_reaf(import_state(REAF, other), GRID)
        changed = [n for n in state if not torch.equal(state[n], expected[n])]
        assert len(changed) == (0 if "pooler" in name else 1), name


def test_a_missing_tensor_is_named():
    model, source = build_dual_encoder(CONFIG), published()
    del source["visual.trunk.blocks.1.attn.qkv.bias"]
    with pytest.raises(InputError, match=r"vision.blocks.1.attn.qkv.bias is missing"):
        load_strictly(model, flat_reaf(import_state(REAF, source), GRID) | fixed(model), "REAF")


def test_a_position_table_of_another_grid_is_resampled():
    source = published()
    table = source["visual.trunk.spatial_posemb"]
    state = flat_reaf(import_state(REAF, source), (2, 3, 3))
    assert torch.equal(state["vision.pos_embed"], resample_3d(table, (2, 3, 3)).flatten(1, 3))


def test_hlip_starts_all_but_the_fusion_and_says_so():
    model = build_dual_encoder(CONFIG)
    before = model.vision.fusion_layer.weight.clone()
    account = load_matching(
        model, initial_state(published(fusion=False), "hlip.pt", "reaf", (4, 8, 8), GRID), "hlip.pt"
    )
    assert torch.equal(model.vision.fusion_layer.weight, before)
    assert "fusion_layer" in account and "left at their start" in account and "hlip.pt" in account
    assert torch.equal(
        model.vision.blocks[2].mlp.fc1.weight, published()["visual.trunk.blocks.2.mlp.fc1.weight"]
    )


def test_a_mae_checkpoint_is_inflated_and_its_decoder_not_used():
    model = build_dual_encoder(CONFIG)
    source = published_mae()
    account = load_matching(model, initial_state(source, "mae.pth", "reaf", (4, 8, 8), GRID), "mae.pth")
    assert "decoder_embed" in account and "mask_token" in account and "text.blocks.* (" in account
    assert torch.equal(model.vision.cls_token, source["cls_token"] + source["pos_embed"][:, :1])
    # A volume that is constant over depth sees the sum of the kernel's colours, once.
    plane = torch.nn.functional.interpolate(
        source["patch_embed.proj.weight"], size=(8, 8), mode="bicubic"
    ).sum(1)
    ones = model.vision.patch_embed(torch.ones(1, 1, 8, 16, 16))[0, 0] - model.vision.patch_embed.proj.bias
    assert torch.allclose(ones, plane.sum((1, 2)), atol=1e-4)


def test_a_mae_checkpoint_of_a_parallel_run_loads_and_starts_reaf_only():
    source = {f"module.{n}": t for n, t in published_mae().items()}
    state = initial_state(source, "mae.pth", "reaf", (4, 8, 8), GRID)
    plain = initial_state(published_mae(), "mae.pth", "reaf", (4, 8, 8), GRID)
    assert all(torch.equal(state[n], plain[n]) for n in plain)
    with pytest.raises(InputError, match="mae.pth: starts --model reaf, not hsenet"):
        initial_state(source, "mae.pth", "hsenet", (4, 8, 8), GRID)


FILES = {
    "epoch_50.pt": lambda path, state: torch.save({"epoch": 50, "name": "REAF", "state_dict": state}, path),
    "mae_pretrain.pth": lambda path, state: torch.save({"model": state}, path),
    "weights.bin": lambda path, state: torch.save(state, path),
    "model.safetensors": lambda path, state: save_file(state, path),
    "folder/model.safetensors": lambda path, state: (path.parent.mkdir(), save_file(state, path)),
}


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_files_of_every_kind_are_read(tmp_path, name):
    state = published(prefix="module.")
    FILES[name](tmp_path / name, state)
    found = read_checkpoint(str(tmp_path / name.split("/")[0]))
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"layer1.0.conv1.weight": torch.zeros(2)},
            "is not a checkpoint of REAF, HLIP, M3D-CLIP, HSENet or a MAE ViT.*layer1",
        ),
        (published_mae(width=12), r"does not fit this model: vision\.\S+ is"),
    ],
)
def test_other_checkpoints_are_refused_by_name(state, words):
    with pytest.raises(InputError, match=words):
        load_matching(
            build_dual_encoder(CONFIG), initial_state(state, "x.pt", "reaf", (4, 8, 8), GRID), "x.pt"
        )


@pytest.fixture(scope="module")
def prepared_reaf(phantom_root, tmp_path_factory) -> Path:
    """The small phantoms in REAF's recipe at 16 x 32 x 32."""
    from reaf_hsenet.data.sources.ct_rate import read_ct_rate
    from reaf_hsenet.presets import TINY_RECIPES

    out = tmp_path_factory.mktemp("prepared") / "reaf"
    recipe = replace(TINY_RECIPES["reaf"], size=(16, 32, 32), spacing=(21.0, 11.0, 11.0))
    prepare(read_ct_rate(phantom_root), out, Options(recipe), progress=False)
    return out


def tiny(data, out, *more) -> list[str]:
    flags = "--stage clip1 --model reaf --preset reaf-tiny --size 16 32 32 --region-size 1 1 1 --batch-size 4"
    folders = ["--data", str(data), "--out", str(out)]
    return [*flags.split(), "--log-every", "1", "--device", "cpu", *folders, *map(str, more)]


@pytest.mark.slow
def test_reaf_trains_resumes_and_starts_another_run(prepared_reaf, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ("--drop-path", 0.3, "--fusion", "random_weighted_mean", "--class-score", "class_token")
    assert train.main(tiny(prepared_reaf, whole, "--max-steps", 4, *settings)) == 0
    assert (
        train.main(tiny(prepared_reaf, parts, "--max-steps", 4, "--save-every", 2, "--keep", 9, *settings))
        == 0
    )
    (parts / "checkpoints/last").write_text("step-000002\n")
    assert train.main(tiny(prepared_reaf, parts, "--resume", *settings)) == 0
    assert same_weights(whole, parts)
    vision = json.loads((whole / "config.json").read_text())["model"]["vision"]
    assert vision["fusion"] == "random_weighted_mean" and vision["class_score"] == "class_token"
    weights = (
        whole / "checkpoints/step-000004/model.safetensors"
    )  # weights alone, without the run's vocabulary
    assert train.main(tiny(prepared_reaf, tmp_path / "next", "--max-steps", 1, "--init", weights)) == 0
    assert "text.blocks.* (" in capsys.readouterr().out  # so left at its start


@pytest.mark.slow
def test_grad_cache_trains_as_one_pass_does(prepared_reaf, tmp_path):
    runs = {}
    for chunk in (None, 1, 3):
        flags = ("--grad-cache", chunk) if chunk else ()
        assert train.main(tiny(prepared_reaf, tmp_path / f"{chunk}", "--max-steps", 2, *flags)) == 0
        runs[chunk] = weights(tmp_path / f"{chunk}")
    for chunk in (1, 3):
        for name, tensor in runs[None].items():
            # Adam divides by the gradient's size: where that is 1e-6 its rounding shows. lr is 1e-3.
            assert (runs[chunk][name] - tensor).abs().max() < 1e-4, (chunk, name)


def test_the_frozen_text_encoder_trains_its_layer_norms_only(prepared_reaf, tmp_path):
    start, end = tmp_path / "start", tmp_path / "end"
    for out, steps in ((start, 1), (end, 3)):  # the first step has a rate of 0 in neither
        flags = ("--max-steps", steps, "--unfreeze-text", 0, "--weight-decay", 0.5)
        assert train.main(tiny(prepared_reaf, out, *flags)) == 0
    start, end = weights(start), weights(end)
    for name in start:
        if name.startswith("text.") and "norm" not in name:
            assert torch.equal(start[name], end[name]), name
        elif "fusion.weights" not in name and not name.endswith(
            ("fusion.scan.weights", "fusion.slice.weights", "pos_embed")
        ):
            assert not torch.equal(start[name], end[name]), name


@pytest.fixture(scope="module")
def started(prepared_reaf, tmp_path_factory) -> Path:
    """A run of one step, to start others from."""
    out = tmp_path_factory.mktemp("runs") / "started"
    assert train.main(tiny(prepared_reaf, out, "--max-steps", 1)) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [(), ("--unfreeze-text", 0)])
def test_lora_trains_the_adapters_of_both_towers_and_leaves_their_matrices(
    prepared_reaf, started, tmp_path, frozen
):
    import evaluate

    out, flags = tmp_path / "lora", ("--init", started, "--lora", "text", "vision", "--lora-r", 2)
    assert train.main(tiny(prepared_reaf, out, "--max-steps", 3, *flags, *frozen)) == 0
    base, found = weights(started), weights(out)
    adapters = [n for n in found if n.endswith("lora_b")]
    assert len(adapters) == 4 and all(found[n].abs().max() > 0 for n in adapters)
    for tower in ("text", "vision"):
        name = f"{tower}.blocks.0.attn.qkv"
        assert torch.equal(found[f"{name}.base.weight"], base[f"{name}.weight"])
    assert evaluate.main(["--task", "retrieval", "--run", str(out), "--device", "cpu"]) == 0
    # A run that starts from it has the adapters in its matrices.
    assert (
        train.main(tiny(prepared_reaf, tmp_path / "next", "--max-steps", 1, "--init", out, "--lr", "1e-9"))
        == 0
    )
    merged = weights(tmp_path / "next")["vision.blocks.0.attn.qkv.weight"]
    a, b = (weights(out)[f"vision.blocks.0.attn.qkv.lora_{x}"] for x in "ab")
    query = base["vision.blocks.0.attn.qkv.weight"][:144] + 4 * b[:144] @ a[:2]  # alpha 8, r 2
    assert torch.allclose(merged[:144], query, atol=1e-5)


def test_a_run_to_start_from_gives_weights_and_words_not_settings(prepared_reaf, started, tmp_path, capsys):
    from reaf_hsenet.models.fusion import layer_weights

    out = tmp_path / "mean"
    flags = ("--init", started, "--fusion", "mean", "--lr", "1e-9", "--max-steps", 1)
    assert train.main(tiny(prepared_reaf, out, *flags)) == 0
    assert "left at their start" not in capsys.readouterr().out
    found, base = weights(out), weights(started)
    assert torch.equal(found["vision.fusion.slice.weights"], layer_weights("mean", 2))
    assert torch.allclose(found["text.word_embed.weight"], base["text.word_embed.weight"], atol=1e-6)
    assert (out / "vocab.txt").read_text() == (started / "vocab.txt").read_text()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


@pytest.mark.slow
def test_two_processes_with_grad_cache_train_as_one_process_does(prepared_reaf, tmp_path):
    runs = {}
    for port, (name, batch, more) in enumerate(
        (
            ("one", 4, ()),
            ("two", 2, ("--grad-cache", "1")),
            ("accumulate", 2, ("--grad-cache", "1", "--accumulate", "2")),
            ("accumulate-one", 4, ("--accumulate", "2")),
        )
    ):
        flags = ["--max-steps", "2", "--batch-size", str(batch), *more]
        command = tiny(prepared_reaf, tmp_path / name)
        command[command.index("--batch-size") : command.index("--batch-size") + 2] = []
        if name.endswith("one"):
            assert train.main([*command, *flags]) == 0
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*TORCHRUN, str(29611 + port), str(ROOT / "train.py"), *command, *flags],
                capture_output=True,
                text=True,
                timeout=240,
                env=environment,
            )
            assert done.returncode == 0, done.stderr
        runs[name] = weights(tmp_path / name)
    for name, alone in (("two", "one"), ("accumulate", "accumulate-one")):
        for key, tensor in runs[alone].items():
            assert (runs[name][key] - tensor).abs().max() < 1e-4, (name, key)  # see the test above


@pytest.mark.slow
def test_wrong_reaf_flags_are_named(prepared_reaf, started, tmp_path):
    def line(*flags, data=prepared_reaf):
        with pytest.raises(InputError) as caught:
            train.main(tiny(data, tmp_path / "r", *flags))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--region-size (9, 9, 9): does not fit the grid of (4, 4, 4)" in line("--region-size", 9, 9, 9)
    assert "--fusion" in line("--fusion", "median")
    assert "--drop-path 1.0" in line("--drop-path", 1)
    assert "--unfreeze-text" in line("--unfreeze-text", "some")
    assert "--grad-cache 0" in line("--grad-cache", 0)
    assert "--lora-r: needs --lora" in line("--lora-r", 4)
    assert "--lora vision: needs weights to adapt, --init" in line("--lora", "vision")
    assert "--lora text: needs weights to adapt, --text-model" in line("--lora", "text")
    lora = ("--init", started, "--lora", "text", "text")
    assert "gate name no linear layer" in line(*lora, "--lora-targets", "gate")
    assert "--unfreeze-text: with --lora text" in line(*lora, "--unfreeze-text", 1)
    assert "--unfreeze-text 50: the text encoder has 1 blocks" in line("--unfreeze-text", 50)
    assert "--fusion-seed 3000000000" in line("--fusion-seed", 3_000_000_000)
    assert "scan_layers (7,)" in line("--scan-layers", 7)
    (tmp_path / "x.pt").write_bytes(b"no")
    assert "x.pt: is truncated or not a checkpoint" in line("--init", tmp_path / "x.pt")
    assert "nowhere.pt: no such folder" in line("--init", "./nowhere.pt")
    torch.save({f"module.{n}": t for n, t in published_mae(width=144).items()}, tmp_path / "mae.pth")
    assert "mae.pth: does not fit this model" in line("--init", tmp_path / "mae.pth")
    hsenet = script("train.py", "--stage", "clip1", "--data", prepared_reaf, "--regions", 2, cwd=tmp_path)
    assert "--regions: is an option of --model reaf" in error_line(hsenet)
