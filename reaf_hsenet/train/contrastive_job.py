"""Stages clip1 and clip2: the dual encoder with its weights, its data, its loss and its validation."""

import argparse
from collections.abc import Callable
from functools import partial

from reaf_hsenet.config import NO_AUGMENTATION
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import CTReportDataset, plain_batch
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.clip import (
    DualEncoder,
    adapt,
    build_dual_encoder,
    freeze_text,
    set_grad_checkpoint,
    start_as_published,
)
from reaf_hsenet.runs.embedding import SCORES, embed, retrieval_score
from reaf_hsenet.train.calibration import calibrate
from reaf_hsenet.train.contrastive import Contrastive, Guided, Teacher, encode
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.run_setup import Setup
from reaf_hsenet.train.training_state import PRECISIONS
from reaf_hsenet.weights import load_matching, load_strictly


def contrastive_job(setup: Setup, args: argparse.Namespace, ranks: Ranks, say) -> Job:
    manifest, settings = setup.manifest, setup.settings
    bad = BadVolumes(settings.max_bad, ranks)
    bad.check(manifest, ["train", "validation"], setup.guided)
    data = partial(
        CTReportDataset,
        manifest,
        tokenizer=setup.tokenizer,
        max_text=setup.model_config.max_text,
        style=args.model,
        slices=setup.guided,
    )
    train_set = data(
        split="train", augmentation=settings.augment, seed=settings.seed, slices_follow=settings.slices_follow
    )
    validation_set = data(split="validation")
    stage = Contrastive()
    if setup.teacher is not None:
        dtype = PRECISIONS[settings.precision]
        chunk = settings.grad_cache or settings.batch_size
        changes = settings.augment != NO_AUGMENTATION
        teacher = Teacher(setup.teacher.model, ranks.device, dtype, chunk, changes)
        stage = Guided(teacher, settings.relation, settings.relation_steps)
        say(f"{setup.teacher.checkpoint.folder}: the teacher")

    def validate(model: DualEncoder) -> tuple[float, dict]:
        pair = embed(model, validation_set, ranks, settings.batch_size, settings.validate_samples, bad=bad)
        volumes, reports = (int((~vectors.isfinite()).any(1).sum()) for vectors in pair)
        if volumes or reports:
            raise FloatingPointError(f"embeddings of {volumes} volumes and {reports} reports are NaN or infinite")
        return retrieval_score(*pair)

    model = build_dual_encoder(setup.model_config)
    if not args.resume:
        start_weights(model, setup, data, args, bad, say)
    if settings.text_blocks is not None:
        if settings.text_blocks > len(model.text.blocks) + 1:
            raise InputError(
                f"--unfreeze-text {settings.text_blocks}: the text encoder has {len(model.text.blocks)} blocks; say all"
            )
        freeze_text(model, settings.text_blocks)
    if setup.model_config.lora:
        try:
            adapt(model, setup.model_config.lora)
        except ValueError as error:
            raise InputError(f"--lora-targets: {error}") from error
    set_grad_checkpoint(model, settings.grad_checkpoint)
    blocks = [*model.vision.blocks, *model.text.blocks]
    return Job(model, train_set, encode, stage.loss, validate, blocks, bad, SCORES, after_step=model.clamp_scale)


def start_weights(
    model: DualEncoder, setup: Setup, data: Callable, args: argparse.Namespace, bad: BadVolumes, say
) -> None:
    """Pretrained weights as the command line names them; what starts from nothing starts as the recipe says."""
    if setup.settings.start == "published":
        start_as_published(model)
    if setup.text_weights is not None:
        load_strictly(model.text, setup.text_weights, args.text_model)
    if setup.init_state is not None:
        say(load_matching(model, setup.init_state, setup.origin["init"]) + setup.init_account)
    elif setup.settings.calibrate:
        sample = plain_batch(data(split="train"), setup.settings.calibrate, bad)
        calibrate(model, sample.volume, sample.ids if setup.text_weights is None else None, sample.mask)
