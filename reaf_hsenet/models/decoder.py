"""Language decoder of Phi-3, Phi-4(-mini), Llama-2 and Llama-3, with a static cache of keys and values.

ids (B, T) or embeddings (B, T, C) -> logits (B, T, V). Pre-norm blocks of rotary, grouped-query attention
and a gated MLP. Modules are named as the published tensors are, so that a state_dict has the published names
without `model.`; separate q, k, v and gate, up are one matrix each in memory. Source: transformers 4.49
(Phi3ForCausalLM, LlamaForCausalLM), Su et al. 2021 (rotary), Ding et al. 2024 (LongRoPE).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.layers import FusedLinear, RMSNorm, run_blocks


class Rope:
    """Cosines and sines of positions. No module: frequencies stay float32 when a model changes its dtype."""

    def __init__(self, config: RopeConfig, head_dim: int):
        self.config, self.head_dim, self.tables = config, head_dim, {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the cos (B or 1, T, 1, head_dim) and sin (B or 1, T, 1, R) of positions (B or 1, T).

        LongRoPE has one set of factors for the whole call: the long ones as soon as any position reaches the
        original context.
        """
        if positions.device not in self.tables:
            table = torch.tensor(self.config.frequencies, dtype=torch.float32, device=positions.device)
            self.tables[positions.device] = table
        short, long = self.tables[positions.device]
        if self.config.kind == "longrope":
            short = torch.where(positions.max() >= self.config.original, long, short)
        angles = positions[..., None, None].float() * short
        cos, sin = angles.cos() * self.config.amplitude, angles.sin() * self.config.amplitude
        cos = F.pad(torch.cat((cos, cos), dim=-1), (0, self.head_dim - 2 * cos.shape[-1]), value=1.0)
        return cos.to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of features of (B, T, heads, head_dim), i and i + R / 2 of the first R; the rest passes.

    (a, b) turns into (a cos - b sin, b cos + a sin). cos: 1 for the rest; sin: with its signs.
    """
    rotated = x[..., : sin.shape[-1]]
    out = x * cos
    out[..., : sin.shape[-1]].addcmul_(torch.cat(rotated.chunk(2, dim=-1)[::-1], dim=-1), sin)
    return out


class KVCache:
    """Keys and values of up to `size` tokens of B sequences, in every layer; `length` tokens are there.

    A `fixed` cache is for compiled steps: its shapes and addresses never change, so that all of it is read
    every time and the next place is counted on the device.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, size: int, dtype=None, device=None, fixed: bool = False
    ):
        shape = (2, batch, config.kv_heads, size, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.size, self.length, self.fixed = size, 0, fixed
        self.place = torch.arange(size, device=device)
        self.next = torch.zeros(1, dtype=torch.long, device=device)

    def slots(self, tokens: int) -> tuple[Tensor, int]:
        """Return where the next tokens go, (T,), and the end of the keys that are read."""
        if self.fixed:
            return self.next + self.place[:tokens], self.size
        if self.length + tokens > self.size:
            raise ValueError(f"{self.length} + {tokens} tokens do not fit a cache of {self.size}")
        return self.place[self.length : self.length + tokens], self.length + tokens

    def advance(self, tokens: int) -> None:
        if self.fixed:
            self.next += tokens
        else:
            self.length += tokens

    def clear(self) -> None:
        self.length = 0
        self.next.zero_()


class DecoderAttention(nn.Module):
    """Query head i reads key/value head i // (heads / kv_heads)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv_proj = FusedLinear(config.width, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=False)
        self.o_proj = nn.Linear(q, config.width, bias=False)

    def forward(
        self, x: Tensor, rope, mask: Tensor | None, causal: bool, layer: Tensor | None, slots, end: int
    ) -> Tensor:
        x = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads + 2 kv_heads, head_dim)
        qk, v = x.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(qk, *rope).split((self.heads, self.kv_heads), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if layer is not None:
            layer[0].index_copy_(2, slots, k.to(layer.dtype))  # autocast computes in another type
            layer[1].index_copy_(2, slots, v.to(layer.dtype))
            k, v = layer[:, :, :, :end].to(q.dtype)
        return self.o_proj(self.attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return the heads' outputs (B, heads, T, head_dim), by torch's fused kernel."""
        group = self.heads // self.kv_heads
        if (
            q.shape[2] == 1
        ):  # one query: the heads of a group are rows of one attention, and no key is repeated
            return F.scaled_dot_product_attention(q.unflatten(1, (-1, group)).squeeze(3), k, v, mask).flatten(
                1, 2
            )[:, :, None]
        k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up_proj = FusedLinear(
            config.width, {"gate_proj": config.mlp, "up_proj": config.mlp}, bias=False
        )
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(
            F.silu(gate, inplace=True).mul_(up)
        )  # the largest tensors are not allocated twice more


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = GatedMlp(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole decoder. A tied one has no lm_head: the embedding gives the logits."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, self.grad_checkpoint, self.rope = config, False, Rope(config.rope, config.head_dim)
        # The pad's own row gets no gradient from look-ups, as published, even where it is bos and eos too.
        self.embed_tokens = nn.Embedding(config.vocab, config.width, padding_idx=config.pad_id)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Return logits (B, T, V), or (B, 1, V) of the last token with `last`. Arguments: see `hidden`."""
        x = self.hidden(self.embed_tokens(ids) if embeddings is None else embeddings, mask, positions, cache)
        return self.logits(x[:, -1:] if last else x)

    def hidden(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return (B, T, C) after the final norm, from embeddings (B, T, C).

        mask: (B, S), nonzero at real tokens, of the cached ones and these (a fixed cache: of its whole size).
        positions: (B, T); without them tokens are numbered 0, 1, ... by column, whatever the mask.
        """
        tokens = x.shape[1]
        slots, end = cache.slots(tokens) if cache else (torch.arange(tokens, device=x.device), tokens)
        positions = slots[None] if positions is None else positions
        visible, causal = self.visible(slots, end, mask, fixed=cache is not None and cache.fixed)
        rope = self.rope(positions, x.dtype)
        if cache is None:
            x = run_blocks(self.layers, x, self.grad_checkpoint, rope, visible, causal, None, slots, end)
        else:
            for block, layer in zip(self.layers, cache.layers, strict=True):
                x = block(x, rope, visible, causal, layer, slots, end)
            cache.advance(tokens)
        return self.norm(x)

    def visible(
        self, slots: Tensor, end: int, mask: Tensor | None, fixed: bool
    ) -> tuple[Tensor | None, bool]:
        """Return (mask, causal): the keys that each token sees, (B or 1, 1, T, S), None for all."""
        window, tokens = self.config.window, len(slots)
        if mask is None and not fixed and (window is None or end <= window) and tokens in (1, end):
            return None, tokens > 1
        keys = torch.arange(end, device=slots.device)
        seen = keys <= slots[:, None]
        if window is not None:
            seen = seen & (keys > slots[:, None] - window)
        if mask is None:
            return seen[None, None], False
        # A padded token sees itself, so that no row of the softmax is empty; nothing sees a padded token.
        seen = (seen & mask.bool()[:, None]) | (keys == slots[:, None])
        return seen[:, None], False

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)
