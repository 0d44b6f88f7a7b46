"""Published checkpoints -> run folders, and runs -> the names that published code reads.

Names go through the same tables in both directions (weights/names.py), so that what was exported loads as the
same tensors, bit for bit. The config.json beside an export holds what no shape tells.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from reaf_hsenet import __version__
from reaf_hsenet.config import LANGUAGE, GuidedVisionConfig, ReafVisionConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, write_json
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.runs.checkpoint import Run, weights_sha256
from reaf_hsenet.runs.language import base_decoder
from reaf_hsenet.runs.published import PublishedRun, open_source
from reaf_hsenet.runs.trained import Trained, is_published, load_source, load_trained
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.weights.adapters import adapter_state, save_adapter
from reaf_hsenet.weights.decoder import save_decoder
from reaf_hsenet.weights.files import State, apart, read_weights_file, write_weights
from reaf_hsenet.weights.names import BERT, M3D_CLIP, REAF, TEACHER, export_state, language_table
from reaf_hsenet.weights.shapes import OWN, bert_settings, with_axes

FORMATS = ("m3d-clip", "hlip", "reaf", "transformers")
NOT_USED = "not_used.safetensors"  # what a published file has and no model here takes; `export` gives it back


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Remove the folder when what writes it fails. Raises InputError when there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; choose a new folder")
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def write_run(published: PublishedRun, out: Path) -> Path:
    """Write RUN/config.json, vocabulary and checkpoints/step-000000.

    The stage-1 model inside a 2E3 checkpoint becomes RUN/stage1, encoders below packers that are no runs yet
    RUN/encoder and RUN/encoder/stage1. config.json is written last: what an interruption leaves is no run.
    """
    notes, source = list(published.notes), published.source
    origin = {"published": {"family": source.family.key, "file": str(source.file.resolve()), "notes": notes}}
    values = {"model": to_dict(published.config), "origin": origin, "slices": published.slices}
    preset = "hsenet-base" if published.decoder else f"{published.config.model}-base"
    with new_folder(out):
        if published.decoder:
            runs = published.beneath
            if isinstance(runs[-1], PublishedRun):
                encoder = write_run(runs[-1], out / "encoder")
                runs = encoder / "stage1", encoder
            origin["init"] = str(runs[-1].resolve())
            origin["encoders"] = [{"run": str(run.resolve()), "sha256": run_sha256(run)} for run in runs]
            origin["decoder"] = published.decoder
            values["features"] = None
        else:
            origin |= {"text_model": None, "init": None, "teacher": None}
            for stage1 in published.beneath:
                teacher = write_run(stage1, out / "stage1")
                origin |= {"teacher": str(teacher.resolve()), "teacher_sha256": run_sha256(teacher)}
        if published.not_used:
            write_weights(out / NOT_USED, published.not_used)
        run = Run(out)
        run.save(0, apart(published.state), {}, keep=1, best=True)
        published.tokenizer.save(out)
        if published.decoder:
            load_tokenizer(out)  # a vocabulary that cannot be read again (ids with gaps) is said now
        known = {"version": __version__, "stage": published.stage, "preset": preset}
        untrained = {"train": {}, "data": None, "world": 1, "max_steps": 0, "total_steps": 0}
        run.write_config(
            {
                **known,
                "recipe": to_dict(published.recipe),
                **values,
                **untrained,
                "torch": torch.__version__,
            }
        )
    return out


def run_sha256(run: Path) -> str:
    return weights_sha256(Run(run).choose().folder / "model.safetensors")


def export(folder: Path, out: Path, kind: str, which: str | None = None) -> list[str]:
    """Write a run's weights as one of FORMATS. Returns notes, a sentence each.

    which: the checkpoint, as of Run.choose. Raises InputError where there is no run, or one of another
    format.
    """
    with new_folder(out):
        language = Run(folder).read_config().get("stage") in LANGUAGE
        if language and kind != "transformers":
            raise InputError(f"--format {kind}: {folder} is a language run; expected --format transformers")
        run = load_trained(folder, which)
        if language:
            return export_language(run, out)
        return export_text(run, out) if kind == "transformers" else export_dual(run, out, kind)


def export_dual(run: Trained, out: Path, kind: str) -> list[str]:
    """Write both towers and their projections, with config.json and vocab.txt."""
    fused = getattr(run.config.vision, "fusion", None) is not None
    reaf = "reaf" if fused else "hlip"
    wanted = "m3d-clip" if run.config.model == "hsenet" else reaf
    if kind != wanted:
        raise InputError(
            f"--format {kind}: {run.folder} is a {run.config.model} run{' with fusion' if fused else ''}; "
            f"expected --format {wanted} or transformers"
        )
    notes: list[str] = []
    state = published_state(run, notes)
    if kind == "m3d-clip":
        teacher = find_teacher(run, notes)
        if teacher is not None:
            state |= {f"{TEACHER}{name}": tensor for name, tensor in published_state(teacher, notes).items()}
        write_weights(out / "model.safetensors", state)
    else:  # as open_clip saves it
        with atomic_write(out / "checkpoint.pt", "wb") as file:
            torch.save({"state_dict": state}, file)
    run.tokenizer.save(out)
    write_json(out / "config.json", dual_settings(run))
    return notes


def published_state(run: Trained, notes: list[str]) -> State:
    """Return a dual encoder's tensors under the published names, with those that its published file had
    beside.
    """
    if is_published(run.folder):  # the teacher's, as it is
        return open_source(str(run.weights)).tensors
    # A fusion's weights are constants of its method, which no published checkpoint has.
    state = {n: t for n, t in stored_state(run).items() if not n.startswith("vision.fusion.")}
    if isinstance(run.config.vision, ReafVisionConfig):
        return export_state(REAF, with_axes(state, run.config.vision)) | not_used(run, notes)
    return export_state(M3D_CLIP, state) | not_used(run, notes)


def stored_state(run: Trained) -> State:
    """Return the checkpoint's tensors in their own type; adapters are added to the matrices they adapt."""
    return merged_state(run.model) if run.config.lora else read_weights_file(run.weights)


