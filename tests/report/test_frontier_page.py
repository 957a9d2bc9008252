"""The page of a frontier: complete, escaped, without a network, and legible on a phone and a desktop."""

import html.parser
import math
import re
import xml.etree.ElementTree

import pytest

from moe_jax.report import frontier_chart
from moe_jax.report.frontier_page import page
from moe_jax.report.frontier_table import signed
from moe_jax.study.frontier import LIMITS, choices
from tests.report import browser, made_up

FRONTIER = made_up.frontier()
PAGE = page(FRONTIER)
HOSTILE = "<script>alert('x')</script>&\""
LONG = "layers:" + ",".join(["8", "4"] * 13)
WIDE = made_up.frontier(26, made_up.POLICIES | {LONG: (6.0, 0.7, 1.0), HOSTILE: (5.0, 0.9, 1.0)})


class Reader(html.parser.HTMLParser):
    """Collects the texts of each table row by the section's id, and the open tags."""

    def __init__(self, text):
        super().__init__()
        self.section, self.rows, self.tags, self.attributes = None, {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "wbr"):
            self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.tags):
            self.rows[self.section][-1][-1] += data


def test_every_tag_is_closed():
    assert Reader(page(WIDE)).tags == []


def test_recommended_are_the_choices():
    rows = [row for row in Reader(PAGE).rows["recommended"] if row[0] != "Concurrency"]
    expected = sorted(choices(FRONTIER), key=lambda choice: (LIMITS.index(choice.limit), choice.concurrency))
    for row, choice in zip(rows, expected, strict=True):
        load, policy, gain, increase, beside = row
        assert load.split()[-1] == str(choice.concurrency)
        assert policy == choice.best.policy
        assert gain.startswith(signed(choice.best.speed.gain.value))
        assert increase.startswith(signed(choice.best.quality.increase.value, 2))
        assert f" {choice.uniform.policy} {signed(choice.uniform.speed.gain.value)}" in beside


def test_a_uniform_choice_is_not_repeated():
    frontier = made_up.frontier(5, {policy: made_up.POLICIES[policy] for policy in ("model", "topk:4")}, (1, 2))
    rows = [row for row in Reader(page(frontier)).rows["recommended"] if row[0] != "Concurrency"]
    assert [row[-1].split(" k ")[-1] for row in rows] == ["the same"] * 4


def test_every_policy_and_concurrency_is_there():
    rows = Reader(PAGE).rows
    policies, concurrencies = list(made_up.POLICIES), made_up.CONCURRENCIES
    measured = [row for row in rows["everything"] if row[0] != "Policy"]
    assert [row[0] for row in measured] == policies * len(concurrencies)
    for row, point in zip(measured, FRONTIER.points, strict=True):
        assert float(row[1].replace(",", "")) == pytest.approx(point.speed.tokens_per_s, rel=0.01)
        assert row[2].startswith(signed(point.speed.gain.value))
        assert float(row[7]) == round(point.quality.experts_per_token, 2)
        assert float(row[8]) == round(point.speed.distinct_experts, 1)
        assert float(row[9]) == round(point.quality.distinct_experts, 1)
    assert re.findall(r"<h3>Concurrency (\d+)</h3>", PAGE) == [str(concurrency) for concurrency in concurrencies]


