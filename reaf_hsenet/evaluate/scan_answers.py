"""One question about one scan, answered piece by piece, and how long the answer may be."""

from collections.abc import Iterator

import torch
from torch import Tensor

from reaf_hsenet.data.language import LIST_END
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.build import build_mllm
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.answering import answer_text, check_context, prompt_embeddings, question_ids, stop_ids
from reaf_hsenet.runs.generation import Sampling, steps
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


def answer_length(
    config: MllmConfig, tokenizer: Tokenizer, question: str, wanted: int | None, usual: int
) -> int:
    """How many new tokens to make at most: `wanted`, or without it the `usual` number cut to what the context
    leaves.

    Raises InputError for a blank question, for one that fills the context, and when what is wanted does not
    fit.
    """
    if not question.strip():
        raise InputError('the question is empty; ask something, such as "Is there pleural effusion?"')
    with torch.device("meta"):  # sizes without weights, which may take minutes to read
        model = build_mllm(config)
    length, context = len(question_ids(model, tokenizer, [question])[0]), config.decoder.context
    if length >= context:
        raise InputError(
            f"a question of {length} tokens, {model.visual_tokens} of them of the image, leaves no room for "
            f"an answer in the decoder's context of {context}: shorten it"
        )
    if wanted is None:
        return min(usual, context - length)
    check_context(model, tokenizer, [question], wanted)
    return wanted


def stream_answer(
    model: Mllm,
    tokenizer: Tokenizer,
    question: str,
    volume: Tensor,
    slices: Tensor | None,
    new_tokens: int,
    sampling: Sampling | None = None,
    compiled: bool = False,
) -> Iterator[str]:
    """Pieces of text, which together are the answer. volume (1, 1, D, H, W), slices (1, S, C): on the model's
    device.
    compiled: as of generation.steps.

    A word is given when the next one begins: until then, further tokens may change it.
    """
    with torch.inference_mode():
        embeddings, mask = prompt_embeddings(model, tokenizer, [question], volume, slices)
    made = steps(
        model.decoder,
        embeddings=embeddings,
        mask=mask,
        new_tokens=new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        sampling=sampling,
        pad_id=tokenizer.pad_id,
        compiled=compiled,
    )
    ids, shown, text = [], 0, ""
    mark = tokenizer.ids.get(LIST_END)
    for token, _ in made:
        ids.append(int(token))
        text = answer_text(model, tokenizer, ids)
        if mark is not None and mark not in ids:
            continue  # what is there so far may be the list of labels
        if (end := max(text.rfind(" "), text.rfind("\n"))) > shown:
            yield text[shown:end]
            shown = end
    if text[shown:]:
        yield text[shown:]
