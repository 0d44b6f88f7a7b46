"""Where reports say that findings are: the readers, and the levels that are scored."""

import numpy as np
import pytest

from reaf_hsenet.data.phantom.findings import sample_findings
from reaf_hsenet.data.phantom.reports import write_report
from reaf_hsenet.metrics.places import phantom_places, place_scores, rule_places, rule_sizes

BOTH = {"right", "left"}


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        (
            "A 2 mm diameter nodule is observed in the superior segment of the right lung lower lobe.",
            {"Lung nodule": ({"right"}, {"lower"})},
        ),
        (
            "There is atelectasis in the linguloinferior segment of the left lung.",
            {"Atelectasis": ({"left"}, {"lingula"})},
        ),
        (
            "Consolidation is seen in the upper and middle lobes on the right. Emphysema in both lungs.",
            {"Consolidation": ({"right"}, {"upper", "middle"}), "Emphysema": (BOTH, set())},
        ),
        (
            "• Bilateral pleural effusion • Left atelectasis",
            {"Pleural effusion": (BOTH, set()), "Atelectasis": ({"left"}, set())},
        ),
        ("Pleural effusion was not detected on the right. No nodule in the left upper lobe.", {}),
    ],
)
def test_rules_read_findings_that_are_not_denied_with_their_sides_and_lobes(text, reading):
    assert rule_places(text) == reading


def test_rules_read_size_classes():
    text = (
        "A small pleural effusion on the left. Severe emphysema in both lungs. No large nodule. Cardiomegaly."
    )
    assert rule_sizes(text) == {"Pleural effusion": {"small"}, "Emphysema": {"large"}, "Cardiomegaly": set()}


def test_a_small_airway_disease_is_no_small_finding():
    text = "Mosaic density differences in both lungs, suggesting small airway disease."
    assert rule_sizes(text) == {"Mosaic attenuation pattern": set()}


def test_a_finding_of_several_clauses_has_the_places_of_all():
    text = "A nodule in the right upper lobe. Another nodule in the left lower lobe."
    assert rule_places(text) == {"Lung nodule": (BOTH, {"upper", "lower"})}


def test_on_phantoms_the_rules_read_the_findings_and_sides_of_the_exact_labeler():
    rng = np.random.default_rng(2)
    reports = [write_report(sample_findings(rng), rng)[0] for _ in range(60)]
    exact = list(map(phantom_places, reports))
    own = place_scores(exact, exact)
    assert all(own[n]["precision"] == own[n]["recall"] == own[n]["agreement"] == 1 for n in own)
    found = place_scores(list(map(rule_places, reports)), exact)
    assert found["presence"]["precision"] == found["presence"]["recall"] == 1
    assert found["side"]["recall"] == 1


def test_the_side_in_a_coronary_arterys_name_is_no_side():
    text = "Calcified plaques are observed in the right coronary artery."
    assert phantom_places(text) == {"Coronary artery wall calcification": (set(), set())}


def test_a_level_is_scored_on_what_the_level_before_got_right():
    right, left = {"right"}, {"left"}
    truth = [
        {"a": (right, {"upper"}), "b": (BOTH, {"lower"}), "c": (set(), set())},
        {"a": (left, {"upper", "lower"})},
    ]
    predicted = [
        {"a": (left, {"upper"}), "b": (BOTH, {"lower", "upper"}), "d": (right, set())},
        {"a": (left, {"upper"})},
    ]
    # Both name a, b and a. Sides: told 1, 2, 1 and named 1, 2, 1, of which 0, 2 and 1 are right. The lobes of
    # the last two: told 1 and 2, named 2 and 1, right 1 and 1.
    assert place_scores(predicted, truth) == {
        "presence": {"precision": 3 / 4, "recall": 3 / 4, "agreement": 1 / 2, "compared": 2},
        "side": {"precision": 3 / 4, "recall": 3 / 4, "agreement": 2 / 3, "compared": 3},
        "lobe": {"precision": 2 / 3, "recall": 2 / 3, "agreement": 0, "compared": 2},
    }


def test_nothing_to_compare_is_undefined():
    empty = {"precision": None, "recall": None, "agreement": None, "compared": 0}
    assert place_scores([{}], [{}]) == dict.fromkeys(("presence", "side", "lobe"), empty)
