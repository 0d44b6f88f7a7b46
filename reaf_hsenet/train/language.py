"""Stages mrg and vqa: the language model with its weights, its data, its loss and its validation."""

import math
from functools import partial

import torch
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.feature_cache import FeatureCache, fill_cache
from reaf_hsenet.data.language import cue_ids
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import Batch, part_unreadable, read_sample
from reaf_hsenet.data.samplers import InOrder
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.probe import best_f1_thresholds
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.findings import FindingsHead
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.runs.language import base_decoder, fill_encoders
from reaf_hsenet.runs.trained import encoder_states
from reaf_hsenet.train.calibration import calibrate_tokens, token_chunks
from reaf_hsenet.train.command import Command
from reaf_hsenet.train.cues import CueTable, truth_sha256
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.setup import Setup
from reaf_hsenet.train.sharding import require_shardable
from reaf_hsenet.train.training_state import PRECISIONS

SAMPLE = 256  # training volumes whose tokens set the findings head's scale


def encode(model: Mllm, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the answers' cross-entropies, the number of target tokens, and logits of findings."""
    return model(
        batch.ids,
        batch.mask,
        batch.labels,
        volume=batch.volume,
        slices=batch.slices,
        features=batch.features,
        findings=batch.findings,
    )


def token_mean(
    outputs: tuple[Tensor, Tensor, Tensor],
    batch: Batch,
    step: int,
    head: FindingsHead | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, dict]:
    """Return the mean over the target tokens of all ranks, as if one process had them all.

    head, weight: of the findings, whose cross-entropy is added.
    """
    total, tokens, logits = outputs
    # Gradients are averaged over ranks: so is what divides them.
    # (1 / W) sum_r total_r / (sum_r tokens_r / W) = sum of all cross-entropies / number of all target tokens,
    # where the first 1 / W is DDP's mean: long reports count by their tokens, on whichever rank they are.
    share = distributed.mean_over_ranks(tokens.float())
    loss, numbers = total / share, {"answer_tokens": share}
    if head is not None:
        wrong, known = head.loss(logits, batch.findings[:, 0])
        findings = wrong / distributed.mean_over_ranks(known.float()).clamp(min=1e-6)
        loss, numbers = loss + weight * findings, numbers | {"findings": findings.detach()}
    return loss, numbers


def build(setup: Setup, command: Command, ranks: Ranks, say) -> Job:
    """Build the job of stage mrg or vqa."""
    settings, config = setup.train, setup.model
    if settings.shard:
        require_shardable(ranks, config.full, settings.precision, command.compile)
    bad = BadVolumes(settings.max_bad, ranks)
    bad.check(setup.manifest, ["train", setup.manifest.chosen_on], setup.guided)
    if config.findings and setup.resumed:
        setup.truth = same_truth(setup)

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
    model.cue_ids = partial(cue_ids, setup.tokenizer, config.findings)
    if not setup.resumed:
        prepare(model, setup, bad, ranks)
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
        truth=setup.truth,
        cue_dropout=config.cue_dropout,
    )
    train_set = data(
        split="train",
        augmentation=settings.augment,
        seed=settings.seed,
        slices_follow=settings.slices_follow,
    )
    validation_set = data(split=setup.manifest.chosen_on)
    for part in (train_set, validation_set):
        part.check_questions()
    return Job(
        model=model,
        train_set=train_set,
        encode=encode,
        loss=partial(token_mean, head=model.findings, weight=settings.findings_weight),
        validate=partial(validate, data=validation_set, settings=settings, bad=bad),
        blocks=[block for encoder in model.encoders for block in encoder.blocks] + list(model.decoder.layers),
        bad=bad,
        measured=("loss", "findings_f1") if config.findings else ("loss",),
        saved=trained_state,
    )


def same_truth(setup: Setup) -> dict[str, Tensor]:
    """Return the findings of a resumed run's volumes. Raises InputError when they have changed."""
    known, splits = setup.origin["labels"], ("train", setup.manifest.chosen_on)
    places = setup.model.cues == "places"
    table = distributed.on_main(lambda: CueTable(setup.manifest, known["source"], splits, places))
    truth = table.truth(setup.model.findings)
    if truth_sha256(truth) != known["sha256"]:
        raise InputError(
            f"{known['source'] or setup.manifest.name}: its findings are not those that the run was "
            "started with; put them back, or start another run with --out"
        )
    return truth


