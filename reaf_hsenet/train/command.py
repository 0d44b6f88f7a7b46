"""The command line of train.py: the flags that are no settings of a network or a recipe, and how all are
read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reaf_hsenet.config import (
    CONTRASTIVE,
    GUIDED,
    LANGUAGE,
    RECIPES,
    ClipConfig,
    LoraConfig,
    ReafVisionConfig,
    TrainConfig,
    VisionConfig,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.script import Parser
from reaf_hsenet.settings import MISSING, add_flags, flags, given, setting


@dataclass(frozen=True)
class Command:
    """The stage to train, its data, its start and its folder. given: all flags of the command line."""

    stage: Literal[(*CONTRASTIVE, *LANGUAGE)] = setting(MISSING, "stage", required=True, changeable=True)
    model: Literal[tuple(RECIPES)] = setting("hsenet", "the method (default: hsenet)", changeable=True)
    data: Path | None = setting(
        None, "folder written by preprocess.py (default: phantoms, made if missing)", changeable=True
    )
    preset: str | None = setting(
        None, f"{', '.join(PRESETS)} (default: tiny on phantoms, base with --data)", metavar="NAME"
    )
    init: str | None = setting(
        None,
        "what to start from. clip1, clip2: a run, or M3D-CLIP, HSENet, HLIP, REAF or MAE ViT-B/16 as file, "
        "folder or hub id. mrg, vqa: the run whose encoder the decoder sees (default: runs/clip2-hsenet, "
        "runs/clip1-reaf)",
    )
    text_model: str | None = setting(
        None, "BERT folder or hub id to start the text encoder from (default: new)", only=CONTRASTIVE
    )
    teacher: str | None = setting(
        None,
        "run of stage clip1, or published file of stage 1 (default: --init or its teacher, else "
        "runs/clip1-hsenet)",
        only=(*GUIDED, *LANGUAGE),
    )
    guidance: bool = setting(True, "guide the encoder by slices; without: a plain 3D ViT", only=GUIDED)
    decoder: str | None = setting(
        None,
        "folder or hub id of a Phi-4, Phi-3 or Llama (default on phantoms: a small one, from scratch)",
        only=LANGUAGE,
    )
    labels: str | None = setting(
        None,
        "findings that --cues tells: a csv, or reports, by rules (default: the data set's labels)",
        metavar="TABLE|reports",
        only=LANGUAGE,
    )
    cache_features: bool | Path = setting(
        False,
        "store the frozen encoders' tokens (default: DATA/features); needs --no-augment",
        bare=True,
        metavar="DIR",
        only=LANGUAGE,
    )
    max_text: int | None = setting(
        None, "tokens of prompt and answer (default: mrg 544, vqa 74)", above=0, only=LANGUAGE
    )
    max_steps: int | None = setting(None, "number of optimizer steps, in place of epochs", above=0)
    out: Path | None = setting(None, "run folder (default: runs/STAGE-MODEL)", changeable=True)
    resume: bool | Literal["auto"] = setting(
        False,
        "continue the run in --out; auto: or start it, when there is none to continue",
        bare=True,
        metavar="auto",
        changeable=True,
    )
    log: Literal["tensorboard", "wandb"] | None = setting(
        None, "also log there, when it is installed", changeable=True
    )
    log_every: int = setting(10, "steps between lines of log.jsonl (default: 10)", above=0, changeable=True)
    profile: bool = setting(False, "write a trace of steps 5 to 10 into the run folder", changeable=True)
    compile: bool = setting(False, "torch.compile the blocks", changeable=True)
    workers: int | None = setting(
        None, "loader processes (default: 4 with a GPU, else 0)", least=0, most=10_000, changeable=True
    )
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: a GPU if any)", changeable=True)
    given: dict = field(default_factory=dict)


# The help's groups. A flag belongs to the first class that has it.
GROUPS = {
    "run": (Command,),
    "recipe (defaults are the stage's own, see config.py)": (TrainConfig,),
    "dual encoder": (VisionConfig, ClipConfig, LoraConfig),
    "REAF's encoder (defaults are the published ones)": (ReafVisionConfig,),
    "language model (defaults are the published ones)": (MllmConfig,),
}
FLAGS = flags(*(cls for classes in GROUPS.values() for cls in classes))


def parse(argv: list[str], description: str) -> Command:
    """Raises InputError for an unknown flag, a value out of range, and a flag of another stage."""
    parser, done = Parser(description), set()
    # Settings are dataclass fields: a flag, its help and its range are read off them (settings.py).
    for title, classes in GROUPS.items():
        own = {name: known for name, known in flags(*classes).items() if name not in done}
        add_flags(parser.add_argument_group(title), own)
        done |= own.keys()
    args = parser.parse_args(argv)
    # Only what was said. Defaults are the stage's, and a resumed run compares these with what it has.
    values = given(args, FLAGS, "stage")
    # The wordings themselves become settings: config.json then has them, whatever becomes of the file.
    if "templates" in values:
        from reaf_hsenet.data.questions import read_templates

        values["templates"] = read_templates(
            values["templates"], values.get("questions", TrainConfig.questions)
        )
    if "lora" in values:
        values["lora"] = tuple(sorted(set(values["lora"])))
    command = Command(**{name: v for name, v in values.items() if name in flags(Command)}, given=values)
    if not command.guidance and "slices_stay" in values:
        raise InputError("--slices-stay: with --no-guidance there are no slice features; leave one out")
    return command
