"""HSENet's spatial packer, and poolings to compare it with: patch tokens become visual tokens.

Patch tokens (B, N, C) on a grid (d, h, w), depth-major, without the class token -> visual tokens (B, K,
C_out). A kernel (kd, kh, kw) cuts the grid into K cells of M = kd kh kw tokens, ordered as the tokens are;
a head maps C to C_out. All are called alike, projector(tokens, slices, text, text_mask); `needs` says what
one cannot do without. Matrices start as torch's own layers do, as published. Source: HSENet (c7198f3) and
its ablations, as that code computes them, which is not always what their names say.
"""

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

Size3 = tuple[int, int, int]


def count_cells(grid: Size3, kernel: Size3) -> int:
    """Return K. Raises ValueError when the kernel does not divide the grid."""
    if len(kernel) != 3 or any(k < 1 or n % k for n, k in zip(grid, kernel, strict=False)):
        raise ValueError(f"a kernel of {tuple(kernel)} tokens does not divide the token grid {tuple(grid)}")
    return math.prod(grid) // math.prod(kernel)


def cut_cells(tokens: Tensor, grid: Size3, kernel: Size3) -> Tensor:
    """Cut (B, N, C) into cells (B, K, M, C)."""
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
    """Base of all projectors: y = head(pack(x)), (B, N, C) -> (B, K, C) -> (B, K, C_out).

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
        """Return (B, K, C_out).

        slices (B, S, C_2d), text (B, T, C_out), text_mask (B, T): for the text-guided projector alone.
        """
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
        """Return a (B, K, 1, M) from projected queries (B, K, C) and cells (B, K, M, C)."""
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
        """Return the weights of the cells' tokens, (B, K, M), depth-major; for pictures and checks."""
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
        """Return the weights of the tokens of every cell, (B, K, M), for tokens (B, N, C)."""
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
