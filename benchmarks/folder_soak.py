"""`srdeploy predict` over a folder that is killed at random points, and its memory when it is not.

    python benchmarks/folder_soak.py deploy/night --photos camvid/images/test --shrink 3 \
        --out soak.json

A folder of `--count` photos in sub-folders is made of the given ones by hard links (predict knows
that two symbolic links to one file are one photo), with odd files among them. The verb is ended
with SIGKILL at random points spread over the job, every fifth of them while it starts, and begun
again with the same command. After each kill all masks that are there must be whole; at the end
every mask must have the bytes that one undisturbed run gives that photo, and the manifest must have
every photo once. Then an undisturbed run does all of it again, and its resident memory is sampled.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image
from scipy import stats
from server_process import harmless
from soaked_folder import OWN, is_sound, look, make_folder

from srdeploy import console
from srdeploy.artifacts.artifact import open_artifact
from srdeploy.environment import PACKAGES, describe_environment
from srdeploy.files import sha256_of, write_json

START_S = 1.0
"""Kills while the verb starts come within so many seconds."""
DELAY_S = 0.05
"""Other kills come up to so much after the photo that they wait for."""
BLOCKS = 10
"""Memory is averaged over so many parts of the time before its slope is taken: samples that follow
each other closely are alike, and an interval from them all would be too narrow."""


@dataclass(frozen=True)
class Point:
    """When a run is killed."""

    photos: int
    """So many are in the manifest."""
    delay_s: float


class Count:
    """Photos without error in a manifest that grows."""

    def __init__(self, manifest: Path) -> None:
        self._manifest = manifest
        self._offset = self._photos = 0

    def now(self) -> int:
        """Reads what is new; --force begins the manifest anew."""
        if not self._manifest.exists():
            return 0
        with self._manifest.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = self._photos = 0
            file.seek(self._offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        lines = new.splitlines()[int(self._offset == 0) :]  # the header is no photo
        self._offset += len(new)
        self._photos += sum(b'"error": ' not in line for line in lines)
        return self._photos


def main(
    artifact: Annotated[Path, typer.Argument(help="A deploy folder or an .onnx file of ours.")],
    photos: Annotated[Path, typer.Option(help="Folder of JPEGs.")],
    count: Annotated[int, typer.Option(help="Photos in the folder.", min=1)] = 20_000,
    odd: Annotated[int, typer.Option(help="Odd files among them.", min=0)] = 60,
    kills: Annotated[int, typer.Option(help="How often it is killed.", min=0)] = 10,
    shrink: Annotated[int, typer.Option(help="The photos' sides are divided by it.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the kills and the odd files.")] = 0,
    work: Annotated[Path | None, typer.Option(help="Where folders go, and stay.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("soak.json"),
) -> None:
    """Kill it, look at what it leaves, and measure its memory."""
    files = sorted(photos.glob("*.jpg"))
    if not files:
        raise SystemExit(f"no *.jpg in {photos}: nothing was measured")
    with tempfile.TemporaryDirectory() as temporary:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": harmless(shlex.join(["python", "folder_soak.py", *sys.argv[1:]])),
            "environment": describe_environment(PACKAGES),
            "artifact_sha256": sha256_of(open_artifact(artifact).file),
            **soak(artifact, files, work or Path(temporary), count, odd, kills, shrink, seed),
        }
    write_json(out, report)
    print(table(report))
    if not report["sound"]:
        raise typer.Exit(1)


def soak(
    artifact: Path,
    files: list[Path],
    work: Path,
    count: int,
    odd: int,
    kills: int,
    shrink: int = 1,
    seed: int = 0,
    sample_s: float = 1.0,
) -> dict[str, Any]:
    """The whole measurement, in the folder `work`; see the module. sample_s: between two looks at
    the memory. `sound` in the report: nothing was lost, wrong, left over or done twice."""
    rng = np.random.default_rng(seed)
    folder = make_folder(files, work, count, odd, shrink, rng)
    expected = expected_masks(artifact, folder.originals, work / "expected")
    out = work / "out"
    struck = []
    began = time.perf_counter()
    for number, point in enumerate(kill_points(count, kills, rng), 1):
        console.say(f"kill {number}/{kills}: after {point.photos:,} photos")
        process = start(artifact, folder.path, out, work)
        killed = kill_at(process, Count(out / "manifest.jsonl"), point)
        left = look(folder, out, expected)
        struck.append({"photos": point.photos, "delay_s": point.delay_s, "killed": killed} | left)
    console.say("to the end")
    process = start(artifact, folder.path, out, work)
    told = ended(process, work)
    killed_job = look(folder, out, expected) | {
        "seconds": time.perf_counter() - began,
        "reported": told["skipped_count"],
        "exit_code": process.returncode,
    }
    console.say("undisturbed")
    process = start(artifact, folder.path, out, work, "--force")
    samples = watch(process, Count(out / "manifest.jsonl"), sample_s)
    told = ended(process, work)
    undisturbed = look(folder, out, expected) | {
        "seconds": told["seconds"],
        "images_per_s": told["images_per_s"],
        "reported": told["skipped_count"],
        "exit_code": process.returncode,
    }
    with Image.open(next(folder.originals.iterdir())) as image:
        size = list(image.size)
    return {
        "photos": count,
        "distinct_photos": len(expected),
        "width_height": size,
        "odd_files": dict(Counter(folder.odd.values())),
        "seed": seed,
        "kills": struck,
        "killed_job": killed_job,
        "undisturbed": undisturbed,
        "memory": memory_figures(samples),
        "samples": samples,
        "sound": all(is_sound(one, count, odd) for one in (killed_job, undisturbed))
        and not any(one["wrong_masks"] or one["recorded_twice"] for one in struck),
    }


def expected_masks(artifact: Path, originals: Path, out: Path) -> dict[str, str]:
    """SHA-256 of each original's mask, by its name, from one undisturbed run."""
    process = start(artifact, originals, out, out.parent)
    told = ended(process, out.parent)
    if process.returncode != 0:
        raise SystemExit(f"{told['skipped_count']} photos can't be predicted: nothing was measured")
    masks = [path for path in out.iterdir() if path.name not in OWN]
    return {path.stem: sha256_of(path) for path in masks}


