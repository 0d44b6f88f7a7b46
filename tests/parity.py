"""Check this project against expected numbers of the published implementations, one line a case.

    python tests/parity.py DIR [--real DIR]      # exits 1 when a case fails

DIR holds case files <case>.json, with <case>.safetensors where there are tensors; a case's `module` says what
it checks, and everything else (shapes, seeds, settings) is read from it. Modules that are not built yet are
skipped by name. Preprocessing cases need the CT files they name, below --real (default: DIR/../real).
"""

import argparse
import csv
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import fill as kit  # noqa: E402
from parity_case import STRICT32, STRICT64, Case, Check, NotBuilt, equal  # noqa: E402
from parity_decoder import check_decoder  # noqa: E402
from parity_lora import check_lora  # noqa: E402
from parity_metrics import check_porter, check_text_scores, check_vqa  # noqa: E402
from parity_packer import check_packer_attention, check_projector, check_spatial_packer  # noqa: E402
from parity_text import check_llm_inputs, check_tokenizers  # noqa: E402
from parity_training import check_training  # noqa: E402
from reaf_hsenet.config import RECIPES, TextConfig  # noqa: E402
from reaf_hsenet.data.labels import load_label_set  # noqa: E402
from reaf_hsenet.data.preprocessing import preprocess, resampled_grid  # noqa: E402
from reaf_hsenet.data.slice_features import normalise  # noqa: E402
from reaf_hsenet.data.slices import SLICE_RECIPES, axial_slices, fit, through_jpeg  # noqa: E402
from reaf_hsenet.data.sources.ct_rate import read_ct_rate  # noqa: E402
from reaf_hsenet.data.volume import Volume, read_volume  # noqa: E402
from reaf_hsenet.metrics.classification import classification_report  # noqa: E402
from reaf_hsenet.metrics.retrieval import cross_retrieval, label_overlap  # noqa: E402
from reaf_hsenet.models.fusion import build_fusion  # noqa: E402
from reaf_hsenet.models.positions import depth_plus_2d, resample_3d, sincos_1d, sincos_grid  # noqa: E402
from reaf_hsenet.models.reaf import REAF  # noqa: E402
from reaf_hsenet.models.saliency import RegionalSaliency  # noqa: E402
from reaf_hsenet.models.slice_encoder import SliceEncoder  # noqa: E402
from reaf_hsenet.models.slice_guidance import SliceGuidedAttention, ViT2E3  # noqa: E402
from reaf_hsenet.models.text_encoder import Pooler, TextEncoder  # noqa: E402
from reaf_hsenet.models.vit3d import ViT3D  # noqa: E402
from reaf_hsenet.train.losses import (  # noqa: E402
    contrastive_logits,
    contrastive_loss,
    relation_loss,
    relation_weight,
)
from reaf_hsenet.weights.files import load_strictly  # noqa: E402
from reaf_hsenet.weights.names import BERT, TRUNK, VIT2D, VIT3D, import_state  # noqa: E402
from reaf_hsenet.weights.shapes import bert_config, flat_reaf, inflated  # noqa: E402


def check_fill(case: Case) -> Iterator[Check]:
    for row in case["rows"]:
        size = (row["vocab_size"],) if "vocab_size" in row else ()
        made = getattr(kit, row["function"])(row["name"], row["shape"], *size, seed=row["seed"]).astype(
            np.float64
        )
        name = f"{row['function']} {row['name']}"
        error = np.abs(made.reshape(-1)[: len(row["first"])] - row["first"]).max()
        yield Check(f"{name} first values", float(error), 1e-12)
        yield Check(f"{name} mean", abs(made.mean() - row["mean"]), 1e-9 * max(1.0, abs(row["mean"])))
        yield Check(f"{name} std", abs(made.std() - row["std"]), 1e-9 * max(1.0, row["std"]))


