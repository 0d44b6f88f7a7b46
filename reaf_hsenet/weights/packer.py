"""Published names of HSENet's packer and of the other projectors <-> ours (models/projectors.py).

Checkpoints of report generation and question answering hold two packers, `mm_projector` for the stage-1
encoder's tokens and `mm_projector2` for the stage-2 encoder's, below `model.` or, with adapters,
`base_model.model.model.`: `base_model.model.model.mm_projector.resolution_attention.Wq.weight` is our
`cell_attn.query.weight`.
"""

import re

from reaf_hsenet.errors import InputError
from reaf_hsenet.models.packer import AveragePool, Projector, SequencePool, SpatialPacker
from reaf_hsenet.models.qformer import QFormer
from reaf_hsenet.models.text_guided import TextGuidedProjector
from reaf_hsenet.weights import State

PARTS = (  # applied in order, from left to right and back
    ("resolution_attention.Wq.", "cell_attn.query."),
    ("resolution_attention.Wk.", "cell_attn.key."),
    ("resolution_attention.Wv.", "cell_attn.value."),
    ("resolution_attention.output_linear.", "cell_attn.proj."),
    ("resolution_attention.norm.", "cell_attn.norm."),
    ("query_embeds", "queries"),
    ("layers.", "blocks."),
    (".linear1.", ".fc1."),
    (".linear2.", ".fc2."),
    (".in_proj_", ".qkv."),
    (".out_proj.", ".proj."),
)
PACKERS = ("mm_projector", "mm_projector2")  # of the stage-1 encoder, of the stage-2 encoder
ADAPTER = re.compile(r"base_model\.model\.(?:model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
HEADS = {"proj_mpls": "head", "projector": "head", "projector_3d": "head", "projector_2d": "slice_head"}
PUBLISHED_HEADS: dict[type[Projector], dict[str, str]] = {
    SpatialPacker: {"head": "proj_mpls"},
    QFormer: {"head": "proj_mpls"},
    # Before AveragePool, which it is built on.
    TextGuidedProjector: {"head": "projector_3d", "slice_head": "projector_2d"},
    AveragePool: {"head": "projector"},  # and M3DPool
    SequencePool: {"head": "projector"},
}


def packer_state(published: State, packer: str = "mm_projector") -> State:
    """Published names -> ours, of one packer of a checkpoint, or of a state with names below a packer only.

    Raises InputError when the checkpoint has other packers only.
    """
    prefix = re.compile(r"(?:.*\.)?(mm_projector\d*)\.(.+)")
    found = {name: match for name in published if (match := prefix.fullmatch(name))}
    if found:
        inner = {match[2]: published[name] for name, match in found.items() if match[1] == packer}
        if not inner:
            others = ", ".join(sorted({match[1] for match in found.values()}))
            raise InputError(f"the checkpoint has no {packer}, it has {others}: name one of them")
    else:
        inner = published
    # A head's layers are numbered with the activations between them: 0 and 2, or 0 and 1.
    heads = {name: re.fullmatch(rf"({'|'.join(HEADS)})\.(\d+)\.(\w+)", name) for name in inner}
    numbers: dict[str, list[int]] = {}
    for match in filter(None, heads.values()):
        numbers[match[1]] = sorted({*numbers.get(match[1], []), int(match[2])})
    state = {}
    for name, tensor in inner.items():
        if match := heads[name]:
            name = f"{HEADS[match[1]]}.fc{numbers[match[1]].index(int(match[2])) + 1}.{match[3]}"
        else:
            for theirs, ours in PARTS:
                name = name.replace(theirs, ours)
        state[name] = tensor
    return state


def published_packer_state(module: Projector, prefix: str = "") -> State:
    """The weights of a projector under their published names, below `prefix` (`model.mm_projector.`)."""
    names = next(names for kind, names in PUBLISHED_HEADS.items() if isinstance(module, kind))
    state = {}
    for name, tensor in module.state_dict().items():
        part, _, rest = name.partition(".")
        if part in names:
            layer, _, kind = rest.partition(".")
            number = list(dict(getattr(module, part).named_children())).index(layer)
            name = f"{names[part]}.{number}.{kind}"
        else:
            for theirs, ours in PARTS:
                name = name.replace(ours, theirs)
        state[prefix + name] = tensor
    return state


def language_names(published: State) -> State:
    """The packers and adapters of HSENet's language model, under the names that a run's checkpoint has.

    Of the adapters only the names: how those of a decoder's separate matrices are joined, adapters.py knows.
    """
    state = {}
    for i, packer in enumerate(PACKERS):
        mine = {n: t for n, t in published.items() if f".{packer}." in f".{n}"}
        if mine:
            state |= {f"projectors.{i}.{n}": t for n, t in packer_state(mine, packer).items()}
    for name, tensor in published.items():
        if not any(f".{packer}." in f".{name}" for packer in PACKERS):
            match = ADAPTER.fullmatch(name)
            state[f"decoder.{match[1]}.lora_{match[2].lower()}" if match else name] = tensor
    return state


def published_language_state(projectors: list[Projector], adapters: State) -> State:
    """The same back, as HSENet's training saves them: peft's names of a model in memory. adapters: of
    adapter_state.
    """
    state = {}
    for packer, projector in zip(PACKERS, projectors, strict=False):
        state |= published_packer_state(projector, f"base_model.model.model.{packer}.")
    return state | {
        re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", n): t for n, t in adapters.items()
    }
