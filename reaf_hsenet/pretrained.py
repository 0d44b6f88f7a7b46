"""Published checkpoints -> this project's names: files, hub ids, renaming, strict loading.

So far: BERT and RoBERTa folders (bert-base-uncased, BiomedBERT, CXR-BERT), the ViT of M3D-CLIP and HSENet, the dual
encoders of REAF and HLIP, and 2D MAE ViTs, which start REAF's encoder.
Nothing is unpickled, and nothing is downloaded unless a hub id (ORGANISATION/NAME, or ORGANISATION/NAME@REVISION) is
given where a folder is expected.
"""

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reaf_hsenet.config import TextConfig
from reaf_hsenet.data.reading import DAMAGED
from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import read_json
from reaf_hsenet.models.positions import depth_plus_2d, resample_3d

State = dict[str, Tensor]

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


def rename(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    """Apply every rule, in order, to every name."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
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


def bert_state(published: State) -> State:
    """Names of transformers' BERT and RoBERTa, with or without prefix -> TextEncoder's; q, k and v become one matrix."""
    inner = {re.sub(r"^(bert|roberta)\.", "", name): tensor for name, tensor in published.items()}
    state = rename({n: t for n, t in inner.items() if not BERT_IGNORED.match(n)}, BERT_NAMES)
    for name in [n for n in state if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        missing = [p for p in parts if p not in state]
        if missing:
            raise InputError(f"the checkpoint has {name} but no {missing[0]}")
        state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(p) for p in parts])
    return state


def reaf_vision_state(published: State, grid: tuple[int, int, int]) -> State:
    """Names of REAF's and HLIP's trunk -> REAF's; a position table of another grid is resampled to `grid`."""
    state = dict(published)
    weight = state.get("patch_embed.proj.weight")
    if weight is not None:
        state["patch_embed.proj.weight"] = weight.flatten(1)  # a Conv3d whose stride is its kernel
    table = state.pop("spatial_posemb", None)
    if table is not None:
        state["pos_embed"] = resample_3d(table, grid).flatten(1, 3)
    return state


def reaf_state(published: State, grid: tuple[int, int, int]) -> State:
    """Names of REAF's and HLIP's dual encoder (open_clip), with or without `module.` -> DualEncoder's."""
    parts: dict[str, State] = {"visual.trunk.": {}, "text.transformer.": {}}
    state: State = {}
    renamed = {
        "visual.head.proj.weight": "vision_proj.weight",
        "text.proj.weight": "text_proj.weight",
        "logit_scale": "logit_scale",
    }
    for name, tensor in published.items():
        name = name.removeprefix("module.")
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix:
            parts[prefix][name.removeprefix(prefix)] = tensor
        else:
            state[renamed.get(name, name)] = tensor
    vision = reaf_vision_state(parts["visual.trunk."], grid)
    state |= {f"vision.{n}": t for n, t in vision.items()}
    return state | {f"text.{n}": t for n, t in bert_state(parts["text.transformer."]).items()}


def mae_state(published: State, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> State:
    """A 2D MAE or timm ViT -> REAF's encoder, as HLIP and REAF inflate it.

    The patch kernel is resized in the plane (bicubic, no antialiasing), summed over colours and spread evenly over
    depth; the position table is resampled and gets a sine-cosine over depth; the class token takes its position with it.
    """
    state = dict(published)
    table = state.pop("pos_embed")
    if round(table.shape[1] ** 0.5) ** 2 != table.shape[1]:  # one row more: the class token's
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, 1:]
    state["pos_embed"] = depth_plus_2d(table, grid).flatten(1, 3)
    kernel = state["patch_embed.proj.weight"]  # (C, 3, p, p)
    if tuple(kernel.shape[2:]) != tuple(patch[1:]):
        kernel = F.interpolate(kernel.float(), size=patch[1:], mode="bicubic")
    kernel = kernel.sum(1).unsqueeze(1).expand(-1, patch[0], -1, -1) / patch[0]  # (C, p_d, p_h, p_w)
    return state | {"patch_embed.proj.weight": kernel.flatten(1)}


def m3d_clip_state(published: State) -> State:
    """Names of M3D-CLIP's and HSENet's dual encoders -> DualEncoder's; of stage 2 without the teacher it carries."""
    state: State = {}
    parts: dict[str, State] = {"vision_encoder.": {}, "language_encoder.": {}}
    renamed = (("mm_vision_proj.", "vision_proj."), ("mm_language_proj.", "text_proj."))
    for name, tensor in published.items():
        if name.startswith("stage1_pretrained_CLIP."):
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
    """The stage-1 dual encoder inside a published stage-2 checkpoint, under DualEncoder's names; empty if there is none."""
    prefix = "stage1_pretrained_CLIP."
    return m3d_clip_state({n.removeprefix(prefix): t for n, t in published.items() if n.startswith(prefix)})


def initial_state(published: State, source: str, model: str, patch, grid: tuple[int, int, int]) -> State:
    """A checkpoint to start a dual encoder from, under DualEncoder's names; recognised by its tensors' names.

    Of hsenet: M3D-CLIP or HSENet. Of reaf: the dual encoder or the vision trunk of REAF or HLIP, or a 2D MAE or timm
    ViT. Of both: this project's own. Raises InputError for anything else.
    """
    state = {n.removeprefix("module."): t for n, t in published.items()}
    if "vision.cls_token" in state:
        if any("lora_" in n for n in state):
            raise InputError(f"{source}: holds LoRA adapters; name the run's folder, whose config.json says how to add them")
        # A fusion's constant weights are the run's own choice, not what was learned.
        return {n: t for n, t in state.items() if not n.startswith("vision.fusion.")}
    if any(n.startswith("vision_encoder.") for n in state):
        kind, found = "hsenet", m3d_clip_state(state)
    elif any(n.startswith("visual.trunk.") for n in state):
        kind, found = "reaf", reaf_state(state, grid)
    elif "spatial_posemb" in state:
        kind, found = "reaf", {f"vision.{n}": t for n, t in reaf_vision_state(state, grid).items()}
    elif {"pos_embed", "patch_embed.proj.weight"} <= set(state) and state["patch_embed.proj.weight"].ndim == 4:
        kind, found = "reaf", {f"vision.{n}": t for n, t in mae_state(state, patch, grid).items()}
    else:
        raise InputError(
            f"{source}: is not a checkpoint of REAF, HLIP, M3D-CLIP, HSENet or a MAE ViT; its names begin with "
            f"{sorted(state)[0]!r}"
        )
    if kind != model:
        raise InputError(f"{source}: starts --model {kind}, not {model}; choose a checkpoint of {model}'s family")
    return found


def bert_config(folder: Path) -> TextConfig:
    """Read a config.json. Raises InputError for what this encoder does not compute."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {values[key]!r}; this encoder has {expected!r} only")
    try:
        return TextConfig(
            vocab=values["vocab_size"],
            width=values["hidden_size"],
            depth=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            mlp=values["intermediate_size"],
            positions=values["max_position_embeddings"],
            token_types=values.get("type_vocab_size", 2),
            layer_norm_eps=values.get("layer_norm_eps", 1e-12),
            dropout=values.get("hidden_dropout_prob", 0.1),
            attention_dropout=values.get("attention_probs_dropout_prob", 0.1),
            pad_id=values.get("pad_token_id", 0),
            kind="roberta" if values.get("model_type") == "roberta" else "bert",
        )
    except KeyError as error:
        raise InputError(f"{path}: has no {error}; expected the config.json of a BERT or RoBERTa") from error


def find_folder(name: str, patterns: list[str]) -> Path:
    """A local folder as it is; ORGANISATION/NAME[@REVISION] from the Hugging Face hub, the files that match only."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        raise InputError(
            f"{name}: no such folder; expected one, or a hub id such as google-bert/bert-base-uncased"
        )
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these kinds
        raise InputError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}); fetch "
            f"{', '.join(patterns)} by hand and name their folder"
        ) from error