def test_heat_map_names_its_concurrency():
    rows = Reader(PAGE).rows["layers"][1:]
    middle = made_up.CONCURRENCIES[len(made_up.CONCURRENCIES) // 2]
    for row, policy in zip(rows, made_up.POLICIES, strict=True):
        point = next(p for p in FRONTIER.points if (p.policy, p.concurrency) == (policy, middle))
        varies = len({p.quality.kept_L for p in FRONTIER.points if p.policy == policy}) > 1
        assert row[0] == policy + f" at {middle}" * varies
        assert row[1:-1] == [f"{kept:.1f}" for kept in point.quality.kept_L]


def test_all_text_is_escaped():
    hostile = WIDE._replace(quality_subject=HOSTILE, speed_subject=HOSTILE, machine=HOSTILE)
    text = page(hostile)
    assert "<script" not in text and "alert(&#x27;x&#x27;)" in text
    assert HOSTILE in [row[0] for row in Reader(text).rows["everything"]]


def test_the_page_loads_nothing_from_a_network():
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc\s*=|\bhref\s*=|<script|<link|<iframe", page(WIDE))
    assert not [name for name, _ in Reader(PAGE).attributes if name.startswith("on")]


def at(concurrency):
    return [point for point in FRONTIER.points if point.concurrency == concurrency]


@pytest.mark.parametrize("concurrency", made_up.CONCURRENCIES)
def test_the_front_holds_points_that_no_other_beats(concurrency):
    def beats(one, other):
        ahead = one.speed.gain.value - other.speed.gain.value, other.quality.increase.value - one.quality.increase.value
        return min(ahead) >= 0 and max(ahead) > 0

    found = frontier_chart.front(at(concurrency))
    assert {p.policy for p in found} <= {
        p.policy for p in at(concurrency) if not any(beats(q, p) for q in at(concurrency))
    }
    assert all(
        any(beats(q, p) or q == p or q.speed.gain.value == p.speed.gain.value for q in found) for p in at(concurrency)
    )
    assert [p.speed.gain.value for p in found] == sorted(p.speed.gain.value for p in found)


def test_chart_draws_every_policy_below_the_ceiling():
    numbers = {policy: number for number, policy in enumerate(made_up.POLICIES)}
    drawn = xml.etree.ElementTree.fromstring(frontier_chart.chart(at(16), numbers, {"budget:24"}))
    marks = [mark for mark in drawn.iter("g") if "mark" in mark.get("class").split()]
    told = {mark.find("title").text.split(": throughput")[0]: mark for mark in marks}
    assert set(told) == {p.policy for p in at(16) if p.quality.increase.value <= frontier_chart.CEILING}
    assert [policy for policy, mark in told.items() if mark.find("circle") is not None] == ["budget:24"]
    gains = {p.policy: p.speed.gain.value for p in at(16)}
    across = {policy: float(re.match(r"translate\((\S+) ", mark.get("transform"))[1]) for policy, mark in told.items()}
    by_gain = sorted(across, key=gains.get)
    assert [across[policy] for policy in by_gain] == sorted(across.values())
    assert "More than 10% worse: topk:1 (" in PAGE


def labels(points):
    """The position of each mark; and of each label its policy, position and extent, and whether it has a line."""
    numbers = {point.policy: number for number, point in enumerate(points)}
    drawn = xml.etree.ElementTree.fromstring(frontier_chart.chart(points, numbers, {"budget:24"}))
    marks, found = {}, []
    for group in drawn.iter("g"):
        kind, *_, number = group.get("class").split()
        if kind == "mark":
            marks[number] = tuple(map(float, re.findall(r"[\d.]+", group.get("transform"))))
        else:
            text = group.find("text")
            half = 3 * len(text.text)
            x, y = float(text.get("x")), float(text.get("y"))
            found.append((number, x - half, x + half, y, group.find("polyline") is not None))
    return marks, found


@pytest.mark.parametrize("concurrency", made_up.CONCURRENCIES)
def test_a_label_is_nearest_to_its_own_mark(concurrency):
    marks, found = labels(at(concurrency))
    assert len(found) >= 6
    for number, left, right, base, has_line in found:
        away = {key: math.dist((x, y), (min(max(x, left), right), base - 4)) for key, (x, y) in marks.items()}
        assert has_line or away[number] <= min(away.values()) + 4, (number, away)
        for other, other_left, other_right, other_base, _ in found:
            assert other == number or abs(base - other_base) > 11 or left > other_right or other_left > right


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("model", "model"),
        ("topk:4", "topk"),
        ("topk:4+renormalize:none", "renormalize"),
        ("topk:6+ratio:0.3", "ratio"),
        ("ratio:0.3+budget:24+renormalize:none", "budget"),
        ("unheard:1", "other"),
        ('"><b>', "other"),
    ],
)
def test_kind_colours_a_policy(policy, kind):
    assert frontier_chart.kind_of(policy) == kind
    assert f'class="kind-{kind}"' in frontier_chart.mark(policy)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.started(tmp_path_factory.mktemp("chromium") / "profile") as one:
        yield one


SIZES = """
[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && e.tagName != "title" &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
  .map(e => [parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement ? e.getScreenCTM().a : 1), e.textContent])
"""
OUTSIDE = """
[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest(".scroll, .picks") &&
    (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5))
  .map(e => e.outerHTML.slice(0, 100))
"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 901, 1440])
@pytest.mark.parametrize("frontier", [FRONTIER, WIDE], ids=["usual", "wide"])
def test_page_fits_the_screen(chromium, tmp_path, frontier, width, dark):
    path = tmp_path / "page.html"
    path.write_text(page(frontier))
    chromium.show(path, width, dark=dark)
    assert chromium.ask("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert chromium.ask(OUTSIDE) == []
    sizes = chromium.ask(SIZES)
    assert len(sizes) > 500 and min(sizes)[0] >= 11, min(sizes)
    assert chromium.ask("performance.getEntriesByType('resource').length") == 0
    for section in ("recommended", "frontier", "layers", "everything"):
        chromium.ask(f"document.getElementById('{section}').scrollIntoView()")
        colours = chromium.screenshot().getcolors(1 << 24)
        _, ground = max(colours)
        assert len(colours) > 50 and (sum(ground) < 200) == dark, section


@pytest.mark.browser
def test_picked_policies_are_highlighted(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    chromium.show(path, 1440)
    opacity = "getComputedStyle(document.querySelector('.mark.p{}')).opacity"
    assert chromium.ask(opacity.format(3)) == "1"
    chromium.ask("document.querySelector('label[for=pick4]').click()")
    assert float(chromium.ask(opacity.format(3))) < 0.2 and chromium.ask(opacity.format(4)) == "1"
    shown = chromium.ask("[...document.querySelectorAll('.told')].filter(e => e.checkVisibility()).length")
    assert shown == len(made_up.CONCURRENCIES)