def prepare(model: Mllm, setup: Setup, bad: BadVolumes, ranks: Ranks) -> None:
    """Set scales from a sample of the training volumes: of tokens for a new decoder, of the findings head."""
    manifest, calibrate, head = setup.manifest, setup.train.calibrate, model.findings
    if not (calibrate or head):
        return
    entries = manifest.entries("train")[: calibrate or SAMPLE]
    good, unreadable = part_unreadable([read_sample(manifest, entry, setup.guided) for entry in entries])
    bad.agree(unreadable)
    if not good:
        raise InputError(
            f"{manifest.name}: of its first {len(entries)} training volumes, whose tokens set the scale of "
            "what is new, none can be read"
        )
    volumes, slices = zip(*good, strict=True)
    sample = torch.stack(volumes), torch.stack(slices) if setup.guided else None
    model.encoders.to(ranks.device)
    if calibrate:
        calibrate_tokens(model, *sample)
    if head:
        pooled = torch.cat([head.pool(found).cpu() for found in token_chunks(model, *sample)])
        head.start(pooled, torch.stack([setup.truth[volume] for volume in manifest.ids("train")]))
    # Back to where the rest of the model is; the training state moves or shards it whole.
    model.encoders.cpu()


def validate(
    model: Mllm, data: LanguageDataset, settings: TrainConfig, bad: BadVolumes
) -> tuple[float, dict]:
    """Return the score, minus the mean cross-entropy of a target token, and the numbers that were measured.

    Answers are to cues that the head predicts, with the thresholds that it has; `findings_f1` is its micro-F1
    over labels with these. Then it gets thresholds and error rates by what it predicts here.
    """
    ranks, rows = bad.ranks, min(settings.validate_samples, len(data))
    loader = make_loader(data, InOrder(rows, settings.batch_size, ranks.rank, ranks.world), 0)
    # Sums, not means of batches: batches have different numbers of target tokens.
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    unreadable, found = [], {}
    for batch in batches(loader, ranks.device, tolerant=True):
        unreadable += batch.bad
        *both, logits = encode(model, batch)
        sums += torch.stack([value.double() for value in both])
        if model.findings:  # each volume counts once, however many questions it has
            both = torch.stack((model.findings.probabilities(logits), batch.findings[:, 0]), 1).cpu()
            found |= {data.name(row): pair for row, pair in zip(batch.index, both, strict=False)}
    bad.agree(unreadable)
    loss, tokens = distributed.mean_over_ranks(sums).tolist()
    if tokens == 0:
        raise InputError(f"{data.manifest.name}: of its first {rows} validation samples none can be read")
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    numbers = {"loss": loss / tokens}
    if model.findings:
        of_all = {name: pair for part in distributed.gather_objects(found) for name, pair in part.items()}
        pairs = torch.stack([pair for _, pair in sorted(of_all.items())])
        numbers["findings_f1"] = measure_findings(model.findings, pairs[:, 0], pairs[:, 1])
    return -loss / tokens, numbers


def measure_findings(head: FindingsHead, probabilities: Tensor, truth: Tensor) -> float:
    """Return the head's micro-F1 over labels; then give it thresholds of best F1 and its error rates.

    probabilities, truth: (N, K). A place's threshold is found where its label is there, and any one where
    there are volumes with the finding.
    """
    there, thresholds, label = truth.nan_to_num() > 0.5, head.thresholds.cpu().clone(), head.label.tolist()
    labels = [j for j, of in enumerate(label) if of == j]
    told, known = (probabilities > thresholds)[:, labels], truth[:, labels].isfinite()
    right = 2 * (told & there[:, labels]).sum()
    f1 = right / ((told & known).sum() + there[:, labels].sum()).clamp(min=1)
    for j, of in enumerate(label):
        rows = truth[:, j].isfinite() & (there[:, of] if of != j else True)
        if there[rows, j].any():
            columns = there[rows, j, None].numpy(), probabilities[rows, j, None].numpy()
            thresholds[j] = float(best_f1_thresholds(*columns)[0].clip(0, 1))
    head.measure(probabilities, truth, thresholds)
    return float(f1)
