"""What a run is made of: settings, data and tokenizer. A resumed run has all of it from its config.json."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from reaf_hsenet.config import LANGUAGE, ClipConfig, Recipe, TrainConfig
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import stage_config
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import Trained
from reaf_hsenet.settings import changed, flag_values, from_dict, spelled, to_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer
from reaf_hsenet.train.command import FLAGS, Command


@dataclass
class Setup:
    """Settings, data and tokenizer of a run, and what the weights of a new one start from.

    origin: names and hashes of what the weights started from. features: folder of --cache-features.
    truth: findings of each volume, which cues tell.
    Of a new run: text_weights, tensors of --text-model; init_state, tensors of --init or of the teacher, and
    init_note, what of them was left out; encoders, tensors of the dual encoders that a decoder sees through.
    """

    preset: str
    manifest: Manifest
    model: ClipConfig | MllmConfig
    train: TrainConfig
    tokenizer: Tokenizer
    origin: dict
    max_steps: int | None = None
    resumed: bool = False
    features: Path | None = None
    teacher: Trained | None = None
    truth: dict[str, Tensor] | None = None
    text_weights: dict | None = None
    init_state: dict | None = None
    init_note: str = ""
    encoders: list[dict] | None = None

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return self.model.guided

    def values(self) -> dict:
        """Return what config.json says of the run, besides its stage, length and place."""
        features = {"features": self.features and str(self.features)} if "encoders" in self.origin else {}
        return {
            "model": to_dict(self.model),
            "recipe": to_dict(self.manifest.recipe),
            "origin": self.origin,
            "slices": self.manifest.slices if self.guided else None,
            "train": to_dict(self.train),
            "data": str(self.manifest.location.absolute()),
            "best_of": self.manifest.chosen_on,
            "training_sha256": self.manifest.training_sha256(),
            **features,
        }


def located(name: str | Path | None) -> str | None:
    """Return the absolute path of a file or folder, so that a run resumes anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name and str(name)


def data_of(command: Command, run: Trained) -> Path:
    """Return --data, or the data set that a run was trained on."""
    if command.data is None and run.data is None:
        raise InputError(f"--data: {run.folder} has no data set of its own; name a prepared one")
    return command.data or run.data


def recipe_settings(command: Command, preset: str, ranks: Ranks) -> TrainConfig:
    """Return the recipe of the stage with the command line's changes. A processor computes in float32."""
    config = changed(stage_config(command.stage, command.model, preset), command.given)
    # The published precisions are for GPUs; on a processor 16 bits are rarely faster.
    if "precision" not in command.given and ranks.device.type == "cpu":
        config = replace(config, precision="fp32")
    return config


