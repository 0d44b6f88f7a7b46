"""Decoders from and to the folders that transformers reads: config.json and safetensors, in one file or in
shards.

Tensors are read one by one into their final place, type and device, so that loading needs little more memory
than the weights themselves. Nothing is read before all names, shapes and types are known to fit.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reaf_hsenet.errors import InputError, OutputError, first_six
from reaf_hsenet.files import find_folder, write_json
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.int8 import Int8Linear, quantise, quantise_decoder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.packed import PackedLinear
from reaf_hsenet.weights.files import gathered, read_index

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The tokeniser's files too: the folder is then whole.
FILES = [
    "config.json",
    INDEX,
    "*.safetensors",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]


@dataclass(frozen=True)
class Stored:
    """A tensor on disk or in memory: its shape, its type and how to get it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def load_decoder(name: str, dtype: torch.dtype | None = None, device="cpu", int8: bool = False) -> Decoder:
    """Load the decoder of a folder or hub id. dtype: None keeps the files' own. int8: weight-only int8
    (models/int8.py).

    Raises InputError, naming the file or the tensors, when something is absent, damaged, of another shape or
    type, or not implemented.
    """
    if dtype is not None:
        _check_dtype(dtype)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # an unknown name; a GPU that is not there
        raise InputError(
            f"device {device}: expected cpu, or cuda or cuda:N where torch sees that GPU"
        ) from error
    if Path(name).is_file():
        raise InputError(
            f"{name}: is a file; name its folder, {Path(name).parent}, which has config.json too"
        )
    folder = find_folder(name, FILES)
    config, stored = DecoderConfig.from_folder(folder), stored_tensors(folder)
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    if len(layers) != config.layers:
        raise InputError(
            f"{folder}: config.json has {config.layers} layers, the files have {len(layers)}; fetch the "
            f"folder again"
        )
    with torch.device("meta"):
        decoder = Decoder(config)
    fill(decoder, stored, str(folder), dtype=dtype, device=device, int8=int8)
    return decoder.eval()


def _check_dtype(dtype) -> None:
    if dtype not in NAMES.values():
        raise InputError(f"dtype {dtype!r}: expected {', '.join(map(str, NAMES.values()))}")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors, by name, not yet read."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # transformers takes it first too
        return _contents(single)
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        found = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}")
    places = read_index(index)
    return gathered(
        index, places, {file: _contents(folder / file) for file in dict.fromkeys(places.values())}
    )


def _contents(path: Path) -> dict[str, Stored]:
    """Return a file's tensors. Each is read by its own mapping of the file, so that no page of another one
    stays in memory.
    """

    def read(name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read any more ({error})") from error

    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: Stored(tuple(view.get_shape()), view.get_dtype(), lambda name=name: read(name))
                for name, view in views.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: is truncated or not safetensors ({' '.join(str(error).split())[:100]})"
        ) from error


def published_names(decoder: Decoder, names: Iterable[str] = ()) -> dict[str, tuple[str, int, int]]:
    """Published name -> our parameter, and the first and last row of it.

    A fused matrix goes by one name or by one for each part: what `names` has, or else as the family has it.
    """
    found = {}
    for ours, parameter in decoder.named_parameters():
        if "lora_" in ours:
            continue
        ours_plain = ours.replace(".base.", ".")
        path = ours_plain.removesuffix(".weight")
        layer = decoder.get_submodule(ours.removesuffix(".weight"))
        published = ours_plain if ours_plain.startswith("lm_head.") else f"model.{ours_plain}"
        parts, start = {}, 0
        for part, rows in getattr(layer, "parts", {}).items():
            parts[f"model.{path.rpartition('.')[0]}.{part}.weight"] = (ours, start, start + rows)
            start += rows
        split = decoder.config.family == "llama"
        if published in names or any(part in names for part in parts):
            split = published not in names
        found |= parts if parts and split else {published: (ours, 0, len(parameter))}
    return found