def not_used(run: Trained, notes: list[str]) -> State:
    path = Run(run.folder).folder / NOT_USED
    if path.is_file():
        return read_weights_file(path)
    notes.append(
        f"{run.folder}: a BERT's pooler is not trained here, so the export has none; the dual encoders do "
        f"not use it"
    )
    return {}


def find_teacher(run: Trained, notes: list[str]) -> Trained | None:
    """Load the stage-1 run that a stage-2 run learned from, where it still is."""
    if run.stage != "clip2":
        return None
    folder, sha256 = run.origin.get("teacher"), run.origin.get("teacher_sha256")
    there = folder and (Run(folder).exists or is_published(Path(folder)))
    teacher = load_source(folder, run.origin.get("text_model"), sha256) if there else None
    if teacher is None or teacher.sha256() != sha256:
        notes.append(f"without the stage-1 model ({TEACHER}*): {folder} is no longer there, or another one")
        return None
    return teacher


def dual_settings(run: Trained) -> dict:
    """Return the config.json of an export: M3D-CLIP's keys, for other readers, and all of our settings."""
    vision = run.config.vision
    values = {
        "img_size": list(vision.size),
        "patch_size": list(vision.patch),
        "hidden_size": vision.width,
        "mlp_dim": vision.mlp,
        "num_layers": vision.depth,
        "num_heads": vision.heads,
        "in_channels": 1,
    }
    if isinstance(vision, GuidedVisionConfig):
        values["num_slices"] = vision.slices
    own = {
        "model": to_dict(replace(run.config, lora=None)),
        "recipe": to_dict(run.recipe),
        "slices": run.slices,
    }
    return {**values, OWN: own}


def export_text(run: Trained, out: Path) -> list[str]:
    """Write the text encoder as a BERT folder that transformers reads."""
    notes: list[str] = []
    ours = {n.removeprefix("text."): t for n, t in stored_state(run).items() if n.startswith("text.")}
    state = export_state(BERT, ours)
    for name, tensor in not_used(run, notes).items():
        for prefix in ("language_encoder.", "text.transformer."):
            if name.startswith(prefix):
                state[name.removeprefix(prefix)] = tensor
    write_weights(out / "model.safetensors", state)
    run.tokenizer.save(out)
    write_json(out / "config.json", bert_settings(run.config.text))
    return notes


def export_language(run: Trained, out: Path) -> list[str]:
    """Write OUT, the decoder as a transformers folder; OUT/adapter, its adapters as peft's; packers and
    adapters.

    The last go into OUT/mm_projector_and_lora.bin, as HSENet's training saves them.
    """
    full, decoder = run.config.full, run.model.decoder
    save_decoder(decoder if full else base_decoder(replace(run.config, int8=False), run.origin), out)
    run.tokenizer.save(out)
    adapters = {} if full else {name: tensor.cpu() for name, tensor in adapter_state(decoder).items()}
    if adapters:
        save_adapter(decoder, out / "adapter", str(out))
    packers = {n: t for n, t in run.model.state_dict().items() if n.startswith("projectors.")}
    state = export_state(language_table(run.config.projector), packers)
    # peft's names of a model in memory.
    state |= {n.removesuffix(".weight") + ".default.weight": t.clone() for n, t in adapters.items()}
    file = out / "mm_projector_and_lora.bin"
    with atomic_write(file, "wb") as opened:
        torch.save(state, opened)
    return [
        f"{out}: the decoder" + (", OUT/adapter: its adapters" if adapters else ", all of it trained"),
        f"{file}: packers and adapters under HSENet's names; the encoders are runs of their own, to be "
        f"exported",
    ]
