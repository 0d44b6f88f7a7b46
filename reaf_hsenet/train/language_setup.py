"""A new run of stage mrg or vqa, from a command line: encoders of earlier runs, projectors, a decoder."""

from dataclasses import replace
from pathlib import Path

from reaf_hsenet import distributed
from reaf_hsenet.config import CONTRASTIVE, NO_AUGMENTATION, PUBLISHED_VISUAL_TOKENS, TEXT_LENGTH, TrainConfig
from reaf_hsenet.data.language import CUE_TOKENS, Findings, add_image_tokens, cue_text
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import questions, report_prompts, templates
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, find_folder, fingerprint
from reaf_hsenet.models.build import visual_tokens
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm_config import TINY_KERNEL, MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.language import decoder_hashes
from reaf_hsenet.runs.trained import Trained, load_trained
from reaf_hsenet.settings import changed
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, check_fits, train_words
from reaf_hsenet.train.command import Command
from reaf_hsenet.train.contrastive_setup import load_teacher
from reaf_hsenet.train.cues import CueTable, label_source, truth_sha256
from reaf_hsenet.train.setup import Setup, data_of, fitting_batch, located, recipe_settings
from reaf_hsenet.weights.decoder import FILES

# Runs that each --vision takes its encoder from; of `dual` the other is that run's teacher.
ENCODER_STAGE = {"dual": "clip2", "2e3": "clip2", "stage1": "clip1", "reaf": "clip1"}


def new_setup(command: Command, ranks: Ranks, say) -> Setup:
    """Build the setup of a new run. Raises InputError, naming the flag, for what does not go together."""
    # The encoders, and by them preset and data.
    # dual, as published: the tokens of the stage-1 encoder, then those of 2E3.
    vision = command.given.get("vision", "reaf" if command.model == "reaf" else "dual")
    if (vision == "reaf") != (command.model == "reaf"):
        raise InputError(
            f"--vision {vision}: is not of --model {command.model}; reaf goes with --model reaf, the others "
            "with hsenet"
        )
    runs = encoder_runs(command, vision)
    first = runs[-1]
    preset = first.preset
    if command.preset not in (None, preset):
        raise InputError(f"--preset {command.preset}: {first.folder} has {preset}; leave the flag out")
    manifest = load_manifest(data_of(command, first))
    for run in runs:
        manifest.require(run.recipe, str(run.folder))
        if run.guided:
            manifest.require_slices(run.slices, str(run.folder))

    # Recipe, decoder and its tokenizer.
    settings = train_settings(command, preset, manifest, ranks, say)
    check_decoder_flags(command, preset)
    new = command.decoder is None
    table = cue_table(command, manifest)
    cues = "none" if table is None else "places" if table.places else "labels"
    findings = () if table is None else table.findings()
    tokenizer, decoder, known = text_side(command, manifest, settings, findings, say)
    config = MllmConfig(
        vision=vision,
        encoders=tuple(run.config.vision for run in runs),
        decoder=decoder,
        kernel=TINY_KERNEL if preset.endswith("-tiny") else MllmConfig.kernel,
        cues=cues,
        findings=findings,
        full=new,
        train_vision=new,
    )
    # A new decoder (no --decoder) has nothing worth freezing: all is trained, unless flags say otherwise.
    config = changed(config, command.given)
    config = replace(config, max_text=text_length(command, config))
    if not config.train_vision:  # frozen encoders stay as they are
        settings = replace(settings, calibrate=0)

    # The checkpoint leaves frozen encoders out: hashes tell later whether the named runs still have them.
    encoders = [
        {
            "run": located(run.folder),
            "sha256": run.sha256(),
            "text_model": run.origin.get("text_model"),
        }
        for run in runs
    ]
    origin = {"init": located(first.folder), "encoders": encoders, "decoder": known}
    truth = table.truth(findings) if findings else None
    if findings:
        origin["labels"] = {"source": table.source, "sha256": truth_sha256(truth)}
    return Setup(
        preset=preset,
        manifest=manifest,
        model=config,
        train=settings,
        tokenizer=tokenizer,
        origin=origin,
        truth=truth,
        features=feature_folder(command, config, settings, manifest),
        max_steps=command.max_steps,
        encoders=[merged_state(run.model) for run in runs],
    )


