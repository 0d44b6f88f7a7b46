"""Checks of a decoder's adapters: logits, merged weights, loss, gradients and both forms of peft's names."""

from collections.abc import Iterator

import torch

import fill as kit
from parity_case import Case, Check, equal, language_loss
from parity_decoder import GRADIENT, _close, build
from reaf_hsenet.models.lora import add_lora, merge_lora, unmerge_lora
from reaf_hsenet.weights.adapters import adapter_state, load_adapter_state
from reaf_hsenet.weights.decoder import decoder_state

LORA = 2e-4  # the kit's own tolerance, absolute on logits


def check_lora(case: Case) -> Iterator[Check]:
    inputs, outputs, lora = (
        {n: case.stored[f"input.{n}"] for n in ("ids", "mask", "labels")},
        case.stored,
        case["lora"],
    )
    ids, mask = inputs["ids"], inputs["mask"]
    files = {n: torch.from_numpy(kit.fill(n, s, case["seed"])) for n, s in case["adapter_weights"].items()}
    memory = {n.replace(".weight", ".default.weight"): t for n, t in files.items()}
    yield equal("in-memory names", sorted(memory), sorted(case["named_parameters_saved_by_name_filter_lora"]))

    fresh = build(case)
    base = fresh(ids, mask=mask)
    yield _close("base logits", base, outputs["base_logits"], mask, LORA)
    fresh.requires_grad_(False)
    torch.manual_seed(0)
    add_lora(fresh, tuple(lora["target_modules"]), lora["r"], lora["alpha"], lora["dropout"])
    yield _close("a fresh adapter's change", fresh(ids, mask=mask), base, allowed=0.0)
    yield equal(
        "adapted", {n: list(t.shape) for n, t in adapter_state(fresh).items()}, case["adapter_weights"]
    )
    trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    yield equal("trained parameters", trained, sum(t.numel() for t in files.values()))

    for form, state in (("", files), (", in-memory names", memory)):
        decoder = build(case).requires_grad_(False)
        load_adapter_state(decoder, state, lora["alpha"], source=case.name)
        logits = decoder(ids, mask=mask)
        yield _close(f"logits{form}", logits, outputs["logits"], mask, LORA)
        saved = adapter_state(decoder)
        same = sorted(saved) == sorted(files) and all(torch.equal(saved[n], files[n]) for n in files)
        yield equal(f"adapter tensors given back{form}", same, True)
    yield Check(
        "loss",
        abs(language_loss(logits, inputs["labels"]).item() - outputs["loss"].item()),
        1e-5 * outputs["loss"].item(),
    )

    merged = decoder_state(decoder)
    for name in (n for n in outputs if n.startswith("merged.")):
        yield _close(name, merged[name.removeprefix("merged.")], outputs[name], allowed=1e-5)
    merge_lora(decoder)
    yield _close("merged logits", decoder(ids, mask=mask), outputs["merged_logits"], mask, LORA)
    unmerge_lora(decoder)

    language_loss(decoder(ids, mask=mask), inputs["labels"]).backward()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    gradients = adapter_state(decoder)  # under the published names
    for name, expected in case["grad_l2"].items():
        yield Check(f"gradient of {name}", abs(gradients[name].norm().item() - expected), GRADIENT * expected)
