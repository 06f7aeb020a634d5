"""`srdeploy bench`: latency with a verdict, accuracy and cost of artifacts against a baseline."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from srdeploy.cli.options import Classes, Device, Json, Quiet, Split, Threads
from srdeploy.cli.verbs import USE, add_verb
from srdeploy.runtimes.registry import runtime_names

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto
    from srdeploy.serve.bench.results import BenchReport
    from srdeploy.spec import Spec

Value = TypeVar("Value")

ACCURACY, MATRIX, MEASUREMENT, REPORT = "Accuracy", "Settings to compare", "Measurement", "Report"
EXITS = "Exits of regulated checkpoints"

REPORT_HTML = "report.html"
REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"


def bench(
    artifacts: Annotated[
        list[Path],
        typer.Argument(help="The baseline, then what to compare with it.", show_default=False),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Data set: time on its photos, and score each artifact.",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    split: Split = "val",
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Score the first N photos.", min=1, rich_help_panel=ACCURACY
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            help="Latencies within this count as equal.",
            min=0.01,
            rich_help_panel=MEASUREMENT,
        ),
    ] = 1.0,
    budget: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Most time to measure each setting.",
            min=1,
            rich_help_panel=MEASUREMENT,
        ),
    ] = 120.0,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=f"One or several of {', '.join(runtime_names())}.",
            rich_help_panel=MATRIX,
        ),
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE,...",
            help="One or several of fp32, fp16, bf16: the arithmetic of runtimes with a choice; "
            "for others, float32 graphs are converted (default: as stored).",
            rich_help_panel=MATRIX,
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N,...", help="Images per run, one or several: 1,8.", rich_help_panel=MATRIX
        ),
    ] = "1",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW,...",
            help="One or several image sizes (default: the first artifact's usual one).",
            rich_help_panel=MATRIX,
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Run that an artifact was exported from, if its manifest does not name it; may be "
            "repeated.",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    exits_left_in: Annotated[
        bool,
        typer.Option(
            help="Also time a regulated checkpoint's graph with its exits, to show what stripping "
            "saves.",
            rich_help_panel=EXITS,
        ),
    ] = True,
    builds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="TensorRT: builds of each engine, which take turns.",
            min=1,
            rich_help_panel=MEASUREMENT,
        ),
    ] = 3,
    costs: Annotated[
        bool,
        typer.Option(
            help="Count GMACs; measure memory and time to first inference.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = True,
    classes: Classes = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for report.html and report.json.",
            rich_help_panel=REPORT,
        ),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="Print Markdown; with --out, also write report.md.",
            rich_help_panel=REPORT,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue a stopped benchmark in --out.",
            rich_help_panel=REPORT,
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show that artifacts are as fast as a baseline, and compare their accuracy and cost.

    The artifacts take turns, round after round with freshly opened sessions, until the noise is
    small enough or the budget is spent. Two sessions of the baseline give the noise floor. Two
    one-sided tests decide: EQUIVALENT (the ratio lies within the margin), DIFFERENT (outside it),
    or NOT SHOWN, with the number of rounds that it would take. The margin is never below the floor.

    With --data: mIoU and error hints, the gain over the baseline with its interval, and whether
    each export gives its own checkpoint's labels.

    The exit code is 0 if every verdict is EQUIVALENT and every export matches its checkpoint, else
    1. What self-regulation costs in training is a sub-command: srdeploy bench train.

    Example: srdeploy bench deploy/baseline deploy/regulated --data data/camvid --out bench

    Example: srdeploy bench deploy/a deploy/b --runtime torch,onnxruntime --batch 1,8

    Example: srdeploy bench train
    """
    from srdeploy import console
    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.data import open_dataset, spec_for
    from srdeploy.serve.bench.entries import every_setting
    from srdeploy.serve.bench.matrix import Benchmark
    from srdeploy.serve.bench.measure import BenchPlan
    from srdeploy.serve.bench.results import PartialFile
    from srdeploy.studies.bench_entries import entries_for
    from srdeploy.validation import parse_size

    console.set_quiet(quiet or as_json)
    _require_folder(out)
    settings = every_setting(
        _several(runtime, "--runtime", str),
        [None] if precision is None else _several(precision, "--precision", str),
        _several(batch, "--batch", _count),
        [None] if size is None else _several(size, "--size", lambda one: parse_size(one, "--size")),
    )
    partial = PartialFile(out, resume)
    dataset = open_dataset(data, split) if data is not None else None
    plan = BenchPlan(margin=margin / 100, budget_s=budget)
    job = Benchmark(device, threads, plan, dataset, limit, costs)
    with entries_for(
        artifacts,
        settings,
        checkpoints=checkpoint or (),
        exits_left_in=exits_left_in,
        builds=builds,
        device=device,
        spec=spec_from_classes(classes) if classes is not None else None,
    ) as entries:
        report, photos = job.run(
            entries, settings, shlex.join(["srdeploy", *sys.argv[1:]]), partial
        )
    if out is not None:
        spec = spec_for(dataset) if dataset is not None else None
        _write(report, photos, spec, out, markdown)
        partial.end()
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    elif markdown:
        from srdeploy.pages.text import to_markdown
        from srdeploy.serve.bench.page import bench_page

        sys.stdout.write(to_markdown(bench_page(report)))
    else:
        _show(report)
    if not report.passed:
        raise typer.Exit(1)


def _several(text: str, option: str, parse: Callable[[str], Value]) -> list[Value]:
    """["a", "b"] parsed, from "a,b". Raises UserError for an empty or repeated one."""
    from srdeploy.errors import UserError

    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option} '{text}': an entry between the commas is empty")
    if len(set(parts)) < len(parts):
        raise UserError(f"{option} '{text}': an entry is given twice")
    return [parse(part) for part in parts]


def _count(text: str) -> int:
    from srdeploy.errors import UserError

    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch '{text}': a number of images is needed, e.g. 1,8")
    return int(text)


def _require_folder(out: Path | None) -> None:
    """Raises UserError where --out can't become the report's folder, before minutes are spent."""
    from srdeploy.errors import UserError

    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder for {REPORT_HTML}")


def _write(
    report: "BenchReport",
    photos: Sequence["DifferingPhoto"],
    spec: "Spec | None",
    out: Path,
    markdown: bool,
) -> None:
    from srdeploy import console
    from srdeploy.files import write_json, write_whole
    from srdeploy.pages.report import write_report
    from srdeploy.pages.text import to_markdown
    from srdeploy.serve.bench.page import bench_page

    page = bench_page(report, photos, spec)
    write_json(out / REPORT_JSON, report.model_dump(mode="json"))
    if markdown:
        write_whole(out / REPORT_MARKDOWN, to_markdown(page))
    write_report(page, out / REPORT_HTML)
    console.done(f"wrote {out / REPORT_HTML}: open it in a browser")


def _show(report: "BenchReport") -> None:
    """Tables on stdout; verdicts and warnings, the last thing read, on stderr."""
    from srdeploy import console
    from srdeploy.pages.text import rich_table, tell_verdicts
    from srdeploy.serve.bench.page import bench_verdicts
    from srdeploy.serve.bench.tables import summary_tables, warnings

    for table in summary_tables(report):
        console.print_table(rich_table(table))
    for warning in warnings(report):
        console.warn(warning)
    tell_verdicts(bench_verdicts(report))


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    add_verb(app, "bench", bench, USE)
