"""The page of a frontier: complete, escaped, without a network, and legible on a phone and a desktop."""

import html.parser
import io
import re
import xml.etree.ElementTree

import PIL.Image
import pytest

from moe_jax.report import frontier_chart
from moe_jax.report.frontier_page import page
from moe_jax.report.frontier_table import signed, with_interval
from moe_jax.study.frontier import LIMITS, choices
from tests.report import browser, made_up

FRONTIER = made_up.frontier()
HOSTILE = "<script>alert('x')</script>&\""
LONG = "layers:" + ",".join(["8", "4"] * 13)
WIDE = made_up.frontier(26, made_up.POLICIES | {LONG: (6.0, 0.7, 1.0), HOSTILE: (5.0, 0.9, 1.0)}, (1, 16))


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


@pytest.fixture(scope="module")
def usual():
    return page(FRONTIER)


@pytest.fixture(scope="module")
def wide():
    return page(WIDE._replace(quality_subject=HOSTILE, speed_subject=HOSTILE, machine=HOSTILE))


def test_every_tag_is_closed(wide):
    assert Reader(wide).tags == []


def test_recommended_are_the_choices(usual):
    rows = [row for row in Reader(usual).rows["recommended"] if row[0] != "Rows"]
    expected = sorted(choices(FRONTIER), key=lambda choice: (LIMITS.index(choice.limit), choice.concurrency))
    for (concurrency, policy, gain, increase), (_, below), choice in zip(rows[::2], rows[1::2], expected, strict=True):
        assert concurrency == str(choice.concurrency)
        assert policy == choice.best.policy
        assert gain.startswith(signed(choice.best.speed.gain.value))
        assert increase.startswith(signed(choice.best.quality.increase.value, 2))
        uniform, ahead = choice.uniform, with_interval(choice.over_uniform)
        words = f"{uniform.policy} {signed(uniform.speed.gain.value)}; recommended over it: {ahead}"
        assert " ".join(below.split()) == f"best uniform k: {words}"


def test_a_uniform_choice_is_not_repeated():
    frontier = made_up.frontier(5, {policy: made_up.POLICIES[policy] for policy in ("model", "topk:4")}, (1, 2))
    rows = [row for row in Reader(page(frontier)).rows["recommended"] if row[0] != "Rows"]
    assert [row[-1] for row in rows[1::2]] == ["the best uniform k itself"] * 4


def test_every_policy_and_concurrency_is_there(usual):
    rows = Reader(usual).rows
    policies, concurrencies = list(made_up.POLICIES), made_up.CONCURRENCIES
    measured = [row for row in rows["everything"] if row[0] != "Policy"]
    assert [row[0] for row in measured] == policies * len(concurrencies)
    for row, point in zip(measured, FRONTIER.points, strict=True):
        assert float(row[1].replace(",", "")) == pytest.approx(point.speed.tokens_per_s, rel=0.01)
        assert row[2].startswith(signed(point.speed.gain.value))
        assert float(row[7]) == round(point.quality.experts_per_token, 2)
        assert float(row[8]) == round(point.speed.distinct_experts, 1)
        assert float(row[9]) == round(point.quality.distinct_experts, 1)
    assert re.findall(r"<h3>Concurrency (\d+)</h3>", usual) == [str(concurrency) for concurrency in concurrencies]


