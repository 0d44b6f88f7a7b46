"""What a run of stage mrg or vqa is made of: encoders of earlier runs, a projector each, a decoder with
its tokenizer.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import NO_AUGMENTATION, PUBLISHED_VISUAL_TOKENS, TEXT_LENGTH, Recipe, TrainConfig
from reaf_hsenet.data.language import LIST_END, add_image_tokens, label_token
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import LIST_QUESTION, questions, report_prompts, templates
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, find_folder, fingerprint
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm_config import TINY_KERNEL, MllmConfig, build_mllm, tiny_decoder
from reaf_hsenet.presets import stage_config
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import DUAL, Trained, decoder_hashes, load_trained
from reaf_hsenet.settings import from_dict, to_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, check_fits
from reaf_hsenet.tokenizer.word_tokenizer import train_words
from reaf_hsenet.train.guided_setup import load_teacher
from reaf_hsenet.train.resumed_setup import refuse_changes, resumable, resumed_settings
from reaf_hsenet.train.run_setup import changed_settings, data_of, located
from reaf_hsenet.train.train_flags import given
from reaf_hsenet.weights.decoder import FILES

LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout")
# What a run keeps for good.
FIXED_FLAGS = (
    *(
        "preset",
        "init",
        "teacher",
        "vision",
        "projector",
        "kernel",
        "shared_projector",
        "decoder",
        "full",
        "train_vision",
        "int8",
    ),
    *(*LORA_FLAGS, "cache_features", "max_text", "questions", "templates", "frozen_dropout", "slices_stay"),
    *(
        "batch_size",
        "accumulate",
        "lr",
        "weight_decay",
        "warmup",
        "clip_norm",
        "no_augment",
        "seed",
        "max_steps",
    ),
    "best_by",
)


@dataclass
class LanguageSetup:
    """All that a run is made of, whether new or resumed.

    features: folder of --cache-features. encoders: tensors of the dual encoders that a new run starts from,
    already read.
    """

    preset: str
    manifest: Manifest
    config: MllmConfig
    settings: TrainConfig
    tokenizer: Tokenizer
    origin: dict
    features: Path | None = None
    max_steps: int | None = None
    encoders: list[dict] | None = None

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return any(hasattr(encoder, "slice_width") for encoder in self.config.encoders)

    def values(self) -> dict:
        """What config.json says of the run, besides its stage, length and place."""
        return {
            "model": to_dict(self.config),
            "recipe": to_dict(self.manifest.recipe),
            "origin": self.origin,
            "slices": self.manifest.slices if self.guided else None,
            "train": to_dict(self.settings),
            "data": str(self.manifest.location.absolute()),
            "features": self.features and str(self.features),
        }


def new_language_setup(args: argparse.Namespace, ranks: Ranks, say) -> LanguageSetup:
    vision = args.vision or ("reaf" if args.model == "reaf" else "dual")
    if (vision == "reaf") != (args.model == "reaf"):
        raise InputError(
            f"--vision {vision}: is not of --model {args.model}; reaf goes with --model reaf, the others "
            f"with hsenet"
        )
    runs = encoder_runs(args, vision)
    first = runs[-1]  # whose data and preset are the default
    preset = args.preset or first.preset
    if args.preset not in (None, first.preset):
        raise InputError(f"--preset {args.preset}: {first.folder} has {first.preset}; leave the flag out")
    manifest = load_manifest(data_of(args, first))
    for run in runs:
        manifest.require(run.recipe, str(run.folder))
        if run.guided:
            manifest.require_slices(run.slices, str(run.folder))
    settings = changed_settings(args, stage_config(args.stage, args.model, preset), ranks)
    rows = len(
        manifest.entries("train") if args.stage == "mrg" else questions(manifest, "train", settings.questions)
    )
    if settings.batch_size * ranks.world > rows:
        if args.batch_size is not None or rows < ranks.world:
            raise InputError(
                f"--batch-size {settings.batch_size}: a batch of {ranks.world} processes needs "
                f"{settings.batch_size * ranks.world} samples, there are {rows}"
            )
        say(
            f"batch size {rows // ranks.world} in place of {settings.batch_size}: there are {rows} "
            f"training samples"
        )
        settings = replace(settings, batch_size=rows // ranks.world)
    if args.decoder is None and not preset.endswith("-tiny"):
        raise InputError(
            "--decoder: name one that the encoders are joined to, for example microsoft/Phi-4-mini-instruct"
        )
    if args.decoder is None and (args.int8 or args.full or given(args, LORA_FLAGS)):
        raise InputError(
            "--full, --int8, --lora-*: are of a --decoder with weights; a new one is trained whole"
        )
    if args.int8 and args.full:
        raise InputError("--int8: weights in eight bits are not trained; leave out --full")
    if args.full and given(args, LORA_FLAGS):
        raise InputError(
            "--lora-*: a decoder that is trained whole has no adapters; leave them or --full out"
        )
    unlabelled = any(
        entry["labels"] is None for split in ("train", "validation") for entry in manifest.entries(split)
    )
    if args.decoder is not None or unlabelled:
        settings = replace(settings, label_epochs=0, list_epochs=0)
    tokenizer, decoder, known = text_side(args, manifest, settings, say)
    full = args.full or known is None
    options = {name.removeprefix("lora_"): v for name, v in given(args, LORA_FLAGS).items()}
    kernel = args.kernel or (TINY_KERNEL if preset.endswith("-tiny") else MllmConfig.kernel)
    config = MllmConfig(
        vision,
        tuple(run.config.vision for run in runs),
        decoder,
        args.projector or MllmConfig.projector,
        tuple(kernel),
        args.shared_projector,
        full,
        known is None if args.train_vision is None else args.train_vision,
        args.int8,
        **options,
    )
    config = replace(config, max_text=text_length(args, config))
    if not config.train_vision:  # frozen encoders stay as they are
        settings = replace(settings, calibrate=0, label_epochs=0)
    origin = {
        "init": located(first.folder),
        "encoders": [
            {"run": located(run.folder), "sha256": run.sha256(), "text_model": run.origin.get("text_model")}
            for run in runs
        ],
        "decoder": known,
    }
    features = feature_folder(args, config, settings, manifest)
    states = [merged_state(run.model) for run in runs]
    return LanguageSetup(
        preset, manifest, config, settings, tokenizer, origin, features, args.max_steps, states
    )


def encoder_runs(args: argparse.Namespace, vision: str) -> list[Trained]:
    """The dual-encoder runs that `vision` takes its encoders from, in their order."""
    default = Path("runs/clip2-hsenet" if vision in ("dual", "2e3") else f"runs/clip1-{args.model}")
    folder = Path(args.init) if args.init else default
    if not Run(folder).exists:
        stage = "clip2" if vision in ("dual", "2e3") else "clip1"
        raise InputError(
            f"{folder}: no run of stage {stage}, whose encoder --vision {vision} sees; train it first, or "
            f"name one with --init"
        )
    run = load_trained(folder, stages=DUAL)
    wanted = {"dual": "clip2", "2e3": "clip2", "stage1": "clip1", "reaf": "clip1"}[vision]
    if (run.stage, run.config.model) != (wanted, args.model) or (wanted == "clip2" and not run.guided):
        guided = " without slices" if run.stage == "clip2" and not run.guided else ""
        raise InputError(
            f"--init {folder}: is a {run.stage} run of {run.config.model}{guided}; --vision {vision} needs "
            f"a {wanted} run of {args.model}"
        )
    if vision != "dual":
        if args.teacher:
            raise InputError(
                f"--teacher: is the stage-1 run beside 2E3; --vision {vision} has none, leave it out"
            )
        return [run]
    had = None if args.teacher else run.origin.get("teacher_sha256")
    teacher = load_teacher(args.teacher or run.origin["teacher"], run.origin.get("text_model"), had)
    if args.teacher is None and teacher.sha256() != had:
        raise InputError(
            f"{teacher.folder}: none of its checkpoints is the one that {folder} learned from; name that "
            "one's folder, or another stage-1 run, with --teacher"
        )
    return [teacher, run]


def text_side(
    args: argparse.Namespace, manifest: Manifest, settings: TrainConfig, say
) -> tuple[Tokenizer, DecoderConfig, dict | None]:
    """Tokenizer with the image tokens, the decoder's settings, and where its weights are; None for a new
    decoder.
    """
    if args.decoder is None:
        say("no --decoder: a small one starts from nothing, with a vocabulary of the training texts")
        texts = [clean_report(entry["text"]) for entry in manifest.entries("train")] + list(report_prompts())
        if settings.list_epochs:
            texts.append(LIST_QUESTION)
        if args.stage == "vqa":
            asked = [row for _, row in questions(manifest, "train", settings.questions)]
            texts = [
                text
                for row in asked
                for text in (row.get("question", ""), row["answer"], row["abnormality"], row["anatomy"])
            ]
            texts += settings.templates or templates(settings.questions)
        tokenizer = train_words(texts, 1000)
        add_image_tokens(tokenizer)
        if settings.list_epochs and args.stage == "mrg":
            tokenizer.add_tokens([*map(label_token, manifest.labels), LIST_END])
        return tokenizer, tiny_decoder(tokenizer), None
    folder = find_folder(args.decoder, FILES)
    tokenizer, config = load_tokenizer(folder), DecoderConfig.from_folder(folder)
    special = {"bos": config.bos_id, "eos": list(config.eos_ids), "pad": config.pad_id}
    check_fits(tokenizer, config.vocab, special, str(folder / "config.json"))
    own = len(tokenizer)
    add_image_tokens(tokenizer)
    # Read whole once, by one rank; from now on the fingerprint tells whether it is the same.
    sha256, prints = distributed.on_main(
        lambda: [decoder_hashes(args.decoder, of) for of in (file_sha256, fingerprint)]
    )
    known = {
        "name": located(args.decoder),
        "sha256": sha256,
        "fingerprint": prints,
        "added": len(tokenizer) - own,
    }
    return tokenizer, replace(config, vocab=len(tokenizer)), known


def text_length(args: argparse.Namespace, config: MllmConfig) -> int:
    """Tokens of an input: visual ones, and the published number of others or --max-text."""
    with torch.device("meta"):
        visual = build_mllm(config).visual_tokens
    length = visual + (args.max_text or TEXT_LENGTH[args.stage] - PUBLISHED_VISUAL_TOKENS)
    if length > config.decoder.context:
        raise InputError(
            f"--max-text: {visual} visual tokens and {length - visual} of text do not fit the decoder's "
            f"context of {config.decoder.context}; lower it, or choose a larger --kernel"
        )
    return length


def feature_folder(args, config: MllmConfig, settings: TrainConfig, manifest: Manifest) -> Path | None:
    if not args.cache_features:
        return None
    if config.train_vision:
        raise InputError(
            "--cache-features: encoders that are trained have no lasting features; add --no-train-vision"
        )
    if settings.augment != NO_AUGMENTATION:
        raise InputError("--cache-features: augmented volumes have other features; add --no-augment")
    if settings.frozen_dropout:
        raise InputError(
            "--cache-features: features under dropout are others each time; leave --frozen-dropout out"
        )
    return (
        manifest.folder / "features" if args.cache_features is True else Path(args.cache_features)
    ).absolute()


def resumed_language_setup(args: argparse.Namespace, run: Run, ranks: Ranks) -> LanguageSetup:
    """Everything from the run's config.json; a flag that would change what is trained is refused."""
    values = resumable(run)
    model = "reaf" if values["model"].get("vision") == "reaf" else "hsenet"
    if (values["stage"], model) != (args.stage, args.model):
        raise InputError(
            f"{run.folder}: is a {values['stage']} run of {model}, not {args.stage} of {args.model}"
        )
    source, origin = str(run.config), values["origin"] or {}
    if not origin.get("encoders"):
        raise InputError(
            f"{source}: its origin has no encoders, which a language run sees through; put the run's own back"
        )
    config, settings = (
        from_dict(MllmConfig, values["model"], source),
        from_dict(TrainConfig, values["train"], source),
    )
    manifest = load_manifest(args.data or Path(values["data"]))
    manifest.require(from_dict(Recipe, values["recipe"], source), str(run.folder))
    if values["slices"]:
        manifest.require_slices(values["slices"], str(run.folder))
    fixed = {
        **vars(settings),
        **vars(config),
        **{f"lora_{name}": getattr(config, name) for name in ("r", "alpha", "dropout")},
    }
    fixed |= {"preset": values["preset"], "max_steps": values["max_steps"], "init": origin.get("init")}
    fixed |= {"decoder": (origin.get("decoder") or {}).get("name"), "shared_projector": config.shared}
    fixed |= {"no_augment": settings.augment == NO_AUGMENTATION, "slices_stay": not settings.slices_follow}
    fixed["teacher"] = origin["encoders"][0]["run"] if config.vision == "dual" else None
    features = Path(values["features"]) if values["features"] else None
    named = args.cache_features
    same = features and named and (named is True or Path(named).absolute() == features)
    fixed["cache_features"] = named if same else values["features"]
    if args.max_text:
        fixed["max_text"] = config.max_text - (text_length(args, config) - args.max_text)
    refuse_changes(args, FIXED_FLAGS, fixed, run)
    settings = resumed_settings(args, run, values, ranks)
    return LanguageSetup(
        values["preset"],
        manifest,
        config,
        settings,
        load_tokenizer(run.folder),
        origin,
        features,
        values["max_steps"],
    )
