"""The text of a frontier contains all of its figures."""

import csv
import io

import pytest

from moe_jax.evaluation.intervals import Estimate
from moe_jax.report.frontier_table import gain_text, increase_text, signed, table, to_csv, with_interval
from moe_jax.study.frontier import choices
from tests.report import made_up

FRONTIER = made_up.frontier()


def parsed(frontier):
    return list(csv.DictReader(io.StringIO(to_csv(frontier))))


def test_csv_reads_back_to_the_same_numbers():
    for line, point in zip(parsed(FRONTIER), FRONTIER.points, strict=True):
        quality, speed = point.quality, point.speed
        assert (line["policy"], int(line["concurrency"])) == (point.policy, point.concurrency)
        expected = {
            "experts_per_token": quality.experts_per_token,
            "distinct_experts_quality": quality.distinct_experts,
            "tokens_per_s": speed.tokens_per_s,
            "bytes": speed.bytes,
            "weights_bytes": point.weights_bytes,
            "distinct_experts_timed": speed.distinct_experts,
        }
        expected |= dict(zip(("ms_first_quartile", "ms_median", "ms_third_quartile"), speed.quartiles_ms))
        expected |= {f"kept_layer_{layer}": kept for layer, kept in enumerate(quality.kept_L)}
        for name, (value, (low, high)) in (
            ("bits_per_byte", quality.bits_per_byte),
            ("increase", quality.increase),
            ("gain", speed.gain),
        ):
            expected |= {name: value, f"{name}_low": low, f"{name}_high": high}
        if point.rival is not None:
            value, (low, high) = point.rival.difference
            expected |= {"over_rival": value, "over_rival_low": low, "over_rival_high": high}
        assert line["rival"] == (point.rival.policy if point.rival else "")
        words = ("policy", "concurrency", "rival")
        assert {name: float(text) for name, text in line.items() if text and name not in words} == expected


def test_csv_quotes_specs():
    odd = 'layers:8,4"\n'
    assert [line["policy"] for line in parsed(made_up.frontier(2, {odd: (6.0, 1.0, 1.0)}, (1, 2)))] == [odd, odd]


def test_table_has_every_choice_and_every_gain():
    chosen, gains = table(FRONTIER).split("\n\n")
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in chosen.split("\n")[2:]]
    for line, choice in zip(lines, choices(FRONTIER), strict=True):
        best, uniform = choice.best, choice.uniform
        assert line[:3] == [str(choice.concurrency), f"{choice.limit:.1%}", best.policy]
        ahead = with_interval(choice.over_uniform)
        assert line[3:] == [gain_text(best), increase_text(best), uniform.policy, gain_text(uniform), ahead]
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in gains.split("\n")[2:]]
    assert [line[0] for line in lines] == list(made_up.POLICIES)
    found = {
        (line[0], rows): gain for line in lines for rows, gain in zip(made_up.CONCURRENCIES, line[1:], strict=True)
    }
    assert found == {(p.policy, p.concurrency): signed(p.speed.gain.value) for p in FRONTIER.points}


@pytest.mark.parametrize(
    ("fraction", "decimals", "text"),
    [(0.1234, 1, "+12.3%"), (-0.1234, 2, "−12.34%"), (-0.00001, 1, "0.0%"), (0.0, 0, "0%"), (1.5, 0, "+150%")],
)
def test_changes_carry_their_sign(fraction, decimals, text):
    assert signed(fraction, decimals) == text


def test_an_interval_of_width_zero_is_not_shown():
    point = FRONTIER.points[0]
    assert gain_text(point) == "0.0%"
    speed = point.speed._replace(gain=Estimate(0.1, (-0.01, 0.2)))
    assert gain_text(point._replace(speed=speed)) == "+10.0% (−1.0% to +20.0%)"