def read_checkpoint(name: str) -> State:
    """The tensors of a file, a folder or a hub id; those of a training checkpoint's `model` or `state_dict`."""
    if Path(name).is_file():
        return read_weights_file(Path(name))
    return read_weights(find_folder(name, ["*.safetensors", "*pytorch_model.bin"]))


def read_weights(folder: Path) -> State:
    """The weights of a folder, as transformers or open_clip name them. Raises InputError when there are none."""
    names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
    for name in names:
        path = Path(folder) / name
        if path.is_file():
            return read_weights_file(path)
    raise InputError(f"{folder}: has none of {', '.join(names)}")


def read_weights_file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:  # a zip file, or a pickle as torch wrote before 1.6
            pickled = file.read(1) in (b"P", b"\x80")
        # Of the older format, what is cut short in mid-name asks for a class that is not there.
        problem = "holds more than tensors, which is not loaded, or is truncated; save its state_dict alone"
        raise InputError(f"{path}: {problem if pickled else 'is truncated or not a checkpoint'}") from error
    except (SafetensorError, *DAMAGED) as error:
        raise InputError(
            f"{path}: is truncated or not a checkpoint ({' '.join(str(error).split())[:120]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise InputError(f"{path}: is not a dictionary of tensors by name")
    return state


def load_matching(module: nn.Module, state: State, source: str) -> str:
    """Fill what `state` has of `module`. Returns an account of what was left as it was, and of what was not used.

    Raises InputError when nothing matches, or a tensor of the same name has another shape.
    """
    own = module.state_dict()
    matching = {n: t for n, t in state.items() if n in own}
    shapes = [f"{n} is {tuple(t.shape)}, expected {tuple(own[n].shape)}" for n, t in matching.items()
              if t.shape != own[n].shape]  # fmt: skip
    if shapes or not matching:
        problem = "; ".join(shapes[:4]) or f"it has {sorted(state)[0]!r} and the like"
        raise InputError(f"{source}: does not fit this model: {problem}; choose the preset that it was made for")
    module.load_state_dict(matching, strict=False)
    left = [n for n, _ in module.named_parameters() if n not in state]
    unused = [n for n in state if n not in own]
    account = [f"{source}: {len(matching)} tensors loaded"]
    account += [f"left at their start: {_summary(left)}"] * bool(left) + [f"not used: {_summary(unused)}"] * bool(unused)
    return "; ".join(account)


def _summary(names: list[str]) -> str:
    """Names in short: those of a part with many are one, `text.blocks.* (192)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    short = [group if len(group) <= 2 else [f"{part}.* ({len(group)})"] for part, group in parts.items()]
    return ", ".join(name for group in short for name in group)


def load_strictly(module: nn.Module, state: State, source: str, own: State | None = None) -> None:
    """Fill `module`, or those of its tensors that `own` has, with `state`.

    Raises InputError that lists missing, unexpected and misshapen tensors by name.
    """
    own = module.state_dict() if own is None else own
    problems = [f"{n} is missing" for n in own if n not in state]
    problems += [f"{n} is not known" for n in state if n not in own]
    problems += [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if problems:
        raise InputError(f"{source}: does not fit this model: {first_six(problems, '; ')}")
    module.load_state_dict(state, strict=False)
