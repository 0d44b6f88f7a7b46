"""Names of published checkpoints and ours: one table a family, read in both directions.

`import_state` and `export_state` take a table and go there and back, bit for bit. A new family is a new
table.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError

State = dict[str, Tensor]


class Row(NamedTuple):
    """A published prefix, our prefix, and pairs (theirs, ours) that are replaced, in order, in the rest.

    A pair whose first entry is a tuple joins these tensors, in that order, along the first axis. ours None
    drops the tensors, which no model here takes; a name without a row is kept. In both directions the row of
    the longest prefix decides, of equal ones the first.
    """

    theirs: str
    ours: str | None
    pairs: tuple[tuple[str | tuple[str, ...], str], ...] = ()


Table = tuple[Row, ...]


def below(theirs: str, ours: str, table: Table) -> Table:
    """Return a table for the same tensors inside of a larger model."""
    return tuple(
        Row(theirs + row.theirs, row.ours if row.ours is None else ours + row.ours, row.pairs)
        for row in table
    )


BERT: Table = (
    Row(
        "",
        "",
        (
            ("embeddings.word_embeddings.", "word_embed."),
            ("embeddings.position_embeddings.", "pos_embed."),
            ("embeddings.token_type_embeddings.", "type_embed."),
            ("embeddings.LayerNorm.", "norm."),
            ("encoder.layer.", "blocks."),
            (".attention.output.dense.", ".attn.proj."),
            (".attention.output.LayerNorm.", ".norm1."),
            (".intermediate.dense.", ".mlp.fc1."),
            (".output.dense.", ".mlp.fc2."),
            (".output.LayerNorm.", ".norm2."),
            (
                (".attention.self.query.", ".attention.self.key.", ".attention.self.value."),
                ".attn.qkv.",
            ),
        ),
    ),
    # Heads of masked-language models, and CXR-BERT's projection.
    Row("cls.", None),
    Row("cls_projection_head.", None),
    Row("lm_head.", None),
    Row("pooler.", None),
    Row("embeddings.position_ids", None),
)

# Of transformers' BertForSequenceClassification and of CT-RATE's RadBertClassifier (`model.`).
CLASSIFIER: Table = (
    *below("", "encoder.", BERT),
    *below("model.", "encoder.", BERT),
    Row("pooler.dense.", "pooler.dense."),
    Row("model.pooler.dense.", "pooler.dense."),
    Row("classifier.", "head."),
)
# RobertaForSequenceClassification has the pooler in its head.
ROBERTA_CLASSIFIER: Table = (
    *below("", "encoder.", BERT),
    Row("classifier.dense.", "pooler.dense."),
    Row("classifier.out_proj.", "head."),
)

# monai's ViT, and what HSENet's stage 2 adds to it.
VIT3D: Table = (
    Row(
        "",
        "",
        (
            ("patch_embedding.position_embeddings", "pos_embed"),
            ("patch_embedding.patch_embeddings.1.", "patch_embed.proj."),
            (".mlp.linear", ".mlp.fc"),
            (".attn.out_proj.", ".attn.proj."),
        ),
    ),
    Row("slice_guided_attention.Wq.", "guidance.query."),
    Row("slice_guided_attention.Wk.", "guidance.key."),
    Row("slice_guided_attention.Wv.", "guidance.value."),
    Row("slice_guided_attention.output_linear.", "guidance.proj."),
    Row("slice_guided_attention.norm.", "guidance.norm."),
    Row("patch_score_proj.", "score."),
)

TEACHER = "stage1_pretrained_CLIP."  # before the names of the stage-1 model inside HSENet's stage 2

M3D_CLIP: Table = (
    *below("vision_encoder.", "vision.", VIT3D),
    *below("language_encoder.", "text.", BERT),
    Row("mm_vision_proj.", "vision_proj."),
    Row("mm_language_proj.", "text_proj."),
    Row("logit_scale", "logit_scale"),
    Row(TEACHER, None),
    Row("visual_encoder_2D.", None),  # BiomedCLIP's, as it is published
)

# REAF and HLIP, whose dual encoder is open_clip's; `TRUNK` is its vision encoder alone.
TRUNK: Table = (Row("", "vision.", (("spatial_posemb", "pos_embed"),)),)
REAF: Table = (
    *below("visual.trunk.", "", TRUNK),
    *below("text.transformer.", "text.", BERT),
    Row("visual.head.proj.weight", "vision_proj.weight"),
    Row("text.proj.weight", "text_proj.weight"),
    Row("logit_scale", "logit_scale"),
)

# timm's and MAE's ViT without heads and decoder; BiomedCLIP's is the only part of it that is used.
VIT2D: Table = (
    Row("", "", (("patch_embed.proj.", "patch_embed."),)),
    *(Row(head, None) for head in ("head.", "fc_norm.", "pre_logits.", "decoder_", "mask_token")),
)
BIOMEDCLIP: Table = (*below("visual.trunk.", "", VIT2D), Row("", None))

# HSENet's packer and the projectors it is compared with. A head's layers are numbered with its activations.
_ATTENTION = (("in_proj_", "qkv."), ("out_proj.", "proj."), (".linear", ".fc"))
_POOL: Table = (Row("projector.0.", "head.fc1."), Row("projector.2.", "head.fc2."))
PROJECTORS: dict[str, Table] = {
    "spatial_packer": (
        Row("resolution_attention.Wq.", "cell_attn.query."),
        Row("resolution_attention.Wk.", "cell_attn.key."),
        Row("resolution_attention.Wv.", "cell_attn.value."),
        Row("resolution_attention.output_linear.", "cell_attn.proj."),
        Row("resolution_attention.norm.", "cell_attn.norm."),
        Row("proj_mpls.0.", "head.fc1."),
        Row("proj_mpls.2.", "head.fc2."),
    ),
    "qformer": (
        Row("query_embeds", "queries"),
        Row("self_attn.", "self_attn.", _ATTENTION),
        Row("cross_attn.", "cross_attn.", _ATTENTION),
        Row("layers.", "blocks.", _ATTENTION),
        Row("proj_mpls.0.", "head.fc1."),
        Row("proj_mpls.2.", "head.fc2."),
    ),
    "text_guided": (
        Row("projector_3d.0.", "head.fc1."),
        Row("projector_3d.2.", "head.fc2."),
        Row("projector_2d.0.", "slice_head.fc1."),
        Row("projector_2d.2.", "slice_head.fc2."),
    ),
    "average_pool": _POOL,
    "m3d_pool": _POOL,
    "sequence_pool": _POOL,
}
PACKERS = ("mm_projector", "mm_projector2")  # of the stage-1 encoder, of the stage-2 encoder


def language_table(projector: str) -> Table:
    """Return the table of HSENet's language model: two packers. Adapters have theirs in adapters.py."""
    return tuple(
        row
        for model in ("base_model.model.model.", "model.", "")
        for i, packer in enumerate(PACKERS)
        for row in below(f"{model}{packer}.", f"projectors.{i}.", PROJECTORS[projector])
    )