def fitting_batch(config: TrainConfig, rows: int, what: str, ranks: Ranks, say) -> TrainConfig:
    """Return the recipe with a batch that is not larger than the training split of `rows` volumes or
    samples.
    """
    if config.batch_size * ranks.world <= rows:
        return config
    # The incomplete last batch of an epoch is left out: a batch larger than the split would leave nothing.
    say(f"batch size {rows // ranks.world} in place of {config.batch_size}: there are {rows} training {what}")
    return replace(config, batch_size=rows // ranks.world)


def resumable(run: Run) -> dict:
    """Return the config.json of a run that was trained here. Raises InputError when there is none."""
    if not run.exists:
        raise InputError(f"{run.folder}: holds no run to resume; name one with --out, or leave --resume out")
    values = run.read_config()
    if (values.get("origin") or {}).get("published"):
        raise InputError(
            f"{run.folder}: is converted, not trained, so there is nothing to resume; start from it with "
            f"--init"
        )
    if absent := [name for name in ("train", "world", "data") if values[name] is None]:
        raise InputError(
            f"{run.folder / 'config.json'}: has no {', '.join(absent)} as a run that was trained has; put "
            "the run's own back"
        )
    return values


def resumed_setup(command: Command, run: Run, ranks: Ranks) -> Setup:
    """Return the setup of a run. Raises InputError for a flag that would change what is learned."""
    values = resumable(run)
    source, origin, language = str(run.config), values.get("origin") or {}, command.stage in LANGUAGE
    method = values["model"].get("model", "reaf" if values["model"].get("vision") == "reaf" else "hsenet")
    # The command names stage and method too, and decides by them which modules are loaded.
    if (values["stage"], method) != (command.stage, command.model):
        raise InputError(
            f"{run.folder}: is a {values['stage']} run of {method}, not {command.stage} of {command.model}"
        )
    if language and not origin.get("encoders"):
        raise InputError(
            f"{source}: its origin has no encoders, which a language run sees through; put the run's own back"
        )
    # All of it is read from config.json, checked like a command line: the run may have been edited.
    config = from_dict(MllmConfig if language else ClipConfig, values["model"], source)
    settings = from_dict(TrainConfig, values["train"], source)
    # Data may have been moved; that they are of the same recipe is required next.
    manifest = load_manifest(command.data or Path(values["data"]))
    manifest.require(from_dict(Recipe, values["recipe"], source), str(run.folder))
    if values.get("slices"):
        manifest.require_slices(values["slices"], str(run.folder))
    if manifest.chosen_on != values["best_of"]:
        raise InputError(
            f"{manifest.name}: checkpoints would be chosen on {manifest.chosen_on}, those of {run.folder} "
            f"were on {values['best_of']}; prepare it with the run's --development"
        )
    if values.get("training_sha256") not in (None, manifest.training_sha256()):  # None: an earlier version's
        raise InputError(
            f"{manifest.name}: has other training volumes than {run.folder} was trained on; prepare it as it "
            "was, with the run's --development"
        )

    # What the command line names must be what the run has, but for what changes nothing that is learned.
    have = flag_values(config) | flag_values(settings)
    have |= {"preset": values["preset"], "max_steps": values["max_steps"]}
    have |= {"init": origin.get("init"), "text_model": origin.get("text_model"), "guidance": config.guided}
    features = Path(values["features"]) if values.get("features") else None
    if language:
        have["decoder"] = (origin.get("decoder") or {}).get("name")
        have["teacher"] = origin["encoders"][0]["run"] if config.vision == "dual" else None
        have["labels"] = (origin.get("labels") or {}).get("source")
        have["cache_features"] = _cached(command.cache_features, features)
        if command.max_text:
            from reaf_hsenet.models.build import visual_tokens  # with the decoder, which clip1 does without

            have["max_text"] = config.max_text - visual_tokens(config)
    else:  # a teacher may have been moved: its weights tell that it is the same
        have["teacher"] = located(command.teacher)
    # How often to log or save may change; a learning rate may not, or config.json would not tell how the
    # weights came about.
    free = {name for name in command.given if FLAGS[name][0].metadata["changeable"]}
    for name, value in command.given.items():
        if name in free:
            continue
        if name in ("init", "text_model", "decoder", "teacher"):
            value = located(value)
        if name == "labels":
            from reaf_hsenet.train.cues import label_source

            value = label_source(value)
        if value != have.get(name):
            raise InputError(
                f"{spelled(name, value, FLAGS)}: with --resume a run keeps its settings ({run.folder} has "
                f"{have.get(name)!s:.200}); leave the flag out, or start another run with --out"
            )
    # More epochs lengthen a run, but not one whose length is --max-steps.
    if values["max_steps"] and command.given.get("epochs", settings.epochs) != settings.epochs:
        raise InputError(
            f"--epochs {command.given['epochs']}: {run.folder} was started with --max-steps "
            f"{values['max_steps']}, which is its length; leave the flag out, or start another run with --out"
        )

    # The global batch is shared by however many ranks there are now.
    whole = settings.batch_size * values["world"]
    if whole % ranks.world:
        raise InputError(
            f"{run.folder}: its global batch of {whole} cannot be shared by {ranks.world} processes"
        )
    settings = changed(settings, {name: command.given[name] for name in free})
    return Setup(
        preset=values["preset"],
        manifest=manifest,
        model=config,
        train=replace(settings, batch_size=whole // ranks.world),
        tokenizer=(load_tokenizer if language else load_wordpiece)(run.folder),
        origin=origin,
        max_steps=values["max_steps"],
        resumed=True,
        features=features,
    )


def keep_slice_encoder(manifest: Manifest, run: Path) -> None:
    """Copy the encoder of the phantoms' slices into the run, so that the run can be moved."""
    # infer.py needs it for a new scan, wherever the run is then.
    own = manifest.folder / "slice_encoder"
    if own.is_dir():
        try:
            shutil.copytree(own, run / own.name, dirs_exist_ok=True)
        except shutil.Error as error:
            raise OutputError(
                f"{run / own.name}: cannot be written ({error.args[0][0][-1]}); free space and start again"
            ) from error


def _cached(named: bool | Path, features: Path | None) -> bool | str | None:
    """Return the value of --cache-features where it names the folder that the run has, else that folder."""
    same = features and named and (named is True or named.absolute() == features)
    return named if same else features and str(features)
