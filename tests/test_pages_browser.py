"""The pages of `demo` and `bench --html` in a browser: as wide as a phone, in light and in dark, all that they say legible."""

import json
from html.parser import HTMLParser

import browser
import pytest
import tiny_llama

from lora_kernels.commands import html

PHONE, LEAST_CONTRAST, LEAST_SIZE = 360, 4.5, 10  # pixels; that of WCAG 2.2's level AA; pixels, in a plot that a phone shrinks


class Words(HTMLParser):
    """Those of the body."""

    def __init__(self, page):
        super().__init__()
        self.found, self.within = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.within = self.within or tag == "body"

    def handle_data(self, data):
        if self.within:
            self.found += data.split()


def faults(page, folder):
    """What a reader would complain of."""
    found = []
    for scheme, is_dark in (("light", False), ("dark", True)):
        seen = browser.seen(page, folder, PHONE, scheme)
        words = [word for text in seen["words"] for word in text["text"].split()]
        if set(Words(page).found) - set(words):
            found.append(f"{scheme}: not shown: {sorted(set(Words(page).found) - set(words))}")
        if seen["width"] > seen["room"]:
            found.append(f"{scheme}: {seen['width']} pixels wide")
        if (seen["background"] < 0.2) != is_dark:
            found.append(f"{scheme}: background of luminance {seen['background']}")
        for text in seen["words"]:
            if text["contrast"] < LEAST_CONTRAST or text["size"] < LEAST_SIZE or not text["width"] * text["height"]:
                found.append(f"{scheme}: {text}")
    return found


@pytest.fixture
def bench_page(run, tmp_path):
    target = tmp_path / "bench.html"
    sizes = ("--shape", "48x32", "--tokens", 16, "--tokens", 24, "--rank", 4, "--repeats", 1)
    assert run("bench", *sizes, "--device", "cpu", "--compare", "none", "--html", target)[0] == 0
    return target.read_text(encoding="utf-8")


def test_the_page_of_layers(bench_page, tmp_path):
    assert faults(bench_page, tmp_path) == []


def test_the_demos_page(run, tmp_path):
    for package in ("transformers", "peft", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    model, text, out = tiny_llama.write(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny_llama.TEXT)
    sizes = ("--steps", 4, "--tokens-per-step", 64, "--rank", 4, "--json", tmp_path / "demo.json")
    assert run("demo", "--model", model, "--text", text, "--output", out, *sizes)[0] == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert faults(page, tmp_path) == []
    assert json.loads((tmp_path / "demo.json").read_text())["page"] == str(out / "report.html")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (".scroll { overflow-x: auto; }", "", "pixels wide"),
        ("--quiet: #5c5c63", "--quiet: #b0b0b8", "light: {"),
        ("--quiet: #a5a5ae", "--quiet: #45454e", "dark: {"),
        ("(prefers-color-scheme: dark)", "print", "dark: background"),
        ("<section>", "<section hidden>", "{'text': "),
    ],
)
def test_what_cannot_be_read_is_seen(bench_page, tmp_path, old, new, fault):
    assert old in bench_page
    assert html.STYLE in bench_page
    assert any(fault in line for line in faults(bench_page.replace(old, new), tmp_path))
