"""Tables and progress: at any width every number that is shown is whole, and what is not shown is named."""

import io
import re
import threading

import pytest
from rich.console import Console

from lora_kernels.commands.bench.rows import LESS_IMPORTANT
from lora_kernels.commands.console import PLAIN_WIDTH, Output
from lora_kernels.commands.tables import make_table

NAMES = ("variant", "backend", "median µs", "p20–p80", "TFLOP/s", "GB/s", "x bare", "x PEFT", "saved", "peak", "launches")
ROWS = [
    ("bare frozen linear", "", "1,024,299", "1,001,780–1,106,817", "6.1e-05", "0.0114", "1.00", "0.08", "0 B", "8.0 KiB", 12),
    ("ours, fp32 adapters", "torch", "1,006", "896–1,115", "0.00031", "0.0489", "0.23", "0.35", "264.1 MiB", "12.5 KiB", 4),
]
REASON = "the first that can compute this call, whatever it is"


def shown(width, names, rows, less_important=()):
    """(the printed table, its columns without those that are left out, those)."""
    table, left_out = make_table(names, rows, width, less_important)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, crop=False)
    return console.file.getvalue(), [name for name in names if name not in left_out], left_out


@pytest.mark.parametrize("width", range(50, 170, 7))
def test_numbers_are_whole_and_what_is_left_out_is_named(width):
    text, columns, left_out = shown(width, NAMES, ROWS, LESS_IMPORTANT)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for row in ROWS:
        for name, cell in zip(NAMES[1:], row[1:], strict=True):
            if name in columns:
                assert re.search(rf"│ +{re.escape(str(cell))} +│", text), (name, cell)
    heads = "".join(re.findall("[┏┃].*", text))
    assert all(word in heads for name in columns for word in name.split())
    assert left_out == [name for name in LESS_IMPORTANT if name in NAMES][: len(left_out)]  # in this order


def test_the_important_columns_are_there_at_80():
    _, columns, _ = shown(80, NAMES, ROWS, LESS_IMPORTANT)
    assert {"variant", "median µs", "x bare", "x PEFT", "saved", "peak"} <= set(columns)
    assert shown(PLAIN_WIDTH, NAMES, ROWS, LESS_IMPORTANT)[2] == []


def test_where_nothing_fits_the_table_is_wider_and_numbers_are_whole():
    text, columns, _ = shown(20, NAMES, ROWS, LESS_IMPORTANT)
    assert columns == ["variant", "median µs", "x bare"]
    assert "│ 1,024,299 │" in text


def test_text_is_wrapped_by_words():
    rows = [("cpu", "yes", REASON), ("cuda:0", "no", "a/very/long/word/" * 8)]
    text, columns, _ = shown(60, ("device", "used", "reason"), rows)
    assert columns == ["device", "used", "reason"]
    assert max(len(line) for line in text.splitlines()) == 60
    found = re.sub(r"[│\s]+", " ", text)
    assert REASON in found
    assert "".join(found.split()).count("a/very/long/word/") == 8


def test_markup_in_cells_and_titles_is_text(capsys):
    Output().table("x[8, 4]", ("what", "n[1]"), [("W[N, K] [bold]", 3)])
    out = capsys.readouterr().out
    assert "x[8, 4]" in out
    assert "W[N, K] [bold]" in out
    assert "n[1]" in out


@pytest.mark.parametrize(
    ("columns", "width"), [("60", 60), ("300", 300), (None, PLAIN_WIDTH), ("wide", PLAIN_WIDTH), ("0", PLAIN_WIDTH)]
)
def test_a_pipe_is_as_wide_as_columns_says(monkeypatch, columns, width, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    output = Output()
    assert output.console.width == output.progress.width == width
    output.table("t", NAMES, ROWS, less_important=LESS_IMPORTANT)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= width
    assert ("Not shown in 60 columns: launches, GB/s" in out) == (width == 60)


def test_progress_is_a_line_on_stderr_where_there_is_no_terminal(capsys):
    with Output().status("Timing [8, 4]"):
        pass
    assert tuple(capsys.readouterr()) == ("", "Timing [8, 4]\n")


def test_progress_on_a_terminal_has_no_thread_that_would_disturb_what_is_timed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with Output().status("Timing [8, 4]"):
        assert threading.active_count() == before
    out, err = capsys.readouterr()
    assert out == ""
    assert "Timing [8, 4] …" in err
