"""The two contrastive stages, clip1 and clip2: model, data, loss and validation.

Stage 2 (HSENet section 3.2) has a frozen stage-1 dual encoder as teacher: contrastive + lambda(t) * relation,
over the gathered batch.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from reaf_hsenet.config import NO_AUGMENTATION, TrainConfig
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import Batch, CTReportDataset, plain_batch
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
from reaf_hsenet.train.command import Command
from reaf_hsenet.train.contrastive_setup import resumed_teacher
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.losses import (
    LOSSES,
    contrastive_logits,
    gather_with_grad,
    relation_loss,
    relation_weight,
)
from reaf_hsenet.train.setup import Setup
from reaf_hsenet.train.training_state import PRECISIONS
from reaf_hsenet.weights.files import load_matching, load_strictly

Outputs = tuple[Tensor, Tensor, Tensor]


def at_least_float32(features: Tensor) -> Tensor:
    """Return half precision as float32, in which logits and losses are computed; float64 stays."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def encode(model: DualEncoder, batch: Batch) -> Outputs:
    """Return unit vectors of the volumes and of the reports, (B, C) each, and the scale."""
    image, text, scale = model(batch.volume, batch.ids, batch.mask, batch.slices)
    rows = len(batch.index)  # none of a stand-in, whose gradients are 0
    return image[:rows], text[:rows], scale


