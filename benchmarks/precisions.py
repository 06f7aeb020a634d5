"""What each precision costs and saves: size, agreement, mIoU and CPU latency, network by network.

    python benchmarks/precisions.py runs/* --data ../data/camvid --limit 20 --out precisions.json

Each run is exported and certified in float32, then converted to fp16, bf16 and both kinds of int8.
Labels are compared, and scored against the masks, on the first photos of val, in onnxruntime; what
it can't run (bf16) in float32 with every 16-bit tensor rounded. Latency is a ratio to the float32
graph in the same runtime: all variants run in turn, in one process.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from journal import Journal

from srdeploy import console
from srdeploy.data import DataSet, open_dataset
from srdeploy.environment import PACKAGES, describe_environment
from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.export.precision.half import emulate
from srdeploy.export.precision.stage import TypeOptions, convert
from srdeploy.files import read_json, write_json, write_whole
from srdeploy.imaging import fit, restore
from srdeploy.metrics import Score
from srdeploy.runs import open_run
from srdeploy.runtimes.base import Runtime
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.bench.entries import bench_images
from srdeploy.serve.bench.measure import BenchPlan, TimedArtifact, measure
from srdeploy.serve.bench.verdict import ratio_interval

TYPES = {
    "fp16": TypeOptions(precision="fp16"),
    "bf16": TypeOptions(precision="bf16"),
    "int8, cpu": TypeOptions(precision="int8", target="cpu"),
    "int8, tensorrt": TypeOptions(precision="int8", target="tensorrt"),
}
NOT_IN_ONNXRUNTIME = ("bf16",)
"""It has no kernels for these types on a CPU."""


def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, one for each network.")],
    data: Annotated[Path, typer.Option(help="The data set that they were trained on.")],
    limit: Annotated[int, typer.Option(help="Photos of val to compare on.", min=1)] = 101,
    budget: Annotated[float, typer.Option(help="Seconds of each latency comparison.")] = 60.0,
    calibration: Annotated[int, typer.Option(help="Photos that int8 is calibrated on.")] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("precisions.json"),
) -> None:
    """Convert every run to every precision; compare, score and time the results."""
    if not data.is_dir():
        raise SystemExit(f"no such data set: {data}: nothing was measured")
    journal = Journal()
    dataset = open_dataset(data, "val")
    networks: dict[str, Any] = read_json(out)["networks"] if out.exists() else {}
    for run in runs:
        name = open_run(run).network.name
        if name in networks:
            continue  # measured before: the file grows network by network
        with tempfile.TemporaryDirectory(prefix="srdeploy-") as text:
            folder = Path(text)
            journal.run("export", run, "--out", folder / "fp32")
            files = convert_all(folder, run, calibration)
            rows = compare(files, dataset, limit, threads)
            for runtime in ("onnxruntime", "openvino"):
                for variant, ratio in latency(files, runtime, dataset, budget, threads).items():
                    rows[variant][runtime] = ratio
        networks[name] = rows
        write_json(
            out,
            {
                "environment": describe_environment([*PACKAGES, "openvino"]),
                "photos": min(limit, len(dataset)),
                "budget_s": budget,
                "calibration": calibration,
                "threads": threads,
                "networks": networks,
            },
        )
    print(table(networks))


def convert_all(folder: Path, run: Path, calibration: int) -> dict[str, Path]:
    """Variant -> its file; the float32 one first."""
    certified = folder / "fp32" / "model.onnx"
    opened = open_run(run)
    plain = read_model(certified)
    files = {"fp32": certified}
    for variant, chosen in TYPES.items():
        types = chosen.model_copy(
            update={
                "calibration": Path(opened.config["data"]) if chosen.precision == "int8" else None,
                "calibration_count": calibration,
            }
        )
        files[variant] = folder / variant.replace(", ", "-") / "model.onnx"
        write_whole(
            files[variant],
            convert(plain, opened.spec, types).SerializeToString(deterministic=True),
        )
    return files


def compare(
    files: dict[str, Path], dataset: DataSet, limit: int, threads: int | None
) -> dict[str, dict[str, Any]]:
    """Size, agreement with float32 and mIoU of each variant."""
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        runtimes, scores = {}, {}
        for variant, file in files.items():
            runnable = file
            if variant in NOT_IN_ONNXRUNTIME:
                runnable = file.with_name("emulated.onnx")
                onnx.save(emulate(onnx.load(str(file))), str(runnable))
            runtimes[variant] = stack.enter_context(open_runtime(runnable, threads=threads))
            scores[variant] = Score(runtimes[variant].spec)
        equal = dict.fromkeys(files, 0)
        pixels = 0
        count = min(limit, len(dataset))
        for index in console.track(range(count), "compare", count):
            photo, labels = dataset.read(index)
            images = fit(photo, runtimes["fp32"].spec)[None]
            found = {variant: one.run(images)[0] for variant, one in runtimes.items()}
            pixels += found["fp32"].size
            for variant, predicted in found.items():
                equal[variant] += int(np.count_nonzero(predicted == found["fp32"]))
                scores[variant].update(labels, restore(predicted, *labels.shape))
        baseline = scores["fp32"].result().miou
        for variant, file in files.items():
            miou = scores[variant].result().miou
            rows[variant] = {
                "bytes": file.stat().st_size,
                "agreement": equal[variant] / pixels,
                "miou": miou,
                "miou_difference_points": 100 * (miou - baseline),
                "computed_by": runtimes[variant].precision,
            }
    return rows


def latency(
    files: dict[str, Path], runtime: str, dataset: DataSet, budget: float, threads: int | None
) -> dict[str, dict[str, Any]]:
    """Ratio to float32 of each variant that the runtime takes. OpenVINO computes bf16 in bf16 where
    the processor does, else in float32, and says so."""
    chosen: dict[str, tuple[Path, str | None]] = {
        variant: (file, None)
        for variant, file in files.items()
        if runtime != "onnxruntime" or variant not in NOT_IN_ONNXRUNTIME
    }
    if runtime == "openvino" and computes_in_bf16(files["fp32"]):
        chosen["bf16"] = (files["fp32"], "bf16")
    sides = [
        TimedArtifact(variant, opener(file, runtime, threads, precision))
        for variant, (file, precision) in chosen.items()
    ]
    first = open_runtime(files["fp32"], runtime=runtime, threads=threads)
    images = bench_images(first, dataset, None, 1)
    found = measure(sides, images, BenchPlan(budget_s=budget))
    floor = interval(found.ratios(1))
    rows = {}
    for index, (variant, (file, precision)) in enumerate(chosen.items()):
        with open_runtime(file, runtime=runtime, threads=threads, precision=precision) as opened:
            computed = opened.precision
        session = index + 1 if index else 0
        rows[variant] = {
            "computed_in": computed,
            "median_ms": float(np.median(found.runs((session,)))),
            "ratio": [1.0, 1.0, 1.0] if index == 0 else interval(found.ratios(session)),
            "floor": floor,
        }
    return rows


def opener(
    file: Path, runtime: str, threads: int | None, precision: str | None
) -> Callable[[int], Runtime]:
    """Opens the same file again and again."""
    return lambda _: open_runtime(file, runtime=runtime, threads=threads, precision=precision)


def interval(log_ratios: list[float]) -> list[float]:
    """[ratio, low, high], 95 %."""
    found = ratio_interval(log_ratios)
    return [found.value, found.low, found.high]


def computes_in_bf16(file: Path) -> bool:
    """Whether OpenVINO offers bf16 arithmetic on this processor."""
    try:
        with open_runtime(file, runtime="openvino", precision="bf16"):
            return True
    except UserError as error:
        console.say(str(error))
        return False


def table(networks: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| network | precision | MB | agreement % | mIoU, points | onnxruntime | OpenVINO |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in networks.items():
        for variant, row in rows.items():
            difference = (
                f"{100 * row['miou']:.2f} %"
                if variant == "fp32"
                else f"{row['miou_difference_points']:+.2f}"
            )
            cells = [name, variant, f"{row['bytes'] / 1e6:.1f}", f"{100 * row['agreement']:.2f}"]
            cells += [difference, *(_ratio(row.get(one)) for one in ("onnxruntime", "openvino"))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "no kernels"
    value, low, high = figures["ratio"]
    if value == low == high == 1:
        return f"1 ({figures['median_ms']:.0f} ms)"
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    typer.run(main)
