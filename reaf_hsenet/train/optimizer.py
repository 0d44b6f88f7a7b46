"""AdamW's groups of parameters and the schedule of the learning rate."""

import math

from torch import nn

from reaf_hsenet.config import TrainConfig
from reaf_hsenet.models.layers import RMSNorm


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return decayed and undecayed parameters by the published rule of each method.

    hsenet: norms and biases are not decayed (class token, positions and logit scale are). reaf: nothing with
    fewer than two dimensions is, nor the logit scale. `rate` of a group: its factor on the learning rate.
    """
    # Found by their type: the names of norms differ from model to model.
    norms = {
        f"{name}.{parameter}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | RMSNorm)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Decay pulls towards 0. That makes a matrix's output smaller, but it would move a norm's gain away
        # from 1 and biases away from what they offset.
        bare = name in norms or name.endswith("bias") or (config.no_decay == "reaf" and parameter.ndim < 2)
        # Encoders of a language model (`encoders.`) may learn at a lower rate than what is new beside them.
        groups.setdefault((bare, name.startswith("encoders.")), []).append(parameter)
    # Sorted, because trainer.pt numbers the parameters by their place in the groups.
    return [
        {
            "params": groups[bare, encoder],
            "weight_decay": 0.0 if bare else config.weight_decay,
            "rate": config.encoder_rate if encoder else 1.0,
        }
        for bare, encoder in sorted(groups)
    ]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the rate of a step: linear over the warm-up, then half a cosine to 0."""
    warmup = math.ceil(config.warmup * total)
    # AdamW's averages are of few gradients at first, and its updates by them too large: the rate rises
    # linearly, from 0 (HSENet), or from lr / warmup (REAF, first_step 1).
    if step < warmup:
        return config.lr * (step + config.first_step) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
