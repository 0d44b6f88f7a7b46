"""Files of tensors: safetensors, shards by their index, and pickles of which only tensors are read; and the
check that tensors fit a module.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import atomic_write, find_folder, named, read_json, visible
from reaf_hsenet.pickles import load_pickle, plain

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# In this order, as transformers, peft and open_clip name them; a shard's index stands for its shards.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def read_checkpoint(name: str) -> State:
    """Return the tensors of a file, a folder or a hub id, all finite."""
    if Path(name).is_file():
        return read_weights(Path(name))
    return read_weights(find_folder(name, ["*.safetensors", "*pytorch_model.bin", "*.pt", "*.pth"]))


def read_weights(path: Path) -> State:
    """Return the tensors of a file, or of a folder by `weights_file`.

    Raises InputError for NaN and infinity.
    """
    path = Path(path) if Path(path).is_file() else weights_file(Path(path))
    state = read_weights_file(path)
    check_finite(state, str(path))
    return state


def weights_file(folder: Path) -> Path:
    """Find the file of a folder's weights: the first of NAMES, or the only one there is, in it or else below
    it.

    Raises InputError when there are none, or several that none of NAMES chooses from.
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
    """Return the tensors of a file, or of the shards that an index lists.

    Of a training checkpoint those of `model` or `state_dict` are taken. Raises InputError, naming the file,
    for anything else.
    """
    path = Path(path)
    if path.suffix == ".json":
        places = read_index(path)
        files = {file: read_weights_file(path.parent / file) for file in dict.fromkeys(places.values())}
        return gathered(path, places, files)
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


def read_index(index: Path) -> dict[str, str]:
    """Return the tensors' names and shards of a model.safetensors.index.json.

    Raises InputError for a missing one.
    """
    places = read_json(index)
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f"{index}: has no weight_map of tensors to files; fetch it again")
    for file in dict.fromkeys(places.values()):
        if not (index.parent / file).is_file():
            raise InputError(
                f"{index.parent / file}: this shard is missing; fetch it again, or the whole folder"
            )
    return places


def gathered(index: Path, places: dict[str, str], files: dict[str, dict]) -> dict:
    """Return what all shards have, of a name in several what the index says.

    Raises InputError for what none has.
    """
    absent = [name for name, file in places.items() if name not in files[file]]
    if absent:
        raise InputError(
            f"{index}: places {first_six(absent)} in {places[absent[0]]}, which does not have it; fetch both "
            f"again"
        )
    return {name: tensor for file in files.values() for name, tensor in file.items()} | {
        name: files[file][name] for name, file in places.items()
    }


def write_weights(path: Path, state: State) -> None:
    """Write safetensors, whole or not at all."""
    with atomic_write(path, "wb") as file:
        file.write(save(apart(state), {"format": "pt"}))


def apart(state: State) -> State:
    """Return copies on the CPU: two tensors of a pickle may share their bytes, which safetensors does not
    write.
    """
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()}


def check_finite(state: State, source: str) -> None:
    """Raise InputError that names the tensors with NaN or infinite values."""
    wrong = [n for n, t in state.items() if not is_finite(t)]
    if wrong:
        raise InputError(
            f"{source}: NaN or infinite values in {first_six(wrong)}; fetch the file again, or another "
            f"checkpoint"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; whole numbers always are."""
    if not tensor.is_floating_point():
        return True
    return bool(
        (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all()
    )  # 8-bit floats cannot say


def load_strictly(module: nn.Module, state: State, source: str, own: State | None = None) -> None:
    """Fill `module`, or those of its tensors that `own` has, with `state`.

    Raises InputError as `require_fit`.
    """
    require_fit(state, module.state_dict() if own is None else own, source)
    module.load_state_dict(state, strict=False)


def require_fit(state: State, own: State, source: str) -> None:
    """Raise InputError unless `state` has the names, shapes and kinds of number of `own`."""
    problems = [f"{n} is missing" for n in own if n not in state]
    problems += [f"{n} is not known" for n in state if n not in own]
    problems += misshapen(state, own)
    problems += [
        f"{n} is {str(state[n].dtype).removeprefix('torch.')}, expected floating point"
        for n in own
        if n in state and own[n].is_floating_point() and not state[n].is_floating_point()
    ]
    if problems:
        raise InputError(f"{source}: does not fit this model: {first_six(problems, '; ')}")


def misshapen(state: State, own: State) -> list[str]:
    """Return a sentence for each tensor of another shape."""
    return [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]


def load_matching(module: nn.Module, state: State, source: str) -> str:
    """Fill what `state` has of `module`. Returns what was left at its start and what was not used.

    Raises InputError when nothing matches, or a tensor of the same name has another shape.
    """
    own = module.state_dict()
    matching = {n: t for n, t in state.items() if n in own}
    shapes = misshapen(matching, own)
    if shapes or not matching:
        problem = "; ".join(shapes[:4]) or f"it has {sorted(state)[0]!r} and the like"
        raise InputError(
            f"{source}: does not fit this model: {problem}; choose the preset that it was made for"
        )
    module.load_state_dict(matching, strict=False)
    left = [n for n, _ in module.named_parameters() if n not in state]
    unused = [n for n in state if n not in own]
    account = [f"{source}: {len(matching)} tensors loaded"]
    account += [f"left at their start: {summary(left)}"] if left else []
    account += [f"not used: {summary(unused)}"] if unused else []
    return "; ".join(account)


def summary(names: list[str]) -> str:
    """Return names in short: those of a part with many are one, `text.blocks.* (192)`."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
    short = [group if len(group) <= 2 else [f"{part}.* ({len(group)})"] for part, group in parts.items()]
    return ", ".join(name for group in short for name in group)
