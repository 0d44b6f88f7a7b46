"""Text from a decoder: greedy or sampled, batched, streamed. Deterministic: the same inputs and seed give the same tokens.

Prompts are ids or embeddings, padded on the left. Source of the rules: transformers 4.49's generate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.models.decoder import Decoder, KVCache

CACHE_STEP = 256  # compiled caches have sizes of multiples of this


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token. top_k, top_p: the tokens to draw from, after the temperature; top_p keeps
    the likeliest ones whose probabilities add up to it."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k}: expected a positive number of tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: expected a probability above 0, at most 1")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) -> a token each, (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k :] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0  # the likeliest is always kept
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def left_padded(rows: list[list[int]], pad_id: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, T) with their ends aligned, and mask (B, T)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def row_positions(mask: Tensor) -> Tensor:
    """(B, T) mask -> each row's positions, counted from its first real token; pads get 1."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)


@torch.inference_mode()
def steps(
    decoder: Decoder,
    ids: Tensor | None = None,
    embeddings: Tensor | None = None,
    mask: Tensor | None = None,
    new_tokens: int = 64,
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling | None = None,
    pad_id: int | None = None,
    compiled: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens (B,), the logits (B, V) they were chosen from) until every row has stopped or `new_tokens` are made.

    ids (B, T) or embeddings (B, T, C), padded on the left where mask (B, T) is 0. A row that has stopped goes on with
    `pad_id`. compiled: later steps run as one compiled graph (torch.compile, CUDA graphs on a GPU), which is kept for
    later calls of about this size.

    LongRoPE takes other factors for more tokens than the original context, which turn the cached keys too. At the step
    that passes it everything is computed anew, so that the result is the same as without a cache.
    """
    sampling, config = sampling or Sampling(), decoder.config
    prompt = decoder.embed_tokens(ids) if embeddings is None else embeddings
    (batch, length), device = prompt.shape[:2], prompt.device
    if length + new_tokens > config.context:
        raise InputError(
            f"a prompt of {length} tokens and {new_tokens} new ones do not fit the decoder's context of {config.context}; "
            "shorten the prompt or ask for fewer"
        )
    padded = mask is not None and not bool(mask.bool().all())
    lengths = mask.sum(1, keepdim=True) if padded else torch.full((batch, 1), length, device=device)
    longest = int(lengths.max())
    if compiled:
        cache, step = _compiled_step(decoder, batch, length + new_tokens, prompt)
    else:
        cache, step = KVCache(config, batch, length + new_tokens, prompt.dtype, device), decoder.forward
    seen = torch.ones(batch, cache.size, dtype=torch.bool, device=device) if padded or compiled else None
    if padded:
        seen[:, :length] = mask.bool()
    generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.temperature else None
    stop = torch.tensor(stop_ids, device=device, dtype=torch.long)
    running, made = torch.ones(batch, dtype=torch.bool, device=device), []

    def run(x: Tensor, call=decoder.forward) -> Tensor:
        """Logits (B, V) of the last of the tokens x (B, T, C), which come after what is in the cache."""
        first, last = length + len(made) - x.shape[1], length + len(made)
        if not padded:
            positions = torch.arange(first, last, device=device)[None].expand(batch, -1)
        elif first:
            positions = lengths + (first - length) + torch.arange(last - first, device=device)
        else:
            positions = row_positions(seen[:, :last])
        known = seen if compiled or seen is None else seen[:, :last]
        return call(embeddings=x, mask=known, positions=positions, cache=cache, last=True)[:, -1]

    logits = run(prompt)
    for i in range(new_tokens):
        token = choose(logits, sampling, generator)
        token = token if pad_id is None else torch.where(running, token, pad_id)
        yield token, logits
        made.append(token)
        running = running & ~torch.isin(token, stop)
        if i + 1 == new_tokens or (stop_ids and not running.any()):
            return
        passes = config.rope.kind == "longrope" and longest + i + 1 == config.rope.original + 1
        if passes:
            cache.clear()
            logits = run(torch.cat((prompt, decoder.embed_tokens(torch.stack(made, 1))), dim=1))
        else:
            logits = run(decoder.embed_tokens(token)[:, None], step)


def _compiled_step(decoder: Decoder, batch: int, size: int, like: Tensor) -> tuple[KVCache, Callable]:
    """An empty cache whose shapes and addresses stay, and one token's step over it, compiled once and kept with the
    decoder."""
    key = batch, math.ceil(size / CACHE_STEP) * CACHE_STEP, like.dtype, like.device
    if key not in decoder.compiled_steps:
        cache = KVCache(decoder.config, batch, key[1], like.dtype, like.device, fixed=True)
        for tensor in (*cache.layers, cache.next, cache.place):
            torch._dynamo.mark_static_address(tensor)
        compiled = torch.compile(decoder.forward, mode="reduce-overhead", fullgraph=True)
        # The graph's own output is overwritten by the next step.
        decoder.compiled_steps[key] = cache, lambda **inputs: compiled(**inputs).clone()
    cache, step = decoder.compiled_steps[key]
    cache.clear()
    return cache, step


def generate(decoder: Decoder, **settings) -> Tensor:
    """New tokens (B, N) of all steps; settings as of `steps`. The stop token is the last of a row, pads follow it."""
    return torch.stack([token for token, _ in steps(decoder, **settings)], dim=1)
