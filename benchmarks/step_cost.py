"""What self-regulation costs in training: one step's time and peak memory over the baseline's.

    python benchmarks/step_cost.py                      # DeepLab-v2 ResNet-101, 321x321, batch 2
    python benchmarks/step_cost.py --network unet --option width=8 --size 64 --steps 5
    python benchmarks/step_cost.py --device cuda --batch 8 --out step_cost.json

Time: all variants live in one process and take steps in turn (A B C D A B C D ...), so that what
else the machine does falls on all of them alike; the ratio is that of medians, with a bootstrap
interval. Memory: each variant runs alone in a fresh process; on the CPU its peak resident size
(torch itself included), on CUDA the peak of torch's allocator.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from rich.table import Table
from scipy import stats

from srdeploy import console
from srdeploy.environment import describe_environment
from srdeploy.errors import UserError
from srdeploy.files import write_json
from srdeploy.models import make_network
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

VARIANTS: dict[str, tuple[str, RegulationConfig, float]] = {
    "baseline": ("baseline", RegulationConfig(enabled=False), 1.0),
    "mea": ("lean exits, before feedback", RegulationConfig(), 0.0),
    "lean": ("lean exits, with feedback", RegulationConfig(), 1.0),
    "authors": ("the authors' heads and weights", RegulationConfig.authors(), 1.0),
}
"""Name -> description, settings, share of training done."""


class Trainee:
    """One variant, ready to take training steps on made-up data."""

    def __init__(
        self, variant: str, network: str, options: dict[str, Any], setting: dict[str, Any]
    ) -> None:
        _, settings, self.progress = VARIANTS[variant]
        self.device = torch.device(setting["device"])
        torch.manual_seed(0)
        plain = make_network(network, setting["classes"], **options).to(self.device)
        self.regulated = SelfRegulation(plain, setting["classes"], settings=settings)
        self.optimizer = torch.optim.SGD(self.regulated.parameters(), lr=1e-4, momentum=0.9)
        shape = (setting["batch"], setting["size"], setting["size"])
        self.images = torch.randn(shape[0], 3, *shape[1:], device=self.device)
        self.labels = torch.randint(
            setting["classes"], shape, dtype=torch.uint8, device=self.device
        )

    def step(self) -> float:
        """One training step; its time in seconds, waiting for the device."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.regulated.losses(self.images, self.labels, self.progress).total.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_memory(variant: str, network: str, options: dict[str, Any], setting: Any) -> None:
    """Takes two steps (momentum buffers appear in the first) and prints the peak in MiB as JSON."""
    trainee = Trainee(variant, network, options, setting)
    for _ in range(2):
        trainee.step()
    if trainee.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainee.device) / 2**20
    else:
        # On Linux in KiB, on macOS in bytes.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    console.print_json({"peak_mib": peak})


def memory_in_fresh_process(variant: str) -> float:
    """The peak in MiB of one variant, measured by this script with the same arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"measuring {variant}'s memory failed: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout)["peak_mib"])


def ratio_of_medians(times: list[float], base: list[float]) -> dict[str, float]:
    """median(times) / median(base) with a 95 % bootstrap interval that keeps rounds together."""
    found = stats.bootstrap(
        (np.asarray(times), np.asarray(base)),
        _ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return {"ratio": float(_ratio(times, base)), "low": float(low), "high": float(high)}


def _ratio(times: Any, base: Any, axis: int = -1) -> Any:
    return np.median(times, axis=axis) / np.median(base, axis=axis)


def time_steps(trainees: dict[str, Trainee], steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each variant, taken in turn after a warm-up round of two."""
    times: dict[str, list[float]] = {variant: [] for variant in trainees}
    for number in console.track(range(-2, steps), "rounds"):
        for variant, trainee in trainees.items():
            seconds = trainee.step()
            if number >= 0:
                times[variant].append(seconds)
    return times


def report(
    times: dict[str, list[float]], memory: dict[str, float], context: dict[str, Any]
) -> dict[str, Any]:
    """All figures as one JSON object; times in seconds, memory in MiB, ratios over the baseline."""
    rows = {
        variant: {
            "description": VARIANTS[variant][0],
            "median_s": float(np.median(found)),
            "time": ratio_of_medians(found, times["baseline"]),
            "peak_mib": memory[variant],
            "memory_ratio": memory[variant] / memory["baseline"],
            "steps_s": found,
        }
        for variant, found in times.items()
    }
    return {**context, "variants": rows}


def table_of(result: dict[str, Any]) -> Table:
    """The report for people."""
    table = Table(
        title=(
            f"One training step: {result['network']}, {result['size']}x{result['size']}, "
            f"batch {result['batch']}, {result['classes']} classes, {result['steps']} rounds"
        )
    )
    for name in ("", "step, ms", "time / baseline (95 %)", "peak, MiB", "memory / baseline"):
        table.add_column(name, justify="left" if name == "" else "right")
    for row in result["variants"].values():
        ratio = row["time"]
        table.add_row(
            row["description"],
            f"{1000 * row['median_s']:.1f}",
            f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            f"{row['peak_mib']:.0f}",
            f"{row['memory_ratio']:.3f}",
        )
    return table


def parsed_options(texts: list[str]) -> dict[str, Any]:
    """["width=8"] -> {"width": 8}. Raises UserError for a text without '='."""
    options = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--option {text}: write NAME=VALUE, e.g. width=8")
        options[name] = yaml.safe_load(value)
    return options


def main(
    network: Annotated[str, typer.Option(help="A network's name.")] = "deeplabv2-resnet101",
    option: Annotated[
        list[str] | None, typer.Option(help="A network's option, NAME=VALUE.")
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 321,
    batch: Annotated[int, typer.Option(min=2, help="Images per step.")] = 2,
    classes: Annotated[int, typer.Option(min=2, max=255)] = 21,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each variant.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times training steps of the baseline and three regulated variants, and their peak memory."""
    options = parsed_options(option or [])
    setting = {"size": size, "batch": batch, "classes": classes, "device": device}
    if memory_of is not None:
        measure_memory(memory_of, network, options, setting)
        return
    memory = {
        variant: memory_in_fresh_process(variant)
        for variant in console.track(VARIANTS, "memory, each in a fresh process")
    }
    trainees = {variant: Trainee(variant, network, options, setting) for variant in VARIANTS}
    context = {"network": network, "options": options, **setting, "steps": steps}
    context["threads"] = torch.get_num_threads()
    context |= describe_environment()
    if device == "cuda":
        context["gpu"] = torch.cuda.get_device_name()
    result = report(time_steps(trainees, steps), memory, context)
    if out is not None:
        write_json(out, result)
    if as_json:
        console.print_json(result)
    else:
        console.print_table(table_of(result))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        console.failed(str(error))
        sys.exit(2)
