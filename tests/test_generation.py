"""Generation: with a cache it is what it is without one; sampling, stopping, padding and streaming."""

import copy
from pathlib import Path

import pytest
import torch

from parity_case import Case
from parity_decoder import build
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.packed import pack
from reaf_hsenet.runs.generation import (
    _COMPILED,
    Sampling,
    choose,
    generate,
    row_positions,
    steps,
)

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str):
    return build(Case(GOLDEN / f"{name}.json", GOLDEN))


@pytest.fixture(scope="module")
def phi():
    """Phi-4-mini's structure; long factors for more than 64 tokens."""
    return golden("phi4mini_tiny")


def left_padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> ids (B, T) with their ends aligned, and mask (B, T)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def without_cache(decoder, embeddings, mask, new_tokens):
    """Everything computed anew for every token."""
    tokens, logits = [], []
    for _ in range(new_tokens):
        logits.append(decoder(embeddings=embeddings, mask=mask, positions=row_positions(mask))[:, -1])
        tokens.append(logits[-1].argmax(-1))
        embeddings = torch.cat((embeddings, decoder.embed_tokens(tokens[-1])[:, None]), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("prompts", [[50], [63], [64], [65], [58, 41], [40, 64], [70, 30]])
@pytest.mark.parametrize("by", ["ids", "embeddings"])
def test_cached_decoding_is_uncached_decoding_through_the_switch_to_long_factors(phi, prompts, by):
    torch.manual_seed(1)
    rows = [torch.randint(1, 300, (n,)).tolist() for n in prompts]
    ids, mask = left_padded(rows, phi.config.pad_id)
    embeddings = phi.embed_tokens(ids).detach()
    expected, expected_logits = without_cache(phi, embeddings, mask, 18)
    start = {"ids": ids} if by == "ids" else {"embeddings": embeddings}
    tokens, logits = zip(*steps(phi, mask=mask, new_tokens=18, **start), strict=True)
    assert torch.equal(torch.stack(tokens, 1), expected)
    assert (torch.stack(logits, 1) - expected_logits).abs().max() < 2e-5


def test_cached_decoding_is_uncached_decoding_beyond_the_sliding_window():
    decoder = golden("phi3_mini_tiny")
    ids, mask = left_padded([list(range(3, 20)), list(range(40, 52))], 300)
    expected, expected_logits = without_cache(decoder, decoder.embed_tokens(ids).detach(), mask, 12)
    tokens, logits = zip(*steps(decoder, ids=ids, mask=mask, new_tokens=12), strict=True)
    assert decoder.config.window == 8 and torch.equal(torch.stack(tokens, 1), expected)
    assert (torch.stack(logits, 1) - expected_logits).abs().max() < 2e-5


def test_a_row_of_a_batch_gives_the_tokens_it_gives_alone():
    decoder = golden("llama3_tiny")
    rows = [list(range(5, 25)), [7, 8, 9], list(range(100, 111))]
    ids, mask = left_padded(rows, 0)
    together = generate(decoder, ids=ids, mask=mask, new_tokens=10)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(generate(decoder, ids=torch.tensor([row]), new_tokens=10)[0], found)


def test_several_stop_tokens_end_rows_and_the_call_ends_with_the_last_row(phi):
    ids, mask = left_padded([[313, 5, 6, 7], [313, 9]], phi.config.pad_id)
    free = generate(phi, ids=ids, mask=mask, new_tokens=12)
    first, second = int(free[0, 2]), int(free[1, 5])
    found = generate(phi, ids=ids, mask=mask, new_tokens=12, stop_ids=(first, second), pad_id=313)
    ends = [next(i for i, t in enumerate(row.tolist()) if t in (first, second)) for row in free]
    assert found.shape[1] == max(ends) + 1 < 12
    for row, plain, end in zip(found, free, ends, strict=True):
        assert torch.equal(row[: end + 1], plain[: end + 1]) and (row[end + 1 :] == 313).all()


def test_tokens_are_streamed_as_they_are_made(phi):
    calls = []
    hook = phi.norm.register_forward_hook(lambda *_: calls.append(1))
    stream = steps(phi, ids=torch.tensor([[313, 4, 5]]), new_tokens=50)
    made = [next(stream)[0] for _ in range(3)]
    hook.remove()
    assert len(made) == len(calls) == 3


@pytest.mark.slow
def test_the_compiled_step_chooses_the_same_tokens(phi, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, fullgraph: compiled(f, backend="eager", fullgraph=fullgraph)
    )
    ids, mask = left_padded([list(range(3, 60)), list(range(9, 50))], phi.config.pad_id)
    _COMPILED.clear()
    for start in ({"ids": ids, "mask": mask}, {"ids": ids[:1]}):
        plain = list(steps(phi, new_tokens=14, **start))
        fixed = list(steps(phi, new_tokens=14, compiled=True, **start))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, fixed, strict=True))
        assert max((a[1] - b[1]).abs().max() for a, b in zip(plain, fixed, strict=True)) < 2e-5


def test_the_compiled_step_is_compiled_once(phi, monkeypatch):
    graphs, compiled = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, mode, fullgraph: compiled(f, backend=count, fullgraph=fullgraph)
    )
    torch.compiler.reset()
    _COMPILED.clear()
    first = generate(phi, ids=torch.tensor([[313, 4, 5]]), new_tokens=9, compiled=True)
    again = generate(phi, ids=torch.tensor([[313, 4, 5, 6]]), new_tokens=30, compiled=True)
    _COMPILED.clear()
    assert len(graphs) == 1
    assert torch.equal(first, generate(phi, ids=torch.tensor([[313, 4, 5]]), new_tokens=9))
    assert torch.equal(again, generate(phi, ids=torch.tensor([[313, 4, 5, 6]]), new_tokens=30))