def kill_points(count: int, kills: int, rng: np.random.Generator) -> list[Point]:
    """One in each of `kills` equal parts of the job; every fifth while the verb starts."""
    points = []
    for number in range(kills):
        share, delay = rng.random(2)
        photos = int(count * (number + share) / kills)
        starts = number % 5 == 4
        points.append(Point(0, START_S * delay) if starts else Point(photos, DELAY_S * delay))
    return points


def start(
    artifact: Path, photos: Path, out: Path, work: Path, *words: str
) -> subprocess.Popen[bytes]:
    """The verb. One thread a session, so that sums are added up alike however many photos are
    left; what it says goes into files in `work`."""
    command = [sys.executable, "-m", "srdeploy", "predict", str(artifact), str(photos)]
    command += ["--out", str(out), "--set", "threads=1", "--json", *words]
    with (work / "stdout").open("wb") as said, (work / "stderr").open("wb") as warned:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=warned)


def ended(process: subprocess.Popen[bytes], work: Path) -> dict[str, Any]:
    """Its summary. Ends the benchmark with its last words where it failed."""
    if process.wait() not in (0, 1):
        raise SystemExit(f"predict failed:\n{(work / 'stderr').read_text()[-3000:]}")
    told: dict[str, Any] = json.loads((work / "stdout").read_text())
    return told


def kill_at(process: subprocess.Popen[bytes], done: Count, point: Point) -> bool:
    """Whether it was still at work when SIGKILL came."""
    while process.poll() is None and done.now() < point.photos:
        time.sleep(0.002)
    time.sleep(point.delay_s)
    process.kill()
    return process.wait() < 0


def watch(
    process: subprocess.Popen[bytes], done: Count, sample_s: float
) -> list[tuple[float, int, int]]:
    """(seconds, photos done, bytes of resident memory) until the process ends, by itself."""
    found: list[tuple[float, int, int]] = []
    began = time.perf_counter()
    one = psutil.Process(process.pid)
    while process.poll() is None:
        resident = one.memory_info().rss
        photos = done.now()
        if found and photos < found[-1][1]:  # what was there before has been dropped just now
            found.clear()
        if resident:  # it has ended where there is none
            found.append((time.perf_counter() - began, photos, resident))
        time.sleep(sample_s)
    return found


def memory_figures(samples: list[tuple[float, int, int]]) -> dict[str, Any]:
    """Peak, and the slope over the second half of the photos with its 95 % interval, in MiB."""
    rows = np.array([(photos / 1000, resident / 2**20) for _, photos, resident in samples])
    late = rows[rows[:, 0] >= rows[-1, 0] / 2]
    parts = np.array_split(late, min(BLOCKS, len(late)))
    means = np.array([part.mean(0) for part in parts])
    figures: dict[str, Any] = {
        "peak_mib": float(rows[:, 1].max()),
        "half_way_mib": float(means[0, 1]),
        "end_mib": float(means[-1, 1]),
        "slope_mib_per_1000_photos": None,
    }
    if len(means) > 2 and np.ptp(means[:, 0]) > 0:
        line = stats.linregress(means[:, 0], means[:, 1])
        error = np.nan_to_num(line.stderr)  # NaN where the memory stays the same to the byte
        half = error * stats.t.ppf(0.975, len(means) - 2)
        slope = [float(line.slope), float(line.slope - half), float(line.slope + half)]
        figures["slope_mib_per_1000_photos"] = slope
    return figures


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| kill | photos recorded | masks there | wrong masks | masks not recorded yet | "
        "recorded twice | unfinished files | half a line |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(str(number), one) for number, one in enumerate(report["kills"], 1)]
    rows += [("to the end", report["killed_job"]), ("undisturbed", report["undisturbed"])]
    keys = ("recorded", "masks", "wrong_masks", "masks_not_recorded", "recorded_twice", "leftovers")
    for name, one in rows:
        cells = [name, *(f"{one[key]:,}" for key in keys), "yes" if one["half_line"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    killed, undisturbed, memory = (report[key] for key in ("killed_job", "undisturbed", "memory"))
    odd = sum(report["odd_files"].values())
    again = sum(one["masks_not_recorded"] for one in report["kills"])
    struck = sum(one["killed"] for one in report["kills"])
    slope = memory["slope_mib_per_1000_photos"]
    told = "" if slope is None else f"{slope[0]:+.3f} ({slope[1]:+.3f} to {slope[2]:+.3f})"
    width, height = report["width_height"]
    lines += [
        "",
        f"{report['photos']:,} photos of {width} x {height} and {odd} odd files; killed {struck} "
        f"times: {'sound' if report['sound'] else 'NOT SOUND'}.",
        f"{killed['recorded_truly']:,} photos are recorded with the digests of their masks, "
        f"{killed['odd_told']} odd files with a reason; {again} masks were made again, at most "
        "those under way at each kill.",
        f"Undisturbed: {undisturbed['images_per_s']:.1f} images/s. Memory at its peak "
        f"{memory['peak_mib']:.0f} MiB; slope over the second half, MiB for 1,000 photos (95 %): "
        f"{told}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
