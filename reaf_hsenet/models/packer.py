"""HSENet's spatial packer and the projectors it is compared with: patch tokens become visual tokens.

Patch tokens (B, N, C) on a grid (d, h, w), depth-major, without the class token -> visual tokens (B, K,
C_out). A kernel (kd, kh, kw) cuts the grid into K cells of M = kd kh kw tokens, ordered as the tokens are;
a head maps C to C_out. All are called alike, projector(tokens, slices, text, text_mask); `needs` says what
one cannot do without. Matrices start as torch's own layers do, as published. Source: HSENet (c7198f3) and
its ablations, as that code computes them, which is not always what their names say.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import Attention

Size3 = tuple[int, int, int]
# The mlp projector's first matrix has (N C) (K C) numbers, 1.5e11 at base size. The largest that is built:
MOST_MIXING_WEIGHTS = 2**31


def count_cells(grid: Size3, kernel: Size3) -> int:
    """K. Raises ValueError when the kernel does not divide the grid."""
    if len(kernel) != 3 or any(k < 1 or n % k for n, k in zip(grid, kernel, strict=False)):
        raise ValueError(f"a kernel of {tuple(kernel)} tokens does not divide the token grid {tuple(grid)}")
    return math.prod(grid) // math.prod(kernel)


def cut_cells(tokens: Tensor, grid: Size3, kernel: Size3) -> Tensor:
    """(B, N, C) -> (B, K, M, C)."""
    (d, h, w), (kd, kh, kw) = grid, kernel
    x = tokens.reshape(len(tokens), d // kd, kd, h // kh, kh, w // kw, kw, -1)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def build_head(width: int, out_width: int, layers: int = 2, kind: str = "mlp") -> nn.Sequential:
    """`layers` linear layers fc1, fc2, ...; between them an exact GELU (`mlp`) or nothing (`linear`)."""
    if kind not in ("mlp", "linear"):
        raise ValueError(f"head {kind!r}, expected mlp or linear")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(layers):
        if i and kind == "mlp":
            modules[f"gelu{i}"] = nn.GELU()
        modules[f"fc{i + 1}"] = nn.Linear(out_width if i else width, out_width)
    return nn.Sequential(modules)


class Projector(nn.Module):
    """What all have in common: y = head(pack(x)), (B, N, C) -> (B, K, C) -> (B, K, C_out).

    visual_tokens: K. kernel: None takes the published one. layers, head: of the head, see build_head.
    """

    needs: tuple[str, ...] = ()  # of the optional inputs: slices, text
    published_kernel: Size3 = (1, 4, 4)

    def __init__(
        self,
        width: int,
        out_width: int,
        grid: Size3,
        kernel: Size3 | None = None,
        layers: int = 2,
        head: str = "mlp",
    ):
        super().__init__()
        self.grid, self.kernel = tuple(grid), tuple(kernel or self.published_kernel)
        self.visual_tokens = self.count(self.grid, self.kernel)
        self.head = build_head(width, out_width, layers, head)

    def count(self, grid: Size3, kernel: Size3) -> int:
        return count_cells(grid, kernel)

    def cells(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, K, M, C)."""
        return cut_cells(tokens, self.grid, self.kernel)

    def pack(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        slices: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """slices (B, S, C_2d), text (B, T, C_out), text_mask (B, T): for the text-guided projector alone."""
        if tokens.shape[1] != math.prod(self.grid):
            expected = f"the grid {self.grid} has {math.prod(self.grid)} (without the class token)"
            raise ValueError(f"{tokens.shape[1]} tokens, {expected}")
        return self.head(self.pack(tokens))


class CellAttention(nn.Module):
    """Every centroid attends to the tokens of its own cell: one head of C channels.

    q = W_q c, a = softmax_i(q (W_k x_i + b_k)^t / sqrt(C)), c' = norm(q + W_o sum_i a_i (W_v x_i + b_v)),
    with i over the cell. The residual is q, not c. A cell has one query, so W_k and W_v can go to its side:
    q (W_k x_i)^t = (q W_k) x_i^t and sum_i a_i W_v x_i = W_v sum_i a_i x_i. K rows go through these
    matrices in place of N, and no keys and values are kept. b_k moves all logits of a cell alike and
    changes nothing; it is a parameter because published weights have it.
    dropout: of the attention weights and of the output projection, in training.
    """

    def __init__(self, width: int, dropout: float = 0.1):
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def weights(self, query: Tensor, cells: Tensor) -> Tensor:
        """Projected queries (B, K, C), cells (B, K, M, C) -> a (B, K, 1, M)."""
        logits = (query @ self.key.weight)[:, :, None] @ cells.mT  # (B, K, 1, M)
        logits = logits + (query @ self.key.bias)[..., None, None]
        return (logits / query.shape[-1] ** 0.5).softmax(-1)

    def forward(self, centroids: Tensor, cells: Tensor) -> Tensor:
        """(B, K, C), (B, K, M, C) -> (B, K, C)."""
        query = self.query(centroids)
        weights = self.dropout(self.weights(query, cells))
        mean = (weights @ cells).squeeze(2)  # (B, K, C)
        # Weights that dropout has thinned do not sum to 1, so the bias is weighed as well.
        value = F.linear(mean, self.value.weight) + weights.sum(-1) * self.value.bias
        return self.norm(query + self.dropout(self.proj(value)))

    def attention(self, centroids: Tensor, cells: Tensor) -> Tensor:
        """The weights of the cells' tokens, (B, K, M), depth-major; for pictures and checks."""
        return self.weights(self.query(centroids), cells).squeeze(2)


class SpatialPacker(Projector):
    """HSENet's packer: c = mean of a cell, c' = CellAttention(c, cell), y = head(c').

    K = N / M: of 8 x 16 x 16 tokens 128 with the kernel (1, 4, 4), 256 with (2, 2, 2), 64 with (2, 4, 4)
    and 32 with (1, 8, 8). dropout: see CellAttention. Source: VisualPacker_3d_phi_v3, and its
    _control_kernel, which spells the last two kernels "(4_4_2)" and "(8_8_1)".
    """

    def __init__(self, width: int, *args, dropout: float = 0.1, **kwargs):
        super().__init__(width, *args, **kwargs)
        self.cell_attn = CellAttention(width, dropout)

    def pack(self, tokens: Tensor) -> Tensor:
        cells = self.cells(tokens)
        return self.cell_attn(cells.mean(2), cells)

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> the weights of the tokens of every cell (B, K, M)."""
        cells = self.cells(tokens)
        return self.cell_attn.attention(cells.mean(2), cells)


class AveragePool(Projector):
    """y = head(mean of a cell), K = N / M. Source: ablation_spatialpooling_Projector."""

    def pack(self, tokens: Tensor) -> Tensor:
        return self.cells(tokens).mean(2)


class M3DPool(AveragePool):
    """M3D's projector (Bai et al. 2024): y = head(mean of a cell of 2 x 2 x 2), K = N / 8.

    Source: SpatialPoolingProjector_m3d; head `linear` is the other one that M3D offers.
    """

    published_kernel = (2, 2, 2)


class SequencePool(Projector):
    """y = head(mean of M tokens that follow each other), K = N / M, M = kd kh kw.

    With M = 16 such a run is a row of the 8 x 16 x 16 grid. Source: ablation_sequencepooling_Projector, and
    with M = 8 SpatialPoolingProjector's `sequence`.
    """

    def count(self, grid: Size3, kernel: Size3) -> int:
        if min(kernel) < 1 or math.prod(grid) % math.prod(kernel):
            raise ValueError(f"the tokens of a kernel {kernel} do not divide those of the grid {grid}")
        return math.prod(grid) // math.prod(kernel)

    def pack(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (self.visual_tokens, -1)).mean(2)


class MlpProjector(Projector):
    """y = head(W [x_1 ... x_N] + b), W (K C) x (N C): all tokens of all cells in one matrix, K = N / M.

    For small grids: W has 155 billion numbers at base size, which a ValueError says. Source:
    ablation_mlps_Projector, which cannot run as published (a reshape without sizes, a layer that is not
    defined); this is what it means.
    """

    def __init__(self, width: int, *args, **kwargs):
        super().__init__(width, *args, **kwargs)
        inputs, outputs = math.prod(self.grid) * width, self.visual_tokens * width
        if inputs * outputs > MOST_MIXING_WEIGHTS:
            size, most = (f"{n / 1e9:,.1f} billion" for n in (inputs * outputs, MOST_MIXING_WEIGHTS))
            made_for = f"the token grid {self.grid} and the kernel {self.kernel}"
            raise ValueError(f"the mlp projector's matrix has {size} numbers for {made_for}, at most {most}")
        self.mixing = nn.Linear(inputs, outputs)

    def pack(self, tokens: Tensor) -> Tensor:
        return self.mixing(tokens.flatten(1)).unflatten(1, (self.visual_tokens, -1))


class BatchAttention(Attention):
    """Self-attention over the batch axis, where all samples have the same queries: a mean of equal values,
    proj(value(x)). W_q and W_k change nothing; they are parameters because published weights have them."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2]
        return self.proj(F.linear(x, weight, bias))


class CrossAttention(Attention):
    """(B, K, C) attend to (B, N, C): softmax(q k^t / sqrt(C / heads)) v, with k and v of the second."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        width = x.shape[-1]
        (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(x, w_q, b_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, K, C / heads)
        k, v = F.linear(context, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QFormerBlock(nn.Module):
    """norm(x + self_attn(x)), then norm(x + fc2(relu(fc1(x)))), torch's TransformerEncoderLayer."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout=dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        return self.norm2(x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x))))))


class QFormer(Projector):
    """K learned queries: s = self_attn(queries), z = cross_attn(s, x), `depth` blocks over z, y = head(z).

    The two attentions have no residual and no norm. kernel: as many queries as cells; None, as published: 32.
    query_attention: `batch`, as published, over the batch axis (see BatchAttention); `queries`, among the
    queries of a sample. dropout: in the blocks, in training. Source: ablation_qformerProjector.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        grid: Size3,
        kernel: Size3 | None = None,
        queries: int = 32,
        depth: int = 2,
        heads: int = 8,
        mlp: int = 2048,
        query_attention: str = "batch",
        dropout: float = 0.1,
        **kwargs,
    ):
        super().__init__(width, out_width, grid, kernel or grid, **kwargs)  # a grid divides itself
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        if query_attention not in ("batch", "queries"):
            raise ValueError(f"query attention {query_attention!r}, expected batch or queries")
        self.visual_tokens = self.visual_tokens if kernel else queries
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.visual_tokens, width)))
        self.self_attn = (BatchAttention if query_attention == "batch" else Attention)(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.blocks = nn.ModuleList(QFormerBlock(width, heads, mlp, dropout) for _ in range(depth))

    def pack(self, tokens: Tensor) -> Tensor:
        queries = self.self_attn(self.queries[None]).expand(len(tokens), -1, -1)
        x = self.cross_attn(queries, tokens)  # (B, K, C)
        for block in self.blocks:
            x = block(x)
        return x


class TextGuidedProjector(AveragePool):
    """Med-2E3's (Shi et al. 2024): pooled 3D tokens, then S slice tokens, weighted by the text.

    p = head(mean of a cell), u_s = slice_head(z_s), v_s = mean of u_s and all p of its depth slot, t = mean
    of the text, r = softmax_s(v_s t^t), unscaled, y = [p, r_s u_s]. K = N / M + S.

    text: the decoder's embeddings of what follows the visual tokens in its input. Published, t is the mean
    of it all, with padding and, in training, the answer; a text_mask (1 or True where a token counts)
    leaves them out.
    slice_slots: the depth slot (of d / kd) of slice s. `modulo`, as published: s mod (d / kd); `depth`: where
    it lies.
    Source: SpatialPoolingProjector_med2e3, which runs in bfloat16 alone; this runs in any type.
    """

    needs = ("slices", "text")

    def __init__(
        self,
        width: int,
        out_width: int,
        grid: Size3,
        kernel: Size3 | None = None,
        slices: int = 32,
        slice_width: int | None = None,
        slice_slots: str = "modulo",
    ):
        super().__init__(width, out_width, grid, kernel)
        self.depth_slots = self.grid[0] // self.kernel[0]
        order = torch.arange(slices)
        choices = {"modulo": order % self.depth_slots, "depth": order * self.depth_slots // slices}
        if slice_slots not in choices:
            raise ValueError(f"slice slots {slice_slots!r}, expected modulo or depth")
        self.register_buffer("slot_of_slice", choices[slice_slots], persistent=False)
        self.visual_tokens += slices
        self.slice_head = build_head(slice_width or width, out_width)

    def slice_logits(
        self, packed: Tensor, slices: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """p (B, N / M, C_out), u (B, S, C_out), text (B, T, C_out) -> v t^t (B, S)."""
        slots = packed.unflatten(1, (self.depth_slots, -1))  # (B, d / kd, tokens of a slot, C_out)
        around = slots.sum(2)[:, self.slot_of_slice]  # (B, S, C_out)
        visual = (around + slices) / (slots.shape[2] + 1)
        if text_mask is None:
            mean = text.mean(1)
        else:
            kept = text_mask[..., None].to(text.dtype)
            mean = (text * kept).sum(1) / kept.sum(1)
        return (visual @ mean.to(visual.dtype)[..., None]).squeeze(-1)

    def forward(
        self,
        tokens: Tensor,
        slices: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        packed = super().forward(tokens)
        if slices is None or text is None:
            raise ValueError("the text-guided projector needs slices and text")
        if slices.shape[1] != len(self.slot_of_slice):
            raise ValueError(f"{slices.shape[1]} slices, this projector takes {len(self.slot_of_slice)}")
        planes = self.slice_head(slices)
        scores = self.slice_logits(packed, planes, text, text_mask).softmax(-1)
        return torch.cat((packed, planes * scores[..., None].to(planes.dtype)), dim=1)


PROJECTORS: dict[str, type[Projector]] = {
    "spatial_packer": SpatialPacker,
    "average_pool": AveragePool,
    "sequence_pool": SequencePool,
    "m3d_pool": M3DPool,
    "qformer": QFormer,
    "text_guided": TextGuidedProjector,
    "mlp": MlpProjector,
}


def build_projector(
    name: str, width: int, out_width: int, grid: Size3, kernel: Size3 | None = None, **options
) -> Projector:
    """A projector by name, C -> C_out. options: of its class. Raises ValueError for another name."""
    if name not in PROJECTORS:
        raise ValueError(f"projector {name!r}, expected one of {', '.join(PROJECTORS)}")
    return PROJECTORS[name](width, out_width, grid, kernel, **options)
