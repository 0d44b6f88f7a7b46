"""Answers of a language model that sees: volumes and plain questions in, texts out.

Question lengths differ, so the rows of a batch are padded on the left, before bos: an answer is the same
alone and in a batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from reaf_hsenet.config import GENERATION
from reaf_hsenet.data.language import CUE_TOKENS, question_text
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.packed import packable
from reaf_hsenet.runs.generation import Sampling, generate, steps
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
    """Return an answer of at most `new_tokens` tokens to each question, without special tokens.

    volume: (B, 1, D, H, W), one a question. slices: (B, S, C), for encoders or projectors that they guide.
    features: of `image_features`, (B, N, C) each, where they are known already; volume is then not used. All
    on the model's device. compiled: as of generation.steps.
    """
    inputs = _decoder_inputs(model, tokenizer, questions, volume, slices, features)
    made = generate(model.decoder, **inputs, new_tokens=new_tokens, sampling=sampling, compiled=compiled)
    return [answer_text(model, tokenizer, row) for row in made.tolist()]


def stream_answer(
    model: Mllm,
    tokenizer: Tokenizer,
    question: str,
    features: list[Tensor],
    slices: Tensor | None,
    new_tokens: int,
    sampling: Sampling | None = None,
    compiled: bool = False,
) -> Iterator[str]:
    """Yield pieces of text, which together are the answer of `answer` to one question. features: of one scan.

    A word is given when the next one begins: until then, further tokens may change it.
    """
    with torch.inference_mode():
        inputs = _decoder_inputs(model, tokenizer, [question], None, slices, features)
    made = steps(model.decoder, **inputs, new_tokens=new_tokens, sampling=sampling, compiled=compiled)
    ids, shown, text = [], 0, ""
    for token, _ in made:
        ids.append(int(token))
        text = answer_text(model, tokenizer, ids)
        if (end := max(text.rfind(" "), text.rfind("\n"))) > shown:
            yield text[shown:end]
            shown = end
    if text[shown:]:
        yield text[shown:]


def _decoder_inputs(model: Mllm, tokenizer: Tokenizer, *prompt) -> dict:
    """Return what generation.steps takes for a prompt and its end. prompt: as of prompt_embeddings."""
    embeddings, mask = prompt_embeddings(model, tokenizer, *prompt)
    ending = {"stop_ids": stop_ids(model, tokenizer), "pad_id": tokenizer.pad_id}
    return {"embeddings": embeddings, "mask": mask, **ending}


@torch.inference_mode()
def image_features(model: Mllm, volume: Tensor, slices: Tensor | None) -> list[Tensor]:
    """Return patch tokens (B, N, C) of every encoder, in the precision of `_autocast`."""
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
    """Return embeddings (B, T, W), padded on the left, and mask (B, T), as generation.steps takes them."""
    features = image_features(model, volume, slices) if features is None else features
    device = features[0].device
    with _autocast(model, device):
        asked = question_ids(model, tokenizer, questions)
        if model.findings is not None:
            at, cues = 1 + model.visual_tokens, model.predicted_cues(model.findings(features))
            asked = [ids[:at] + cue + ids[at:] for ids, cue in zip(asked, cues, strict=True)]
        ids, mask = (t.to(device) for t in tokenizer.batch(asked))
        # Padded on the right, so that the image has its columns.
        rows = model.embed(ids, features, slices, mask)
    pads = (mask.shape[1] - mask.sum(1)).tolist()
    moved = [[row.roll(pad, 0) for row, pad in zip(rows_, pads, strict=True)] for rows_ in (rows, mask)]
    return torch.stack(moved[0]), torch.stack(moved[1])


def question_ids(model: Mllm, tokenizer: Tokenizer, questions: list[str]) -> list[list[int]]:
    """Return ids of each question: bos, the image tokens, and the text."""
    texts = [question_text(tokenizer, question, model.visual_tokens) for question in questions]
    return [tokenizer.encode(text, special_tokens=False) for text in texts]


def answer_length(
    model: Mllm, tokenizer: Tokenizer, questions: list[str], task: str, wanted: int | None = None
) -> int:
    """Return how many new tokens to make at most: `wanted`, else the task's, cut to what the context leaves.

    task: `mrg` or `vqa`. Raises InputError when the longest question leaves no room, or not for `wanted`.
    """
    length, context = max(map(len, question_ids(model, tokenizer, questions))), model.decoder.config.context
    length += CUE_TOKENS if model.findings else 0  # what a cue may have
    cues = f" and up to {CUE_TOKENS} of cues" if model.findings else ""
    asked = f"a question of {length} tokens, {model.visual_tokens} of them of the image{cues}, leaves"
    if length >= context:
        raise InputError(f"{asked} no room for an answer in the decoder's context of {context}: shorten it")
    if wanted is None:
        return min(GENERATION[task]["new_tokens"], context - length)
    if wanted > context - length:
        raise InputError(
            f"--new-tokens {wanted}: {asked} {context - length} of the decoder's context of {context}; "
            "shorten the question or ask for fewer"
        )
    return wanted


def stop_ids(model: Mllm, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what ends an answer: the token that training puts there, and those of the decoder's config."""
    return tuple(dict.fromkeys((tokenizer.eos_id, *model.decoder.config.eos_ids)))


def answer_text(model: Mllm, tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text before the first stop token, without special tokens and outer spaces."""
    stops = stop_ids(model, tokenizer)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


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
