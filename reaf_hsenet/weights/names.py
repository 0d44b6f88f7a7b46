"""Names of published checkpoints -> ours.

The functions `*_names` only rename, and join a BERT's query, key and value; `sources` reads from them which
published tensors one of ours is made of, so that what is shown and what is exported follow the same rules.
The functions `*_state` also give tensors our shapes: a flattened patch kernel, a position table of another
grid.
"""

import math
import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from reaf_hsenet.errors import InputError
from reaf_hsenet.models.positions import depth_plus_2d, resample_3d
from reaf_hsenet.weights.reading import State

TEACHER = "stage1_pretrained_CLIP."  # the prefix of the stage-1 model inside HSENet's stage 2

VIT3D_NAMES = (
    (r"^patch_embedding\.position_embeddings$", "pos_embed"),
    (r"^patch_embedding\.patch_embeddings\.1\.", "patch_embed.proj."),
    (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"^slice_guided_attention\.Wq\.", "guidance.query."),
    (r"^slice_guided_attention\.Wk\.", "guidance.key."),
    (r"^slice_guided_attention\.Wv\.", "guidance.value."),
    (r"^slice_guided_attention\.output_linear\.", "guidance.proj."),
    (r"^slice_guided_attention\.norm\.", "guidance.norm."),
    (r"^patch_score_proj\.", "score."),
)

