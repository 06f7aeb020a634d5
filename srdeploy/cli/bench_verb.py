"""`srdeploy bench`: latency with a verdict, accuracy and cost of artifacts against a baseline."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from srdeploy.cli.options import Classes, Device, Json, Quiet, Split, Threads
from srdeploy.runtimes.registry import precision_labels, runtime_names

if TYPE_CHECKING:
    from srdeploy.serve.bench.accuracy import DifferingPhoto
    from srdeploy.serve.bench.results import BenchReport
    from srdeploy.spec import Spec

Value = TypeVar("Value")

REPORT_HTML = "report.html"
REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"


def bench(
    artifacts: Annotated[
        list[Path],
        typer.Argument(help="The baseline, then what is compared with it.", show_default=False),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Data set: real photos to time, and accuracy of each.")
    ] = None,
    split: Split = "val",
    limit: Annotated[int | None, typer.Option(help="Score the first N photos.", min=1)] = None,
    margin: Annotated[
        float, typer.Option(help="Percent within which latencies count as equal.", min=0.01)
    ] = 1.0,
    budget: Annotated[
        float, typer.Option(help="Seconds to measure each setting for, at most.", min=1)
    ] = 120.0,
    runtime: Annotated[
        str,
        typer.Option(help=f"One or several, with commas: {', '.join(runtime_names())}."),
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"One or several of fp32, fp16, bf16: the arithmetic of {precision_labels()}; "
            "float32 graphs are converted for other runtimes. By default as stored."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images per run, one or several: 1,8.")] = "1",
    size: Annotated[
        str | None,
        typer.Option(
            help="HEIGHTxWIDTH, one or several; by default the first artifact's usual one."
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run that an artifact was exported from, where its manifest's command does not "
            "lead there; may be repeated."
        ),
    ] = None,
    exits_left_in: Annotated[
        bool,
        typer.Option(
            help="Also time a regulated checkpoint's graph with its exits: what stripping saves."
        ),
    ] = True,
    builds: Annotated[
        int, typer.Option(help="tensorrt: builds of each engine, which take turns.", min=1)
    ] = 3,
    costs: Annotated[
        bool,
        typer.Option(help="Count GMACs; measure memory and time to first inference."),
    ] = True,
    classes: Classes = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown; with --out, write report.md too.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a benchmark that was stopped in --out.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show that artifacts are as fast as a baseline, and compare their accuracy and cost.

    All run in turn, round after round, each round with freshly opened sessions, until the noise is
    small enough or the budget is spent. Two sessions of the baseline give the noise floor. Two
    one-sided tests decide: EQUIVALENT (the ratio lies within the margin), DIFFERENT (outside it),
    or NOT SHOWN, with the number of rounds that would be needed. The margin is never below the
    floor.

    With --data: mIoU and both failures, the gain over the baseline with its interval, and whether
    each export has its own checkpoint's labels.

    Exit code 0 when every verdict is EQUIVALENT and every export matches its checkpoint, else 1.

    Example: srdeploy bench deploy/baseline deploy/regulated --data data/camvid --out bench

    Example: srdeploy bench deploy/a deploy/b --runtime torch,onnxruntime --batch 1,8

    What self-regulation costs in training: srdeploy bench train --help
    """
    from srdeploy import console
    from srdeploy.artifacts.artifact import spec_from_classes
    from srdeploy.data import open_dataset, spec_for
    from srdeploy.serve.bench.entries import every_setting
    from srdeploy.serve.bench.matrix import Bench
    from srdeploy.serve.bench.measure import Plan
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
    plan = Plan(margin=margin / 100, budget_s=budget)
    job = Bench(device, threads, plan, dataset, limit, costs)
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
        from srdeploy.serve.bench.text import to_markdown

        sys.stdout.write(to_markdown(report))
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
        raise UserError(f"{option} '{text}': an entry stands there twice")
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
    from srdeploy.serve.bench.page import bench_page
    from srdeploy.serve.bench.text import to_markdown

    write_json(out / REPORT_JSON, report.model_dump(mode="json"))
    if markdown:
        write_whole(out / REPORT_MARKDOWN, to_markdown(report))
    write_report(bench_page(report, photos, spec), out / REPORT_HTML)
    console.done(f"wrote {out / REPORT_HTML}: open it in a browser")


def _show(report: "BenchReport") -> None:
    """Tables on stdout; verdicts and warnings, the last thing read, on stderr."""
    from srdeploy import console
    from srdeploy.serve.bench.report_tables import answers, equal_labels, label, warnings
    from srdeploy.serve.bench.results import Outcome
    from srdeploy.serve.bench.text import tables

    for table in tables(report):
        console.print_table(table)
    tellers = {Outcome.EQUIVALENT: console.done, Outcome.DIFFERENT: console.failed}
    for warning in warnings(report):
        console.warn(warning)
    several = len(report.cells) > 1
    for answer in answers(report):
        where = f" ({label(answer.cell)})" if several else ""
        tell = tellers.get(answer.verdict.outcome, console.warn)
        tell(f"{answer.verdict.outcome}: {answer.claim}{where}: {answer.verdict.reason}")
    for row in report.accuracy.rows if report.accuracy is not None else ():
        if row.checkpoint is not None:
            tell = console.done if row.checkpoint.passed else console.failed
            tell(
                f"{row.name} against its checkpoint {row.checkpoint.checkpoint}: "
                f"{equal_labels(row.checkpoint.agreement)} % equal labels, "
                f"{100 * row.checkpoint.miou_difference:+.3f} points of mIoU"
            )


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command("bench")(bench)
