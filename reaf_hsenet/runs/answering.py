"""Answers of a language model that sees: volumes and plain questions in, texts out.

Question lengths differ, so the rows of a batch are padded on the left, before bos: an answer is the same
alone and in a batch.
"""

import torch
from torch import Tensor

from reaf_hsenet.config import GENERATION
from reaf_hsenet.data.language import LIST_END, question_text
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.packed import packable
from reaf_hsenet.runs.generation import Sampling, generate
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


@torch.inference_mode()
def answer(
    model: Mllm,
    tokenizer: Tokenizer,
    questions: list[str],
    volume: Tensor | None,
    slices: Tensor | None,
    new_tokens: int,
    sampling: Sampling | None = None,
    features: list[Tensor] | None = None,
    compiled: bool = False,
) -> list[str]:
    """Return an answer of at most `new_tokens` tokens to each question, as plain text without special tokens.

    volume: (B, 1, D, H, W), one a question; slices: (B, S, C), for an encoder or a projector that is guided
    by them.
    features: of `image_features`, (B, N, C) each, where they are known already; volume is then not used. All
    on the model's device. compiled: as of generation.steps. Raises InputError when a question and its answer
    do not fit the decoder's context.
    """
    embeddings, mask = prompt_embeddings(model, tokenizer, questions, volume, slices, features)
    made = generate(
        model.decoder,
        embeddings=embeddings,
        mask=mask,
        new_tokens=new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        sampling=sampling,
        pad_id=tokenizer.pad_id,
        compiled=compiled,
    )
    return [answer_text(model, tokenizer, row) for row in made.tolist()]


@torch.inference_mode()
def image_features(model: Mllm, volume: Tensor, slices: Tensor | None) -> list[Tensor]:
    """Patch tokens (B, N, C) of every encoder, in mixed precision when the decoder is in half precision;
    see `_autocast`.
    """
    with _autocast(model, volume.device):
        return model.features(volume, slices)


@torch.inference_mode()
def prompt_embeddings(
    model: Mllm,
    tokenizer: Tokenizer,
    questions: list[str],
    volume: Tensor | None,
    slices: Tensor | None,
    features: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what generation.steps takes: embeddings (B, T, W), padded on the left, and mask (B, T)."""
    features = image_features(model, volume, slices) if features is None else features
    device = features[0].device
    ids, mask = (t.to(device) for t in tokenizer.batch(question_ids(model, tokenizer, questions)))
    with _autocast(model, device):
        rows = model.embed(
            ids, features, slices, mask
        )  # padded on the right, so that the image has its columns
    pads = (mask.shape[1] - mask.sum(1)).tolist()
    moved = [[row.roll(pad, 0) for row, pad in zip(rows_, pads, strict=True)] for rows_ in (rows, mask)]
    return torch.stack(moved[0]), torch.stack(moved[1])


def question_ids(model: Mllm, tokenizer: Tokenizer, questions: list[str]) -> list[list[int]]:
    """Return ids of each question: bos, the image tokens, and the text."""
    texts = [question_text(tokenizer, question, model.visual_tokens) for question in questions]
    return [tokenizer.encode(text, special_tokens=False) for text in texts]


def usual_new_tokens(model: Mllm, tokenizer: Tokenizer, questions: list[str], task: str) -> int:
    """Return how many new tokens `task` (mrg or vqa) is published with, or as many as the decoder's context
    leaves.
    """
    return max(1, min(GENERATION[task]["new_tokens"], _room(model, tokenizer, questions)))


def check_context(model: Mllm, tokenizer: Tokenizer, questions: list[str], new_tokens: int) -> None:
    """Raise InputError unless the longest of the questions and `new_tokens` more fit the decoder's
    context.
    """
    room = _room(model, tokenizer, questions)
    if new_tokens > room:
        context = model.decoder.config.context
        raise InputError(
            f"--new-tokens {new_tokens}: a question of {context - room} tokens, {model.visual_tokens} of "
            f"them of the image, leaves {max(0, room)} of the decoder's context of {context}; shorten the "
            "question or ask for fewer"
        )


def _room(model: Mllm, tokenizer: Tokenizer, questions: list[str]) -> int:
    return model.decoder.config.context - max(map(len, question_ids(model, tokenizer, questions)))


def stop_ids(model: Mllm, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that end an answer: training's, and those that the decoder's config names."""
    return tuple(dict.fromkeys((tokenizer.eos_id, *model.decoder.config.eos_ids)))


def answer_text(model: Mllm, tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text before the first stop token, after the list of labels where there is one; no special
    tokens, no outer spaces.
    """
    stops = stop_ids(model, tokenizer)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    mark = tokenizer.ids.get(LIST_END)
    start = ids.index(mark) + 1 if mark in ids[:end] else 0
    return tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()


def _autocast(model: Mllm, device: torch.device):
    """Encoders and projectors keep float32 weights, as in training; beside a decoder in half precision they
    compute in its.

    A processor without instructions for that precision takes 7 times as long with it: there they compute in
    float32.
    """
    weight = model.decoder.embed_tokens.weight
    return torch.autocast(
        device.type,
        weight.dtype,
        enabled=weight.dtype != torch.float32 and (device.type != "cpu" or packable(weight)),
    )
