"""Tensors under our names into a module: strictly, or as far as they match."""

from torch import nn

from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.weights.reading import State, summary


def load_matching(module: nn.Module, state: State, source: str) -> str:
    """Fill what `state` has of `module`. Returns an account of what was left as it was, and of what was not
    used.

    Raises InputError when nothing matches, or a tensor of the same name has another shape.
    """
    own = module.state_dict()
    matching = {n: t for n, t in state.items() if n in own}
    shapes = [
        f"{n} is {tuple(t.shape)}, expected {tuple(own[n].shape)}"
        for n, t in matching.items()
        if t.shape != own[n].shape
    ]
    if shapes or not matching:
        problem = "; ".join(shapes[:4]) or f"it has {sorted(state)[0]!r} and the like"
        raise InputError(
            f"{source}: does not fit this model: {problem}; choose the preset that it was made for"
        )
    module.load_state_dict(matching, strict=False)
    left = [n for n, _ in module.named_parameters() if n not in state]
    unused = [n for n in state if n not in own]
    account = [f"{source}: {len(matching)} tensors loaded"]
    account += [f"left at their start: {summary(left)}"] * bool(left) + [
        f"not used: {summary(unused)}"
    ] * bool(unused)
    return "; ".join(account)


def load_strictly(module: nn.Module, state: State, source: str, own: State | None = None) -> None:
    """Fill `module`, or those of its tensors that `own` has, with `state`.

    Raises InputError that lists missing, unexpected and misshapen tensors by name.
    """
    require_fit(state, module.state_dict() if own is None else own, source)
    module.load_state_dict(state, strict=False)


def require_fit(state: State, own: State, source: str) -> None:
    """Raise InputError unless `state` has the names and shapes of `own`."""
    missing, unknown, misshapen = compare(state, own)
    problems = [f"{n} is missing" for n in missing] + [f"{n} is not known" for n in unknown] + misshapen
    if problems:
        raise InputError(f"{source}: does not fit this model: {first_six(problems, '; ')}")


def compare(state: State, own: State) -> tuple[list[str], list[str], list[str]]:
    """(names that `state` lacks, names that it alone has, sentences about those of another shape or kind
    of number).
    """
    misshapen = [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    misshapen += [
        f"{n} is {str(state[n].dtype).removeprefix('torch.')}, expected floating point"
        for n in own
        if n in state and own[n].is_floating_point() and not state[n].is_floating_point()
    ]
    return [n for n in own if n not in state], [n for n in state if n not in own], misshapen