def fill(decoder: Decoder, stored: dict[str, Stored], source: str, dtype, device, int8: bool = False) -> None:
    """Read every tensor into the decoder, whose parameters are replaced. First all are checked."""
    parameters = dict(decoder.named_parameters())
    # Old Llama files hold the rotary frequencies, and some tied ones hold the head too, which is the
    # embedding.
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    head = stored.pop("lm_head.weight", None) if decoder.config.tied else None
    places = published_names(decoder, stored)
    check(places, parameters, stored, source, any_dtype=dtype is not None)
    embedding = stored["model.embed_tokens.weight"]
    same = head is None or (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or (head and not torch.equal(head.read(), embedding.read())):
        raise InputError(
            f"{source}: config.json ties lm_head to the embedding, but lm_head.weight is another matrix"
        )
    parts = {}
    for name, (ours, start, end) in places.items():
        parts.setdefault(ours, []).append((name, start, end))
    chosen = set()
    if int8:  # the layers that quantise_decoder would take, of a copy that has no data
        plan = copy.deepcopy(decoder).to("meta")
        quantise_decoder(plan)
        chosen = {name for name, layer in plan.named_modules() if isinstance(layer, Int8Linear)}
    for ours, pieces in parts.items():
        module = decoder.get_submodule(ours.rpartition(".")[0])
        kind = dtype or DTYPES[stored[pieces[0][0]].dtype]
        weight = torch.empty(parameters[ours].shape, dtype=kind, device=device)
        for name, start, end in pieces:
            weight[start:end].copy_(stored[name].read())
        module.weight = nn.Parameter(weight, requires_grad=parameters[ours].requires_grad)
        if ours.removesuffix(".weight") in chosen:
            quantise(decoder, ours.removesuffix(".weight"))


def check(places: dict, parameters: dict, stored: dict[str, Stored], source: str, any_dtype: bool) -> None:
    """Raise InputError that lists what is missing, not known, of another shape or type."""
    problems = [f"{name} is missing" for name in places if name not in stored]
    problems += [f"{name} is not known" for name in stored if name not in places]
    for name, (ours, start, end) in places.items():
        expected = (end - start, *parameters[ours].shape[1:])
        if name in stored and stored[name].shape != expected:
            problems.append(f"{name} is {stored[name].shape}, expected {expected}")
    known = [name for name in places if name in stored]
    problems += [
        f"{name} is {stored[name].dtype}, expected {', '.join(DTYPES)}"
        for name in known
        if stored[name].dtype not in DTYPES
    ]
    if not problems and not any_dtype:
        first = stored[known[0]].dtype
        problems = [
            f"{name} is {stored[name].dtype}, the others are {first}: name one dtype for all"
            for name in known
            if stored[name].dtype != first
        ]
    if problems:
        raise InputError(f"{source}: does not fit this decoder: {first_six(problems, '; ')}")


def decoder_state(decoder: Decoder, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights (or other tensors by our parameters' names: gradients) under their published names.
    Adapters are added to the matrices they adapt.
    """
    if any(isinstance(layer, (Int8Linear, PackedLinear)) for layer in decoder.modules()):
        raise InputError("an int8 or packed decoder is not exported: load it again without, and save that")
    tensors = merged_state(decoder) if tensors is None else tensors
    plain = {name.replace(".base.", "."): tensor for name, tensor in tensors.items()}
    return {
        name: plain[ours.replace(".base.", ".")][start:end]
        for name, (ours, start, end) in published_names(decoder).items()
    }


def save_decoder(
    decoder: Decoder, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and safetensors, in shards of at most `shard_bytes` (or one tensor); transformers
    reads them.

    An older save is removed first and config.json comes last, so that what an interruption leaves is refused,
    not mixed.
    """
    folder, state = Path(folder), decoder_state(decoder)
    for tensor in state.values():
        _check_dtype(dtype or tensor.dtype)
    shards, size = [{}], 0
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype)
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    kind = next(name for name, t in NAMES.items() if t == next(iter(shards[0].values())).dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (
            folder / "config.json",
            folder / INDEX,
            folder / SINGLE,
            *folder.glob("model-*-of-*.safetensors"),
        ):
            old.unlink(missing_ok=True)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        )
        for name, shard in zip(names, shards, strict=True):
            save_file({n: t.contiguous() for n, t in shard.items()}, folder / name, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: cannot be written ({error}); free space or choose another folder"
        ) from error
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for t in shard.values())
        places = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / "config.json", decoder.config.to_json(kind))


@torch.no_grad()
def resize_vocabulary(decoder: Decoder, size: int, added: int) -> None:
    """`size` rows in the embedding and the head, the last `added` of them the mean of all others, as HSENet
    does it.

    Rows of the file beyond the tokeniser's own tokens (Phi-4-mini has some) are dropped. Raises InputError
    when there are too few, and, before anything is changed, for adapted, int8 and packed layers.
    """
    old = size - added
    if not 0 < old <= decoder.config.vocab:
        raise InputError(
            f"the tokeniser has {old} tokens of its own, the decoder {decoder.config.vocab} rows: they are "
            f"of different models"
        )
    config = replace(decoder.config, vocab=size)  # which refuses special tokens that would be cut off
    layers = [layer for layer in (decoder.embed_tokens, decoder.lm_head) if layer is not None]
    for layer in layers:
        if not isinstance(layer, (nn.Embedding, nn.Linear)):
            raise InputError(
                f"a {type(layer).__name__} is not resized: resize the vocabulary before adapters, int8 and "
                f"packing"
            )
    for layer in layers:
        rows = layer.weight[:old]
        mean = rows.mean(0, keepdim=True)  # torch adds up in float32 whatever the type
        layer.weight = nn.Parameter(
            torch.cat((rows, mean.expand(added, -1))), requires_grad=layer.weight.requires_grad
        )
    decoder.embed_tokens.num_embeddings = size
    if decoder.lm_head is not None:
        decoder.lm_head.out_features = size
    decoder.config = config