def check_vit3d(case: Case) -> Iterator[Check]:
    """Stage 1, or stage 2 where the case has slice features."""
    config = case["config"]
    sizes = (
        config["img_size"],
        config["patch_size"],
        config["hidden_size"],
        config["num_layers"],
        config["num_heads"],
        config["mlp_dim"],
    )
    guided = "image_2d" in case["inputs"]
    slices = case.input("image_2d") if guided else None
    model = (
        ViT2E3(*sizes, slices=config["num_slices"], slice_width=slices.shape[-1]) if guided else ViT3D(*sizes)
    )
    load_strictly(model, import_state(VIT3D, case.weights()), case.name)
    model.eval()
    volume = case.input("volume")
    for dtype, allowed, suffix in ((torch.float32, STRICT32, ""), (torch.float64, STRICT64, "__f64")):
        model.to(dtype)
        inputs = [x.to(dtype) for x in (volume, slices) if x is not None]
        found, hooks = {}, []
        for i, block in enumerate(model.blocks):
            keep = lambda _, __, out, i=i, found=found: found.__setitem__(f"block_{i}", out)
            hooks.append(block.register_forward_hook(keep))
        with torch.no_grad():
            found["tokens"] = model(*inputs)
            found["cls"] = found["tokens"][:, 0]
            patches = found["patch_embedding"] = model.embed(inputs[0])
            if guided:
                found["guided"] = model.guidance(patches, inputs[1])
                found["guided_attention"] = model.guidance.attention(patches, inputs[1])
                found["patch_scores"] = model.patch_scores(patches, inputs[1])
        for hook in hooks:
            hook.remove()
        yield from case.compare(found, allowed, suffix)


def check_slice_attention(case: Case) -> Iterator[Check]:
    width = case["config"]["emb_dim"]
    inputs = case.input("query"), case.input("slices")
    module = SliceGuidedAttention(width, width).eval()
    published = {f"slice_guided_attention.{n}": t for n, t in case.weights().items()}
    state = {n.removeprefix("guidance."): t for n, t in import_state(VIT3D, published).items()}
    load_strictly(module, state, case.name)
    for dtype, allowed, suffix in ((torch.float32, STRICT32, ""), (torch.float64, STRICT64, "__f64")):
        query, slices = (x.to(dtype) for x in inputs)
        with torch.no_grad():
            module.to(dtype)
            found = {"out": module(query, slices), "attention": module.attention(query, slices)}
        yield from case.compare(found, allowed, suffix)


def check_slice_encoder(case: Case) -> Iterator[Check]:
    c = case["config"]
    width = c["embed_dim"]
    model = SliceEncoder(
        c["img_size"],
        c["patch_size"],
        width=width,
        depth=c["depth"],
        heads=c["num_heads"],
        mlp=width * c["mlp_ratio"],
    )
    load_strictly(model, import_state(VIT2D, case.weights()), case.name)
    model.eval()
    images = case.input("images")
    for dtype, allowed, suffix in ((torch.float32, STRICT32, ""), (torch.float64, STRICT64, "__f64")):
        model.to(dtype)
        found, hooks = {}, []
        for i, block in enumerate(model.blocks):
            keep = lambda _, __, out, i=i, found=found: found.__setitem__(f"block_{i}", out)
            hooks.append(block.register_forward_hook(keep))
        with torch.no_grad():
            found["feature"] = model(images.to(dtype))
        for hook in hooks:
            hook.remove()
        yield from case.compare(found, allowed, suffix)


def check_relation(case: Case) -> Iterator[Check]:
    values = case["values"]
    unit = {n: torch.nn.functional.normalize(case.input(n).double(), dim=-1) for n in case["inputs"]}
    image, text = (unit[n].requires_grad_() for n in ("image", "text"))
    scale = torch.tensor(case["config"]["logit_scale"], dtype=torch.float64, requires_grad=True)
    found, leaves = {}, (image, text, scale)

    def parts():
        student = contrastive_logits(image, text, scale)
        teacher = contrastive_logits(unit["image_stage1"], unit["text_stage1"], scale)
        return student, teacher, contrastive_loss(student), relation_loss(student, teacher)

    found["logits_stage2"], found["logits_stage1"], loss, relation = parts()
    gradients = torch.autograd.grad(relation, leaves)
    found["grad_relation_image"], found["grad_relation_text"] = gradients[:2]
    yield Check(
        "relation's gradient of the scale",
        abs(gradients[2].item() - values["grad_relation_logit_scale"]),
        1e-12,
    )
    yield Check("relation", abs(relation.item() - values["relation"]), 1e-12)
    yield Check("contrastive", abs(loss.item() - values["loss_contrastive_stage2"]), 1e-12)
    teachers = contrastive_loss(found["logits_stage1"]).item()
    yield Check("contrastive of stage 1", abs(teachers - values["loss_contrastive_stage1"]), 1e-12)
    for step, weight in values["relation_weight_by_step"].items():
        if step == "none":
            continue  # no step is evaluation, which has no relation loss here
        mine = relation_weight(int(step), 0.1, 5000)
        yield Check(f"weight at step {step}", abs(mine - weight), 1e-12)
        _, _, loss, relation = parts()
        total = loss + mine * relation
        yield Check(f"loss at step {step}", abs(total.item() - values["total_loss_by_step"][step]), 1e-12)
        if f"grad_total_image_step{step}" in case["outputs"]:
            gradients = torch.autograd.grad(total, leaves)
            found[f"grad_total_image_step{step}"], found[f"grad_total_text_step{step}"] = gradients[:2]
            error = abs(gradients[2].item() - values[f"grad_total_logit_scale_step{step}"])
            yield Check(f"gradient of the scale at step {step}", error, 1e-12)
    yield from case.compare(found, 1e-12)


