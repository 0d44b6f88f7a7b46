"""One table of settings: what a field may hold, read by config.json and by the flags."""

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from conftest import ROOT
from reaf_hsenet.config import (
    LANGUAGE,
    NO_AUGMENTATION,
    STAGES,
    Augmentation,
    ClipConfig,
    GuidedVisionConfig,
    LoraConfig,
    ReafVisionConfig,
    Recipe,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import DecoderOrigin, RunSettings
from reaf_hsenet.settings import (
    Range,
    changed,
    check_ranges,
    flag_name,
    flag_values,
    from_dict,
    setting,
    to_dict,
)
from reaf_hsenet.train.command import FLAGS, parse
from reaf_hsenet.train.stability import Stability
from reaf_hsenet.train.training import Progress, TrainerFile


@dataclass(frozen=True)
class Inner:
    share: float = setting(0.5, least=0, most=1)

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class Outer:
    name: str
    sizes: tuple[int, int] = setting((1, 2), above=0)
    kind: Literal["a", 1] = "a"
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()
    words: dict[str, int] = dataclasses.field(default_factory=dict)
    low: float = setting(-math.inf, least=-math.inf)

    __post_init__ = Inner.__post_init__


WHOLE = {
    "name": "x",
    "sizes": [3, 4],
    "kind": 1,
    "inner": {"share": 1},
    "several": [{"share": 0.1}, {}],
    "words": {"a": 2},
    "low": 3,
}


def test_what_was_written_is_read_again():
    made = from_dict(Outer, WHOLE)
    assert made == Outer("x", (3, 4), 1, Inner(1), (Inner(0.1), Inner()), {"a": 2}, 3)
    assert from_dict(Outer, json.loads(json.dumps(to_dict(made)))) == made
    assert from_dict(Outer, to_dict(Outer("x"))).low == -math.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "f.json: name of Outer is 3; expected str"),
        ({"sizes": [3]}, "f.json: sizes of Outer is .3.; expected tuple.int, int."),
        ({"sizes": [3, True]}, "sizes of Outer is .3, True."),
        ({"sizes": [3, 0]}, "f.json: sizes of Outer is .3, 0.; expected more than 0"),
        ({"kind": "b"}, "kind of Outer is 'b'; expected Literal"),
        ({"kind": True}, "kind of Outer is True"),
        ({"inner": {"share": 1.5}}, "f.json: share of Inner is 1.5; expected 1 or less"),
        ({"inner": {"share": float("nan")}}, "share of Inner is nan; expected float"),
        ({"inner": {"share": 10**400}}, "share of Inner is 1000"),
        ({"several": [{"share": -1}]}, "share of Inner is -1; expected 0 or more"),
        ({"several": [3]}, "several of Outer is .3."),
        ({"words": {"a": "b"}}, "words of Outer is"),
        ({"low": float("inf")}, "low of Outer is inf"),
        ({"more": 1}, "f.json: Outer has no setting more: written by another version"),
    ],
)
def test_what_does_not_fit_is_one_line_with_file_and_field(change, words):
    with pytest.raises(InputError, match=words) as error:
        from_dict(Outer, {**WHOLE, **change}, "f.json")
    assert "\n" not in str(error.value)


def test_what_is_absent_is_named():
    with pytest.raises(InputError, match="f.json: Outer lacks name"):
        from_dict(Outer, {}, "f.json")
    with pytest.raises(InputError, match="f.json: Outer is .1.; expected an object of settings"):
        from_dict(Outer, [1], "f.json")


SETTINGS = (
    *(
        Augmentation,
        ClipConfig,
        DecoderOrigin,
        GuidedVisionConfig,
        LoraConfig,
        MllmConfig,
        Progress,
        ReafVisionConfig,
    ),
    *(RunSettings, TrainerFile, Stability, TextConfig, TrainConfig, VisionConfig, DecoderConfig, RopeConfig),
)


