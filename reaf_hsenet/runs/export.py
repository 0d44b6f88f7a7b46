"""Runs of this project -> the names that published code reads: the same renaming backwards.

Which published tensor one of ours comes from is read off the functions that load them (names.sources), so
that loading what was exported gives the same tensors, bit for bit. The config.json beside it holds what no
shape tells.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from reaf_hsenet.config import GuidedVisionConfig, ReafVisionConfig, TextConfig, VisionConfig
from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import atomic_write, write_json
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.conversion import NOT_USED, new_folder
from reaf_hsenet.runs.dual import open_source
from reaf_hsenet.runs.trained import (
    STAGES,
    DualEncoderRun,
    MllmRun,
    base_decoder,
    is_published,
    load_dual_encoder,
    load_mllm,
    load_source,
)
from reaf_hsenet.settings import to_dict
from reaf_hsenet.weights.adapters import adapter_state, save_adapter
from reaf_hsenet.weights.decoder import save_decoder
from reaf_hsenet.weights.names import TEACHER, bert_state, m3d_clip_state, reaf_names, sources
from reaf_hsenet.weights.packer import published_language_state
from reaf_hsenet.weights.reading import State, read_weights_file
from reaf_hsenet.weights.shapes import OWN, TEXT_KEYS

FORMATS = ("m3d-clip", "hlip", "reaf", "transformers")


def export(folder: Path, out: Path, kind: str, which: str | None = None) -> list[str]:
    """Write a run's weights as one of FORMATS. Returns notes, a sentence each. Raises InputError where a run
    is none.

    which: the checkpoint, as of Run.choose.
    """
    with new_folder(out):
        stage = Run(folder).read_config().get("stage")
        if stage not in STAGES:
            run = load_dual_encoder(folder, which)
            return export_text(run, out) if kind == "transformers" else export_dual(run, out, kind)
        if kind != "transformers":
            raise InputError(f"--format {kind}: {folder} is a language run; expected --format transformers")
        return export_language(load_mllm(folder, which), out)


def export_dual(run: DualEncoderRun, out: Path, kind: str) -> list[str]:
    """Both towers and their projections, with config.json and vocab.txt."""
    fused = getattr(run.config.vision, "fusion", None) is not None
    wanted = "m3d-clip" if run.config.model == "hsenet" else "reaf" if fused else "hlip"
    if kind != wanted:
        raise InputError(
            f"--format {kind}: {run.folder} is a {run.config.model} run{' with fusion' if fused else ''}; "
            f"expected --format {wanted} or transformers"
        )
    notes: list[str] = []
    state = published_dual_state(run, notes)
    if kind == "m3d-clip":
        teacher = _teacher(run, notes)
        if teacher is not None:
            state |= {f"{TEACHER}{n}": t for n, t in published_dual_state(teacher, notes).items()}
        _save(out / "model.safetensors", state)
    else:  # as open_clip saves it
        with atomic_write(out / "checkpoint.pt", "wb") as file:
            torch.save({"state_dict": state}, file)
    run.tokenizer.save(out)
    write_json(out / "config.json", _settings(run))
    return notes


def published_dual_state(run: DualEncoderRun, notes: list[str]) -> State:
    """A dual encoder's tensors under the published names, with those that its own published file had
    beside them.
    """
    if is_published(run.folder):  # the teacher's, as it is
        return open_source(str(run.weights)).state
    config, vision = run.config, run.config.vision
    reaf = isinstance(vision, ReafVisionConfig)
    names = list(reaf_tensors(vision, config.text) if reaf else m3d_clip_tensors(vision, config.text))
    ours = {n: t for n, t in stored_state(run).items() if not n.startswith("vision.fusion.")}
    state = under_published_names(ours, names, reaf_names if reaf else m3d_clip_state, str(run.folder))
    if reaf:
        kernel, table = "visual.trunk.patch_embed.proj.weight", "visual.trunk.spatial_posemb"
        state[kernel] = state[kernel].reshape(vision.width, 1, *vision.patch)
        state[table] = state[table].unflatten(1, vision.grid)
    return state | _not_used(run, notes)


def stored_state(run: DualEncoderRun) -> State:
    """The checkpoint's tensors in their own type; of an adapted model, the matrices with their adapters
    added.
    """
    return merged_state(run.model) if run.config.lora else read_weights_file(run.weights)


def under_published_names(
    ours: State, names: list[str], renaming: Callable[[State], State], source: str
) -> State:
    """ours: all tensors, under our names. names: all published ones, each of which `renaming` finds a
    place for.
    """
    places = sources(names, renaming)
    if other := sorted(set(places) ^ set(ours)):
        raise InputError(f"{source}: the published format and this run differ in {first_six(other)}")
    state = {}
    for name, parts in places.items():
        pieces = ours[name].chunk(len(parts)) if len(parts) > 1 else (ours[name],)
        state |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return state


def _parts(*names: str) -> Iterator[str]:
    return (f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def bert_tensors(config: TextConfig, prefix: str = "") -> Iterator[str]:
    """Names of transformers' BertModel without its pooler."""
    for table in ("word", "position", "token_type"):
        yield f"{prefix}embeddings.{table}_embeddings.weight"
    yield from _parts(f"{prefix}embeddings.LayerNorm")
    for i in range(config.depth):
        attention = (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            "attention.output.dense",
        )
        layers = (
            *attention,
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
        yield from _parts(*(f"{prefix}encoder.layer.{i}.{layer}" for layer in layers))


def m3d_clip_tensors(vision: VisionConfig, text: TextConfig) -> Iterator[str]:
    """Names of M3D-CLIP, or of HSENet's stage 2 without the model it carries."""
    yield from (
        "logit_scale",
        "vision_encoder.cls_token",
        "vision_encoder.patch_embedding.position_embeddings",
    )
    yield from _parts(
        "mm_vision_proj",
        "mm_language_proj",
        "vision_encoder.patch_embedding.patch_embeddings.1",
        "vision_encoder.norm",
    )
    for i in range(vision.depth):
        block = f"vision_encoder.blocks.{i}"
        yield f"{block}.attn.qkv.weight"
        yield from _parts(
            *(
                f"{block}.{layer}"
                for layer in ("mlp.linear1", "mlp.linear2", "norm1", "norm2", "attn.out_proj")
            )
        )
    if isinstance(vision, GuidedVisionConfig):
        guidance = (
            f"slice_guided_attention.{layer}" for layer in ("Wq", "Wk", "Wv", "output_linear", "norm")
        )
        yield from _parts(*(f"vision_encoder.{layer}" for layer in (*guidance, "patch_score_proj")))
    yield from bert_tensors(text, "language_encoder.")


def reaf_tensors(vision: ReafVisionConfig, text: TextConfig) -> Iterator[str]:
    """Names of REAF's and HLIP's dual encoder, as open_clip has them."""
    yield from ("logit_scale", "visual.head.proj.weight", "text.proj.weight")
    yield from ("visual.trunk.cls_token", "visual.trunk.spatial_posemb")
    layers = ["patch_embed.proj", "norm", *(["fusion_layer"] if vision.fusion else [])]
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers += [f"blocks.{i}.{layer}" for i in range(vision.depth) for layer in block]
    yield from _parts(*(f"visual.trunk.{layer}" for layer in layers))
    yield from bert_tensors(text, "text.transformer.")


def export_text(run: DualEncoderRun, out: Path) -> list[str]:
    """The text encoder as a BERT folder that transformers reads."""
    notes: list[str] = []
    ours = {n.removeprefix("text."): t for n, t in stored_state(run).items() if n.startswith("text.")}
    state = under_published_names(ours, list(bert_tensors(run.config.text)), bert_state, str(run.folder))
    for prefix in ("language_encoder.", "text.transformer."):
        state |= {n.removeprefix(prefix): t for n, t in _not_used(run, notes).items() if n.startswith(prefix)}
    _save(out / "model.safetensors", state)
    run.tokenizer.save(out)
    write_json(out / "config.json", text_settings(run.config.text))
    return list(dict.fromkeys(notes))


def text_settings(config: TextConfig) -> dict:
    """A config.json as transformers writes it."""
    return {
        "architectures": ["RobertaModel" if config.kind == "roberta" else "BertModel"],
        "model_type": config.kind,
        **{key: getattr(config, name) for name, key in TEXT_KEYS.items()},
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "pad_token_id": config.pad_id,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }


def export_language(run: MllmRun, out: Path) -> list[str]:
    """OUT: the decoder as a transformers folder; OUT/adapter: its adapters as peft's;
    OUT/mm_projector_and_lora.bin: packers and adapters as HSENet saves them.
    """
    decoder = (
        run.model.decoder if run.config.full else base_decoder(replace(run.config, int8=False), run.origin)
    )
    save_decoder(decoder, out)
    run.tokenizer.save(out)
    adapters = {} if run.config.full else {n: t.cpu() for n, t in adapter_state(run.model.decoder).items()}
    if adapters:
        save_adapter(run.model.decoder, out / "adapter", str(out))
    notes = [f"{out}: the decoder" + (", OUT/adapter: its adapters" if adapters else ", all of it trained")]
    state = published_language_state(list(run.model.projectors), adapters)
    with atomic_write(out / "mm_projector_and_lora.bin", "wb") as file:
        torch.save({name: tensor.detach().clone() for name, tensor in state.items()}, file)
    packers = out / "mm_projector_and_lora.bin"
    return [
        *notes,
        f"{packers}: packers and adapters under HSENet's names; the encoders are runs of their own, to be "
        f"exported",
    ]


def _teacher(run: DualEncoderRun, notes: list[str]) -> DualEncoderRun | None:
    """The stage-1 run that a stage-2 run learned from, where it still is."""
    if run.stage != "clip2":
        return None
    folder = run.origin.get("teacher")
    there = folder and (Run(folder).exists or is_published(Path(folder)))
    teacher = (
        load_source(folder, run.origin.get("text_model"), run.origin.get("teacher_sha256")) if there else None
    )
    if teacher is None or teacher.sha256() != run.origin.get("teacher_sha256"):
        notes.append(f"without the stage-1 model ({TEACHER}*): {folder} is no longer there, or another one")
        return None
    return teacher


def _not_used(run: DualEncoderRun, notes: list[str]) -> State:
    path = Run(run.folder).folder / NOT_USED
    if path.is_file():
        return read_weights_file(path)
    notes.append(
        f"{run.folder}: a BERT's pooler is not trained here, so the export has none; the dual encoders do "
        f"not use it"
    )
    return {}


def _settings(run: DualEncoderRun) -> dict:
    """config.json: M3D-CLIP's keys, for other readers, and all of this project's settings."""
    vision = run.config.vision
    values = {
        "img_size": list(vision.size),
        "patch_size": list(vision.patch),
        "hidden_size": vision.width,
        "mlp_dim": vision.mlp,
        "num_layers": vision.depth,
        "num_heads": vision.heads,
        "in_channels": 1,
    }
    if isinstance(vision, GuidedVisionConfig):
        values["num_slices"] = vision.slices
    config = replace(run.config, lora=None)
    return {**values, OWN: {"model": to_dict(config), "recipe": to_dict(run.recipe), "slices": run.slices}}


def _save(path: Path, state: dict[str, Tensor]) -> None:
    with atomic_write(path, "wb") as file:
        file.write(save({n: t.detach().cpu().contiguous() for n, t in state.items()}, {"format": "pt"}))
