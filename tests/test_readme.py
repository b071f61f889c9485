"""The Python examples of the README and of docs/ run as they stand, and what they link to exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {  # "peft.md 1" -> the first example of docs/peft.md
    f"{page.name} {number}": text
    for page in PAGES
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path, monkeypatch):
    if "bitsandbytes" in EXAMPLES[example]:
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[example], example, "exec"), {})


def test_no_example_is_lost_or_there_twice():
    assert len(EXAMPLES) == 22  # README's 4, and 18 of docs/
    assert len(set(EXAMPLES.values())) == len(EXAMPLES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    assert sum(example.startswith("README") for example in EXAMPLES) == 4


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_site_s_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in menu] == []


def test_troubleshooting_lists_every_message(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    errors = importlib.import_module("errors")
    page = errors.on_page_markdown((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert errors.MARK not in page
    assert "- ValueError: `` dora_dropout: got <dora_dropout>, expected 'peft' or 'low_rank' ``" in page
    assert page.count("\n- ") > 300
