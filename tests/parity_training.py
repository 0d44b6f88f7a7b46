"""Optimizer steps of the published training code: this project's own step is run on the same weights and
batches.

Nothing of a step is written again here: groups, schedule, losses, clipping, clamping and freezing are the
package's.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import fill as kit
from parity_case import Case, Check, equal
from reaf_hsenet.config import (
    NO_AUGMENTATION,
    STAGES,
    ClipConfig,
    GuidedVisionConfig,
    ReafVisionConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.models.clip import DualEncoder, build_dual_encoder, freeze_text, set_grad_checkpoint
from reaf_hsenet.train.contrastive import Contrastive, Guided, Teacher, encode
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.optimizer import learning_rate
from reaf_hsenet.train.training_state import TrainingState
from reaf_hsenet.weights.files import load_strictly
from reaf_hsenet.weights.names import BERT, M3D_CLIP, REAF, TEACHER, import_state, places, teacher_tensors
from reaf_hsenet.weights.shapes import flat_reaf
from train import train_step

CPU = Ranks(0, 1, torch.device("cpu"))


def check_training(case: Case) -> Iterator[Check]:
    config = case["config"]
    model_config, settings = _model_config(case), _settings(config)
    model = build_dual_encoder(model_config).double()
    published = _weights(case)
    state, names = _renamed(published, case["weights_kept_as_computed"], model_config, model)
    load_strictly(model, state, case.name)
    if settings.text_blocks is not None:
        freeze_text(model, settings.text_blocks)
    set_grad_checkpoint(model, settings.grad_checkpoint)
    stage = Contrastive()
    if "relation_weight" in config:
        teacher = build_dual_encoder(
            replace(model_config, vision=VisionConfig(*_sizes(config["vision"])))
        ).double()
        load_strictly(teacher, import_state(M3D_CLIP, teacher_tensors(published)), case.name)
        stage = Guided(
            Teacher(teacher, CPU.device, None, config["batch"], True),
            settings.relation,
            settings.relation_steps,
        )
    job = Job(
        model,
        None,
        encode=encode,
        loss=stage.loss,
        validate=None,
        blocks=[],
        bad=None,
        after_step=model.clamp_scale,
    )
    state = TrainingState(job, settings, CPU)
    yield from _check_groups(config, state, names)
    start = {name: t.clone() for name, t in _published(model, names).items()}
    for k, want in enumerate(case["steps"]):
        rate = learning_rate(k, config["total_steps"], settings)
        yield Check(f"rate of step {k}", abs(rate - want["lr"]), 1e-12 * (want["lr"] or 1))
        done = train_step(state, [_batch(case, k)], k, rate, lambda: 0)
        yield Check(f"loss of step {k}", abs(done.loss - want["loss"]), 1e-9)
        yield Check(f"gradient of step {k}", abs(done.norm / want["grad_norm"] - 1), 1e-9)
        if "relation" in want:
            yield Check(
                f"relation of step {k}", abs(float(done.numbers["relation"]) - want["relation"]), 1e-9
            )
        if "logit_scale_after" in want:
            yield Check(
                f"scale after step {k}", abs(model.logit_scale.item() - want["logit_scale_after"]), 1e-9
            )
    yield from _check_updates(case, start, _published(model, names), settings)


def _settings(config: dict) -> TrainConfig:
    """The published recipe of the stage, with the case's own numbers."""
    reaf = config["method"] == "reaf"
    stage = "clip2" if "relation_weight" in config else "clip1"
    own = {
        **{name: config[name] for name in ("lr", "weight_decay", "eps", "clip_norm", "epochs")},
        "betas": tuple(config["betas"]),
        "batch_size": config["batch"],
        "warmup": config["warmup_epochs"] / config["epochs"] if reaf else config["warmup_ratio"],
        "precision": "fp32",  # no autocast: the step computes in the type of the weights
        "augment": NO_AUGMENTATION,
    }
    if reaf:
        own |= {
            "text_blocks": config["text_unlocked_layers"],
            "grad_checkpoint": config["grad_checkpointing"],
        }
    if stage == "clip2":
        own |= {"relation": config["relation_weight"], "relation_steps": config["relation_steps"]}
    return replace(STAGES[stage, config["method"]], **own)


def _sizes(vision: dict) -> tuple:
    width = vision.get("hidden_size", vision.get("embed_dim"))
    mlp = vision["mlp_dim"] if "mlp_dim" in vision else int(width * vision["mlp_ratio"])
    layers = vision.get("num_layers", vision.get("depth"))
    return tuple(vision["img_size"]), tuple(vision["patch_size"]), width, layers, vision["num_heads"], mlp


