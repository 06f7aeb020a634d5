"""The benchmark as Markdown and in the terminal: the same verdicts and figures as on the page."""

import io
import re
from collections.abc import Callable

import pytest

from srdeploy.pages.text import rich_table, to_markdown
from srdeploy.serve.bench.page import bench_page
from srdeploy.serve.bench.results import BenchReport
from srdeploy.serve.bench.tables import equal_labels, summary_tables

Factory = Callable[..., BenchReport]


def pipes(line: str) -> int:
    """Pipes that part cells: those without a backslash."""
    return len(re.findall(r"(?<!\\)\|", line))


def markdown(report: BenchReport) -> str:
    return to_markdown(bench_page(report))


def in_terminal(report: BenchReport, width: int = 120) -> str:
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    for table in summary_tables(report):
        console.print(rich_table(table))
    return file.getvalue()


def test_verdicts_come_first_with_ratio_margin_and_reason(bench_report: BenchReport) -> None:
    lines = [line for line in markdown(bench_report).splitlines() if line.startswith("- **")]
    starts = [line.split("**")[1] for line in lines]
    assert starts == [
        "✓ EQUIVALENT",
        "? NOT SHOWN",
        "✗ DIFFERENT",
        "✗ DIFFERS",
        "✓ matches",
        "+1.23 mIoU",
    ]
    assert r"ratio 1.001 \[0.998, 1.004\], margin 1 %: regulated against baseline" in lines[0]
    assert ". The ratio lies between 0.9982" in lines[0]
    assert "about 31 rounds would tell, 12 were run." in lines[1]


def test_warnings_environment_command_and_gain_are_there(bench_report: BenchReport) -> None:
    text = markdown(bench_report)
    assert "> - The CPU's governor is powersave" in text
    assert f"```sh\n{bench_report.command}\n```" in text
    assert "| onnxruntime | 1.24.1 |" in text
    gain = r"**+1.23 mIoU** points \[95 %\]: +1.23 \[+0.51, +1.98\], regulated over baseline"
    assert gain in text


def test_every_table_has_as_many_cells_in_each_row(make_report: Factory) -> None:
    nasty = make_report(names=("base|line", r"regu\|lated", "exits\nleft in"))
    for report in (make_report(), nasty):
        blocks = re.findall(r"(?:^\|.*\n)+", markdown(report), re.M)
        assert len(blocks) == 11
        for block in blocks:
            lines = block.splitlines()
            assert set(lines[1]) <= set("|:- ")
            assert len({pipes(line.replace("\\\\", "")) for line in lines}) == 1


def test_a_name_cannot_become_markup(make_report: Factory) -> None:
    text = markdown(make_report(names=("`a`", "<img src=x>", "*b* [c](d)")))
    outside = text.split("### Command")[0]
    assert not re.search(r"(?<!\\)[`<]", outside)
    assert r"\*b\* \[c\](d)" in outside


def test_a_fence_in_the_command_does_not_end_the_block(make_report: Factory) -> None:
    text = markdown(make_report(command="srdeploy bench '```'"))
    assert text.endswith("````sh\nsrdeploy bench '```'\n````\n")


def test_the_terminal_shows_the_same_verdicts_and_how_they_were_reached(
    bench_report: BenchReport,
) -> None:
    shown = " ".join(in_terminal(bench_report).split())
    for part in ("✓ EQUIVALENT", "? NOT SHOWN", "✗ DIFFERENT", "1.001 [0.998, 1.004]"):
        assert part in shown
    for part in ("12 rounds", "12 interleaved blocks", "71 s", "margin asked for: 1 %"):
        assert part in shown
    assert "noise floor, the first against itself: 1.000 [0.997, 1.004]" in shown
    assert "+1.23 [+0.51, +1.98]" in shown


@pytest.mark.parametrize("length", [8, 60])
def test_names_of_any_length_fit_120_columns_and_figures_stay_whole(
    make_report: Factory, length: int
) -> None:
    names = ("a" * length, "b" * length, "c" * length)
    shown = in_terminal(make_report(names=names))
    assert max(map(len, shown.splitlines())) <= 120
    for figure in ("1.251 [1.246, 1.256]", "1.032 [1.028, 1.037]", "6,182,009", "✗ DIFFERENT"):
        assert figure in shown
    assert shown.count("…") == 0


def test_square_brackets_in_a_name_are_shown(make_report: Factory) -> None:
    assert "[red]x[/red]" in in_terminal(make_report(names=("a", "[red]x[/red]", "c")))


def test_only_equal_labels_are_a_hundred_percent() -> None:
    assert equal_labels(1.0) == "100.0000"
    assert equal_labels(1 - 1e-8) == "99.9999"
