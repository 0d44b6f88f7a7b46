"""Retrieval scores: the published numbers, a slow and plain reference, collapsed models and wrong input."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics import retrieval
from reaf_hsenet.metrics.retrieval import (
    average_precision,
    cross_retrieval,
    cross_retrieval_per_scan,
    label_overlap,
    recall_table,
)

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = (
    "as_published_accumulating",
    "per_k",
    "per_k_excluding_the_query_itself",
    "per_k_excluding_all_reconstructions_of_the_query_scan",
)


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "metrics_retrieval.safetensors")
    tensors |= load_file(GOLDEN / "metrics_retrieval_labels.safetensors")
    return tensors, json.loads((GOLDEN / "metrics_retrieval.json").read_text())


def dataset(seed, count=60, width=4):
    """Embeddings of small integers, whose dot products are exact and often equal; scans of scattered rows."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randint(-2, 3, (2, count, width), generator=generator).float()
    scans = torch.randint(0, count // 2, (count,), generator=generator) * 7 + 3
    labels = (torch.rand(count, 5, generator=generator) < 0.25).long()
    image[10], labels[10] = image[3], labels[3]
    return image, text, scans, labels


def unit(count, width, seed=0):
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(noise, dim=1)


def by_similarity(similarities):
    """Indices, most similar first; Python's sort is stable, so equals stay in the order of their index."""
    return sorted(range(len(similarities)), key=lambda j: similarities[j], reverse=True)


def plain_ranks(similarity, target):
    return [by_similarity(row).index(own) + 1 for row, own in zip(similarity, target, strict=True)]


def plain_per_scan(queries, gallery, rows, scans):
    """Ranks of the queries in `rows`, among scans as similar as the most similar of their rows."""
    similarity, numbers = (queries @ gallery.T).tolist(), sorted(set(scans))
    members = [[j for j, scan in enumerate(scans) if scan == number] for number in numbers]
    best = [[max(similarity[i][j] for j in rows_of_scan) for rows_of_scan in members] for i in rows]
    return plain_ranks(best, [numbers.index(scans[i]) for i in rows])


def plain_overlap(image, labels, scans, ks):
    """The published loops, with the other three variants beside them."""
    similarity, labels, scans = (image @ image.T).tolist(), labels.tolist(), scans.tolist()
    gallery = [j for j, row in enumerate(labels) if sum(row)]

    def pair(a, b):
        both = sum(x == 1 and y == 1 for x, y in zip(labels[a], labels[b], strict=True))
        differ = sum(x != y for x, y in zip(labels[a], labels[b], strict=True))
        return both / (both + differ)

    def query_scores(k, excludes):
        scores = []
        for i in range(len(labels)):
            mine = [j for j in gallery if not excludes(i, j)]
            top = [mine[place] for place in by_similarity([similarity[i][j] for j in mine])[:k]]
            if top:
                scores.append(sum(pair(i, j) for j in top) / len(top))
        return scores

    excluding = {
        "per_k": lambda i, j: False,
        "per_k_excluding_the_query_itself": lambda i, j: i == j,
        "per_k_excluding_all_reconstructions_of_the_query_scan": lambda i, j: scans[i] == scans[j],
    }
    values = {name: {} for name in VARIANTS}
    accumulated = []
    for k in ks:
        for name, excludes in excluding.items():
            scores = query_scores(k, excludes)
            values[name][str(k)] = sum(scores) / len(scores)
        accumulated += query_scores(k, excluding["per_k"])
        values["as_published_accumulating"][str(k)] = sum(accumulated) / len(accumulated)
    return values


def test_golden_recall_tables_are_reproduced(golden):
    tensors, expected = golden
    tables = cross_retrieval(tensors["image"], tensors["text"]).tables
    assert tables["report_to_volume"] == pytest.approx(expected["text_to_image"], abs=1e-7)
    assert tables["volume_to_report"] == pytest.approx(expected["image_to_text"], abs=1e-7)


def test_golden_ranks_are_those_of_a_full_sort(golden):
    image, text = golden[0]["image"], golden[0]["text"]
    found = cross_retrieval(image, text).ranks
    assert found["report_to_volume"].tolist() == plain_ranks((text @ image.T).tolist(), range(300))
    assert found["volume_to_report"].tolist() == plain_ranks((image @ text.T).tolist(), range(300))


def test_golden_label_overlap_is_reproduced_in_all_four_variants(golden):
    tensors, expected = golden
    found = label_overlap(tensors["image"], tensors["labels"], tensors["scan"])
    expected = expected["volume_to_volume"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-7), name


@pytest.mark.parametrize("seed", range(3))
def test_exact_ranks_with_many_equal_similarities_follow_a_stable_sort(seed):
    image, text, _, _ = dataset(seed)
    found = cross_retrieval(image, text)
    assert found.ranks["report_to_volume"].tolist() == plain_ranks((text @ image.T).tolist(), range(60))
    assert found.ranks["volume_to_report"].tolist() == plain_ranks((image @ text.T).tolist(), range(60))
    assert found.query_rows["report_to_volume"].tolist() == list(range(60))


@pytest.mark.parametrize("seed", range(3))
def test_per_scan_ranks_are_those_of_the_best_row_of_each_scan(seed):
    image, text, scans, _ = dataset(seed)
    found, scans = cross_retrieval_per_scan(image, text, scans), scans.tolist()
    first = [scans.index(number) for number in sorted(set(scans))]
    assert found.query_rows["report_to_volume"].tolist() == first
    assert found.ranks["report_to_volume"].tolist() == plain_per_scan(text, image, first, scans)
    assert found.ranks["volume_to_report"].tolist() == plain_per_scan(image, text, range(60), scans)


@pytest.mark.parametrize("ks", [(1, 5, 10, 50), (1, 3, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_label_overlap_equals_the_published_loops_in_all_four_variants(seed, ks):
    image, _, scans, labels = dataset(seed)
    found = label_overlap(image, labels, scans, ks)
    for name, value in plain_overlap(image, labels, scans, ks).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_block_size_does_not_change_results(block, monkeypatch):
    image, text, scans, labels = dataset(0)

    def results():
        return (
            cross_retrieval(image, text),
            cross_retrieval_per_scan(image, text, scans),
            label_overlap(image, labels, scans),
        )

    *whole, overlap = results()
    monkeypatch.setattr(retrieval, "BLOCK_SIMILARITIES", block * len(image))
    *blocks, overlap_of_blocks = results()
    assert overlap == overlap_of_blocks
    for one, other in zip(whole, blocks, strict=True):
        assert one.tables == other.tables
        assert all(torch.equal(one.ranks[name], other.ranks[name]) for name in one.ranks)


def test_collapsed_embeddings_score_chance():
    one = torch.ones(200, 8)
    found = cross_retrieval(one, one)
    for table in found.tables.values():
        assert table == {
            "R@1": 1 / 200,
            "R@5": 5 / 200,
            "R@10": 10 / 200,
            "R@50": 50 / 200,
            "R@100": 0.5,
            "mean_rank": 100.5,
            "median_rank": 100,
        }
    per_scan = cross_retrieval_per_scan(one, one, torch.arange(200) // 2)
    assert all(table["R@1"] == 1 / 100 for table in per_scan.tables.values())


def test_a_sibling_reconstruction_is_a_miss_by_exact_index_and_a_hit_per_scan():
    reports = unit(6, 16)
    text = reports.repeat_interleave(2, dim=0)
    image = text.clone()
    image[0::2] = torch.nn.functional.normalize(image[0::2] + 0.1 * unit(6, 16, seed=1), dim=1)
    scans = torch.arange(6).repeat_interleave(2)
    assert cross_retrieval(image, text).tables["report_to_volume"]["R@1"] == 0.5
    per_scan = cross_retrieval_per_scan(image, text, scans)
    assert len(per_scan.ranks["report_to_volume"]) == 6 and len(per_scan.ranks["volume_to_report"]) == 12
    assert all(table["R@1"] == 1.0 for table in per_scan.tables.values())


def test_median_rank_counts_from_one_and_is_rounded_down():
    assert recall_table(torch.tensor([4, 1, 2, 9]))["median_rank"] == 3
    assert recall_table(torch.tensor([4, 1, 3, 9]))["median_rank"] == 3
    table = recall_table(torch.tensor([1, 2, 6]), ks=(1, 5))
    assert table == {"R@1": 1 / 3, "R@5": 2 / 3, "mean_rank": 3.0, "median_rank": 2}
    assert json.loads(json.dumps(table)) == table


def test_label_overlap_uses_all_neighbours_there_are_when_fewer_than_k_are_left():
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])
    found = label_overlap(unit(4, 3), labels, torch.tensor([0, 0, 1, 2]), ks=(50,))
    # Without its own scan: rows 0 and 1 see row 2; row 2 sees rows 0 and 1; row 3 sees all and scores 0.
    expected = (0 + 1 / 2 + (0 + 1 / 2) / 2 + 0) / 4
    assert found["per_k_excluding_all_reconstructions_of_the_query_scan"]["50"] == pytest.approx(expected)


def test_label_overlap_leaves_queries_without_any_gallery_out_and_is_none_when_no_query_has_one():
    labels = torch.tensor([[1, 0], [1, 0]])
    found = label_overlap(unit(2, 3), labels, torch.tensor([4, 4]), ks=(1,))
    assert found["per_k_excluding_the_query_itself"] == {"1": 1.0}
    assert found["per_k_excluding_all_reconstructions_of_the_query_scan"] == {"1": None}


def test_label_overlap_is_none_when_no_volume_has_a_positive_label():
    found = label_overlap(unit(5, 3), torch.zeros(5, 18), torch.arange(5))
    nothing = dict.fromkeys(("1", "5", "10", "50"))
    counts = {"gallery_size": 0, "queries": 5, "queries_without_positive": 5}
    assert found == counts | dict.fromkeys(VARIANTS, nothing)


def test_average_precision_of_cases_computed_by_hand():
    """On a line, nearest first: 0 sees 1 2 3 4; relevant to it are 1 and 3. 2 has no label, 5 no fellow."""
    image = torch.tensor([[1, 0], [0.99, 0], [0.98, 0], [0.97, 0], [0.96, 0], [0.95, 0]])
    labels = torch.tensor(
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    )
    rows, found, chance = average_precision(image, labels, ks=(1, 2, 3, 50))
    # All queries see the gallery 0, 1, 3, 4, 5 in this order, without themselves.
    expected = {
        0: [1, 1, 1, 1],  # 1* 3* 4 5
        1: [1, 1, 1, 1],  # 0* 3* 4* 5
        3: [1, 1, 1, 1],  # 0* 1* 4 5
        4: [0, 1 / 2, 1 / 2, 1 / 2],  # 0 1* 3 5
    }
    assert rows.tolist() == list(expected) and found.tolist() == list(expected.values())
    # A first at random is relevant for 2, 3, 2 and 1 of the 4 others.
    assert chance[0] == pytest.approx((2 + 3 + 2 + 1) / 16)


def test_average_precision_is_over_what_could_be_found_and_ties_go_by_index():
    image = torch.ones(5, 2)  # all equally similar: 0, 1, 2, 3, 4 without the query
    labels = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    _, found, _ = average_precision(image, labels, ks=(2, 50))
    assert found.tolist() == [
        pytest.approx([(1 / 2) / 2, (1 / 2 + 2 / 3) / 2]),  # 1 2* 3* 4
        pytest.approx([0, 1 / 4]),  # 0 2 3 4*
        pytest.approx([1 / 2, (1 + 2 / 3) / 2]),  # 0* 1 3* 4
        pytest.approx([1 / 2, (1 + 2 / 3) / 2]),  # 0* 1 2* 4
        pytest.approx([1 / 2, 1 / 2]),  # 0 1* 2 3
    ]


def test_chance_is_the_mean_average_precision_over_all_orders():
    image = torch.tensor([[1.0], [1], [1], [1], [1]])
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    chance = average_precision(image, labels, ks=(1, 2, 3, 4))[2]
    mean = torch.zeros(4, dtype=torch.float64)
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        rows, found, _ = average_precision(image, labels[list(order)], ks=(1, 2, 3, 4))
        mean += found.mean(0) / len(orders)
    assert torch.allclose(chance, mean)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_average_precision_of_few_volumes(count):
    rows, found, chance = average_precision(torch.ones(count, 2), torch.ones(count, 3), ks=(5,))
    assert found.tolist() == ([[1.0], [1.0]] if count == 2 else [])
    assert len(rows) == len(found) and (count < 2 or chance.tolist() == [1.0])


def test_embeddings_with_nan_are_refused_in_one_line():
    a, rows, labels = unit(4, 3), torch.arange(4), torch.ones(4, 2)
    nan = a.clone()
    nan[2, 1] = torch.nan
    for call in (
        lambda: cross_retrieval(nan, a),
        lambda: cross_retrieval_per_scan(a, nan, rows),
        lambda: label_overlap(nan, labels, rows),
    ):
        with pytest.raises(InputError, match="expected finite embeddings, found NaN or infinity") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_results_on_a_gpu_equal_those_on_a_cpu():
    image, text, scans, labels = dataset(0)
    on_gpu = cross_retrieval_per_scan(image.cuda(), text.cuda(), scans.cuda())
    assert on_gpu.tables == cross_retrieval_per_scan(image, text, scans).tables
    assert on_gpu.ranks["report_to_volume"].is_cuda
    found, expected = (label_overlap(image.to(d), labels.to(d), scans.to(d)) for d in ("cuda", "cpu"))
    assert all(found[name] == pytest.approx(value, abs=1e-12) for name, value in expected.items())


MEMORY_SCRIPT = """
import re, torch
from reaf_hsenet.metrics import retrieval
from reaf_hsenet.metrics.retrieval import label_overlap, ranks
image = torch.nn.functional.normalize(torch.randn(50_000, 32), dim=1)
items = torch.arange(50_000) // 2
whole, retrieval.BLOCK_SIMILARITIES = retrieval.BLOCK_SIMILARITIES, 80 * 50_000
ranks(image[:4_000], image, items[:4_000])
retrieval.BLOCK_SIMILARITIES = whole
ranks(image[:2_000], image, items[:2_000], items)
label_overlap(image[:8_000], torch.ones(8_000, 18), items[:8_000])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_scaled_down_to_4000_queries_in_50000_and_overlap_of_8000_the_process_peaks_below_one_full_matrix():
    # The many blocks of 80 show a process that grows with each block. VmHWM and not ru_maxrss, which a child
    # process inherits from the one that started it.
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 0.75e9
