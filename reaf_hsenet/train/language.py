"""Stages mrg and vqa: the language model with its weights, its data, its loss and its validation."""

import math
from functools import partial

import torch
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.feature_cache import FeatureCache, fill_cache
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import Batch, part_unreadable, read_sample
from reaf_hsenet.data.samplers import InOrder
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.runs.language import base_decoder, fill_encoders
from reaf_hsenet.runs.trained import encoder_states
from reaf_hsenet.train.calibration import calibrate_tokens
from reaf_hsenet.train.command import Command
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.label_start import learn_labels
from reaf_hsenet.train.setup import Setup
from reaf_hsenet.train.sharding import require_shardable
from reaf_hsenet.train.training_state import PRECISIONS


def encode(model: Mllm, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of the answers' cross-entropies, and the number of target tokens."""
    return model(
        batch.ids,
        batch.mask,
        batch.labels,
        volume=batch.volume,
        slices=batch.slices,
        features=batch.features,
    )


def token_mean(outputs: tuple[Tensor, Tensor], batch: Batch, step: int) -> tuple[Tensor, dict]:
    """Return the mean over the target tokens of all ranks, as if one process had them all."""
    total, tokens = outputs
    # Gradients are averaged over ranks: so is what divides them.
    # (1 / W) sum_r total_r / (sum_r tokens_r / W) = sum of all cross-entropies / number of all target tokens,
    # where the first 1 / W is DDP's mean: long reports count by their tokens, on whichever rank they are.
    share = distributed.mean_over_ranks(tokens.float())
    return total / share, {"answer_tokens": share}


def build(setup: Setup, command: Command, ranks: Ranks, say) -> Job:
    """Build the job of stage mrg or vqa."""
    settings, config = setup.train, setup.model
    if settings.shard:
        require_shardable(ranks, config.full, settings.precision, command.compile)
    bad = BadVolumes(settings.max_bad, ranks)
    bad.check(setup.manifest, ["train", setup.manifest.chosen_on], setup.guided)

    # The model with its weights. A resumed run's checkpoint has those of what it trains.
    torch.manual_seed(settings.seed)
    dtype = PRECISIONS[settings.precision] or torch.float32
    decoder = None
    if setup.origin.get("decoder") and not (config.full and setup.resumed):
        # A frozen decoder is held in the type it computes in; what is trained is float32.
        decoder = base_decoder(config, setup.origin, torch.float32 if config.full else dtype)
    model = build_mllm(config, decoder)
    # Frozen encoders are in no checkpoint: they come from the runs that config.json names, by hash.
    if not (setup.resumed and config.train_vision):
        fill_encoders(model, setup.encoders or encoder_states(setup.origin["encoders"]), "the encoders' runs")
        setup.encoders = None
    if not setup.resumed:
        prepare_encoders(model, setup, bad, ranks)
    model.frozen_dropout = settings.frozen_dropout
    model.decoder.grad_checkpoint = settings.grad_checkpoint
    for encoder in model.encoders:
        # A frozen encoder runs without a graph: it keeps no activations to be computed again.
        encoder.grad_checkpoint = settings.grad_checkpoint and config.train_vision

    # The data: volumes, or the frozen encoders' tokens of them, with questions and answers.
    cache = None
    if setup.features:
        shapes = [(math.prod(encoder.grid), encoder.width) for encoder in config.encoders]
        cache = FeatureCache(setup.features, setup.origin["encoders"], setup.manifest, dtype, shapes)
        splits = "train", setup.manifest.chosen_on
        fill_cache(cache, model, splits, ranks=ranks, slices=setup.guided, bad=bad)
    data = partial(
        LanguageDataset,
        setup.manifest,
        task="mrg" if command.stage == "mrg" else settings.questions,
        tokenizer=setup.tokenizer,
        image_tokens=model.visual_tokens,
        max_text=config.max_text,
        slices=setup.guided,
        cache=cache,
        templates=settings.templates,
    )
    train_set = data(
        split="train",
        augmentation=settings.augment,
        seed=settings.seed,
        slices_follow=settings.slices_follow,
        list_epochs=settings.list_epochs,
    )
    validation_set = data(split=setup.manifest.chosen_on)
    for part in (train_set, validation_set):
        part.check_questions()
    return Job(
        model=model,
        train_set=train_set,
        encode=encode,
        loss=token_mean,
        validate=partial(validate, data=validation_set, settings=settings, bad=bad),
        blocks=[block for encoder in model.encoders for block in encoder.blocks] + list(model.decoder.layers),
        bad=bad,
        measured=("loss",),
        saved=trained_state,
    )


def prepare_encoders(model: Mllm, setup: Setup, bad: BadVolumes, ranks: Ranks) -> None:
    """Prepare encoders that are trained on for a decoder from scratch, as the recipe says."""
    manifest, settings = setup.manifest, setup.train
    # First the size of what differs between patients, then what it says (docs/method.md has the gain of
    # each).
    if settings.calibrate:
        entries = manifest.entries("train")[: settings.calibrate]
        good, unreadable = part_unreadable([read_sample(manifest, entry, setup.guided) for entry in entries])
        bad.agree(unreadable)
        if not good:
            raise InputError(
                f"{manifest.name}: of its first {len(entries)} training volumes, which a new decoder starts "
                "from, none can be read"
            )
        volumes, slices = zip(*good, strict=True)
        calibrate_tokens(model, torch.stack(volumes), torch.stack(slices) if setup.guided else None)
    if settings.label_epochs:
        learn_labels(model, manifest, settings, guided=setup.guided, bad=bad, device=ranks.device)


def validate(
    model: Mllm, data: LanguageDataset, settings: TrainConfig, bad: BadVolumes
) -> tuple[float, dict]:
    """Return the score, minus the mean cross-entropy of a target token, and {"loss": that mean}."""
    ranks, rows = bad.ranks, min(settings.validate_samples, len(data))
    loader = make_loader(data, InOrder(rows, settings.batch_size, ranks.rank, ranks.world), 0)
    # Sums, not means of batches: batches have different numbers of target tokens.
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    unreadable = []
    for batch in batches(loader, ranks.device, tolerant=True):
        unreadable += batch.bad
        sums += torch.stack([value.double() for value in encode(model, batch)])
    bad.agree(unreadable)
    loss, tokens = distributed.mean_over_ranks(sums).tolist()
    if tokens == 0:
        raise InputError(f"{data.manifest.name}: of its first {rows} validation samples none can be read")
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return -loss / tokens, {"loss": loss / tokens}
