"""Fully sharded training (--shard): ranks share weights, gradients and AdamW's states (ZeRO-3).

A decoder block is gathered when it computes, forward and backward, and its gradients are reduced to the
ranks' parts. Checkpoints have the whole tensors, under the names and in the order of an unsharded run.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed.fsdp
from torch import Tensor, nn

from reaf_hsenet import distributed
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError


def require_shardable(ranks: Ranks, full: bool, precision: str, compiled: bool) -> None:
    """Raise InputError where --shard has nothing to share, or no way to."""
    if not full:
        raise InputError(
            "--shard: adapters and their states are small, every process holds them; add --full, or leave "
            "it out"
        )
    # ZeRO-3 gives each of W ranks a W-th of weights, gradients and moments: 16 bytes a parameter in all.
    if ranks.world == 1:
        raise InputError(
            "--shard: one process has nobody to share with; start torchrun --nproc-per-node N, or say "
            "--no-shard"
        )
    if precision == "fp16":
        raise InputError("--shard: fp16 needs a loss scale that the parts do not have; say --precision bf16")
    if compiled:
        raise InputError("--compile: has not been tried with --shard; leave one out")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise InputError(
            f"--shard: needs torch 2.6 or newer, this is {torch.__version__}; update it, or leave the flag "
            f"out"
        )


def shard(model: nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Share the parameters of `model`, which every rank holds whole, between the ranks, on their devices.

    dtype: the decoder and the projectors are gathered and computed in it; gradients are reduced, and the
    ranks'
    parts held, in float32. The encoders are gathered in float32: autocast computes with them as it does
    without
    --shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # One axis of all ranks: every parameter is cut in `world` parts, and none is held twice.
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    # What comes in stays as it is, so that the encoders see volumes in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # From the inside out: each call takes the parameters that no earlier call has taken, and gathers them
    # together. The last one is left with embedding, projectors, norm and head.
    for encoder in model.encoders:
        fully_shard(encoder, mesh=mesh)
    for block in model.decoder.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is on one process, of which the ranks may hold parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict]:
    """Return tensors `names` and the optimizer's state as an unsharded run has them; empty but on rank 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    # Gathered tensor by tensor and kept in rank 0's memory: no GPU could hold the whole model.
    tensors, state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    # Ranks other than 0 have sent their parts, and get nothing.
    if not tensors:
        return {}, {}
    # The state-dict functions name parameters, an unsharded optimizer numbers them. Numbered, the checkpoint
    # can be continued with --shard and without.
    number = {name: i for i, name in enumerate(_order(model, optimizer))}
    groups = [
        {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
    ]
    by_number = {number[name]: value for name, value in state["state"].items()}
    return {name: tensors[name] for name in names}, {"state": by_number, "param_groups": groups}


def load_whole_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Callable[[], tuple[dict[str, Tensor], dict, dict]],
) -> dict:
    """Load what `whole_state`, or an unsharded run, has saved.

    read() returns (tensors, optimizer's state, the rest). It is called on rank 0 alone, which sends the
    others
    their parts. Returns the rest, on every rank.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    tensors, state = {}, {}

    def on_rank_0() -> dict:
        found, numbered, rest = read()
        # Back from numbers to names, which is what the state-dict functions take.
        order = _order(model, optimizer)
        groups = [
            {**group, "params": [order[i] for i in group["params"]]} for group in numbered["param_groups"]
        ]
        tensors.update(found)
        state.update(state={order[i]: value for i, value in numbered["state"].items()}, param_groups=groups)
        return rest

    # Reading once spares the file system; a file that does not fit ends every rank with one line.
    rest = distributed.on_main(on_rank_0)
    # What is frozen is not in a checkpoint.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, tensors, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    return rest


def _order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, by the numbers that its own state_dict calls them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
