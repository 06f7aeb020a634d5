"""Whether two checkouts make the same: compares two folders that `srdeploy demo --out` wrote.

    python benchmarks/same_outputs.py old/demo new/demo --out same.md

Looks at deploy/ and masks/. Graphs and pictures must be equal byte for byte. Of JSON everything is
compared but what the clock, the place or the machine decides, and that is listed. Exit code 0: all
is equal; 1: something is not.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from srdeploy.errors import UserError
from srdeploy.files import sha256_of, write_whole
from srdeploy.imaging import read_labels

PARTS = ("deploy", "masks")
DIGESTS = ("digest_plain", "digest_deployed", "graph_digest")
LEFT_OUT = {"made", "command", "path", "artifact", "photo", "environment", "versions"}
"""Keys of what differs from run to run, with all that is below them."""
DURATIONS = ("seconds", "_ms", "_s", "_ns")
"""Ends of keys that hold a time."""

Row = tuple[str, str, bool, str]
"""File, what was compared, whether it is equal, and what is not."""


def is_left_out(trail: tuple[str, ...]) -> bool:
    """trail: the keys down to a value."""
    # The certificate's own checksum moves with its environment; its keys are compared instead.
    if trail[-2:] == ("files", "certificate.json"):
        return True
    return trail[-1] in LEFT_OUT or trail[-1].endswith(DURATIONS)


def leaves(value: Any, trail: tuple[str, ...], left_out: set[str]) -> Iterator[tuple[str, str]]:
    """Every value below, as text, by the dotted path of its keys. What is left out goes to the
    set."""
    if trail and is_left_out(trail):
        left_out.add(".".join("*" if key.isdecimal() else key for key in trail))
    elif isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, (*trail, key), left_out)
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from leaves(below, (*trail, str(index)), left_out)
    else:
        yield ".".join(trail), repr(value)  # 1, 1.0 and true differ, not-a-number does not


def read_leaves(file: Path, left_out: set[str]) -> dict[str, str]:
    """Reads the leaves of a JSON file, or of a file with one object per line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return dict(leaves(json.loads(text), (), left_out))
    # Photos are recorded as they are done, in an order that the machine decides.
    records = sorted(map(json.loads, text.splitlines()), key=lambda one: one.get("name", ""))
    return dict(leaves(records, (), left_out))


def compare_json(name: str, old: Path, new: Path, left_out: set[str]) -> Iterator[Row]:
    """The digests of graphs in a row of their own."""
    try:
        ours, theirs = read_leaves(old, left_out), read_leaves(new, left_out)
    except ValueError as error:
        yield name, "JSON keys", False, f"no JSON: {error}"
        return
    keys = [*ours, *(key for key in theirs if key not in ours)]
    for what, wanted in (("graph digests", True), ("JSON keys", False)):
        chosen = [key for key in keys if (key.rpartition(".")[2] in DIGESTS) == wanted]
        if not chosen and wanted:
            continue
        pairs = {key: (ours.get(key, "absent"), theirs.get(key, "absent")) for key in chosen}
        told = [f"{key}: {one} / {other}" for key, (one, other) in pairs.items() if one != other]
        yield name, f"{len(chosen)} {what}", not told, "; ".join(told)


def compare_bytes(name: str, old: Path, new: Path) -> Row:
    digests = sha256_of(old), sha256_of(new)
    told = "" if digests[0] == digests[1] else f"{digests[0][:16]} / {digests[1][:16]}"
    return name, "sha256", not told, told


def compare_pixels(name: str, old: Path, new: Path) -> Row:
    try:
        ours, theirs = read_labels(old), read_labels(new)
    except UserError as error:
        return name, "label pixels", False, str(error)
    if ours.shape != theirs.shape:
        return name, "label pixels", False, f"{ours.shape} / {theirs.shape}"
    differing = int((ours != theirs).sum())
    told = f"{differing} of {ours.size} pixels" if differing else ""
    return name, "label pixels", not told, told


def files_below(side: Path) -> set[str]:
    files = (path for part in PARTS for path in (side / part).rglob("*") if path.is_file())
    return {path.relative_to(side).as_posix() for path in files}


def compare(old: Path, new: Path, left_out: set[str]) -> Iterator[Row]:
    """A row for each comparison of each file that either folder has."""
    ours, theirs = files_below(old), files_below(new)
    for name in sorted(ours | theirs):
        pair = old / name, new / name
        if name not in ours & theirs:
            yield name, "presence", False, f"only in {'old' if name in ours else 'new'}"
        elif pair[0].suffix in (".json", ".jsonl"):
            yield from compare_json(name, *pair, left_out)
        else:
            yield compare_bytes(name, *pair)
            # Overlays and the legend are pictures in colour: they have no labels.
            parts = Path(name).parts
            if parts[0] == "masks" and len(parts) == 2 and parts[1] != "legend.png":
                yield compare_pixels(name, *pair)


def main(
    old: Annotated[Path, typer.Argument(help="A folder of `srdeploy demo`.")],
    new: Annotated[Path, typer.Argument(help="The folder of the other checkout's.")],
    out: Annotated[Path | None, typer.Option(help="Where the table goes, in Markdown.")] = None,
) -> None:
    """Compare the graphs, certificates and masks of two demos."""
    for side in (old, new):
        for part in PARTS:
            if not any((side / part).rglob("*")):
                raise SystemExit(f"nothing in {side / part}: nothing was compared")
    left_out: set[str] = set()
    rows = list(compare(old, new, left_out))
    lines = ["| file | compared | equal | what differs |", "| --- | --- | --- | --- |"]
    for name, what, equal, told in rows:
        escaped = told.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {what} | {'yes' if equal else '**no**'} | {escaped} |")
    lines += ["", "Left out of JSON: " + (", ".join(sorted(left_out)) or "nothing") + "."]
    if out is not None:
        write_whole(out, "\n".join(lines) + "\n")
    wrong = [row for row in rows if not row[2]]
    for name, what, _, told in wrong:
        print(f"{name}: {what}: {told}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} comparisons are equal\n{lines[-1]}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
