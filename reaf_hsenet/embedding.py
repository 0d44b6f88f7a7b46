"""Dual-encoder runs at work: rebuild one from its folder, embed a split, score retrieval on it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.checkpoint import Choice, Run, weights_sha256
from reaf_hsenet.config import ClipConfig, GuidedVisionConfig, Recipe
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.samplers import InOrder
from reaf_hsenet.data.workers import batches, make_loader, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.retrieval import cross_retrieval
from reaf_hsenet.models.clip import DualEncoder, adapt, build_dual_encoder
from reaf_hsenet.pretrained import find_folder, is_hub_id
from reaf_hsenet.pretrained.loading import require_fit
from reaf_hsenet.pretrained.reading import SUFFIXES
from reaf_hsenet.progress import progress_bar
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer import WordPiece, load_wordpiece

# What the validation of a dual encoder measures.
SCORES = tuple(f"{direction}/R@{k}" for direction in ("report_to_volume", "volume_to_report") for k in (1, 5, 10))


@dataclass
class DualEncoderRun:
    """A trained dual encoder with what its inputs must be. origin: what its weights started from."""

    folder: Path
    stage: str
    preset: str
    model: DualEncoder
    config: ClipConfig
    recipe: Recipe
    tokenizer: WordPiece
    checkpoint: Choice
    weights: Path
    data: Path | None
    origin: dict
    slices: dict | None

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return isinstance(self.config.vision, GuidedVisionConfig)

    def sha256(self) -> str:
        """Of the checkpoint's weights, by which a run knows its teacher wherever that is moved to."""
        return weights_sha256(self.weights)


def load_dual_encoder(folder: Path, which: str | None = None, text_model: str | None = None) -> DualEncoderRun:
    """Rebuild a clip1 or clip2 run's model; or that of a published checkpoint, a file or a folder.

    which: the checkpoint, as of Run.choose. text_model: where a published text encoder's vocab.txt is, when not beside its
    checkpoint. Raises InputError when the folder holds no such run or its weights do not fit.
    """
    if is_published(folder):
        from reaf_hsenet.published_run import load_published  # which takes all of the package with it

        run = load_published(folder, text_model)
        if not isinstance(run, DualEncoderRun):
            raise InputError(f"{folder}: is HSENet's language model; expected a dual encoder")
        return run
    if text_model is not None:
        raise InputError(f"--text-model: is of published weights; the run {folder} knows its own vocabulary, leave it out")
    run = Run(folder)
    values = run.read_config()
    if values.get("stage") not in ("clip1", "clip2"):
        raise InputError(
            f"{folder}: is a run of stage {values.get('stage')!r}; expected a dual encoder, stage clip1 or clip2"
        )
    source = str(run.folder / "config.json")
    config, recipe = from_dict(ClipConfig, values["model"], source), from_dict(Recipe, values["recipe"], source)
    state, checkpoint = run.load_model(which)
    with torch.device("meta"):  # sizes that the weights do not have are not built
        require_fit(state, _run_model(config).state_dict(), str(checkpoint.folder / "model.safetensors"))
    tokenizer, origin = load_wordpiece(run.folder), values.get("origin") or {}
    short = len(tokenizer.vocab) < config.text.vocab and not origin.get("text_model")  # a published one may have spare rows
    if short or len(tokenizer.vocab) > config.text.vocab:
        raise InputError(
            f"{run.folder / 'vocab.txt'}: has {len(tokenizer.vocab)} tokens, the run's text encoder {config.text.vocab}; put the run's own back"
        )
    model = _run_model(config)
    model.load_state_dict(state)
    return DualEncoderRun(
        folder=Path(folder),
        stage=values["stage"],
        preset=values.get("preset", ""),
        model=model.eval(),
        config=config,
        recipe=recipe,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        weights=checkpoint.folder / "model.safetensors",
        data=Path(values["data"]) if values["data"] else None,
        origin=origin,
        slices=values.get("slices"),
    )


def _run_model(config: ClipConfig) -> DualEncoder:
    model = build_dual_encoder(config)
    if config.lora:
        adapt(model, config.lora)
    return model


def is_published(path: Path) -> bool:
    """Whether this is a file, or a folder with weights that no run of ours wrote."""
    path = Path(path)
    if Run(path).named:  # one of a run's checkpoints
        return False
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return any(file.suffix in SUFFIXES for file in path.iterdir())
    return path.is_file() and path.suffix in SUFFIXES


def load_source(path: Path | str, text_model: str | None, sha256: str | None = None) -> DualEncoderRun:
    """Load a run that another run came from, or published weights, whose vocabulary lies where that run's did.

    sha256: hash of the weights that the other run had. The checkpoint with these is taken, whichever the path names now.
    """
    path = Path(path)
    if is_published(path):
        return load_dual_encoder(path, None, text_model)
    run = Run(path)
    had = run.holding(sha256) if sha256 else None
    return load_dual_encoder(run.folder, had) if had else load_dual_encoder(path)


def locate_run(name: str) -> Path:
    """A path as it is; a hub id, fetched."""
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    return find_folder(name, [*(f"*{suffix}" for suffix in SUFFIXES), "*.json", "vocab.txt"])


@worker_deaths_named()
@torch.inference_mode()
def embed(
    model: DualEncoder,
    dataset: CTReportDataset,
    ranks: Ranks,
    batch: int,
    rows: int | None = None,
    workers: int = 0,
    progress: bool = False,
    reports: bool = True,
    bad: BadVolumes | None = None,
) -> tuple[Tensor, Tensor]:
    """Unit vectors of the first `rows` volumes and reports, (N, C) each, on the CPU and the same on every rank.

    Without `reports` there are none of them, (N, 0). bad: takes what cannot be read, up to its limit; without it the first
    such volume is an InputError.
    """
    rows = min(rows or len(dataset), len(dataset))
    loader = make_loader(dataset, InOrder(rows, batch, ranks.rank, ranks.world), workers)
    index, image, text, unreadable = [], [], [], []
    with progress_bar(len(loader), "embed", "batch", shown=progress and ranks.main) as bar:
        for part in batches(loader, ranks.device, tolerant=bad is not None):
            bar.update()
            index, unreadable = index + part.index, unreadable + part.bad
            if not part.index:
                continue
            image.append(model.encode_image(part.volume, part.slices).float().cpu())
            text.append(
                model.encode_text(part.ids, part.mask).float().cpu() if reports else torch.empty(len(part.index), 0)
            )
    if bad is not None:
        bad.agree(unreadable)
    parts = distributed.gather_objects((index, image, text))
    if not any(index for index, _, _ in parts):
        raise InputError(f"{dataset.manifest.name}: of its first {rows} volumes here none can be read")
    order = torch.tensor([i for index, _, _ in parts for i in index]).argsort()
    image = torch.cat([x for _, images, _ in parts for x in images])[order]
    text = torch.cat([x for _, _, texts in parts for x in texts])[order]
    return image, text


def retrieval_score(image: Tensor, text: Tensor) -> tuple[float, dict[str, float]]:
    """(mean R@5 of both directions, the numbers to show), for choosing the best checkpoint."""
    tables = cross_retrieval(image, text).tables
    numbers = {f"{direction}/R@{k}": tables[direction][f"R@{k}"] for direction in tables for k in (1, 5, 10)}
    return sum(table["R@5"] for table in tables.values()) / 2, numbers
