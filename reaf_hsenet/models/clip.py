"""Dual encoder: a CT and its report as two unit vectors of one space (HSENet section 3.1, M3D-CLIP; REAF).

volume (B, 1, D, H, W) -> class token -> Linear -> l2 norm; report ids (B, T) -> token 0 -> Linear -> l2 norm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import init_weights
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.reaf import REAF
from reaf_hsenet.models.slice_guidance import ViT2E3
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.models.vit3d import ViT3D

MAX_LOGIT_SCALE = math.log(100)


class DualEncoder(nn.Module):
    """The two encoders, with a projection each into the space of both.

    logit_scale: `raw`, the parameter multiplies the cosines as it is, as HSENet does; `exp`, as CLIP does.
    """

    def __init__(
        self,
        vision: ViT3D | REAF,
        text: TextEncoder,
        vision_width: int,
        text_width: int,
        embed: int,
        logit_scale: str,
        projection_bias: bool = True,
    ):
        super().__init__()
        self.vision, self.text = vision, text
        self.vision_proj = nn.Linear(vision_width, embed, bias=projection_bias)
        self.text_proj = nn.Linear(text_width, embed, bias=projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.scale_kind = logit_scale
        for projection in (self.vision_proj, self.text_proj):
            init_weights(projection)

    def encode_image(self, volume: Tensor, slices: Tensor | None = None) -> Tensor:
        """Return unit vectors (B, embed) of volumes (B, 1, D, H, W). slices: (B, S, C_2d), for 2E3."""
        tokens = self.vision(volume) if slices is None else self.vision(volume, slices)
        return F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit vectors (B, embed) of reports: ids (B, T), mask (B, T)."""
        return F.normalize(self.text_proj(self.text(ids, mask)[:, 0]), dim=-1)

    def scale(self) -> Tensor:
        """Return the factor of the cosines, a scalar."""
        return self.logit_scale if self.scale_kind == "raw" else self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep an exponential scale within 1 and 100, after an optimizer step; a raw one stays."""
        if self.scale_kind == "exp":
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def forward(
        self, volume: Tensor, ids: Tensor, mask: Tensor, slices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(volume, slices), self.encode_text(ids, mask), self.scale()


def set_grad_checkpoint(model: DualEncoder, on: bool) -> None:
    model.vision.grad_checkpoint = model.text.grad_checkpoint = on


@torch.no_grad()
def start_as_published(model: DualEncoder) -> None:
    """Draw the weights of a model from scratch as the libraries of the published code do.

    Every Linear starts as torch's own: uniform in +-1 / sqrt(inputs), biases too. Then, by library:
    HSENet's ViT (monai 1.3): patches and positions are normal with std 0.02, the class token and patch biases
    are 0. REAF's ViT (timm 1.0): the blocks are normal with std 0.02, their biases 0, the class token has std
    1e-6. BERT (transformers 4.49): matrices and tables are normal with std 0.02, the padding row and the
    biases are 0. Where these libraries truncate a normal of 0.02, it is at 100 standard deviations, which is
    never reached.
    """
    vision, text = model.vision, model.text
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    reaf = isinstance(vision, REAF)
    drawn = [vision.blocks if reaf else vision.patch_embed, text]  # the others keep torch's start
    for module in (module for part in drawn for module in part.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    text.word_embed.weight[text.pad_id] = 0
    if reaf:
        nn.init.normal_(vision.cls_token, std=1e-6)
    else:
        nn.init.zeros_(vision.cls_token)
        nn.init.normal_(vision.pos_embed, std=0.02)


def freeze_text(model: DualEncoder, blocks: int) -> None:
    """Freeze the text encoder but for its LayerNorms and its last `blocks` blocks.

    One block more than there are: the embeddings are trained too.

    Source: open_clip's lock_text_tower, as REAF uses it; the projection is always trained.
    """
    text = model.text
    parts = [nn.ModuleList((text.word_embed, text.pos_embed, text.type_embed, text.norm)), *text.blocks]
    for part in parts[: max(0, len(parts) - blocks)]:
        for module in part.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = isinstance(module, nn.LayerNorm)


def adapt(model: DualEncoder, lora) -> None:
    """Give the towers of a LoraConfig their adapters, and freeze the rest of their blocks but LayerNorms."""
    for name in lora.towers:
        tower = getattr(model, name)
        for module in tower.blocks.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = isinstance(module, nn.LayerNorm)
        add_lora(tower.blocks, lora.targets, lora.r, lora.alpha, lora.dropout)


def build_vision(config) -> ViT3D | REAF:
    """Build the vision encoder of a VisionConfig, GuidedVisionConfig or ReafVisionConfig."""
    common = (config.size, config.patch, config.width, config.depth, config.heads, config.mlp)
    if hasattr(config, "slice_width"):
        return ViT2E3(
            *common, slices=config.slices, slice_width=config.slice_width, dropout=config.guidance_dropout
        )
    if not hasattr(config, "scan_layers"):
        return ViT3D(*common)
    saliency = None
    if config.regions:
        names = ("region_size", "regions", "suppression", "class_score", "remainder")
        saliency = {name: getattr(config, name) for name in names}
    names = ("scan_layers", "fusion", "fusion_seed", "slice_class", "drop_path")
    return REAF(*common, saliency=saliency, **{name: getattr(config, name) for name in names})


def build_dual_encoder(config) -> DualEncoder:
    """Build a dual encoder without its adapters: pretrained weights come first, then adapt()."""
    return DualEncoder(
        build_vision(config.vision),
        TextEncoder(**vars(config.text)),
        vision_width=config.vision.width,
        text_width=config.text.width,
        embed=config.embed,
        logit_scale=config.logit_scale,
        projection_bias=config.projection_bias,
    )
