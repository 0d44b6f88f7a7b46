"""Generation: with a cache it is what it is without one; sampling, stopping, padding and streaming."""

from pathlib import Path

import pytest
import torch

from parity_case import Case
from parity_decoder import build
from reaf_hsenet.errors import InputError
from reaf_hsenet.generation import Sampling, choose, generate, left_padded, row_positions, steps

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str):
    return build(Case(GOLDEN / f"{name}.json", GOLDEN))


@pytest.fixture(scope="module")
def phi():
    """Phi-4-mini's structure; long factors for more than 64 tokens."""
    return golden("phi4mini_tiny")


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


def test_the_compiled_step_chooses_the_same_tokens(phi, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, fullgraph: compiled(f, backend="eager", fullgraph=fullgraph))
    ids, mask = left_padded([list(range(3, 60)), list(range(9, 50))], phi.config.pad_id)
    phi.compiled_steps.clear()
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

    monkeypatch.setattr(torch, "compile", lambda f, mode, fullgraph: compiled(f, backend=count, fullgraph=fullgraph))
    torch.compiler.reset()
    phi.compiled_steps.clear()
    first = generate(phi, ids=torch.tensor([[313, 4, 5]]), new_tokens=9, compiled=True)
    again = generate(phi, ids=torch.tensor([[313, 4, 5, 6]]), new_tokens=30, compiled=True)
    phi.compiled_steps.clear()
    assert len(graphs) == 1
    assert torch.equal(first, generate(phi, ids=torch.tensor([[313, 4, 5]]), new_tokens=9))
    assert torch.equal(again, generate(phi, ids=torch.tensor([[313, 4, 5, 6]]), new_tokens=30))


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
    assert torch.allclose(shares(top_k=3, top_p=0.6), torch.tensor([0, 0.625, 0, 0.375, 0]), atol=0.02)  # k first
    cold = (logits[0] * 2).softmax(0)
    assert torch.allclose(shares(temperature=0.5), cold, atol=0.02)
    assert torch.equal(shares(temperature=0.0), torch.tensor([0.0, 1, 0, 0, 0]))


def test_a_prompt_longer_than_the_context_is_refused(phi):
    with pytest.raises(InputError, match="500 tokens and 20 new ones do not fit the decoder's context of 512"):
        generate(phi, ids=torch.ones(1, 500, dtype=torch.long), new_tokens=20)


def test_sampling_settings_out_of_range_are_refused():
    for settings, named in (({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
                            ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p")):  # fmt: skip
        with pytest.raises(InputError, match=named):
            Sampling(**settings)