def test_heat_map_names_its_concurrency(usual):
    rows = Reader(usual).rows["layers"][1:]
    middle = made_up.CONCURRENCIES[len(made_up.CONCURRENCIES) // 2]
    for row, policy in zip(rows, made_up.POLICIES, strict=True):
        point = next(p for p in FRONTIER.points if (p.policy, p.concurrency) == (policy, middle))
        varies = len({p.quality.kept_L for p in FRONTIER.points if p.policy == policy}) > 1
        assert row[0] == policy + f" at {middle}" * varies
        assert row[1:-1] == [f"{kept:.1f}" for kept in point.quality.kept_L]


def test_all_text_is_escaped(wide):
    assert "<script" not in wide and "alert(&#39;x&#39;)" in wide
    assert HOSTILE in [row[0] for row in Reader(wide).rows["everything"]]


def test_the_page_loads_nothing_from_a_network(usual, wide):
    asked = (
        r"""https?:|//[a-z]|@import|url\((?!#)|\bsrc\s*=|\bhref\s*=(?!"#)|<script|<link|<iframe|<\?xml|<!doctype svg"""
    )
    assert not re.search(asked, wide, re.I)
    assert not [name for name, _ in Reader(usual).attributes if name.startswith("on")]


def at(concurrency):
    return [point for point in FRONTIER.points if point.concurrency == concurrency]


@pytest.mark.parametrize("concurrency", made_up.CONCURRENCIES)
def test_the_front_holds_points_that_no_other_beats(concurrency):
    def beats(one, other):
        ahead = one.speed.gain.value - other.speed.gain.value, other.quality.increase.value - one.quality.increase.value
        return min(ahead) >= 0 and max(ahead) > 0

    drawn = [point for point in at(concurrency) if point.quality.increase.value <= frontier_chart.CEILING]
    found = frontier_chart.front(at(concurrency))
    assert {p.policy for p in found} <= {p.policy for p in drawn if not any(beats(q, p) for q in drawn)}
    assert all(any(beats(q, p) or q == p or q.speed.gain.value == p.speed.gain.value for q in found) for p in drawn)
    assert [p.speed.gain.value for p in found] == sorted(p.speed.gain.value for p in found)
    assert frontier_chart.front(at(concurrency) * 2) == found


def drawn(points, recommended=frozenset()):
    """The parts of a chart by the number of their policy: areas to point at, and visible marks."""
    numbers = {point.policy: number for number, point in enumerate(points)}
    text = frontier_chart.svg(points, recommended, numbers)
    areas, marks = {}, {}
    for group in xml.etree.ElementTree.fromstring(f'<page xmlns:xlink="x">{text}</page>').iter("g"):
        kind, _, number = group.get("class", "").partition(" p")
        if kind == "area":
            areas[int(number)] = group
        if kind == "mark":
            marks.setdefault(int(number), []).append(group)
    return areas, marks


def test_chart_draws_every_policy_below_the_ceiling(usual):
    points = at(16)
    areas, marks = drawn(points)
    expected = {number for number, p in enumerate(points) if p.quality.increase.value <= frontier_chart.CEILING}
    assert areas.keys() == marks.keys() == expected and len(expected) < len(points)
    for number, group in areas.items():
        assert group.find("title").text.startswith(f"{points[number].policy}: throughput ")
    places = {number: group.find(".//use") for number, group in areas.items()}
    for axis, value in (("x", lambda p: p.speed.gain.value), ("y", lambda p: -p.quality.increase.value)):
        along = [float(places[number].get(axis)) for number in sorted(places, key=lambda n: value(points[n]))]
        assert along == sorted(along)
    assert "More than 10% worse: topk:1 (" in usual


def test_front_is_numbered_and_listed_and_recommended_policies_are_ringed(usual):
    for concurrency in (1, 16):
        points, front = at(concurrency), frontier_chart.front(at(concurrency))
        recommended = {choice.best.policy for choice in choices(FRONTIER) if choice.concurrency == concurrency}
        _, marks = drawn(points, recommended)
        texts = {n: [text.text for group in groups for text in group.iter("text")] for n, groups in marks.items()}
        numbered = {points[n].policy: int(texts[n][0]) for n in marks if texts[n] and texts[n][0].isdigit()}
        assert numbered == {point.policy: number for number, point in enumerate(front, 1)}
        least = min(len(groups) for n, groups in marks.items() if points[n].policy in numbered)
        more = {points[n].policy for n, groups in marks.items() if points[n].policy in numbered and len(groups) > least}
        assert more == recommended
    listed = Reader(usual).rows["frontier"]
    expected = [
        (number, p)
        for concurrency in made_up.CONCURRENCIES
        for number, p in enumerate(frontier_chart.front(at(concurrency)), 1)
    ]
    assert listed == [
        [str(number), p.policy, signed(p.speed.gain.value, 0), signed(p.quality.increase.value, 2)]
        for number, p in expected
    ]


def test_names_are_not_rendered_as_formulas():
    points = [point._replace(uniform=True, policy=f"$x^{n}$<b>") for n, point in enumerate(at(16))]
    areas, marks = drawn(points)
    assert all(area.find("title").text.startswith(f"$x^{number}$<b>: ") for number, area in areas.items())
    texts = {text.text for groups in marks.values() for group in groups for text in group.iter("text")}
    assert any(text.startswith("$x^") for text in texts)


def test_picture_has_a_panel_for_each_concurrency():
    image = PIL.Image.open(io.BytesIO(frontier_chart.png(made_up.frontier(concurrencies=(1, 4, 16, 64))))).convert(
        "RGB"
    )
    across, down = image.width / 3, image.height / 2
    cells = [
        image.crop((int(x * across), int(y * down), int((x + 1) * across), int((y + 1) * down)))
        for y in range(2)
        for x in range(3)
    ]
    ringed = [any(color == (10, 94, 168) for _, color in cell.getcolors(1 << 24)) for cell in cells]
    assert ringed == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("model", "one k"),
        ("topk:4", "one k"),
        ("topk:4+renormalize:none", "one k"),
        ("layers:8,4+renormalize:none", "by layer"),
        ("topk:6+ratio:0.3", "by token"),
        ("ratio:0.3+budget:24+renormalize:none", "by all rows of a step"),
        ("unheard:1", None),
    ],
)
def test_marks_show_the_kind_of_policy(policy, words):
    looks = {words: look for words, look in frontier_chart.LOOKS.items() if look == frontier_chart.look(policy)}
    assert list(looks) == ([words] if words else [])


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
[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest(".scroll") &&
    (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5))
  .map(e => e.outerHTML.slice(0, 100))
"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 901, 1440])
@pytest.mark.parametrize("shown", ["usual", "wide"])
def test_page_fits_the_screen(chromium, tmp_path, request, shown, width, dark):
    path = tmp_path / "page.html"
    path.write_text(request.getfixturevalue(shown))
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
def test_a_hovered_policy_is_highlighted_everywhere(chromium, tmp_path, usual):
    path = tmp_path / "page.html"
    path.write_text(usual)
    chromium.show(path, 1440)
    opacities = "new Set([...document.querySelectorAll('.mark{}')].map(e => getComputedStyle(e).opacity)).size"
    marks = "[...document.querySelectorAll('.mark')].filter(e => getComputedStyle(e).opacity == '1')"
    classes = f"[...new Set({marks}.map(e => e.classList[1]))]"
    assert chromium.ask(opacities.format("")) == 1
    chromium.ask("document.querySelector('#frontier .area.p4').scrollIntoView({block: 'center'})")
    box = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    x, y = chromium.ask(f"{box}(document.querySelector('#frontier .area.p4').getBoundingClientRect())")
    chromium.say("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert chromium.ask(classes) == ["p4"]
    panels = f"new Set({marks}.map(e => e.ownerSVGElement)).size"
    beyond = sum(p.policy == "topk:3" and p.quality.increase.value > frontier_chart.CEILING for p in FRONTIER.points)
    assert chromium.ask(panels) == len(made_up.CONCURRENCIES) - beyond
