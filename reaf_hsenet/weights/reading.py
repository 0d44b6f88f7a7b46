"""Weights files -> dictionaries of tensors: .safetensors, and pickles (.bin, .pt, .pth) of which only
tensors are read.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import named, read_json, visible
from reaf_hsenet.pickles import load_pickle, plain

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# In this order, as transformers, peft and open_clip name them; a shard's index stands for its shards.
NAMES = (
    *(
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "open_clip_model.safetensors",
    ),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)


def read_weights(folder: Path) -> State:
    """The weights of a folder. Raises InputError when there are none, or several that none of NAMES
    chooses from.
    """
    path = weights_file(Path(folder))
    state = read_weights_file(path)
    check_finite(state, str(path))
    return state


def weights_file(folder: Path) -> Path:
    """The file of a folder's weights: the first of NAMES, or the only one there is, in the folder or else
    below it.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*", "*/**/*"):  # beside it, else below
        others = [path for path in visible(folder, pattern) if path.suffix in SUFFIXES and path.is_file()]
        if len(others) == 1:
            return others[0]
        if others:
            raise InputError(
                f"{folder}: holds {first_six([str(p.relative_to(folder)) for p in others])}; name one of "
                f"these files"
            )
    raise InputError(
        f"{folder}: has none of {', '.join(NAMES)}, nor another file that ends in {', '.join(SUFFIXES)}"
    )


def read_weights_file(path: Path) -> State:
    """The tensors of a file, or of the shards that an index lists; those of a training checkpoint's
    `model` or `state_dict`. Raises InputError, naming the file, for anything else.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _read_shards(path)
    problem = "is truncated or not a checkpoint"
    if path.suffix == ".safetensors":
        with named(path, problem):
            state = load_file(path)
    else:
        state = load_pickle(path, problem=problem)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    ):
        raise InputError(f"{path}: is not a dictionary of tensors by name")
    return {name: plain(tensor, f"{path}: {name}") for name, tensor in state.items()}


def _read_shards(index: Path) -> State:
    places = read_json(index)
    places = places.get("weight_map") if isinstance(places, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
        raise InputError(f"{index}: has no weight_map of tensors to files; fetch it again")
    state: State = {}
    for file in dict.fromkeys(places.values()):
        if not (index.parent / file).is_file():
            raise InputError(
                f"{index.parent / file}: this shard is missing; fetch it again, or the whole folder"
            )
        state |= read_weights_file(index.parent / file)
    absent = [name for name in places if name not in state]
    if absent:
        raise InputError(
            f"{index}: lists {first_six(absent)}, which the shards do not have; fetch them again"
        )
    return state


def is_finite(tensor: Tensor) -> bool:
    """Whole numbers always are."""
    if not tensor.is_floating_point():
        return True
    return bool(
        (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all()
    )  # eight-bit floats have no isfinite


def check_finite(state: State, source: str) -> None:
    """Raise InputError that names the tensors with NaN or infinite values."""
    wrong = [n for n, t in state.items() if not is_finite(t)]
    if wrong:
        raise InputError(
            f"{source}: NaN or infinite values in {first_six(wrong)}; fetch the file again, or another "
            f"checkpoint"
        )


def summary(names: list[str]) -> str:
    """Names in short: those of a part with many are one, `text.blocks.* (192)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    short = [group if len(group) <= 2 else [f"{part}.* ({len(group)})"] for part, group in parts.items()]
    return ", ".join(name for group in short for name in group)