def places(table: Table, names: Iterable[str]) -> dict[str, list[str]]:
    """Return our name -> the published names of the tensors that it is made of. Unused names are absent.

    Raises InputError for two tensors in one place, and for a join that lacks one.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        ours, part, _ = _our_name(table, name)
        if ours is None:
            continue
        parts = found.setdefault(ours, {})
        if part in parts:
            raise InputError(
                f"the checkpoint has two tensors for {ours}, {parts[part]} and {name}: export one model's "
                f"state_dict alone"
            )
        parts[part] = name
    for ours, parts in found.items():
        count = _our_name(table, next(iter(parts.values())))[2]
        if len(parts) < count:
            raise InputError(f"the checkpoint has {len(parts)} of {count} parts of {ours}; fetch it again")
    return {ours: [parts[i] for i in sorted(parts)] for ours, parts in found.items()}


def _our_name(table: Table, name: str) -> tuple[str | None, int, int]:
    """Return our name of a published tensor, which part of ours it is, and of how many."""
    for prefix in ("module.", "bert.", "roberta."):  # of some files
        name = name.removeprefix(prefix)
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(old, new)  # of the oldest files
    row = max(
        (row for row in table if name.startswith(row.theirs)),
        key=lambda row: len(row.theirs),
        default=Row("", ""),
    )
    if row.ours is None:
        return None, 0, 1
    rest, part, count = name.removeprefix(row.theirs), 0, 1
    for theirs, ours in row.pairs:
        pieces = theirs if isinstance(theirs, tuple) else (theirs,)
        for i, piece in enumerate(pieces):
            if piece in rest:
                rest, part, count = rest.replace(piece, ours), i, len(pieces)
                break
    return row.ours + rest, part, count


def import_state(table: Table, published: State) -> State:
    """Return published tensors under our names; those that a row joins are one.

    Raises InputError, see `places`.
    """
    state = {}
    for ours, names in places(table, published).items():
        parts = [published[name] for name in names]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"the checkpoint's {' and '.join(names)} have the shapes {sorted(shapes)}; expected one shape"
            )
        state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return state


def export_state(table: Table, state: State) -> State:
    """Return our tensors under their published names.

    Raises InputError for one that the table has no row for.
    """
    published = {}
    for ours, tensor in state.items():
        rows = [row for row in table if row.ours is not None and ours.startswith(row.ours)]
        row = max(rows, key=lambda row: len(row.ours), default=None)
        if row is None:
            raise InputError(f"the published format has no place for {ours}; export another one")
        names = [ours.removeprefix(row.ours)]
        for theirs, mine in reversed(row.pairs):
            pieces = theirs if isinstance(theirs, tuple) else (theirs,)
            names = list(dict.fromkeys(name.replace(mine, piece) for name in names for piece in pieces))
        parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
        published |= {row.theirs + name: part.clone() for name, part in zip(names, parts, strict=True)}
    return published


def classifier_table(names: Iterable[str]) -> Table:
    """Return the table of a report classifier, a BERT's or a RoBERTa's."""
    roberta = any("classifier.dense." in name for name in names)
    return ROBERTA_CLASSIFIER if roberta else CLASSIFIER


def teacher_tensors(published: State) -> State:
    """Return the stage-1 model inside a published stage 2, under M3D-CLIP's names; empty without one."""
    return {n.removeprefix(TEACHER): t for n, t in published.items() if n.startswith(TEACHER)}