def check_text_encoder(case: Case) -> Iterator[Check]:
    config = _text_config(case)
    published = case.weights()
    model = TextEncoder(**vars(config)).eval()
    load_strictly(model, import_state(BERT, published), case.name)
    pooler = Pooler(config.width)
    pooler.load_state_dict(
        {n.removeprefix("pooler."): t for n, t in published.items() if n.startswith("pooler.")}
    )
    inputs = {n.removeprefix("input."): t for n, t in case.stored.items() if n.startswith("input.")}
    ids, mask, types = inputs["ids"], inputs["mask"], inputs.get("token_type_ids")
    states = []
    hooks = [model.dropout.register_forward_hook(lambda _, __, out: states.append(out))]
    hooks += [b.register_forward_hook(lambda _, __, out: states.append(out)) for b in model.blocks]
    hidden = model(ids, mask, types)
    for hook in hooks:
        hook.remove()
    found = {
        "last_hidden_state": hidden,
        "pooler_output": pooler(hidden),
        "hidden_states": torch.stack(states),
    }
    plain = model(ids[:1])
    found |= {"plain_last_hidden_state": plain, "plain_pooler_output": pooler(plain)}
    found["cls_square_mean"] = hidden[:, 0].square().mean().reshape(1)
    if "ids_pad_inside" in inputs:
        inside = inputs["ids_pad_inside"]
        found |= {
            "position_ids": model.position_ids(ids),
            "pad_inside_position_ids": model.position_ids(inside),
            "pad_inside_last_hidden_state": model(inside, torch.ones_like(inside)),
            "from_embeds_last_hidden_state": model(mask=mask[1:], embeddings=model.word_embed(ids[1:])),
        }
    yield from case.compare(found, STRICT32)
    expected = case.values.get("grad_l2_of_cls_square_mean")
    if expected:
        found["cls_square_mean"].backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        yield from _check_gradients(expected, gradients, list(case["weights"]))


