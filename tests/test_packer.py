"""The packer and its rivals: what a visual token sees, how many there are, what no golden number covers."""

import pytest
import torch
import torch.nn.functional as F

from reaf_hsenet.models.build import PROJECTORS, build_projector
from reaf_hsenet.models.packer import CellAttention, SpatialPacker, count_cells
from reaf_hsenet.weights.files import load_strictly
from reaf_hsenet.weights.names import PROJECTORS as NAMES
from reaf_hsenet.weights.names import Row, below, export_state, import_state, language_table

GRID, WIDTH, OUT = (4, 4, 8), 16, 12
OPTIONS = {"qformer": {"mlp": 24}, "text_guided": {"slices": 6, "slice_width": 10}}
SIZES = [
    ((4, 4, 8), (1, 4, 4)),
    ((4, 4, 8), (2, 2, 2)),
    ((3, 6, 5), (3, 2, 1)),
    ((2, 8, 8), (1, 8, 8)),
    ((1, 1, 3), (1, 1, 1)),
]


def build(name, grid=GRID, kernel=(2, 2, 4), **options):
    torch.manual_seed(0)
    options = OPTIONS.get(name, {}) | options
    projector = build_projector(name, WIDTH, OUT, grid, kernel, **options).double().eval()
    with torch.no_grad():
        for parameter in projector.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


def tokens(batch=2, grid=GRID):
    torch.manual_seed(1)
    return torch.randn(batch, grid[0] * grid[1] * grid[2], WIDTH, dtype=torch.float64)


def others(batch=2):
    """Slice features and text, which the text-guided projector needs and the others leave alone."""
    torch.manual_seed(2)
    return torch.randn(batch, 6, 10, dtype=torch.float64), torch.randn(batch, 5, OUT, dtype=torch.float64)


