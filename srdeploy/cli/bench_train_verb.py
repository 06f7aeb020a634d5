"""`srdeploy bench train`: what self-regulation costs while training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srdeploy.cli.options import Device, Json, NetworkOptions, Quiet
from srdeploy.cli.verbs import USE, add_verb

if TYPE_CHECKING:
    from rich.table import Table

    from srdeploy.train.step_cost import StepCost


def bench_train(
    network: Annotated[
        str,
        typer.Argument(help="A built-in network's name, or your own as PACKAGE.MODULE:FUNCTION."),
    ] = "deeplabv2-mobilenetv2",
    option: NetworkOptions = None,
    classes: Annotated[
        int, typer.Option(metavar="N", help="Number of classes.", min=2, max=255)
    ] = 21,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Size of the images, as --crop in training.")
    ] = "320x320",
    batch: Annotated[int, typer.Option(metavar="N", help="Images per step, 2 or more.")] = 2,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds, with two steps of each variant.", min=3)
    ] = 10,
    device: Device = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads (default: torch's choice).", min=1)
    ] = None,
    compile_steps: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile all variants, the baseline too, as train --set compile=true does.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a JSON report.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure what self-regulation costs while training: time and memory of one step.

    Four ways to train one network step in turn in one process, on a synthetic batch:

    baseline: the plain network, as srdeploy train --no-sr trains it.

    mea: with lean exits that learn from the labels, as training begins, before feedback sets in.

    lean: mea and the feedback between exits (SR-F and SR-L), as srdeploy train goes on.

    authors: the same with the heads of the authors' published code.

    Ratios are of medians, with a 95 % interval, beside the baseline's ratio to itself: smaller
    differences than that are noise. Memory is measured in a fresh process for each variant. None of
    this cost is deployed. To benchmark a folder called train: srdeploy bench ./train

    Example: srdeploy bench train

    Example: srdeploy bench train unet --option width=16 --size 256x256 --classes 12 --rounds 20

    Example: srdeploy bench train deeplabv2-resnet101 --batch 8 --device cuda --out cost.json
    """
    from srdeploy import console
    from srdeploy.files import write_json
    from srdeploy.train.step_cost import step_cost, training_of
    from srdeploy.validation import parse_options, parse_size

    console.set_quiet(quiet or as_json)
    config = training_of(
        network,
        parse_options(option or []),
        classes,
        parse_size(size, "--size"),
        batch,
        device,
        compile_steps,
    )
    found = step_cost(config, classes, rounds, threads)
    if out is not None:
        write_json(out, found.model_dump(mode="json"))
    if as_json:
        console.print_json(found.model_dump(mode="json"))
    else:
        console.print_table(step_table(found))


def step_table(found: "StepCost") -> "Table":
    """One row per variant."""
    from rich.table import Table
    from rich.text import Text

    height, width = found.size
    table = Table(
        title=Text(
            f"one training step: {found.network}, {found.classes} classes, batch {found.batch} of "
            f"{height}x{width}"
        ),
        caption=Text("\n".join(_remarks(found))),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("trained")
    for header in ("step, ms", "time [95 %]", "memory, MiB", "memory", "parameters added"):
        table.add_column(header, justify="right")
    for row in found.variants:
        share = 100 * row.parameters_added / max(1, found.parameters)
        table.add_row(
            row.name,
            f"{row.median_ms:.1f}",
            "1" if row.time is None else str(row.time),
            f"{row.memory_mib:.0f}",
            f"{row.memory_ratio:.3f}",
            f"{row.parameters_added:,} ({share:.1f} %)" if row.parameters_added else "0",
        )
    return table


def _remarks(found: "StepCost") -> list[str]:
    lines = [f"{row.name}: {row.description}" for row in found.variants]
    lines += [
        f"time, memory: over the baseline's; {found.rounds} rounds, two steps of each in every one",
        f"noise floor, the baseline's time against itself: {found.floor}",
    ]
    if found.variants[0].process_mib is None:
        lines.append("memory, MiB: peak of torch's allocator on the GPU, in a fresh process")
    else:
        lines.append(
            "memory, MiB: peak above what the process held before the network was built; the whole "
            "process's is in the JSON"
        )
    lines.append(
        f"on {found.device}, {found.threads} CPU threads, {found.arithmetic}, {found.layout}; "
        "without reading photos"
    )
    if found.compiled:
        lines.append(
            "compiled: all variants, through torch.compile"
            + ("" if found.variants[0].process_mib is None else "; memory includes the compiler's")
        )
    unsettled = [row.name for row in found.variants if not row.settled]
    if unsettled:
        lines.append(f"times never settled while warming up: {', '.join(unsettled)}")
    return lines


def register(app: typer.Typer) -> None:
    """Adds `bench train` to the command line."""
    add_verb(app, "bench train", bench_train, USE)