BERT_NAMES = (
    (r"\.gamma$", ".weight"),  # the oldest files' names of LayerNorm parameters
    (r"\.beta$", ".bias"),
    (r"^embeddings\.word_embeddings\.", "word_embed."),
    (r"^embeddings\.position_embeddings\.", "pos_embed."),
    (r"^embeddings\.token_type_embeddings\.", "type_embed."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.output\.LayerNorm\.", r"\1.norm2."),
)
# Heads of timm's ViTs, and MAE's decoder, which a slice encoder does not use.
VIT_IGNORED = re.compile(r"^(head|fc_norm|pre_logits)\.|^decoder_|^mask_token$")

# Heads of masked-language models and CXR-BERT's projection, which the dual encoders do not use.
BERT_IGNORED = re.compile(r"^(cls\.|cls_projection_head\.|lm_head\.|pooler\.|.*position_ids$)")


def sources(names: Iterable[str], renaming: Callable[[State], State]) -> dict[str, list[str]]:
    """Our name -> the published names, in the order in which they are joined. What is not used has no
    entry.
    """
    names = list(names)
    tagged = {name: torch.full((1, 1), i, dtype=torch.int64) for i, name in enumerate(names)}
    return {ours: [names[i] for i in tags.flatten().tolist()] for ours, tags in renaming(tagged).items()}


def rename(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    """Apply every rule, in order, to every name."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise InputError(
                f"the checkpoint has two tensors for {name}: export one model's state_dict alone"
            )
        renamed[name] = tensor
    return renamed


def slice_encoder_state(published: State) -> State:
    """Names of BiomedCLIP's checkpoint (`visual.trunk.`), or of timm's and MAE's ViT -> SliceEncoder's.

    Only known heads are left out: a tensor that this encoder has no place for is for load_strictly to name.
    """
    names = {n.removeprefix("visual.trunk."): n for n in published if n.startswith("visual.trunk.")}
    names = names or {n: n for n in published}
    state = {n: published[full] for n, full in names.items() if not VIT_IGNORED.match(n)}
    return rename(state, ((r"^patch_embed\.proj\.", "patch_embed."),))


def vit3d_state(published: State) -> State:
    """Names of monai's ViT (M3D-CLIP, HSENet's two stages) -> ViT3D's and ViT2E3's."""
    return rename(published, VIT3D_NAMES)


def decoder_names(published: State) -> State:
    """Names of transformers' Phi and Llama -> Decoder's, whose q, k, v and gate, up are one matrix each."""
    state = {re.sub(r"^model\.", "", name): tensor for name, tensor in published.items()}
    for whole, parts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    ):
        for name in [n for n in state if f".{parts[0]}." in n]:
            pieces = [name.replace(parts[0], part) for part in parts]
            if (
                all(piece in state for piece in pieces)
                and len({state[piece].shape[1:] for piece in pieces}) == 1
            ):
                state[name.replace(parts[0], whole)] = torch.cat([state.pop(piece) for piece in pieces])
    return state


def bert_state(published: State) -> State:
    """Names of transformers' BERT and RoBERTa, with or without prefix -> TextEncoder's; q, k and v become
    one matrix.
    """
    inner = rename(published, ((r"^(bert|roberta)\.", ""),))
    state = rename({n: t for n, t in inner.items() if not BERT_IGNORED.match(n)}, BERT_NAMES)
    for name in [n for n in state if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        missing = [p for p in parts if p not in state]
        if missing:
            raise InputError(f"the checkpoint has {name} but no {missing[0]}")
        shapes = {tuple(state[p].shape) for p in parts}
        if len(shapes) > 1:
            raise InputError(
                f"the checkpoint's query, key and value of {name} have the shapes {sorted(shapes)}; "
                f"expected one shape"
            )
        state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(p) for p in parts])
    return state


def reaf_names(published: State) -> State:
    """Names of REAF's and HLIP's dual encoder (open_clip), with or without `module.`, or of its vision
    trunk alone.
    """
    parts: dict[str, State] = {"visual.trunk.": {}, "text.transformer.": {}}
    renamed = {
        "visual.head.proj.weight": "vision_proj.weight",
        "text.proj.weight": "text_proj.weight",
        "logit_scale": "logit_scale",
    }
    inner = {name.removeprefix("module."): tensor for name, tensor in published.items()}
    if "spatial_posemb" in inner:
        parts["visual.trunk."], inner = inner, {}
    state: State = {}
    for name, tensor in inner.items():
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix:
            parts[prefix][name.removeprefix(prefix)] = tensor
        else:
            state[renamed.get(name, name)] = tensor
    vision = rename(parts["visual.trunk."], ((r"^spatial_posemb$", "pos_embed"),))
    state |= {f"vision.{n}": t for n, t in vision.items()}
    return state | {f"text.{n}": t for n, t in bert_state(parts["text.transformer."]).items()}


def reaf_vision_state(published: State, grid: tuple[int, int, int]) -> State:
    """Names of REAF's and HLIP's trunk -> REAF's; a position table of another grid is resampled to `grid`."""
    trunk = {f"visual.trunk.{n}": t for n, t in published.items()}
    return {n.removeprefix("vision."): t for n, t in reaf_state(trunk, grid).items()}


def reaf_state(published: State, grid: tuple[int, int, int]) -> State:
    """Names and shapes of REAF's and HLIP's dual encoder -> DualEncoder's, as reaf_vision_state."""
    state = reaf_names(published)
    if (weight := state.get("vision.patch_embed.proj.weight")) is not None:
        if weight.ndim != 5:
            raise InputError(
                f"patch_embed.proj.weight is {tuple(weight.shape)}; expected channels, 1, and the patch's "
                f"D, H, W"
            )
        state["vision.patch_embed.proj.weight"] = weight.flatten(1)  # a Conv3d whose stride is its kernel
    if (table := state.get("vision.pos_embed")) is not None:
        if table.ndim != 5:
            raise InputError(
                f"spatial_posemb is {tuple(table.shape)}; expected 1, depth, height, width, channels"
            )
        state["vision.pos_embed"] = resample_3d(table, grid).flatten(1, 3)
    return state


def mae_state(published: State, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> State:
    """A 2D MAE or timm ViT -> REAF's encoder, as HLIP and REAF inflate it.

    The patch kernel is resized in the plane (bicubic, no antialiasing), summed over colours and spread evenly
    over depth; the position table is resampled and gets a sine-cosine over depth; the class token takes its
    position with it.
    """
    state = dict(published)
    table, kernel = state.pop("pos_embed"), state["patch_embed.proj.weight"]
    if (table.ndim, kernel.ndim) != (3, 4) or math.isqrt(table.shape[1]) ** 2 not in (
        table.shape[1],
        table.shape[1] - 1,
    ):
        raise InputError(
            f"pos_embed is {tuple(table.shape)}; expected 1, rows of a square with or without a class "
            f"token's, channels"
        )
    if round(table.shape[1] ** 0.5) ** 2 != table.shape[1]:  # one row more: the class token's
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, 1:]
    state["pos_embed"] = depth_plus_2d(table, grid).flatten(1, 3)
    if tuple(kernel.shape[2:]) != tuple(patch[1:]):
        kernel = F.interpolate(kernel.float(), size=patch[1:], mode="bicubic")
    kernel = kernel.sum(1).unsqueeze(1).expand(-1, patch[0], -1, -1) / patch[0]  # (C, p_d, p_h, p_w)
    return state | {"patch_embed.proj.weight": kernel.flatten(1)}


def m3d_clip_state(published: State) -> State:
    """Names of M3D-CLIP's and HSENet's dual encoders -> DualEncoder's; of stage 2 without what it carries."""
    state: State = {}
    parts: dict[str, State] = {"vision_encoder.": {}, "language_encoder.": {}}
    renamed = (("mm_vision_proj.", "vision_proj."), ("mm_language_proj.", "text_proj."))
    for name, tensor in published.items():
        if name.startswith((TEACHER, "visual_encoder_2D.")):  # the second is BiomedCLIP's, as it is published
            continue
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix:
            parts[prefix][name.removeprefix(prefix)] = tensor
        else:
            for old, new in renamed:
                name = name.replace(old, new) if name.startswith(old) else name
            state[name] = tensor
    state |= {f"vision.{n}": t for n, t in vit3d_state(parts["vision_encoder."]).items()}
    return state | {f"text.{n}": t for n, t in bert_state(parts["language_encoder."]).items()}


def teacher_state(published: State) -> State:
    """The stage-1 dual encoder inside a published stage-2 checkpoint, under DualEncoder's names; empty if
    there is none.
    """
    return m3d_clip_state({n.removeprefix(TEACHER): t for n, t in published.items() if n.startswith(TEACHER)})


def classifier_state(published: State) -> State:
    """Names of transformers' two classifiers and of RadBertClassifier (`model.`) -> ReportClassifier's."""
    inner = {re.sub(r"^(module\.)?(bert|roberta|model)\.", "", name): t for name, t in published.items()}
    roberta = "classifier.dense.weight" in inner  # RoBERTa's head has the pooler in it
    renamed = (
        {"classifier.dense.": "pooler.dense.", "classifier.out_proj.": "head."}
        if roberta
        else {"pooler.dense.": "pooler.dense.", "classifier.": "head."}
    )
    state, encoder = {}, {}
    for name, tensor in inner.items():
        prefix = next((p for p in renamed if name.startswith(p)), None)
        if prefix:
            state[renamed[prefix] + name.removeprefix(prefix)] = tensor
        else:
            encoder[name] = tensor
    return state | {f"encoder.{n}": t for n, t in bert_state(encoder).items()}