def cell_of(grid, kernel):
    """By loops: for every token, its cell."""
    cells, across = [], [n // k for n, k in zip(grid, kernel, strict=True)]
    for z in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                cells.append(((z // kernel[0]) * across[1] + y // kernel[1]) * across[2] + x // kernel[2])
    return torch.tensor(cells)


def by_loops(packer, x, grid, kernel):
    """The packer's equation, cell by cell, with a key and a value for every token."""
    attn, cells = packer.cell_attn, cell_of(grid, kernel)
    packed = []
    for sample in x:
        for cell in range(int(cells.max()) + 1):
            inside = sample[cells == cell]
            query = attn.query(inside.mean(0))
            weights = (attn.key(inside) @ query / WIDTH**0.5).softmax(0)
            packed.append(attn.norm(query + attn.proj(weights @ attn.value(inside))))
    packed = torch.stack(packed).unflatten(0, (len(x), -1))
    return packer.head.fc2(F.gelu(packer.head.fc1(packed)))


@pytest.mark.parametrize(("grid", "kernel"), SIZES)
def test_the_packer_equals_a_loop_over_cells_for_any_grid_and_kernel(grid, kernel):
    packer, x = build("spatial_packer", grid, kernel), tokens(grid=grid)
    out = packer(x)
    assert torch.allclose(out, by_loops(packer, x, grid, kernel), atol=1e-12)
    assert out.shape == (2, packer.visual_tokens, OUT)


def test_the_packers_gradients_are_those_of_the_loop():
    packer, gradients = build("spatial_packer"), []
    for run in (packer, lambda x: by_loops(packer, x, GRID, (2, 2, 4))):
        packer.zero_grad()
        x = tokens().requires_grad_()
        run(x).square().sum().backward()
        gradients.append({"input": x.grad} | {n: p.grad.clone() for n, p in packer.named_parameters()})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-10) for n in gradients[1])


@pytest.mark.parametrize("name", ["spatial_packer", "average_pool", "m3d_pool"])
def test_a_visual_token_sees_its_own_cell_and_no_other(name):
    kernel = (2, 2, 4)
    projector, x, cells = build(name, kernel=kernel), tokens(1), cell_of(GRID, kernel)
    before = projector(x)[0]
    for token in range(0, len(cells), 7):
        changed = x.clone()
        changed[0, token] += 1
        moved = (projector(changed)[0] - before).abs().amax(1) > 1e-9
        assert moved.nonzero().flatten().tolist() == [cells[token]]


def test_attention_weights_of_a_cell_are_positive_and_sum_to_one():
    weights = build("spatial_packer").attention(tokens())
    assert weights.shape == (2, 8, 16) and weights.min() > 0
    assert torch.allclose(weights.sum(-1), torch.ones(2, 8, dtype=torch.float64))


def test_dropped_attention_weights_drop_the_bias_of_their_values_too():
    torch.manual_seed(0)
    attn = CellAttention(WIDTH, dropout=0.4).double().train()
    attn.value.bias.data.normal_()
    cells = torch.randn(2, 3, 8, WIDTH, dtype=torch.float64)
    torch.manual_seed(5)
    found = attn(cells.mean(2), cells)
    torch.manual_seed(5)
    query = attn.query(cells.mean(2))
    weights = F.dropout((query[:, :, None] @ attn.key(cells).mT / WIDTH**0.5).softmax(-1), 0.4)
    value = (weights @ attn.value(cells)).squeeze(2)
    assert torch.allclose(found, attn.norm(query + F.dropout(attn.proj(value), 0.4)), atol=1e-12)


@pytest.mark.parametrize("name", ["spatial_packer", "qformer"])
def test_dropout_is_an_argument_and_acts_in_training_alone(name):
    x = tokens()
    for dropout, same in ((0.0, True), (0.1, False)):
        projector = build(name, dropout=dropout)
        assert torch.equal(projector(x), projector(x))
        assert torch.equal(projector.train()(x), projector(x)) is same


@pytest.mark.parametrize("name", PROJECTORS)
def test_visual_tokens_is_the_number_that_comes_out(name):
    for kernel in ((2, 2, 4), (1, 4, 4), None):
        projector = build(name, kernel=kernel)
        out = projector(tokens(), *others())
        assert out.shape == (2, projector.visual_tokens, OUT)
        expected = {"qformer": 32, "m3d_pool": 16}.get(name, 8) if kernel is None else 8
        assert projector.visual_tokens == expected + 6 * (name == "text_guided")


def test_published_kernels_give_the_published_numbers_of_tokens():
    kernels = {(1, 4, 4): 128, (2, 2, 2): 256, (2, 4, 4): 64, (1, 8, 8): 32}
    assert {k: count_cells((8, 16, 16), k) for k in kernels} == kernels
    with torch.device("meta"):
        base = {n: build_projector(n, 768, 3072, (8, 16, 16)) for n in PROJECTORS}
    counts = {n: projector.visual_tokens for n, projector in base.items()}
    assert counts == {
        "spatial_packer": 128,
        "average_pool": 128,
        "sequence_pool": 128,
        "m3d_pool": 256,
        "qformer": 32,
        "text_guided": 160,
    }


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_kernel_that_does_not_divide_the_grid_is_refused_with_both_named(name):
    with pytest.raises(ValueError, match=r"\(1, 3, 4\).*\(4, 4, 8\)"):
        build(name, kernel=(1, 3, 4))


@pytest.mark.parametrize("name", PROJECTORS)
def test_tokens_with_their_class_token_are_refused(name):
    with pytest.raises(ValueError, match="129 tokens.*128"):
        build(name)(torch.randn(2, 129, WIDTH, dtype=torch.float64), *others())


def test_an_unknown_projector_is_refused_with_the_known_ones_named():
    with pytest.raises(ValueError, match="perceiver.*spatial_packer.*text_guided"):
        build("perceiver")


# What the published computations leave without effect: their gradients are zero, up to rounding.
INERT = {"spatial_packer": {"cell_attn.key.bias"}, "qformer": set()}


@pytest.mark.parametrize("name", PROJECTORS)
def test_gradients_flow_to_every_parameter(name):
    projector = build(name)
    projector(tokens(), *others()).square().sum().backward()
    still = {n for n, p in projector.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert still == INERT.get(name, set())
    assert all(p.grad is not None for p in projector.parameters())  # what DistributedDataParallel asks for


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_sample_does_not_depend_on_its_batch(name):
    projector, x, (slices, text) = build(name), tokens(3), others(3)
    alone = torch.cat([projector(x[i : i + 1], slices[i : i + 1], text[i : i + 1]) for i in range(3)])
    assert torch.allclose(projector(x, slices, text), alone, atol=1e-12)


@pytest.mark.parametrize("name", PROJECTORS)
def test_published_names_there_and_back_give_the_same_weights(name):
    projector = build(name)
    other = build_projector(name, WIDTH, OUT, GRID, (2, 2, 4), **OPTIONS.get(name, {})).double()
    published = export_state(NAMES[name], projector.state_dict())
    assert len(published) == len(projector.state_dict())
    load_strictly(other, import_state(NAMES[name], published), name)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in projector.state_dict().items())


def test_the_packers_published_names_are_those_of_hsenets_checkpoints():
    attention = [f"resolution_attention.{n}" for n in ("Wq", "Wk", "Wv", "output_linear", "norm")]
    layers = (*attention, "proj_mpls.0", "proj_mpls.2")
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(export_state(NAMES["spatial_packer"], build("spatial_packer").state_dict())) == expected


def test_each_packer_of_a_checkpoint_is_taken_by_its_name():
    first, second = build("spatial_packer"), SpatialPacker(WIDTH, OUT, GRID, (2, 2, 4))
    table, names = NAMES["spatial_packer"], language_table("spatial_packer")
    adapter = "model.layers.0.self_attn.qkv_proj.lora_A.default.weight"
    for model in ("base_model.model.model.", "model.", ""):
        both = {adapter: torch.zeros(1)}
        for packer, name in ((first, "mm_projector"), (second, "mm_projector2")):
            both |= export_state(below(f"{model}{name}.", "", table), packer.state_dict())
        state = import_state(names, both)
        assert adapter in state and len(state) == len(both)
        for i, packer in enumerate((first, second)):
            assert all(torch.equal(state[f"projectors.{i}.{n}"], t) for n, t in packer.state_dict().items())
    state.pop(adapter)
    assert {n.split(".")[3] for n in export_state(names, state)} == {"mm_projector", "mm_projector2"}


def test_linear_heads_have_no_activation_and_published_numbers_without_gaps():
    pool, x = build("m3d_pool", head="linear", layers=3), tokens()
    head, mean = pool.head, pool.pack(x)
    assert torch.allclose(pool(x), head.fc3(head.fc2(head.fc1(mean))))
    table = tuple(Row(f"projector.{i}.", f"head.fc{i + 1}.") for i in range(3))
    assert len(export_state(table, pool.state_dict())) == 6
    with pytest.raises(ValueError, match="conv.*mlp or linear"):
        build("m3d_pool", head="conv")


def test_runs_of_a_sequence_need_not_fit_the_axes_of_the_grid():
    pool, x = build("sequence_pool", kernel=(1, 1, 32)), tokens()
    assert torch.allclose(pool.pack(x)[:, 1], x[:, 32:64].mean(1)) and pool.visual_tokens == 4


def test_published_query_attention_is_one_over_the_batch_axis():
    """torch's own attention, given (B, K, C) where it expects (length, batch, channels)."""
    projector = build("qformer")
    reference = torch.nn.MultiheadAttention(WIDTH, 8).double().eval()
    published = export_state(NAMES["qformer"], projector.state_dict())
    names = {n.removeprefix("self_attn."): t for n, t in published.items() if n.startswith("self_attn.")}
    reference.load_state_dict(names)
    queries = projector.queries.expand(3, -1, -1)
    assert torch.allclose(reference(queries, queries, queries)[0], projector.self_attn(queries), atol=1e-12)


def test_queries_that_do_not_divide_into_heads_are_refused():
    with pytest.raises(ValueError, match="16.*5 heads"):
        build("qformer", heads=5)


def text_guided_by_loops(projector, x, slices, text, slots):
    packed, planes = projector.head(projector.pack(x)), projector.slice_head(slices)
    depth = packed.unflatten(1, (GRID[0] // projector.kernel[0], -1))
    rows = []
    for b in range(len(x)):
        visual = [torch.cat((depth[b, slot], planes[b, s : s + 1])).mean(0) for s, slot in enumerate(slots)]
        scores = torch.stack([v @ text[b].mean(0) for v in visual]).softmax(0)
        rows.append(torch.cat((packed[b], scores[:, None] * planes[b])))
    return torch.stack(rows)


def test_slices_are_scored_with_the_3d_tokens_of_their_depth_slot():
    projector, inputs = build("text_guided"), (tokens(), *others())
    assert torch.allclose(
        projector(*inputs), text_guided_by_loops(projector, *inputs, [0, 1, 0, 1, 0, 1]), atol=1e-12
    )


def test_a_text_mask_leaves_tokens_out_of_the_texts_mean():
    projector, (slices, text) = build("text_guided"), others()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    masked = projector(tokens(), slices, text, mask)
    assert torch.allclose(masked, projector(tokens(), slices, text[:, :3]), atol=1e-12)
    assert (masked - projector(tokens(), slices, text)).abs().max() > 1e-6


def test_the_text_guided_projector_names_what_it_was_not_given():
    projector, (slices, text) = build("text_guided"), others()
    assert projector.needs == ("slices", "text")
    with pytest.raises(ValueError, match="needs slices and text"):
        projector(tokens())
    with pytest.raises(ValueError, match="needs slices and text"):
        projector(tokens(), slices)
    with pytest.raises(ValueError, match="4 slices.*6"):
        projector(tokens(), slices[:, :4], text)