def test_two_compiled_calls_at_once_and_a_copy_of_the_decoder_do_not_share_their_state(phi, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, fullgraph: compiled(f, backend="eager", fullgraph=fullgraph)
    )
    _COMPILED.clear()
    prompts = [torch.tensor([[313, 4, 5]]), torch.tensor([[313, 9, 8]])]
    expected = [generate(phi, ids=ids, new_tokens=6) for ids in prompts]
    both = [steps(phi, ids=ids, new_tokens=6, compiled=True) for ids in prompts]
    turns = [[next(call)[0] for call in both] for _ in range(6)]
    assert all(torch.equal(torch.stack([turn[i] for turn in turns], 1), expected[i]) for i in (0, 1))
    for call in both:
        call.close()
    other = copy.deepcopy(phi)
    with torch.no_grad():
        other.norm.weight.mul_(-1)
    found = generate(other, ids=prompts[0], new_tokens=6, compiled=True)
    assert torch.equal(found, generate(other, ids=prompts[0], new_tokens=6)) and not torch.equal(
        found, expected[0]
    )
    _COMPILED.clear()


def test_a_stopped_row_is_padded_without_being_told_how(phi):
    ids, mask = left_padded([[313, 5, 6, 7], [313, 9]], 313)
    free = generate(phi, ids=ids, mask=mask, new_tokens=12)
    found = generate(phi, ids=ids, mask=mask, new_tokens=12, stop_ids=(int(free[0, 2]),))
    assert (found[0, 3:] == phi.config.pad_id).all() and torch.equal(found[1], free[1])


def test_generation_has_no_dropout_and_leaves_the_mode_as_it_was():
    decoder = golden("llama3_tiny")
    expected = generate(decoder, ids=torch.tensor([[5, 6, 7]]), new_tokens=8)
    add_lora(decoder.layers, ("q_proj", "down_proj"), r=2, alpha=4, dropout=0.5)
    for name, parameter in decoder.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    decoder.train()
    one, two = (generate(decoder, ids=torch.tensor([[5, 6, 7]]), new_tokens=8) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, expected)
    assert decoder.training and decoder.layers[0].mlp.down_proj.dropout.training and torch.is_grad_enabled()


def test_generation_works_under_autocast():
    decoder = golden("llama3_tiny")
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(decoder, ids=torch.tensor([[5, 6, 7]]), new_tokens=4).shape == (1, 4)
        pack(decoder)
        assert generate(decoder, ids=torch.tensor([[5, 6, 7]]), new_tokens=4).shape == (1, 4)


def test_wrong_prompts_are_refused(phi):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for settings, named in (
        ({"ids": ids, "mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "pad on the left"),
        ({"ids": ids[:, :0]}, "at least one"),
        ({"ids": ids, "new_tokens": 0}, "at least one"),
    ):
        with pytest.raises(InputError, match=named):
            generate(phi, **settings)
    for settings in ({}, {"ids": ids, "embeddings": phi.embed_tokens(ids)}):
        with pytest.raises(AssertionError, match="either ids or embeddings"):
            generate(phi, **settings)


def test_sampling_is_seeded(phi):
    ask = {"ids": torch.tensor([[313, 4, 5]]), "new_tokens": 12}
    one, again, other = (generate(phi, sampling=Sampling(1.0, seed=seed), **ask) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_top_k_and_top_p_draw_from_the_likeliest_tokens_in_their_proportions():
    logits = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05]).log().expand(20000, -1)
    draw = torch.Generator().manual_seed(0)

    def shares(**settings) -> torch.Tensor:
        tokens = choose(logits, Sampling(**{"temperature": 1.0, **settings}), draw)
        return torch.bincount(tokens, minlength=5) / len(tokens)

    assert torch.allclose(shares(), logits[0].exp(), atol=0.02)
    assert torch.allclose(shares(top_k=2), torch.tensor([0, 0.625, 0, 0.375, 0]), atol=0.02)
    assert torch.allclose(shares(top_p=0.85), torch.tensor([0.1, 0.5, 0, 0.3, 0]) / 0.9, atol=0.02)
    assert torch.equal(shares(top_p=0.4), torch.tensor([0.0, 1, 0, 0, 0]))  # the likeliest is always kept
    assert torch.allclose(
        shares(top_k=3, top_p=0.6), torch.tensor([0, 0.625, 0, 0.375, 0]), atol=0.02
    )  # k first
    cold = (logits[0] * 2).softmax(0)
    assert torch.allclose(shares(temperature=0.5), cold, atol=0.02)
    assert torch.equal(shares(temperature=0.0), torch.tensor([0.0, 1, 0, 0, 0]))


def test_a_prompt_longer_than_the_context_is_refused(phi):
    with pytest.raises(
        InputError, match="500 tokens and 20 new ones do not fit the decoder's context of 512"
    ):
        generate(phi, ids=torch.ones(1, 500, dtype=torch.long), new_tokens=20)


def test_sampling_settings_out_of_range_are_refused():
    for settings, named in (
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(InputError, match=named):
            Sampling(**settings)
