"""Text from a decoder: greedy or sampled, batched, streamed. Deterministic: the same inputs and seed give the
same tokens.

Prompts are ids or embeddings, padded on the left. Source of the rules: transformers 4.49's generate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.models.decoder import Decoder, KVCache

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of a decoder
CACHE_STEP, KEPT_STEPS = 256, 4  # compiled caches have sizes of multiples of this; so many are kept


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest.

    top_k, top_p: the tokens to draw from, after the temperature; top_p keeps the likeliest ones whose
    probabilities add up to it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-4 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: expected 0 (greedy), or 0.0001 and more")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise InputError(f"top_k {self.top_k}: expected a positive number of tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: expected a probability above 0, at most 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: expected a whole number from 0 to 2**63 - 1")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Choose a token for each row of logits (B, V) -> (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = (
        (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k :] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # 0 for the likeliest, which is always kept
        probabilities[before >= sampling.top_p] = 0
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def row_positions(mask: Tensor) -> Tensor:
    """Return, for a (B, T) mask, each row's positions, counted from its first real token; pads get 1."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)


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
    """Yield tokens (B,) and the logits (B, V) they were chosen from, until all rows have stopped.

    new_tokens: at most. ids (B, T) or embeddings (B, T, C) are padded on the left where mask (B, T) is 0. A
    row that has stopped goes on with `pad_id` (by default the decoder's own, else the first stop token). The
    decoder runs in evaluation mode.
    compiled: later steps run as one compiled graph (torch.compile, CUDA graphs on a GPU), which is kept for
    later calls of about this size.

    LongRoPE takes other factors for more tokens than the original context, which turn the cached keys too. At
    the step that passes it everything is computed anew, so that the result is the same as without a cache.
    """
    assert (ids is None) != (embeddings is None), "a prompt is either ids or embeddings"
    prompt = decoder.embed_tokens(ids) if embeddings is None else embeddings
    _check(decoder, prompt, mask, new_tokens)
    if pad_id is None and stop_ids:
        pad_id = decoder.config.pad_id if decoder.config.pad_id is not None else stop_ids[0]
    batch, size = len(prompt), prompt.shape[1] + new_tokens
    if compiled:
        step = _take_compiled(decoder, batch, size, prompt)
        cache = step.cache
    else:
        step, cache = decoder.forward, KVCache(decoder.config, batch, size, prompt.dtype, prompt.device)
    training = decoder.training
    decoder.eval()
    try:
        yield from _steps(
            decoder,
            prompt,
            mask,
            new_tokens=new_tokens,
            stop_ids=stop_ids,
            sampling=sampling or Sampling(),
            pad_id=pad_id,
            cache=cache,
            step=step,
        )
    finally:
        decoder.train(training)
        if compiled:
            _give_back(decoder, step)


def _check(decoder: Decoder, prompt: Tensor, mask: Tensor | None, new_tokens: int) -> None:
    batch, length = prompt.shape[:2]
    if not batch or not length or new_tokens < 1:
        raise InputError(
            f"{batch} prompts of {length} tokens, {new_tokens} new ones: expected at least one of each"
        )
    if length + new_tokens > decoder.config.context:
        raise InputError(
            f"a prompt of {length} tokens and {new_tokens} new ones do not fit the decoder's context of "
            f"{decoder.config.context}; shorten the prompt or ask for fewer"
        )
    if mask is not None and bool((mask[:, 1:].bool() < mask[:, :-1].bool()).any()):
        raise InputError("a prompt has padding after its text: pad on the left, batch(rows, side='left')")


@torch.inference_mode()
def _steps(
    decoder: Decoder,
    prompt: Tensor,
    mask: Tensor | None,
    new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    pad_id: int | None,
    cache: KVCache,
    step: Callable,
) -> Iterator[tuple[Tensor, Tensor]]:
    config, (batch, length), device = decoder.config, prompt.shape[:2], prompt.device
    padded = mask is not None and not bool(mask.bool().all())
    lengths = mask.sum(1, keepdim=True) if padded else torch.full((batch, 1), length, device=device)
    longest = int(lengths.max())
    seen = torch.ones(batch, cache.size, dtype=torch.bool, device=device) if padded or cache.fixed else None
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
        known = seen if cache.fixed or seen is None else seen[:, :last]
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


class CompiledStep:
    """One token's step over a cache of fixed shapes and addresses: compiled once, on a GPU a CUDA graph."""

    def __init__(self, decoder: Decoder, batch: int, size: int, like: Tensor):
        self.key = batch, size, like.dtype, like.device
        self.cache = KVCache(decoder.config, batch, size, like.dtype, like.device, fixed=True)
        for tensor in (*self.cache.layers, self.cache.next, self.cache.place):
            torch._dynamo.mark_static_address(tensor)
        self.compiled = torch.compile(decoder.forward, mode="reduce-overhead", fullgraph=True)

    def __call__(self, **inputs) -> Tensor:
        return self.compiled(**inputs).clone()  # the graph's own output is overwritten by the next step


# Compiled steps of the last few sizes, by decoder. One in use is not here: no two calls share a cache.
_COMPILED: WeakKeyDictionary[Decoder, list[CompiledStep]] = WeakKeyDictionary()


def _take_compiled(decoder: Decoder, batch: int, size: int, like: Tensor) -> CompiledStep:
    size = math.ceil(size / CACHE_STEP) * CACHE_STEP
    for step in _COMPILED.setdefault(decoder, []):
        if step.key == (batch, size, like.dtype, like.device):
            _COMPILED[decoder].remove(step)
            step.cache.clear()
            return step
    return CompiledStep(decoder, batch, size, like)


def _give_back(decoder: Decoder, step: CompiledStep) -> None:
    _COMPILED[decoder] = [*_COMPILED[decoder], step][-KEPT_STEPS:]


def generate(decoder: Decoder, **settings) -> Tensor:
    """Return new tokens (B, N), a stop token the last of its row, then pads. settings: as of `steps`."""
    return torch.stack([token for token, _ in steps(decoder, **settings)], dim=1)