def encoder_runs(command: Command, vision: str) -> list[Trained]:
    """Return the dual-encoder runs that `vision` takes its encoders from, in their order."""
    wanted = ENCODER_STAGE[vision]
    folder = Path(command.init or f"runs/{wanted}-{command.model}")
    if not Run(folder).exists:
        raise InputError(
            f"{folder}: no run of stage {wanted}, whose encoder --vision {vision} sees; train it first, or "
            "name one with --init"
        )
    run = load_trained(folder, stages=CONTRASTIVE)
    if (run.stage, run.config.model) != (wanted, command.model) or (wanted == "clip2" and not run.guided):
        guided = " without slices" if run.stage == "clip2" and not run.guided else ""
        raise InputError(
            f"--init {folder}: is a {run.stage} run of {run.config.model}{guided}; --vision {vision} needs a "
            f"{wanted} run of {command.model}"
        )
    if vision != "dual":
        if command.teacher:
            raise InputError(
                f"--teacher: is the stage-1 run beside 2E3; --vision {vision} has none, leave it out"
            )
        return [run]
    # The first of the two encoders is the very stage-1 model that 2E3 learned from, known by its hash.
    had = None if command.teacher else run.origin.get("teacher_sha256")
    teacher = load_teacher(command.teacher or run.origin["teacher"], run.origin.get("text_model"), had)
    if command.teacher is None and teacher.sha256() != had:
        raise InputError(
            f"{teacher.folder}: none of its checkpoints is the one that {folder} learned from; name that "
            "one's folder, or another stage-1 run, with --teacher"
        )
    return [teacher, run]


def train_settings(command: Command, preset: str, manifest: Manifest, ranks: Ranks, say) -> TrainConfig:
    """Return the recipe for the samples that this data has."""
    config = recipe_settings(command, preset, ranks)
    # A sample is a report, or a question: a volume of vqa is read once for each of its questions.
    if command.stage == "mrg":
        rows = len(manifest.entries("train"))
    else:
        rows = len(questions(manifest, "train", config.questions))
    needed = config.batch_size * ranks.world
    if needed > rows and ("batch_size" in command.given or rows < ranks.world):
        raise InputError(
            f"--batch-size {config.batch_size}: a batch of {ranks.world} processes needs {needed} samples, "
            f"there are {rows}"
        )
    return fitting_batch(config, rows, "samples", ranks, say)


def cue_table(command: Command, manifest: Manifest) -> CueTable | None:
    """Return the findings that cues tell of this data set; None where the run has no cues."""
    splits, cues = ("train", manifest.chosen_on), command.given.get("cues")
    if cues is None:
        # A new decoder has them where every split has labels; a published one where they are asked for.
        entries = [[e["labels"] for e in manifest.entries(split)] for split in splits]
        labelled = manifest.labels and all(any(map(bool, labels)) for labels in entries)
        cues = "places" if command.decoder is None and (labelled or command.labels) else "none"
    if cues == "none":
        for name in {"labels", "cue_dropout"} & command.given.keys():
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: goes with --cues labels or places; add one of these")
        return None
    source = label_source(command.labels)
    return distributed.on_main(lambda: CueTable(manifest, source, splits, places=cues == "places"))


def check_decoder_flags(command: Command, preset: str) -> None:
    """Raise InputError for flags of the decoder that do not go together."""
    given = command.given
    adapters = {"lora_r", "lora_alpha", "lora_dropout"} & given.keys()
    if command.decoder is None and not preset.endswith("-tiny"):
        raise InputError(
            "--decoder: name one that the encoders are joined to, for example microsoft/Phi-4-mini-instruct"
        )
    if command.decoder is None and (given.get("int8") or "full" in given or adapters):
        raise InputError(
            "--full, --int8, --lora-*: are of a --decoder with weights; a new one is trained whole"
        )
    if given.get("int8") and given.get("full"):
        raise InputError("--int8: weights in eight bits are not trained; leave out --full")
    if given.get("full") and adapters:
        raise InputError(
            "--lora-*: a decoder that is trained whole has no adapters; leave them or --full out"
        )


