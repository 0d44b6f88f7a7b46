"""Checks of the language decoder: logits, losses, gradients and greedy tokens."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from parity_case import Case, Check, equal, language_loss
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.runs.generation import steps
from reaf_hsenet.weights.decoder import DTYPES, Stored, decoder_state, fill

LOGITS, GRADIENT = 1e-4, 1e-3  # the kit's own tolerances: absolute on logits, relative on gradient norms


def load_decoder_state(decoder: Decoder, state: dict[str, Tensor], source: str) -> None:
    """Fill a decoder with tensors in memory, under their published names, as its files fill it."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    stored = {
        n: Stored(tuple(t.shape), kinds.get(t.dtype, str(t.dtype)), lambda t=t: t) for n, t in state.items()
    }
    fill(decoder, stored, source, decoder.norm.weight.dtype, "cpu")


def build(case: Case, **changes) -> Decoder:
    config = replace(DecoderConfig.from_json(case["config"], case.name), **changes)
    decoder = Decoder(config)
    load_decoder_state(decoder, case.weights(), case.name)
    return decoder.eval()


def _close(
    name: str, found: Tensor, expected: Tensor, real: Tensor | None = None, allowed: float = LOGITS
) -> Check:
    """The largest difference, over the real tokens only where a mask is given."""
    if found.shape != expected.shape:
        return Check(f"{name} shape {tuple(found.shape)}", float("inf"), 1.0)
    difference = (found.double() - expected.double()).abs()
    return Check(name, (difference if real is None else difference[real.bool()]).max().item(), allowed)


