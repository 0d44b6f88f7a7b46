"""The commands of README.md and docs/ are accepted, and those that claim to do as published do so."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch

import published
import train
from conftest import ROOT
from published import BERT
from reaf_hsenet.config import STAGES
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train.command import parse
from reaf_hsenet.train.optimizer import learning_rate
from reaf_hsenet.train.setup import recipe_settings
from reaf_hsenet.weights.__main__ import main as convert
from reaf_hsenet.weights.names import M3D_CLIP, import_state

README = (ROOT / "README.md").read_text()


def commands(text: str, script: str = "train.py") -> list[list[str]]:
    """Arguments of a script, wherever it is called in a block of commands."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;", line.split(" #")[0]):
                if script in command and script in (words := shlex.split(command)):
                    found.append([w for w in words[words.index(script) + 1 :] if w != "&"])
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/weights.md", "docs/clusters.md", "docs/method.md"])
def test_every_train_command_of_the_documents_is_accepted(document):
    found = commands((ROOT / document).read_text())
    for arguments in found:
        parse(arguments, "")
    assert len(found) > 3 or document != "README.md"


@pytest.mark.slow
def test_stage_2s_command_starts_the_student_from_m3d_clip_as_published(sized_data, tmp_path, capsys):
    arguments = next(c for c in commands(README) if "--teacher" in c)
    m3d_clip = published.write_m3d_clip(tmp_path / "M3D-CLIP").parent
    bert = published.write_vocabulary(tmp_path / "bert", 200, BERT["config"])
    published.write(bert / "model.safetensors", {n: 2 * t for n, t in published.bert().items()})
    stage_1 = published.write_m3d_clip(
        tmp_path / "stage1", {n: t + 0.01 for n, t in published.m3d_clip().items()}
    )
    assert convert(["convert", str(stage_1), str(tmp_path / "teacher"), "--text-model", str(bert)]) == 0
    files = {
        "runs/ct-rate": tmp_path / "teacher",
        "GoodBaiBai88/M3D-CLIP": m3d_clip,
        "google-bert/bert-base-uncased": bert,
        "data/ct-rate": sized_data,
        "runs/ct-rate-2": tmp_path / "run",
    }
    assert set(files) <= set(arguments)
    arguments = [str(files.get(word, word)) for word in arguments]
    assert train.main([*arguments, "--batch-size", "4", "--max-steps", "1", "--device", "cpu"]) == 0
    assert "left at their start: vision.guidance" in capsys.readouterr().out
    run, teacher = load_trained(tmp_path / "run"), load_trained(tmp_path / "teacher")
    found, start = run.model.state_dict(), import_state(M3D_CLIP, published.m3d_clip())
    assert all(torch.equal(found[n], t) for n, t in start.items())  # text too; the first step's rate is 0
    assert run.origin["teacher_sha256"] == teacher.sha256() and run.origin["init"] == str(m3d_clip)
    assert found["vision.guidance.query.weight"].abs().max() <= 48**-0.5  # torch's start of a Linear
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["start"] == "published"


def test_reafs_second_command_is_its_train_script():
    readme, script = (parse(c, "") for c in commands(README) if "reaf" in c and "--init" in c)
    settings = [
        recipe_settings(command, "reaf-base", Ranks(0, 1, torch.device("cuda")))
        for command in (readme, script)
    ]
    assert [(s.lr, s.batch_size, s.epochs) for s in settings] == [(5e-4, 16, 50), (2e-4, 148, 2)]
    assert settings[1].grad_cache == 16 and settings[0].grad_cache is None
    steps = len(GlobalBatches(46_400, 148, 0, 1, 0))  # CT-RATE's training volumes, about
    assert steps == 313
    rates = [learning_rate(k, 2 * steps, settings[1]) for k in range(2 * steps)]
    assert rates[0] == pytest.approx(2e-4 / 313) and rates[312] == rates[313] == max(rates) == 2e-4


def test_reafs_warm_up_of_313_epochs_is_a_rate_that_rises_to_the_end():
    """What the published code makes of 313: lr (k + 1) / (313 steps an epoch)."""
    said = re.search(r"--lr (\S+) --warmup 1`", (ROOT / "docs/method.md").read_text()).group(1)
    ours = replace(STAGES["clip1", "reaf"], lr=float(said), warmup=1.0)
    for step in (0, 100, 625):
        assert learning_rate(step, 626, ours) == pytest.approx(2e-4 * (step + 1) / (313 * 313), rel=1e-3)