def ranges(cls) -> dict[str, Range]:
    return {
        f.name: f.metadata["range"]
        for f in dataclasses.fields(cls)
        if f.metadata.get("range", Range()) != Range()
    }


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_range_is_held_to(cls):
    """A number below it is refused when the object is made, however it is made."""
    for name, held in ranges(cls).items():
        if held.least == -math.inf:
            continue
        below = held.above if held.above is not None else held.least - 1
        broken = cls.__new__(cls)
        for field in dataclasses.fields(cls):
            default = None if field.default is dataclasses.MISSING else field.default
            object.__setattr__(broken, field.name, below if field.name == name else default)
        with pytest.raises(InputError, match=f"^{name} of {cls.__name__} is {below}"):
            broken.__post_init__()


def test_every_number_of_a_recipe_has_a_range():
    for cls in (TrainConfig, Augmentation, ReafVisionConfig, TextConfig, LoraConfig, MllmConfig):
        free = {
            f.name for f in dataclasses.fields(cls) if "int" in str(f.type) or "float" in str(f.type)
        } - ranges(cls).keys()
        assert free <= {"scan_layers"}, cls


def test_flags_of_one_name_have_one_range():
    for cls in (TrainConfig, LoraConfig, MllmConfig, ReafVisionConfig, VisionConfig):
        for field in dataclasses.fields(cls):
            if name := flag_name(field):
                assert FLAGS[name][0].metadata.get("range") == field.metadata.get("range"), name


def test_flags_are_read_as_their_fields_say():
    words = "--fusion none --unfreeze-text all --region-size 2 2 2 --scan-layers 1 2 --lora vision text"
    command = parse(
        ["--stage", "clip1", *words.split(), "--lora-r", "4", "--no-augment", "--no-grad-checkpoint"], ""
    )
    assert command.given == {
        "stage": "clip1",
        "fusion": None,
        "unfreeze_text": None,
        "region_size": (2, 2, 2),
        "scan_layers": (1, 2),
        "lora": ("text", "vision"),
        "lora_r": 4,
        "no_augment": NO_AUGMENTATION,
        "grad_checkpoint": False,
    }
    reaf = replace(PRESETS["reaf-tiny"], lora=LoraConfig(("text",)))
    config, recipe = changed(reaf, command.given), changed(STAGES["clip1", "reaf"], command.given)
    assert (config.vision.fusion, config.vision.region_size, config.lora.r) == (None, (2, 2, 2), 4)
    assert (recipe.text_blocks, recipe.augment, recipe.grad_checkpoint) == (None, NO_AUGMENTATION, False)
    assert flag_values(config)["lora"] == ("text", "vision") and flag_values(recipe)["lr"] == 5e-4
    assert parse(["--stage", "mrg", "--resume", "--cache-features"], "").resume is True
    assert parse(["--stage", "mrg", "--cache-features", "x"], "").cache_features == Path("x")
    for wrong in ("--resume sometimes", "--cache-features x --lr 0", "--relation 1", "--kernel 1 2"):
        with pytest.raises(InputError, match="--" + wrong.split(" --")[-1].split()[0].strip("-")):
            parse(["--stage", "mrg", *wrong.split()], "")


def test_published_settings_and_presets_survive_json():
    for config in (*PRESETS.values(), *STAGES.values()):
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_what_earlier_versions_counted_is_passed_over():
    earlier = {**to_dict(Stability(skipped=2)), "mean": 1.5, "deviation": 0.1, "seen": 7}
    assert from_dict(Stability, earlier) == Stability(skipped=2)
    with pytest.raises(InputError, match="Stability has no setting men"):
        from_dict(Stability, {**earlier, "men": 1})


@pytest.mark.parametrize("name", ["clip1", "clip2", "reaf", "mrg", "vqa"])
def test_runs_of_earlier_versions_are_read(name):
    """What a run wrote before flags came from the fields: every value is still that of a setting."""
    run = json.loads((ROOT / "tests/golden/earlier_runs.json").read_text())[name]
    model = MllmConfig if run["stage"] in LANGUAGE else ClipConfig
    for cls, part in ((model, "model"), (TrainConfig, "train"), (Recipe, "recipe")):
        read = json.loads(json.dumps(to_dict(from_dict(cls, run[part], "config.json"))))
        for held in (run[part], run[part].get("augment", {})):
            for name in {*getattr(cls, "GONE", ()), *Augmentation.GONE} & held.keys():
                del held[name]
        assert {key: read[key] for key in run[part]} == run[part]