def text_side(
    command: Command, manifest: Manifest, settings: TrainConfig, findings: Findings, say
) -> tuple[Tokenizer, DecoderConfig, dict | None]:
    """Return tokenizer with image tokens, the decoder's settings, and where its weights are (None:
    nowhere).
    """
    if command.decoder is None:
        say("no --decoder: a small one starts from nothing, with a vocabulary of the training texts")
        # Words, not pieces of words: what phantoms' reports say takes few of them, and few tokens an answer.
        texts = training_texts(command.stage, manifest, settings)
        tokenizer = train_words([*texts, cue_text(findings, [True] * len(findings)), cue_text((), ())], 1000)
        add_image_tokens(tokenizer)
        return tokenizer, tiny_decoder(tokenizer), None
    folder = find_folder(command.decoder, FILES)
    tokenizer, config = load_tokenizer(folder), DecoderConfig.from_folder(folder)
    special = {"bos": config.bos_id, "eos": list(config.eos_ids), "pad": config.pad_id}
    check_fits(tokenizer, config.vocab, special, str(folder / "config.json"))
    # Image tokens are added to the vocabulary, and rows for them to the embedding (docs/method.md).
    own = len(tokenizer)
    add_image_tokens(tokenizer)
    # Read whole once, by one rank; from now on the fingerprint tells whether it is the same.
    sha256, prints = distributed.on_main(
        lambda: [decoder_hashes(command.decoder, of) for of in (file_sha256, fingerprint)]
    )
    known = {
        "name": located(command.decoder),
        "sha256": sha256,
        "fingerprint": prints,
        "added": len(tokenizer) - own,
    }
    return tokenizer, replace(config, vocab=len(tokenizer)), known


def tiny_decoder(tokenizer: Tokenizer) -> DecoderConfig:
    """A decoder that two cores train from nothing."""
    return DecoderConfig(
        family="llama",
        vocab=len(tokenizer),
        width=128,
        layers=3,
        heads=4,
        kv_heads=4,
        head_dim=32,
        mlp=384,
        context=1024,
        rope=RopeConfig(dims=32),
        tied=True,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
    )


def training_texts(stage: str, manifest: Manifest, settings: TrainConfig) -> list[str]:
    """Return the texts that a new decoder's vocabulary is made from."""
    if stage == "mrg":
        return [clean_report(entry["text"]) for entry in manifest.entries("train")] + list(report_prompts())
    asked = [row for _, row in questions(manifest, "train", settings.questions)]
    texts = [
        text
        for row in asked
        for text in (row.get("question", ""), row["answer"], row["abnormality"], row["anatomy"])
    ]
    return [*texts, *(settings.templates or templates(settings.questions))]


def text_length(command: Command, config: MllmConfig) -> int:
    """Return the tokens of an input: visual ones, and the published number of others or --max-text."""
    # The published limit counts 256 visual tokens; with other projectors the text keeps its share.
    visual = visual_tokens(config)
    length = visual + (command.max_text or TEXT_LENGTH[command.stage] - PUBLISHED_VISUAL_TOKENS)
    cues = CUE_TOKENS if config.findings else 0
    if length + cues > config.decoder.context:
        beside = f", {cues} of cues" if cues else ""
        raise InputError(
            f"--max-text: {visual} visual tokens{beside} and {length - visual} of text do not fit the "
            f"decoder's context of {config.decoder.context}; lower it, or choose a larger --kernel"
        )
    return length


def feature_folder(
    command: Command, config: MllmConfig, settings: TrainConfig, manifest: Manifest
) -> Path | None:
    """Return the folder of --cache-features. Raises InputError where features would not stay the same."""
    if not command.cache_features:
        return None
    # Each of these would make a volume's tokens change from one epoch to the next.
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
    named = command.cache_features
    return (manifest.folder / "features" if named is True else named).absolute()