def _hidden_states(decoder: Decoder, **inputs) -> Tensor:
    """The embeddings, every block's output but the last's, and the final norm's: (L + 1, B, T, C)."""
    found = []
    hooks = [decoder.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda _, args, out: found.append(out)) for layer in decoder.layers[:-1]
    ]
    hooks += [decoder.norm.register_forward_hook(lambda _, args, out: found.append(out))]
    decoder(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def _gradients(case: Case, decoder: Decoder, ids, mask, labels, stored: str) -> Iterator[Check]:
    decoder.zero_grad()
    loss = language_loss(decoder(ids, mask=mask), labels)
    loss.backward()
    yield Check("loss", abs(loss.item() - case[stored]), 1e-5 * case[stored])
    gradients = {n: p.grad for n, p in decoder.named_parameters()}
    for name, expected in case["grad_l2"].items():
        found = decoder_gradient(decoder, gradients, name)
        yield Check(f"gradient of {name}", abs(found.norm().item() - expected), GRADIENT * expected)
    for name in (n for n in case["outputs"] if n.startswith("grad.")):
        published = name.removeprefix("grad.").removesuffix(".row_l2")
        found = decoder_gradient(decoder, gradients, published)
        found = found.norm(dim=1) if name.endswith(".row_l2") else found
        yield _close(name, found, case.stored[name])


def decoder_gradient(decoder: Decoder, gradients: dict[str, Tensor], published: str) -> Tensor:
    """The gradient under its published name; a fused matrix is cut into its parts."""
    return decoder_state(decoder, gradients)[published]


def _generated(case: Case, decoder: Decoder, name: str, **inputs) -> Iterator[Check]:
    ids = case.stored[f"{name}_ids"]
    tokens, logits = zip(*steps(decoder, new_tokens=ids.shape[1], **inputs), strict=True)
    yield equal(f"{name} ids", torch.stack(tokens, 1).tolist(), ids.tolist())
    if f"{name}_logits" in case.stored:
        yield _close(f"{name} logits", torch.stack(logits, 1), case.stored[f"{name}_logits"])


def check_decoder(case: Case) -> Iterator[Check]:
    decoder, inputs = (
        build(case),
        {n.removeprefix("input."): t for n, t in case.stored.items() if n.startswith("input.")},
    )
    yield from (_phi4mini if "ids96" in inputs else _plain)(case, decoder, inputs)


def _plain(case: Case, decoder: Decoder, inputs: dict[str, Tensor]) -> Iterator[Check]:
    """Phi-4, Phi-3-mini and Llama."""
    ids, mask, outputs = inputs["ids"], inputs["mask"], case.stored
    with torch.no_grad():
        yield _close("logits", decoder(ids, mask=mask), outputs["logits"], mask)
        if "hidden_states" in outputs:
            states = _hidden_states(decoder, ids=ids, mask=mask)
            yield _close(
                "hidden states",
                states.permute(1, 2, 0, 3),
                outputs["hidden_states"].permute(1, 2, 0, 3),
                mask,
            )
        if "last_hidden_state" in outputs:
            last = decoder.hidden(decoder.embed_tokens(ids), mask)
            yield _close("last hidden state", last, outputs["last_hidden_state"], mask)
        if "inv_freq" in outputs:
            yield _close(
                "inv_freq",
                torch.tensor(decoder.config.rope.frequencies[0]),
                outputs["inv_freq"],
                allowed=1e-7,
            )
        if "logits_no_padding_mask" in outputs:
            yield _close("logits without mask", decoder(ids), outputs["logits_no_padding_mask"])
            yield _close("logits, long factors", decoder(inputs["ids48"]), outputs["logits48"])
            plain = replace(decoder.config.rope, kind="default", short_factor=(), long_factor=())
            yield _close(
                "logits, default rope",
                build(case, rope=plain)(ids, mask=mask),
                outputs["logits_default_rope"],
                mask,
            )
            yield _close(
                "logits, window off",
                build(case, window=None)(ids, mask=mask),
                outputs["logits_window_off"],
                mask,
            )
            values = case["config"]
            for older in ("su", "yarn"):
                renamed = {**values, "rope_scaling": {**values["rope_scaling"], "type": older}}
                yield equal(f"rope type {older}", DecoderConfig.from_json(renamed), decoder.config)
    # The Phi-3 case starts from its whole prompt's first 12 tokens too, as the others say.
    yield from _generated(case, decoder, "gen", ids=ids[:1, :12])
    if "grad_l2" in case.values:
        yield from _gradients(case, decoder, ids, mask=mask, labels=inputs["labels"], stored="loss_exact")


def _phi4mini(case: Case, decoder: Decoder, inputs: dict[str, Tensor]) -> Iterator[Check]:
    outputs, original = case.stored, decoder.config.rope.original
    short, long = (torch.tensor(f) for f in decoder.config.rope.frequencies)
    yield _close("inv_freq short", short, outputs["inv_freq_short"], allowed=1e-7)
    yield _close("inv_freq long", long, outputs["inv_freq_long"], allowed=1e-7)
    yield Check("attention scaling", abs(decoder.config.rope.amplitude - case["attention_scaling"]), 1e-12)
    with torch.no_grad():
        for n in ("24", "96"):
            ids, mask = inputs[f"ids{n}"], inputs[f"mask{n}"]
            yield _close(f"logits{n}", decoder(ids, mask=mask), outputs[f"logits{n}"], mask)
        states = _hidden_states(decoder, ids=inputs["ids24"], mask=inputs["mask24"])
        expected = outputs["hidden_states24"].permute(1, 2, 0, 3)
        yield _close("hidden states", states.permute(1, 2, 0, 3), expected, inputs["mask24"])
        edge, kept = inputs["ids_edge"], outputs["logits_at_limit"].shape[1]
        yield _close(
            "logits at the limit", decoder(edge[:, :original])[:, -kept:], outputs["logits_at_limit"]
        )
        yield _close("logits past the limit", decoder(edge)[:, -kept:], outputs["logits_past_limit"])
        spliced = torch.cat(
            (
                decoder.embed_tokens(inputs["mm_ids"][:, :1]),
                inputs["mm_features"],
                decoder.embed_tokens(inputs["mm_ids"][:, 9:]),
            ),
            dim=1,
        )
        yield _close("logits of spliced embeddings", decoder(embeddings=spliced), outputs["mm_logits"])
    left, mask, pad = inputs["prompts_left"], inputs["mask_left"], decoder.config.pad_id
    yield from _generated(case, decoder, "gen12", ids=inputs["prompt12"])
    yield from _generated(case, decoder, "gen_left", ids=left, mask=mask)
    yield from _generated(
        case,
        decoder,
        "gen_left_stop",
        ids=left,
        mask=mask,
        stop_ids=(case["gen_left_stop_token"],),
        pad_id=pad,
    )
    yield from _generated(case, decoder, "gen_embeds", embeddings=inputs["embeds"])
    yield from _generated(case, decoder, "gen_mm", embeddings=spliced)
    yield from _generated(case, decoder, "gen_cross_nocache", ids=inputs["prompt_cross"])
    yield from _generated(case, decoder, "gen_embeds_cross_recomputed", embeddings=inputs["embeds_cross"])
    yield from _gradients(
        case,
        decoder,
        inputs["ids24"],
        mask=inputs["mask24"],
        labels=inputs["labels24"],
        stored="loss24_exact",
    )