def _model_config(case: Case) -> ClipConfig:
    config, vision, text = case["config"], case["config"]["vision"], case["config"]["text"]
    words = TextConfig(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        depth=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        mlp=text["intermediate_size"],
        positions=text["max_position_embeddings"],
        token_types=text["type_vocab_size"],
        layer_norm_eps=text["layer_norm_eps"],
        dropout=config["dropout"],
        attention_dropout=config["dropout"],
        pad_id=text["pad_token_id"],
    )
    if config["method"] == "reaf":
        encoder = ReafVisionConfig(
            *_sizes(vision), scan_layers=tuple(vision["scan_attn_indexes"]), drop_path=config["drop_path"]
        )
        return ClipConfig(
            "reaf", encoder, words, config["embed_dim"], projection_bias=False, logit_scale="exp"
        )
    if "image_2d" in case["inputs"]:
        _, slices, width = case["inputs"]["image_2d"]["shape"]
        encoder = GuidedVisionConfig(*_sizes(vision), slices, width, guidance_dropout=config["dropout"])
    else:
        encoder = VisionConfig(*_sizes(vision))
    return ClipConfig(vision=encoder, text=words, embed=vision["hidden_size"])


def _weights(case: Case) -> dict[str, Tensor]:
    """The whole checkpoint, under its published names."""
    made = case.weights()
    return made | {
        name: torch.tensor(value, dtype=torch.float64) for name, value in case["weights_set"].items()
    }


def _renamed(
    published: dict, computed: dict, config: ClipConfig, model: DualEncoder
) -> tuple[dict, dict[str, list[str]]]:
    """(the state_dict, our name -> the published names whose tensors it joins). computed: fixed tables."""
    if config.model == "reaf":
        fixed = {n: t for n, t in model.state_dict().items() if n == "vision.pos_embed" or ".fusion." in n}
        state = flat_reaf(import_state(REAF, published), config.vision.grid)
        return state | fixed, places(REAF, [*published, *computed])
    return import_state(M3D_CLIP, published), places(M3D_CLIP, published)


def _published(model: DualEncoder, names: dict[str, list[str]]) -> dict[str, Tensor]:
    """The model's tensors under their published names, flattened."""
    state = model.state_dict()
    found = {}
    for ours, theirs in names.items():
        for name, part in zip(theirs, torch.atleast_1d(state[ours]).chunk(len(theirs)), strict=True):
            found[name] = part.detach().flatten()
    return found


def _batch(case: Case, k: int) -> Batch:
    config, inputs = case["config"], case["inputs"]
    rows = [(k * config["batch"] + i) % config["rows"] for i in range(config["batch"])]
    volume = case.input("volume").double()[rows]
    spec = inputs["input_ids"]
    ids = torch.from_numpy(kit.token_ids(spec["name"], spec["shape"], spec["vocab_size"], spec["seed"])) + 1
    lengths = torch.tensor(spec["lengths"])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    slices = case.input("image_2d").double()[rows] if "image_2d" in inputs else None
    return Batch(volume, (ids * mask)[rows], mask[rows], rows, slices, counts=[len(rows)])


def _check_groups(config: dict, state: TrainingState, names: dict[str, list[str]]) -> Iterator[Check]:
    """Which tensors are trained, and which of them decay. A BERT's pooler has no place here, and no
    gradient there.
    """
    known = {id(p): n for n, p in state.model.named_parameters()}
    groups = state.optimizer.param_groups
    trained = {n for g in groups for p in g["params"] for n in names[known[id(p)]]}
    decayed = {n for g in groups if g["weight_decay"] for p in g["params"] for n in names[known[id(p)]]}
    still = set(config["no_gradient"])
    yield equal("trained", sorted(trained), sorted(set(config["trained"]) - still))
    yield equal("decayed", sorted(decayed), sorted(set(config["decayed"]) - still))


def _check_updates(case: Case, start: dict, end: dict, settings: TrainConfig) -> Iterator[Check]:
    noise, moved = case["noise"], sum(step["lr"] for step in case["steps"])
    for name, want in case["updates"].items():
        update, final = end[name] - start[name], end[name].clone()
        at = np.round(np.linspace(0, len(update) - 1, 8)).astype(int)
        if name in noise:
            first, last = noise[name]
            yield Check(f"{name} noise", update[first:last].abs().max().item(), 1e-6 * moved)
            kept = torch.cat((update[:first], update[last:]))
            if len(kept) == 0:
                continue
            final = torch.cat((final[:first], final[last:]))
        else:
            kept = update
        error = max(
            abs(update[i].item() - v) for i, v in zip(at, want["update_at"], strict=True) if v is not None
        )
        yield Check(f"{name} update", error, 1e-8 * want["update_max"])
        yield Check(
            f"{name} largest update",
            abs(kept.abs().max().item() - want["update_max"]),
            1e-8 * want["update_max"],
        )
        yield Check(f"{name} norm of the update", abs(kept.norm().item() / want["update_l2"] - 1), 1e-8)
        yield Check(f"{name} norm", abs(final.norm().item() / want["l2"] - 1), 1e-8)
    for name in case["unmoved"]:
        if name in end:
            yield equal(f"{name} unmoved", end[name].equal(start[name]), True)
        else:  # the teacher, which is no part of what is trained, or a pooler, which has no place here
            inner = re.sub(r"^(stage1_pretrained_CLIP\.)?(language_encoder|text\.transformer)\.", "", name)
            yield equal(f"{name} is used", name.startswith(TEACHER) or not places(BERT, [inner]), True)
