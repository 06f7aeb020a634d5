"""The temporary tables of a listing. Paths are bytes, since they may be no text."""

TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -24000;
CREATE TABLE photos (
    id INTEGER PRIMARY KEY, real BLOB UNIQUE, source INTEGER, label BLOB, is_link INTEGER,
    suffixed BLOB, stem BLOB, name BLOB, path BLOB, bytes INTEGER, changed_ns INTEGER);
CREATE TABLE unusable (path BLOB PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TABLE inside (below_out BLOB, path BLOB);
"""

# Of two paths of one file the same one is kept, in whatever order they are met.
ADD = """
INSERT INTO photos (real, source, label, is_link, suffixed, stem, path, bytes, changed_ns)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (real) DO UPDATE SET
    source = excluded.source, label = excluded.label, is_link = excluded.is_link,
    suffixed = excluded.suffixed, stem = excluded.stem, path = excluded.path
WHERE (excluded.source, excluded.is_link, excluded.suffixed, excluded.path)
    < (source, is_link, suffixed, path)
"""