def _text_config(case: Case) -> TextConfig:
    """Through a config.json file, as a user's checkpoint would be read."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case["config"]))
        return bert_config(Path(folder))


def _check_gradients(expected: dict, gradients: dict[str, Tensor], published: list[str]) -> Iterator[Check]:
    """Gradient norms under the published names; the fused q, k, v gradient is cut into its three parts."""
    for name in published:
        if expected[name] is None:
            continue
        ours = next(iter(import_state(BERT, {name: torch.zeros(3)}))) if ".self." not in name else None
        if ours is None:
            layer, part, kind = re.match(
                r"encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.(\w+)", name
            ).groups()
            third = ("query", "key", "value").index(part)
            gradient = gradients[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3)[third]
        else:
            gradient = gradients[ours]
        yield Check(
            f"gradient of {name}", abs(gradient.norm().item() - expected[name]), 1e-3 * expected[name] + 1e-6
        )


def check_contrastive(case: Case) -> Iterator[Check]:
    image, text = (torch.nn.functional.normalize(case.input(n).double(), dim=-1) for n in ("image", "text"))
    scale = torch.tensor(case["config"]["logit_scale"], dtype=torch.float64)
    for tensor in (image, text, scale):
        tensor.requires_grad_()
    logits = contrastive_logits(image, text, scale)
    loss = contrastive_loss(logits)
    loss.backward()
    found = {
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "grad_image": image.grad,
        "grad_text": text.grad,
    }
    yield from case.compare(found, 1e-12)
    values = case["values"]
    yield Check("loss", abs(loss.item() - values["loss"]), 1e-12)
    yield Check("gradient of logit_scale", abs(scale.grad.item() - values["grad_logit_scale"]), 1e-12)
    if "diagnostic_loss_if_exponentiated" in values:
        other = contrastive_loss(contrastive_logits(image, text, scale.exp())).item()
        yield Check("loss with exp", abs(other - values["diagnostic_loss_if_exponentiated"]), 1e-12)


def check_positions(case: Case) -> Iterator[Check]:
    found = {}
    for name, spec in case["outputs"].items():
        shape, grids = spec["shape"], re.findall(r"\(([\d, ]+)\)", spec.get("what", ""))
        grids = [tuple(int(x) for x in g.split(",")) for g in grids]
        if "pos_embed_2d" in case["inputs"]:
            found[name] = depth_plus_2d(case.input("pos_embed_2d"), tuple(shape[1:4]))
        elif name.startswith("resampled"):
            found[name] = resample_3d(sincos_grid(grids[0], shape[-1])[None], grids[1])
        elif name.startswith("spatial"):
            found[name] = sincos_grid(tuple(shape[1:4]), shape[-1])[None]
        elif name.startswith("sequential"):
            found[name] = sincos_1d(shape[1], shape[-1])[None]
        elif name.startswith("sincos1d"):
            found[name] = sincos_1d(shape[0], shape[-1])
        elif name.startswith("sincos2d"):
            found[name] = sincos_grid(grids[0], shape[-1]).flatten(0, 1)
        else:
            raise NotBuilt(f"position table {name}")
    yield from case.compare(found, STRICT32)


# Of the published table, grid 14 x 14 x 14, width 768, in the kit's own float32. The last bit of a sine in
# float32 depends on the processor; where the table differs, a case's float64 tolerance is 1e-6 (see its
# `tolerance`).
PUBLISHED_TABLE_CRC = 1221108600


def check_reaf(case: Case) -> Iterator[Check]:
    config, fusion = case["config"], case["config"]["fusion"]
    saliency = {
        "region_size": fusion["region_spatial_size"],
        "regions": fusion["n_regions"],
        "suppression": fusion["suppression_factor"],
    }
    width, depth = config["embed_dim"], config["depth"]
    model = REAF(
        config["img_size"],
        config["patch_size"],
        width=width,
        depth=depth,
        heads=config["num_heads"],
        mlp=int(width * config["mlp_ratio"]),
        scan_layers=config["scan_attn_indexes"],
        saliency=saliency,
    )
    state = flat_reaf(import_state(TRUNK, case.weights()), tuple(config["grid"]))
    state = {name.removeprefix("vision."): tensor for name, tensor in state.items()}
    fixed = {n: t for n, t in model.state_dict().items() if n == "pos_embed" or n.startswith("fusion.")}
    load_strictly(model, state | fixed, case.name)
    model.eval()
    volume = case.input("volume")[:, 0]  # one scan a study
    same_table = zlib.crc32(sincos_grid((14, 14, 14), 768).numpy().tobytes()) == PUBLISHED_TABLE_CRC
    strict64 = STRICT64 if same_table else 1e-6
    for dtype, allowed, suffix in ((torch.float32, STRICT32, ""), (torch.float64, strict64, "__f64")):
        model.to(dtype)
        found, hooks = {}, []
        for i, block in enumerate(model.blocks):
            keep = lambda _, __, out, i=i, found=found: found.__setitem__(f"block_{i}_cls", out[:, 0])
            hooks.append(block.register_forward_hook(keep))
        with torch.no_grad():
            encoding = model.encode(volume.to(dtype))
        for hook in hooks:
            hook.remove()
        found["feature"] = encoding.tokens[:, 0]
        for name, branch in encoding.branches.items():
            found |= {
                f"{name}_embedding": branch.pooled,
                f"{name}_map": branch.map,
                f"fused_{name}": branch.fused,
            }
        yield from case.compare(found, allowed, suffix)
        for name, branch in encoding.branches.items():
            want, weights = case["values"][f"softmax_of_{name}_map"], branch.map[0].softmax(-1)
            yield equal(f"{name} largest weight{suffix}", weights.argmax().item(), want["largest_at"][0])
            yield Check(
                f"{name} class weight{suffix}", abs(weights[0].item() - want["class_token_weight"][0]), 1e-5
            )


def check_fusion_saliency(case: Case) -> Iterator[Check]:
    config = case["config"]
    layers = [case.input(n) for n in sorted(case["inputs"]) if n.startswith("layer_")]
    found, weights = {"batch": case.input("batch")}, case["values"]["layer_weights"]
    for count in (int(k) for k in weights):
        fuse = build_fusion("weighted_mean", count)
        found[f"fused{count}"] = fuse(layers[:count])
        error = (fuse.weights.double() - torch.tensor(weights[str(count)], dtype=torch.float64)).abs().max()
        yield Check(f"weights of {count} layers", error.item(), 1e-7)
    for option in ("default", "alternative"):
        c = config[option]
        enhance = RegionalSaliency(
            config["spatial_size"], c["region_spatial_size"], c["n_regions"], c["suppression_factor"]
        )
        for name in [n for n in found if not n.startswith("map_")]:
            found[f"map_{option}_{name}"] = enhance(found[name])
    yield from case.compare(found, STRICT32)


def check_mae(case: Case) -> Iterator[Check]:
    config = case["config"]
    patch, grid = tuple(config["patch_size"]), tuple(config["grid"])
    found = inflated({name: case.input(name) for name in case["inputs"]}, patch, grid)
    yield equal(
        "names",
        sorted(found),
        sorted({"pos_embed"} | set(case["values"]["output_keys"]) - {"spatial_posemb"}),
    )
    found["spatial_posemb"] = found.pop("pos_embed").unflatten(1, grid)
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"].unflatten(1, (1, *patch))
    yield from case.compare(found, STRICT32)


PREPROCESS_RECIPES = {
    "preprocess_hsenet_volume": RECIPES["hsenet"],
    "preprocess_bimcv_volume": replace(RECIPES["hsenet"], spacing=None),
    "preprocess_reaf": RECIPES["reaf"],
}


def check_preprocess(case: Case) -> Iterator[Check]:
    kind = re.fullmatch(r"preprocess_(\w+)_slices", case.name)
    if not (case.name in PREPROCESS_RECIPES or kind and kind.group(1) in SLICE_RECIPES):
        raise NotBuilt(f"no recipe for {case.name}")
    if not case.real.is_dir():
        raise NotBuilt(f"needs the CT files, {case.real} is absent; name their folder with --real")
    tables = [read_ct_rate(p.parent) for p in sorted(case.real.glob("*/dataset"))]
    cts = {c.id: c for t in tables for split in t.splits.values() for c in split}
    for name, variants in case["volumes"].items():
        for variant, want in variants.items():
            volume = read_volume(
                cts[name].path,
                cts[name].table,
                "metadata" if "double" in variant else "auto",
                "header" if "lps" in variant else "stored",
                "LPS",
            )
            _as_noted(volume, want.get("note", ""))
            if kind:
                yield from _check_slices(case, volume, kind.group(1), f"{name}/{variant}", want)
            else:
                yield from _check_input(case, volume, f"{name}/{variant}", want)


def _check_input(case: Case, volume: Volume, label: str, want: dict) -> Iterator[Check]:
    allowed = float(re.search(r"max abs (\S+)", case["suggested_tolerance"]).group(1))
    recipe = PREPROCESS_RECIPES[case.name]
    mine = replace(recipe, fit=label.split("/")[2] if label.count("/") > 1 else recipe.fit)
    image, grid = torch.from_numpy(preprocess(volume, mine)), resampled_grid(volume, mine)
    yield equal(f"{label} shape", list(image.shape), want["output"]["shape"])
    if "resampled" in want:
        yield equal(f"{label} resampled shape", list(grid.shape), want["resampled"]["shape"])
    if "crop_start" in want:
        box = [list(side) for side in zip(*grid.foreground(grid.range()[0]), strict=True)]
        yield equal(f"{label} crop", box, [want["crop_start"], want["crop_end"]])
    for sample in ("strided", "center"):
        stored = case.stored[f"{label}/{sample}"]
        error = (_sample(image, stored, sample, case["samples"]) - stored).abs().max().item()
        yield Check(f"{label} {sample}", error, allowed)
    yield Check(f"{label} mean", abs(image.double().mean().item() - want["output"]["mean"]), allowed)


GREY = 1 / 255 / 0.26  # one grey level of the normalised pictures: single pixels may differ by it
MEAN_GREY, MEAN_UINT8, DIFFERING = 1e-4, 1e-3, 1e-3  # and these are the kit's bounds of the averages


def _check_slices(case: Case, volume: Volume, recipe: str, label: str, want: dict) -> Iterator[Check]:
    if "crop_xyz" in want:
        volume.hu = volume.hu[tuple(slice(*side) for side in want["crop_xyz"])]
    if "literal_axis_rule" in label:
        # The published script leaves this volume's axes; turned so that x is up, ours must agree.
        volume = Volume(volume.hu.transpose(1, 2, 0), volume.spacing)
    slices = axial_slices(volume, SLICE_RECIPES[recipe])
    yield equal(f"{label} uint8 shape", list(slices.shape), want["uint8_rotated"]["shape"])
    yield Check(f"{label} uint8 mean", abs(slices.mean() - want["uint8_rotated"]["mean"]), MEAN_UINT8)
    if f"{label}/uint8_strided" in case.stored:
        error = np.abs(slices[::4, ::8, ::8] - case.stored[f"{label}/uint8_strided"].numpy().astype(int))
        yield Check(f"{label} uint8", float(error.max()), 1)
        yield Check(f"{label} uint8 differing", float((error > 0).mean()), DIFFERING)
    images = normalise(torch.from_numpy(fit(slices, want["output"]["shape"][-1])))
    yield equal(f"{label} shape", list(images.shape), want["output"]["shape"])
    pairs = {
        s: (_sample(images, case.stored[f"{label}/{s}"], s, case["samples"]), s)
        for s in ("strided", "center")
    }
    yield Check(f"{label} mean", abs(images.double().mean().item() - want["output"]["mean"]), MEAN_GREY)
    if f"{label}/with_jpeg_strided" in case.stored:
        images = normalise(torch.from_numpy(fit(through_jpeg(slices), want["output"]["shape"][-1])))
        pairs["jpeg"] = images[::4, :, ::16, ::16], "with_jpeg_strided"
    for kind, (found, key) in pairs.items():
        error = (found - case.stored[f"{label}/{key}"]).abs()
        yield Check(f"{label} {kind}", error.max().item(), GREY)
        yield Check(f"{label} {kind} mean abs", error.mean().item(), MEAN_GREY)


def _as_noted(volume, note: str) -> None:
    """Variants that change the volume say how: another spacing, or a part of it padded with a value."""
    spacing = re.search(r"spacing replaced by xy ([\d.]+) and z ([\d.]+)", note)
    if spacing:
        xy, z = map(float, spacing.groups())
        volume.spacing = (xy, xy, z)
    part = re.search(r"stored voxels \[(.+?)\].*padded with (-?\d+) by \(\((.+?)\)\) ", note)
    if part:
        box = tuple(slice(*map(int, s.split(":"))) for s in part.group(1).split(","))
        pads = np.array(re.findall(r"\d+", part.group(3)), int).reshape(3, 2)
        volume.hu = np.pad(volume.hu[box], pads, constant_values=int(part.group(2)))


def _sample(image: Tensor, stored: Tensor, kind: str, described: str) -> Tensor:
    if kind == "strided":
        steps = re.search(r"strided steps \(([\d, ]+)\)", described).group(1)
        return image[tuple(slice(None, None, int(s)) for s in steps.split(","))]
    starts = [(n - b) // 2 for n, b in zip(image.shape, stored.shape, strict=True)]
    return image[tuple(slice(s, s + b) for s, b in zip(starts, stored.shape, strict=True))]


def check_metrics(case: Case) -> Iterator[Check]:
    if "per_class" in case.values:
        yield from _check_classification(case)
        return
    if "pairs" in case.values:
        yield from check_text_scores(case)
        return
    if "samples" in case.values:
        yield from check_vqa(case)
        return
    if "volume_to_volume" not in case.values:
        raise NotBuilt(case.name)
    image, text = case.stored["image"], case.stored["text"]
    tables = cross_retrieval(image, text).tables
    for direction, key in (("volume_to_report", "image_to_text"), ("report_to_volume", "text_to_image")):
        for name, want in case[key].items():
            yield Check(f"{direction} {name}", abs(tables[direction][name] - want), 1e-7)
    labels, scans = _label_rows(case)
    want = case["volume_to_volume"]
    found = label_overlap(image, labels, scans)
    for name, value in want.items():
        for k, number in value.items() if isinstance(value, dict) else ((None, value),):
            mine = found[name] if k is None else found[name][k]
            yield Check(f"{name} {k or ''}", abs(mine - number), 1e-7)


def _check_classification(case: Case) -> Iterator[Check]:
    names, labels = case["class_names"], case.stored["labels"].numpy().astype(bool)
    means = {"mean_18": [], **load_label_set("ct-rate").means}
    found = classification_report(labels, case.stored["scores"].numpy(), names, means)
    rows = [(name, want, found["classes"][name]) for name, want in case["per_class"].items()]
    rows += [(name, case[name], found["means"][name]) for name in means if name in case.values]
    for name, want, mine in rows:
        for key, value in want.items():
            for metric, number in value.items() if isinstance(value, dict) else ((None, value),):
                got = mine["auroc" if key == "auc" else key]
                got = got if metric is None else got[metric]
                if number is None or got is None:
                    yield equal(f"{name} {key} {metric or ''}", got, number)
                else:
                    yield Check(f"{name} {key} {metric or ''}", abs(got - number), 1e-9)


def _label_rows(case: Case) -> tuple[Tensor, Tensor]:
    """The rows of the label table that the case names: stored beside it, or in the real table."""
    beside = case.path.with_name(case.path.stem + "_labels.safetensors")
    if beside.is_file():
        stored = load_file(beside)
        return stored["labels"], stored["scan"]
    table, start, end = re.match(r"(\S+) rows (\d+):(\d+)", case["label_rows"]).groups()
    if not (case.real / table).is_file():
        raise NotBuilt(f"needs {table}, name its folder with --real")
    with open(case.real / table, newline="") as file:
        rows = list(csv.DictReader(file))[int(start) : int(end)]
    names = [row.pop("VolumeName").rsplit("_", 1)[0] for row in rows]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    labels = torch.tensor([[int(float(v)) for v in row.values()] for row in rows])
    return labels, torch.tensor([number[n] for n in names])


CHECKS: dict[str, Callable[[Case], Iterator[Check]]] = {
    "fill": check_fill,
    "hsenet_vit_stage1": check_vit3d,
    "hsenet_vit_stage2": check_vit3d,
    "slice_guided_attention": check_slice_attention,
    "slice_encoder": check_slice_encoder,
    "spatial_packer": check_spatial_packer,
    "packer_attention": check_packer_attention,
    "projector": check_projector,
    "relation_loss": check_relation,
    "text_encoder": check_text_encoder,
    "contrastive_loss": check_contrastive,
    "position_tables": check_positions,
    "reaf": check_reaf,
    "reaf_fusion_saliency": check_fusion_saliency,
    "mae_inflation": check_mae,
    "decoder": check_decoder,
    "lora": check_lora,
    "tokenizers": check_tokenizers,
    "llm_inputs": check_llm_inputs,
    "preprocess": check_preprocess,
    "metrics": check_metrics,
    "porter": check_porter,
    "training": check_training,
}


def run_case(path: Path, real: Path) -> tuple[str, str]:
    """(PASS, FAIL, SKIP or FACT, the line to print)."""
    case = Case(path, real)
    if case.module is None:
        return "FACT", f"FACT {case.name}: nothing to run"
    if case.module not in CHECKS:
        return "SKIP", f"SKIP {case.name}: {case.module} is not built yet"
    try:
        checks = list(CHECKS[case.module](case))
    except NotBuilt as reason:
        return "SKIP", f"SKIP {case.name}: {case.module}: {reason}"
    worst = max(checks, key=lambda c: c.ratio)
    failed = [c for c in checks if not c.ratio <= 1]
    status = "FAIL" if failed else "PASS"
    return status, (
        f"{status} {case.name} ({case.module}): {len(checks)} checks, {len(failed)} failed; worst "
        f"{worst.error:.2e} of {worst.allowed:.2e} allowed, {worst.name}"
    )


def case_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.glob("*.json")) if "module" in json.loads(p.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=Path, help="folder of the CT files and label tables")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder")
    files = case_files(args.folder)
    if not files:
        parser.error(f"{args.folder}: holds no case files")
    statuses = []
    for path in files:
        status, line = run_case(path, args.real or args.folder.parent / "real")
        print(line, flush=True)
        statuses.append(status)
    print(", ".join(f"{statuses.count(s)} {s.lower()}" for s in ("PASS", "FAIL", "SKIP", "FACT")))
    return 1 if "FAIL" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
