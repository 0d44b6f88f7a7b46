"""Stages mrg and vqa: the language model with its weights, its data, its loss and its validation."""

import math

import torch
from torch import Tensor

from reaf_hsenet import distributed
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
    """(sum of the answers' cross-entropies, number of their tokens)."""
    return model(batch.ids, batch.mask, batch.labels, batch.volume, batch.slices, batch.features)


def token_mean(outputs: tuple[Tensor, Tensor], batch: Batch, step: int) -> tuple[Tensor, dict]:
    """The mean over the answer tokens of all ranks' batches, as if one process had them all."""
    total, tokens = outputs
    share = distributed.mean_over_ranks(
        tokens.float()
    )  # gradients are averaged over ranks: so is what divides them
    return total / share, {"answer_tokens": share}


def build(setup: Setup, command: Command, ranks: Ranks, say) -> Job:
    """Build the job of stage mrg or vqa."""
    manifest, settings, config = setup.manifest, setup.train, setup.model
    if settings.shard:
        require_shardable(ranks, config.full, settings.precision, command.compile)
    bad = BadVolumes(settings.max_bad, ranks)
    bad.check(manifest, ["train", "validation"], setup.guided)
    dtype = PRECISIONS[settings.precision]
    torch.manual_seed(settings.seed)
    decoder = None  # a new one, or one whose weights are in the checkpoint
    if setup.origin.get("decoder") and not (config.full and setup.resumed):
        # A frozen decoder is held in the type it computes in; what is trained is float32.
        decoder = base_decoder(config, setup.origin, torch.float32 if config.full else dtype or torch.float32)
    model = build_mllm(config, decoder)
    if not (setup.resumed and config.train_vision):  # then they are in the checkpoint
        fill_encoders(model, setup.encoders or encoder_states(setup.origin["encoders"]), "the encoders' runs")
        setup.encoders = None
        if settings.calibrate and not setup.resumed:
            entries = manifest.entries("train")[: settings.calibrate]
            good, unreadable = part_unreadable(
                [read_sample(manifest, entry, setup.guided) for entry in entries]
            )
            bad.agree(unreadable)
            if not good:
                raise InputError(
                    f"{manifest.name}: of its first {len(entries)} training volumes, which a new decoder "
                    f"starts from, none can be read"
                )
            volumes, slices = zip(*good, strict=True)
            calibrate_tokens(model, torch.stack(volumes), torch.stack(slices) if setup.guided else None)
        if settings.label_epochs and not setup.resumed:
            learn_labels(model, manifest, settings, setup.guided, bad, ranks.device)
    model.frozen_dropout = settings.frozen_dropout
    model.decoder.grad_checkpoint = settings.grad_checkpoint
    for encoder in model.encoders:
        encoder.grad_checkpoint = settings.grad_checkpoint and config.train_vision
    cache = None
    if setup.features:
        shapes = [(math.prod(encoder.grid), encoder.width) for encoder in config.encoders]
        cache = FeatureCache(
            setup.features, setup.origin["encoders"], manifest, dtype or torch.float32, shapes
        )
        fill_cache(cache, model, ("train", "validation"), ranks, setup.guided, bad)

    def data(split: str, **changes) -> LanguageDataset:
        task = "mrg" if command.stage == "mrg" else settings.questions
        return LanguageDataset(
            manifest,
            split,
            task,
            setup.tokenizer,
            model.visual_tokens,
            config.max_text,
            slices=setup.guided,
            cache=cache,
            templates=settings.templates,
            **changes,
        )

    train_set = data(
        "train",
        augmentation=settings.augment,
        seed=settings.seed,
        slices_follow=settings.slices_follow,
        list_epochs=settings.list_epochs,
    )
    validation_set = data("validation")
    for part in (train_set, validation_set):
        part.check_questions()

    def validate(model: Mllm) -> tuple[float, dict]:
        rows = min(settings.validate_samples, len(validation_set))
        loader = make_loader(validation_set, InOrder(rows, settings.batch_size, ranks.rank, ranks.world), 0)
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        unreadable = []
        for batch in batches(loader, ranks.device, tolerant=True):
            unreadable += batch.bad
            sums += torch.stack([value.double() for value in encode(model, batch)])
        bad.agree(unreadable)
        loss, tokens = distributed.mean_over_ranks(sums).tolist()
        if tokens == 0:
            raise InputError(f"{manifest.name}: of its first {rows} validation samples none can be read")
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return -loss / tokens, {"loss": loss / tokens}

    blocks = [block for encoder in model.encoders for block in encoder.blocks] + list(model.decoder.layers)
    return Job(model, train_set, encode, token_mean, validate, blocks, bad, ("loss",), saved=trained_state)