class Contrastive:
    """Stage 1: the contrastive loss `name` of the gathered batch, symmetric cross-entropy as published."""

    def __init__(self, name: str = "softmax"):
        self.contrast = LOSSES[name]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        return self.of_logits(self.logits(*outputs, batch), outputs[2])

    def logits(self, image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
        # (B, C) of this rank -> all ranks' rows: every other report of the global batch is a negative of a
        # volume. In float32: bfloat16 keeps eight bits of a cosine, too few to tell near pairs apart.
        image, text = (
            gather_with_grad(at_least_float32(features), batch.counts) for features in (image, text)
        )
        return contrastive_logits(image, text, scale)

    def of_logits(self, logits: Tensor, scale: Tensor) -> tuple[Tensor, dict]:
        return self.contrast(logits), {"logit_scale": scale.detach()}


class Teacher:
    """A frozen dual encoder in evaluation mode, whose features are computed once where they cannot change.

    Reports: once per distinct sequence of tokens, of which the last `kept_reports` are kept: a report that is
    shortened at random is another one every epoch. Volumes: once, when `images_change` (augmentation) is off.
    Kept features are computed one at a time: in a batch, rounding depends on the other rows, and a resumed
    run would differ.
    """

    def __init__(
        self,
        model: DualEncoder,
        device: torch.device,
        dtype: torch.dtype | None,
        chunk: int,
        images_change: bool,
        kept_reports: int = 2**16,
    ):
        # Without dropout, which the published teacher keeps: a report then has one vector, that can be kept.
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.chunk, self.images_change = device, dtype, chunk, images_change
        self.kept_reports = kept_reports
        self.texts: dict[bytes, Tensor] = {}
        self.images: dict[int, Tensor] = {}

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, C) of the volumes and of the reports, a chunk of the batch on the device at a time."""
        text = []
        # Each report by itself, without the batch's padding: the key is its tokens alone.
        for ids, mask in zip(batch.ids.cpu(), batch.mask.cpu(), strict=True):
            ids = ids[mask.bool()]
            key = hashlib.sha256(ids.numpy().tobytes()).digest()
            found = self.texts.pop(key, None)
            if found is None:
                found = self._encode(self.model.encode_text, ids[None], torch.ones_like(ids)[None])[0]
            self.texts[key] = found  # the last used is the last
            if len(self.texts) > self.kept_reports:
                del self.texts[next(iter(self.texts))]
            text.append(found)
        # Augmentation makes another volume every epoch, which nothing that is kept would fit.
        if self.images_change:
            image = [self._encode(self.model.encode_image, part) for part in batch.volume.split(self.chunk)]
            return torch.cat(image), torch.stack(text)
        for row, volume in zip(batch.index, batch.volume, strict=True):
            if row not in self.images:
                self.images[row] = self._encode(self.model.encode_image, volume[None])[0]
        return torch.stack([self.images[row] for row in batch.index]), torch.stack(text)

    def _encode(self, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return at_least_float32(encode(*(t.to(self.device) for t in inputs)))


class Guided(Contrastive):
    """Stage 2: cross-entropy and relation to the teacher.

    The teacher's logits are scaled by the student's scale, as published, and carry no gradient.
    """

    def __init__(self, teacher: Teacher, weight: float, steps: int, name: str = "softmax"):
        super().__init__(name)
        self.teacher, self.weight, self.steps = teacher, weight, steps

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        logits, scale = self.logits(*outputs, batch), outputs[2]
        loss, numbers = self.of_logits(logits, scale)
        # L = L_contrastive + lambda(t) mean (s v t^T - s v_1 t_1^T)^2: the student's similarities start near
        # the teacher's, and are let go as lambda falls.
        weight = relation_weight(step, self.weight, self.steps)
        if weight == 0:  # the teacher has nothing more to say
            return loss, numbers | {"relation": 0.0}
        # All ranks gather together: one that could read nothing takes part with its own 0 rows.
        features = self.teacher.features(batch) if batch.index else (x.detach() for x in outputs[:2])
        # The scale is detached: it moves the student's logits towards the target, never the target.
        relation = relation_loss(logits, self.logits(*features, scale.detach(), batch))
        return loss + weight * relation, numbers | {"relation": relation.detach()}


def build(setup: Setup, command: Command, ranks: Ranks, say) -> Job:
    """Build the job of stage clip1 or clip2."""
    settings, config = setup.train, setup.model
    if setup.resumed and setup.origin.get("teacher"):
        setup.teacher = resumed_teacher(command, setup)
    bad = BadVolumes(settings.max_bad, ranks)
    # Absent and cut files are found now, not after hours of training.
    bad.check(setup.manifest, ["train", setup.manifest.chosen_on], setup.guided)

    # The data: volumes with their reports.
    data = partial(
        CTReportDataset,
        setup.manifest,
        tokenizer=setup.tokenizer,
        max_text=config.max_text,
        style=command.model,
        slices=setup.guided,
    )
    train_set = data(
        split="train",
        augmentation=settings.augment,
        seed=settings.seed,
        slices_follow=settings.slices_follow,
    )

    # The loss: contrastive, in stage 2 with a teacher's relation.
    stage = Contrastive(settings.loss)
    if setup.teacher is not None:
        teacher = Teacher(
            model=setup.teacher.model,
            device=ranks.device,
            dtype=PRECISIONS[settings.precision],
            chunk=settings.grad_cache or settings.batch_size,
            images_change=settings.augment != NO_AUGMENTATION,
        )
        stage = Guided(teacher, settings.relation, settings.relation_steps, settings.loss)
        say(f"{setup.teacher.checkpoint.folder}: the teacher")

    # The model with its initial weights; a resumed run loads its checkpoint over them.
    model = build_dual_encoder(config)
    if not setup.resumed:
        start_weights(model, setup, plain=data(split="train"), bad=bad, say=say)
    # Freezing and adapters come after the weights: an adapted layer has other names than a published file.
    if settings.text_blocks is not None:
        if settings.text_blocks > len(model.text.blocks) + 1:
            raise InputError(
                f"--unfreeze-text {settings.text_blocks}: the text encoder has {len(model.text.blocks)} "
                "blocks; say all"
            )
        freeze_text(model, settings.text_blocks)
    if config.lora:
        try:
            adapt(model, config.lora)
        except ValueError as error:
            raise InputError(f"--lora-targets: {error}") from error
    set_grad_checkpoint(model, settings.grad_checkpoint)
    return Job(
        model=model,
        train_set=train_set,
        encode=encode,
        loss=stage.loss,
        validate=partial(validate, data=data(split=setup.manifest.chosen_on), settings=settings, bad=bad),
        blocks=[*model.vision.blocks, *model.text.blocks],
        bad=bad,
        measured=SCORES,
        after_step=model.clamp_scale,
    )


def start_weights(model: DualEncoder, setup: Setup, plain: CTReportDataset, bad: BadVolumes, say) -> None:
    """Load the pretrained weights that the command line names; the rest starts as the recipe says.

    plain: the training split without augmentation, which calibration takes a sample of.
    """
    # From the general to the particular, each over the one before: a start for all, --text-model, then --init
    # or the teacher.
    if setup.train.start == "published":
        start_as_published(model)
    if setup.text_weights is not None:
        load_strictly(model.text, setup.text_weights, setup.origin["text_model"])
    if setup.init_state is not None:
        say(load_matching(model, setup.init_state, setup.origin["init"]) + setup.init_note)
    # Features of loaded weights tell patients apart already; those of a start from scratch hardly do.
    elif setup.train.calibrate:
        sample = plain_batch(plain, setup.train.calibrate, bad)
        ids = sample.ids if setup.text_weights is None else None
        calibrate(model, sample.volume, ids, sample.mask)


def validate(
    model: DualEncoder, data: CTReportDataset, settings: TrainConfig, bad: BadVolumes
) -> tuple[float, dict]:
    """Return the score, mean R@5, and the recalls of retrieval."""
    pair = embed(model, data, bad.ranks, settings.batch_size, settings.validate_samples, bad=bad)
    # A comparison with NaN is false: ranks among such vectors would be numbers like any other.
    volumes, reports = (int((~vectors.isfinite()).any(1).sum()) for vectors in pair)
    if volumes or reports:
        raise FloatingPointError(f"embeddings of {volumes} volumes and {reports} reports are NaN or infinite")
    return retrieval_score(*pair)
