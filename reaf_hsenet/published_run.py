"""Published weights at work as they are: a dual encoder, or HSENet's packers and adapters on what they stand on.

evaluate.py, infer.py and train.py take a file or folder of them wherever they take a run, through load_dual_encoder and
load_mllm; nothing is converted or written.
"""

from pathlib import Path

import torch

from reaf_hsenet.checkpoint import Choice
from reaf_hsenet.embedding import DualEncoderRun, load_dual_encoder
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256
from reaf_hsenet.mllm_run import MllmRun, build_run_model
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.pretrained.dual import load_published_dual
from reaf_hsenet.pretrained.families import open_source
from reaf_hsenet.pretrained.language import load_published_language


def load_published(
    path: Path | str,
    text_model: str | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
    dtype: torch.dtype | None = None,
) -> DualEncoderRun | MllmRun:
    """M3D-CLIP, HSENet's two stages, HLIP, REAF, or HSENet's language model, under their published names.

    text_model: where the text encoder's vocab.txt is, when not beside its weights. decoder, encoders: what packers and
    adapters stand on, Phi-4-mini and HSENet-2E3-CLIP. dtype: of the decoder; None keeps that of its files. Raises
    InputError for all that does not fit.
    """
    source = open_source(str(path))
    if source.family.kind == "language":
        if decoder is None or encoders is None:
            raise InputError(
                f"{path}: holds packers and adapters only; name what they stand on: --decoder microsoft/Phi-4-mini-instruct "
                "--encoders HSENET-2E3-CLIP"
            )
        published = load_published_language(source, decoder, encoders, text_model=text_model)
        if published.encoder is not None:
            states = [published.encoder.teacher.state, published.encoder.state]
            hashes = [file_sha256(published.encoder.source.file)]
        else:
            runs = [load_dual_encoder(run) for run in published.encoder_runs]
            states, hashes = [merged_state(run.model) for run in runs], [run.sha256() for run in runs]
        origin = {"published": source.family.key, "notes": list(published.notes), "decoder": published.decoder}
        origin["encoders"] = [{"sha256": sha256} for sha256 in hashes]
        model = build_run_model(published.config, origin, published.state, states, source.name, dtype)
        known = {"stage": published.stage, "origin": origin, "train": {}}
    else:
        for name, value in (("decoder", decoder), ("encoders", encoders)):
            if value is not None:
                raise InputError(f"--{name}: is of HSENet's packers and adapters; {path} is {source.family.name}, leave it out")
        published = load_published_dual(source, text_model)
        where = str(Path(text_model).resolve()) if text_model and Path(text_model).exists() else text_model
        origin = {"published": source.family.key, "notes": list(published.notes), "text_model": where}
        model, known = published.model(), {"stage": published.stage, "origin": origin}
    return (MllmRun if source.family.kind == "language" else DualEncoderRun)(
        folder=Path(path),
        preset=f"{'reaf' if source.family.key in ('reaf', 'hlip') else 'hsenet'}-base",
        model=model,
        config=published.config,
        recipe=published.recipe,
        tokenizer=published.tokenizer,
        checkpoint=Choice(source.file),
        weights=source.file,
        data=None,
        slices=published.slices,
        **known,
    )
