"""Where the outputs of each photo go: no two in one place, and none where a folder is needed.

A listing's table `photos` holds, for each photo, its source, the source's `label`, `suffixed` (the
path below the source, made safe) and `stem` (the same without suffix); `name` is chosen here.
"""

import hashlib
import os
import sqlite3
from functools import lru_cache

LONGEST_PART = 240
"""Bytes of a folder or file in a name: 255 less suffixes such as .json, and a number."""
OUTPUT_SUFFIXES = (".png", ".jpg", ".npz", ".json", ".jsonl", ".parquet")
KINDS = (("", ".png"), ("overlays/", ".jpg"), ("probabilities/", ".npz"), ("rle/", ".json"))
"""Folder and suffix of the outputs of a photo."""
OWN_FILES = ("classes.json", "legend.png", "manifest.jsonl", "areas.jsonl", "areas.parquet")
"""Other files in the output folder."""


def safe_name(relative: str) -> tuple[str, str]:
    """(with suffix, without) of a path below a source: folders that look like outputs get a _, so
    that a mask b.png never meets a folder b.png; parts that leave no room for suffixes are cut."""
    folder, slash, file = relative.rpartition("/")
    above = safe_folder(folder) + slash
    return above + _shortened(file), above + _shortened(os.path.splitext(file)[0])


@lru_cache(maxsize=1024)  # the folder of one photo is that of the next
def safe_folder(folder: str) -> str:
    """The part of a safe name that folders make."""
    return "/".join(_shortened(_unlike_outputs(part)) for part in folder.split("/"))


def shared_folders(one: list[str], other: list[str]) -> list[str]:
    """The folders that both begin with."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]


def choose_names(database: sqlite3.Connection) -> None:
    """Fills in `name`, the same whatever the order in which photos were found."""
    run = database.execute
    run("CREATE INDEX by_stem ON photos (stem, source)")
    # Sources that share a name get their folders' names in front.
    run(
        "CREATE TABLE sharing AS SELECT DISTINCT source FROM photos WHERE stem IN "
        "(SELECT stem FROM photos GROUP BY stem HAVING min(source) < max(source))"
    )
    run(
        "UPDATE photos SET name = CASE WHEN source IN sharing "
        "THEN CAST(label || x'2f' || stem AS BLOB) ELSE stem END"
    )
    run("DROP INDEX by_stem")
    run("CREATE INDEX by_name ON photos (name)")
    # Photos that differ only in their suffix keep it, and so does one that is called legend.
    run(
        "CREATE TABLE suffixes AS SELECT name FROM photos GROUP BY name "
        "HAVING count(*) > 1 AND count(DISTINCT substr(suffixed, length(stem) + 1)) > 1"
    )
    run("INSERT INTO suffixes VALUES (CAST('legend' AS BLOB))")
    run(
        "UPDATE photos SET name = CASE WHEN source IN sharing "
        "THEN CAST(label || x'2f' || suffixed AS BLOB) ELSE suffixed END "
        "WHERE name IN (SELECT name FROM suffixes)"
    )
    _number(database)


def _number(database: sqlite3.Connection) -> None:
    """Adds numbers to names that are still shared; the first photo keeps its name."""
    shared = "SELECT name FROM photos GROUP BY name HAVING count(*) > 1 ORDER BY name"
    database.execute(f"CREATE TABLE shared AS {shared}")
    for (name,) in database.execute("SELECT name FROM shared"):
        rows = database.execute(
            "SELECT id FROM photos WHERE name = ? ORDER BY source, suffixed, path", (name,)
        ).fetchall()
        number = 2
        # The name of the legend stays free even where a photo without suffix has it.
        for (row,) in rows[1:]:
            while _is_taken(database, b"%s-%d" % (name, number)):
                number += 1
            numbered = b"%s-%d" % (name, number)
            database.execute("UPDATE photos SET name = ? WHERE id = ?", (numbered, row))
    if _is_taken(database, b"legend"):
        number = 2
        while _is_taken(database, b"legend-%d" % number):
            number += 1
        database.execute(
            "UPDATE photos SET name = ? WHERE name = ?", (b"legend-%d" % number, b"legend")
        )


def _is_taken(database: sqlite3.Connection, name: bytes) -> bool:
    row = database.execute("SELECT 1 FROM photos WHERE name = ? LIMIT 1", (name,)).fetchone()
    return row is not None


def _unlike_outputs(folder: str) -> str:
    return f"{folder}_" if folder.lower().endswith(OUTPUT_SUFFIXES) else folder


def _shortened(part: str) -> str:
    if len(part) <= LONGEST_PART // 4:  # characters have 4 bytes at most
        return part
    encoded = os.fsencode(part)
    if len(encoded) <= LONGEST_PART:
        return part
    digest = hashlib.blake2b(encoded, digest_size=4).hexdigest()
    # Characters that are cut in the middle are dropped whole.
    kept = encoded[: LONGEST_PART - 9].decode("utf-8", "surrogateescape")
    while kept and "\udc80" <= kept[-1] <= "\udcff":
        kept = kept[:-1]
    return f"{kept}~{digest}"
