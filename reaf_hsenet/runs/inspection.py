"""What a checkpoint is: its family, its configuration as read from the shapes, where every tensor goes, what is wrong."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from reaf_hsenet.config import TextConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_object
from reaf_hsenet.metrics.clinical import ReportClassifier
from reaf_hsenet.models.clip import build_vision
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.packer import SpatialPacker
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.dual import expected_state, open_source
from reaf_hsenet.weights import bert_settings
from reaf_hsenet.weights.adapters import CONFIG as ADAPTER_CONFIG
from reaf_hsenet.weights.adapters import adapter_settings
from reaf_hsenet.weights.families import Source
from reaf_hsenet.weights.loading import compare
from reaf_hsenet.weights.names import TEACHER, reaf_state, sources, teacher_state
from reaf_hsenet.weights.reading import State, is_finite, summary
from reaf_hsenet.weights.shapes import (
    Reader,
    dual_config,
    read_beside,
    reaf_vision,
    require_shapes,
    slice_settings,
    text_shapes,
)


@dataclass
class Row:
    """A published tensor. ours: its place here, with the rows where several share one; None: it has none."""

    published: str
    shape: list[int]
    dtype: str
    ours: str | None


@dataclass
class Inspection:
    """configuration: read from shapes and settings. missing: our names; left_over: published ones of no known use;
    not_used: published ones that are known and have no place here; wrong: tensors of another shape, or not finite."""

    source: str
    file: str
    family: str
    key: str
    configuration: dict
    notes: list[str]
    tensors: list[Row]
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    not_used: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not (self.missing or self.left_over or self.wrong)


def inspect(name: str) -> Inspection:
    """Of a file, folder or hub id. Raises InputError for what cannot be read or is of no known family."""
    source = open_source(name)
    path, beside = read_beside(source.folder)
    published = source.state
    reader = Reader(source.family.names(published), source.name, path, beside)
    configuration, expected = ACCOUNTS[source.family.kind](source, reader)
    state = reader.state
    places = sources(published, source.family.names)
    if any(n.startswith(TEACHER) for n in published):
        inner = sources((n for n in published if n.startswith(TEACHER)), teacher_state)
        places |= {f"stage1.{ours}": parts for ours, parts in inner.items()}
        state = state | {f"stage1.{n}": t for n, t in teacher_state(published).items()}
        expected = expected and expected | _teacher_state(source, reader)
    missing, unknown, wrong = compare(state, expected) if expected else ([], [], [])
    goes = {part: (ours, i, len(parts)) for ours, parts in places.items() for i, part in enumerate(parts)}
    left_over = [part for ours in unknown for part in places.get(ours, [])]
    rows = []
    for n, tensor in published.items():
        ours, i, count = goes.get(n, (None, 0, 1))
        shown = None if n in left_over else f"{ours} [{i + 1} of {count}]" if count > 1 else ours
        rows.append(Row(n, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), shown))
    return Inspection(
        source.name,
        str(source.file),
        source.family.name,
        source.family.key,
        configuration,
        list(dict.fromkeys(reader.notes)),
        rows,
        missing,
        left_over,
        [n for n in published if n not in goes],
        wrong + [f"{n} has NaN or infinite values" for n, t in published.items() if not is_finite(t)],
        [use.replace("FILE", source.name).replace("FOLDER", str(source.folder)) for use in source.family.uses],
    )


def _meta(make: Callable[[], nn.Module]) -> State:
    with torch.device("meta"):
        return make().state_dict()


def _dual(source: Source, reader: Reader) -> tuple[dict, State]:
    config = dual_config(source.state, reader)
    if config.model == "reaf":
        reader.state = reaf_state(source.state, config.vision.grid)
    return asdict(config), {n: t for n, t in expected_state(config).items() if not n.startswith("vision.fusion.")}


def _teacher_state(source: Source, reader: Reader) -> State:
    inner = {n.removeprefix(TEACHER): t for n, t in source.state.items() if n.startswith(TEACHER)}
    config = dual_config(inner, Reader(teacher_state(source.state), source.name, reader.path, reader.beside))
    return {f"stage1.{n}": t for n, t in expected_state(config).items()}


def _trunk(source: Source, reader: Reader) -> tuple[dict, State]:
    config = reaf_vision(source.state, reader)
    reader.state = reaf_state(source.state, config.grid)
    expected = {f"vision.{n}": t for n, t in _meta(lambda: build_vision(config)).items()}
    return asdict(config), {n: t for n, t in expected.items() if not n.startswith("vision.fusion.")}


def _text_config(reader: Reader, prefix: str = "") -> TextConfig:
    found = text_shapes(reader, prefix)
    if "vocab_size" not in reader.beside:
        return found
    reader.notes.clear()  # which are of what the settings say
    said = bert_settings(reader.beside, reader.path)
    require_shapes(said, found, str(reader.path))
    return said


def _text(source: Source, reader: Reader) -> tuple[dict, State]:
    config = _text_config(reader)
    return asdict(config), _meta(lambda: TextEncoder(**vars(config)))


def _classifier(source: Source, reader: Reader) -> tuple[dict, State]:
    config = _text_config(reader, "encoder.")
    return asdict(config) | {"labels": reader.shape("head.weight", 2)[0]}, _meta(lambda: ReportClassifier(config))


def _slices(source: Source, reader: Reader) -> tuple[dict, State]:
    own = source.folder / "slice_encoder.json"
    settings = read_object(own) if own.is_file() else slice_settings(reader)
    return settings, _meta(lambda: SliceEncoder(**settings))


def _adapter(source: Source, reader: Reader) -> tuple[dict, State]:
    ranks = sorted({t.shape[0] for n, t in reader.state.items() if n.endswith(".lora_a") and t.ndim == 2})
    settings = source.folder / ADAPTER_CONFIG
    r, alpha, *_ = adapter_settings(settings) if settings.is_file() else (ranks[0], 2 * ranks[0]) if ranks else (None, None)
    if ranks != [r]:
        raise InputError(f"{source.name}: its adapters are of rank {ranks}, {settings.name} says {r}; fetch both again")
    if not settings.is_file():
        reader.notes.append(f"no {ADAPTER_CONFIG} beside it: alpha, which no tensor tells, is taken as {alpha}")
    layers = sorted({n.rpartition(".lora_")[0] for n in reader.state if ".lora_" in n})
    pairs = [f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"]
    kinds = sorted({layer.rpartition(".")[2] for layer in layers})
    values = {"r": ranks[0], "alpha": alpha, "layers": kinds}
    return values, {name: reader.state.get(name, torch.empty(0)) for name in pairs}


def _language(source: Source, reader: Reader) -> tuple[dict, State]:
    values, expected = _adapter(source, reader) if any(".lora_" in n for n in reader.state) else ({}, {})
    packers = sorted({n.split(".")[1] for n in reader.state if n.startswith("projectors.")})
    for i in packers:
        width = reader.shape(f"projectors.{i}.cell_attn.query.weight", 2)[1]
        out = reader.shape(f"projectors.{i}.head.fc2.weight", 2)[0]
        packer = _meta(lambda width=width, out=out: SpatialPacker(width, out, (1, 4, 4)))
        expected |= {f"projectors.{i}.{n}": t for n, t in packer.items()}
        values |= {f"packer {i}": f"{width} -> {out} channels"}
    reader.notes.append("packers: the kernel, published (1, 4, 4), and the encoders' grid are in no shape")
    return values, expected


def _decoder(source: Source, reader: Reader) -> tuple[dict, State]:
    if not reader.beside:
        raise InputError(f"{source.name}: has no config.json beside it, which a decoder's heads and rotary positions are read from")
    config = DecoderConfig.from_json(reader.beside, str(reader.path))
    numbers = reader.shape("embed_tokens.weight", 2)
    if numbers != (config.vocab, config.width):
        raise InputError(f"{reader.path}: vocab_size and hidden_size are {(config.vocab, config.width)}, the tensors have {numbers}")
    with torch.device("meta"):
        decoder = Decoder(config)
    # As load_decoder: old Llama files hold rotary frequencies, some tied ones the head, which is the embedding.
    spare = {n for n in reader.state if n.endswith("rotary_emb.inv_freq") or config.tied and n == "lm_head.weight"}
    reader.state = {n: t for n, t in reader.state.items() if n not in spare}
    return asdict(config), dict(decoder.named_parameters())


def _run(source: Source, reader: Reader) -> tuple[dict, None]:
    folder = next((f for f in source.file.parents if Run(f).exists), None)
    if folder is None:
        raise InputError(f"{source.name}: is a run's checkpoint without the run's config.json; name the run's folder")
    values = Run(folder).read_config()
    return {key: values.get(key) for key in ("stage", "preset", "model", "recipe", "origin", "slices")}, None


ACCOUNTS = {
    "dual": _dual, "language": _language, "text": _text, "classifier": _classifier, "slices": _slices, "decoder": _decoder,
    "adapter": _adapter, "trunk": _trunk, "run": _run,
}  # fmt: skip


def print_inspection(found: Inspection, everything: bool) -> None:
    """The account as text: tensors one by one, or by part."""
    print(f"{found.source}: {found.family}")
    print(f"file: {found.file}, {len(found.tensors)} tensors")
    print("configuration:")
    for key, value in _flat(found.configuration):
        print(f"  {key} {value}")
    for note in found.notes:
        print(f"note: {note}")
    print("tensors:")
    for line in _table(found.tensors, everything):
        print(f"  {line}")
    lists = {"missing": found.missing, "left over, of no known use": found.left_over, "known, not used here": found.not_used}
    for title, names in lists.items():
        print(f"{title}: {(', '.join(names) if everything else summary(names)) or 'none'}")
    for problem in found.wrong:
        print(f"wrong: {problem}")
    print("for:")
    for use in found.uses:
        print(f"  {use}")


def _flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: list[Row], everything: bool) -> list[str]:
    """Published name, shape, our name; blocks of equal layout in one line each unless `everything`."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        pattern = row.published if everything else _numbers(row.published)
        lines.setdefault(f"{pattern} {row.shape}", []).append(row)
    table = []
    for group in lines.values():
        first, many = group[0], len(group) > 1
        name, ours = (_numbers(n) if many and n else n for n in (first.published, first.ours))
        shape = "x".join(map(str, first.shape)) or "one number"
        table.append((f"{name}{f' ({len(group)})' * many}", f"{shape} {first.dtype}", f"-> {ours or 'not used'}"))
    widths = [max(len(line[i]) for line in table) for i in range(2)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in table]


def _numbers(name: str) -> str:
    """Blocks' numbers as stars; the numbers of a layer within a block stay."""
    parts = name.split(".")
    lists = ("blocks", "layer", "layers", "decoder_blocks")
    blocks = [i for i, part in enumerate(parts) if part.isdecimal() and parts[i - 1] in lists]
    return ".".join("*" if i in blocks else part for i, part in enumerate(parts))
