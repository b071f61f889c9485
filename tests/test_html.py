"""The parts of a page: nothing of the text becomes markup, bars and lines are as long as their values, dark mode is whole."""

import re

import pytest
from html_reader import read

from lora_kernels.commands.html import Bar, bars, page, paragraph, quotation, section, table
from lora_kernels.commands.line_chart import BOTTOM, LEFT, RIGHT, TOP, Line, line_chart

NASTY = """</pre></td></p></title><script>alert('1')</script><img src="https://x.example" onerror=alert(1)>&lt;&amp;"'"""


def test_text_stays_text_wherever_it_comes():
    parts = [paragraph(NASTY), quotation(NASTY, NASTY), table((NASTY, NASTY), [(NASTY, NASTY)])]
    parts += [bars(NASTY, [Bar(NASTY, 1, NASTY, ours=True)])]
    parts += [line_chart(NASTY, NASTY, [Line(NASTY, {1: 1.0})])]
    document = page(NASTY, section(NASTY, *parts))
    found = read(document)
    assert found.text.count(" ".join(NASTY.split())) == 16  # each place above, but the chart's label, which is an attribute
    assert found.rows == [[NASTY, NASTY], [NASTY, NASTY]]
    assert found.quotations == [NASTY]


@pytest.mark.parametrize(
    ("bad", "shown"), [("\udcff.txt", "?.txt"), ("\x1b[31m\x00", "�[31m�"), ("\x85", "�"), ("a\n\tb", "a\n\tb")]
)
def test_what_no_file_or_reader_takes_is_replaced(bad, shown):
    document = page("t", quotation("q", bad))
    assert read(document.encode("utf-8").decode()).quotations == [shown]


def test_blanks_and_lines_of_a_sample_stay():
    assert read(page("t", quotation("q", "\n  first\n\nsecond "))).quotations == ["\n  first\n\nsecond "]


def test_a_bar_is_as_long_as_its_value():
    values = [Bar("a", 2.0, "two", ours=True), Bar("b", 8.0, "eight", ours=False), Bar("c", 0.0, "none", ours=False)]
    assert read(page("t", bars("x", values))).bars == [("ours", 25.0), ("", 100.0), ("", 0.0)]
    assert read(page("t", bars("x", values[2:]))).bars == [("", 0.0)]


def test_dark_mode_has_each_colour():
    light, dark = re.findall(r":root \{([^}]*)\}", read(page("t")).style)
    colours = [set(re.findall(r"--\w+(?=:)", scheme)) for scheme in (light, dark)]
    assert colours[0] == colours[1] == set(re.findall(r"var\((--\w+)\)", page("t")))


def points(svg):
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in re.findall(r'points="([^"]*)"', svg)]


def test_lines_span_the_plot():
    first, second = points(line_chart("loss", "step", [Line("a", {1: 4.0, 2: 3.0}), Line("b", {0: 3.5, 4: 2.0}, "second")]))
    across, down = (RIGHT - LEFT) / 4, BOTTOM - TOP
    assert first == pytest.approx([(LEFT + across, TOP), (LEFT + 2 * across, TOP + down / 2)])
    assert second == pytest.approx([(LEFT, TOP + down / 4), (RIGHT, BOTTOM)])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ({1: 2.5}, ["2", "2.5", "3", "0.5", "1", "1.5"]),
        ({0: 0.0, 40: 1.0}, ["0", "0.5", "1", "0", "10", "20", "30", "40"]),
        ({0: 5.612, 100000: 5.481}, ["5.5", "5.55", "5.6", "0", "50000", "100000"]),
    ],
)
def test_ticks_are_round_numbers(values, ticks):
    svg = line_chart("loss", "step", [Line("a", values)])
    assert re.findall(r">([\d.]+)</text>", svg) == ticks
