"""How often `srdeploy bench` is right: its own loop and verdict on machines whose truth is known.

    python benchmarks/power.py                       # 100 benchmarks at each of four true shifts
    python benchmarks/power.py --shifts 0,3 --benches 60 --json

A simulated machine takes the place of clock and sessions; everything else (warming up, order,
rounds, when to stop, the tests) is what `srdeploy bench` runs. Its times have a slow drift, noise
that resembles its neighbours (AR(1)), rare long delays with a heavy tail, an offset of each opened
session that stays for its life, and first runs that are slower. The second artifact is slower by
the true shift.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from srdeploy import console
from srdeploy.environment import describe_environment
from srdeploy.files import write_json
from srdeploy.imaging import Pixels
from srdeploy.serve.bench.measure import BenchPlan, TimedArtifact, TimedSession, measure
from srdeploy.serve.bench.results import LatencyOutcome
from srdeploy.serve.bench.verdict import judge
from srdeploy.validation import Settings

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
LATENCY_S = 0.045


class Noise(Settings):
    """A machine's habits; deviations are of the logarithm of a run's time."""

    session: float
    """Of the offset that an opened session keeps."""
    drift: float
    """Amplitude of a slow wave; its period, of 20 to 200 s, is drawn for each benchmark."""
    neighbours: float
    """Of noise that resembles its neighbours (correlation 0.9 from run to run)."""
    alone: float
    """Of noise of each run by itself."""
    delays: float
    """Share of runs that something holds up, by a Pareto time: 2.5 moments, at least nothing."""


MACHINES = {
    "quiet": Noise(session=0.002, drift=0.01, neighbours=0.01, alone=0.01, delays=0.005),
    "shared": Noise(session=0.006, drift=0.1, neighbours=0.05, alone=0.03, delays=0.05),
    "crowded": Noise(session=0.03, drift=0.3, neighbours=0.2, alone=0.1, delays=0.2),
}


class Machine:
    """Time as it passes while sessions run."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise = noise
        self.rng = np.random.default_rng(seed)
        self.now = 0.0
        self.neighbour = 0.0
        self.period = self.rng.uniform(20, 200)
        self.phase = self.rng.uniform(0, 2 * np.pi)

    def spend(self, seconds: float) -> None:
        """Lets a run of `seconds` on an idle machine pass."""
        noise, rng = self.noise, self.rng
        self.neighbour = 0.9 * self.neighbour + np.sqrt(1 - 0.81) * rng.normal(0, noise.neighbours)
        late = self.neighbour + rng.normal(0, noise.alone)
        late += noise.drift * np.sin(self.phase + 2 * np.pi * self.now / self.period)
        if rng.random() < noise.delays:
            late += 0.3 * rng.pareto(2.5)
        self.now += seconds * np.exp(late)


class SimulatedSession:
    """An opened artifact that only lets time pass."""

    def __init__(self, machine: Machine, factor: float) -> None:
        self.machine = machine
        self.factor = factor
        self.runs = 0

    def __enter__(self) -> "SimulatedSession":
        self.machine.now += 0.1
        self.factor *= np.exp(self.machine.rng.normal(0, self.machine.noise.session))
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def timed_run(self, images: Pixels) -> tuple[Pixels, None]:
        """One run; the first ones are slower."""
        self.runs += 1
        self.machine.spend(LATENCY_S * self.factor * (1 + 0.8 / self.runs**3))
        return images, None


def one_benchmark(noise: Noise, shift: float, seed: int, plan: BenchPlan) -> dict[str, Any]:
    """Verdict and effort of one benchmark on a fresh machine; shift: e.g. 0.03."""
    machine = Machine(noise, seed)

    def side(name: str, factor: float) -> TimedArtifact:
        def make(opening: int) -> TimedSession:
            return SimulatedSession(machine, factor)

        return TimedArtifact(name, make)

    sides = [side("baseline", 1.0), side("other", 1 + shift)]
    found = measure(sides, IMAGES, plan, clock=lambda: machine.now)
    ratios = found.ratios(2)
    verdict = judge(ratios, found.ratios(1), plan.margin)
    beyond = shift > verdict.margin
    wrong = verdict.outcome is (LatencyOutcome.EQUIVALENT if beyond else LatencyOutcome.DIFFERENT)
    return {
        "outcome": verdict.outcome,
        "wrong": wrong,
        "margin": verdict.margin,
        "rounds": len(ratios),
        "seconds": found.seconds,
        "deviation": float(np.std(ratios, ddof=1)),
    }


def rates(noise: Noise, shift: float, benches: int, plan: BenchPlan) -> dict[str, Any]:
    """Shares of the outcomes, and of those that are wrong by their own margin (which may have been
    raised to the floor), over `benches` benchmarks; medians of the rest."""
    found = [one_benchmark(noise, shift, seed, plan) for seed in range(benches)]
    outcomes = Counter(one["outcome"] for one in found)
    return {
        "shift": shift,
        "benches": benches,
        **{outcome.value: outcomes[outcome] / benches for outcome in LatencyOutcome},
        "wrong": sum(one["wrong"] for one in found) / benches,
        **{
            f"median_{name}": float(np.median([one[name] for one in found]))
            for name in ("margin", "rounds", "seconds", "deviation")
        },
    }


def main(
    shifts: Annotated[str, typer.Option(help="True shifts in percent.")] = "0,0.5,1,3",
    benches: Annotated[int, typer.Option(help="Benchmarks per shift.", min=1)] = 100,
    machines: Annotated[str, typer.Option(help="Which machines.")] = ",".join(MACHINES),
    budget: Annotated[float, typer.Option(help="Simulated seconds, as --budget.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
) -> None:
    """Count the verdicts of simulated benchmarks."""
    console.set_quiet(True)
    plan = BenchPlan(budget_s=budget)
    found = {
        name: [
            rates(MACHINES[name], float(shift) / 100, benches, plan) for shift in shifts.split(",")
        ]
        for name in machines.split(",")
    }
    noise = {name: MACHINES[name].model_dump() for name in found}
    result = {"plan": plan.model_dump(), "noise": noise, "rates": found}
    if out is not None:
        write_json(out, {"environment": describe_environment(), **result})
    if as_json:
        console.print_json(result)
        return
    for name, rows in found.items():
        console.print_table(table_of(f"a {name} machine, {benches} benchmarks each", rows))


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """One row per true shift."""
    table = Table(title=title)
    headers = ("true shift", *LatencyOutcome, "wrong", "rounds", "seconds", "spread of rounds")
    for name in headers:
        table.add_column(str(name), justify="right")
    for row in rows:
        table.add_row(
            f"{100 * row['shift']:g} %",
            *(f"{100 * row[outcome]:.0f} %" for outcome in LatencyOutcome),
            f"{100 * row['wrong']:.0f} %",
            f"{row['median_rounds']:.0f}",
            f"{row['median_seconds']:.0f}",
            f"{100 * row['median_deviation']:.1f} %",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
