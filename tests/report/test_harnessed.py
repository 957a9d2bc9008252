"""The table of the harness: names, units, intervals and paired differences, on results written by hand."""

import numpy as np
import pytest

from moe_jax.report import harnessed


def result(acc, nats, f1=0.5):
    """Results of the harness: a group, a task with two filters, and a figure that has no value per document."""
    sizes = [100, 300, 200, 50]
    samples = [
        {"doc_id": number, "filter": chosen, "acc": one if chosen == "none" else 0.0}
        for number, one in reversed(list(enumerate(acc)))
        for chosen in ("none", "strict")
    ]
    pairs = [{"doc_id": n, "filter": "none", "bits_per_byte": pair} for n, pair in enumerate(zip(nats, sizes))]
    return {
        "results": {
            "all": {"alias": "all", "acc,none": np.mean(acc), "acc_stderr,none": 0.1, "sample_len": 4},
            "one": {
                **{"acc,none": np.mean(acc), "acc_stderr,none": 0.1, "acc,strict": 0.0, "acc_stderr,strict": 0.0},
                **{"f1,none": f1, "f1_stderr,none": "N/A", "alias": "one"},
            },
            "text": {"bits_per_byte,none": -sum(nats) / sum(sizes) / np.log(2), "bits_per_byte_stderr,none": "N/A"},
        },
        "samples": {"one": samples, "text": pairs},
    }


@pytest.fixture
def found():
    nats = np.array([-90.0, -250.0, -130.0, -40.0])
    return harnessed.rows(["model", "topk:2"], [result([1, 0, 1, 1], nats), result([1, 0, 0, 1], nats * 1.2)])


def test_figures_of_each_policy(found):
    first, few = (row["figures"] for row in found)
    assert [row["policy"] for row in found] == ["model", "topk:2"]
    names = {"all/acc", "one/acc", "one/acc/strict", "one/f1", "text/bits_per_byte"}
    assert set(first) == names
    assert set(few) == names | {f"{name}_difference" for name in ("one/acc", "one/acc/strict", "text/bits_per_byte")}
    assert first["one/acc"]["value"] == 0.75 and first["one/acc/strict"]["value"] == 0
    assert first["text/bits_per_byte"]["value"] == pytest.approx(510 / 650 / np.log(2))
    assert {name: first[name]["unit"] for name in names} == dict.fromkeys(names, "1") | {
        "text/bits_per_byte": "bit/byte"
    }


def test_intervals(found):
    """Resampled if there are documents, else from the harness's standard error, else missing."""
    first, few = (row["figures"] for row in found)
    assert first["all/acc"]["ci95"] == pytest.approx((0.75 - 0.196, 0.75 + 0.196))
    assert first["one/acc"]["ci95"] == (0.25, 1)
    low, high = first["text/bits_per_byte"]["ci95"]
    assert low < first["text/bits_per_byte"]["value"] < high
    assert "ci95" not in first["one/f1"]
    assert few["one/acc_difference"]["value"] == -0.25 and few["one/acc_difference"]["ci95"] == (-0.75, 0)


def test_differences_are_paired(found):
    """A fifth more nats in every document: the difference varies less than the figures."""
    first, few = (row["figures"]["text/bits_per_byte"] for row in found)
    difference = found[1]["figures"]["text/bits_per_byte_difference"]
    assert difference["value"] == pytest.approx(0.2 * first["value"])
    assert np.ptp(difference["ci95"]) < np.ptp(few["ci95"]) / 4


def test_a_figure_that_is_not_a_mean_over_documents_is_not_resampled():
    """Such as a metric with its own aggregation."""
    one = result([1, 0, 1, 1], [-1, -1, -1, -1])
    one["results"]["one"]["acc,none"] = 0.6
    figures = harnessed.rows(["model", "topk:2"], [one, one])[1]["figures"]
    assert figures["one/acc"]["ci95"] == pytest.approx((0.6 - 0.196, 0.6 + 0.196))
    assert "one/acc_difference" not in figures


def test_table(found):
    head, _, *lines = harnessed.table(found).splitlines()
    assert head == "|  | `model` | `topk:2` |"
    assert lines[1] == "| one/acc | 0.750 (0.250 to 1.000) | 0.500 (0.000 to 1.000) |"
    assert lines[2] == "| one/acc_difference |  | -0.250 (-0.750 to +0.000) |"
    assert len(lines) == 5 + 3
