"""A folder with all that file systems allow and nobody wants, and what is to become of it."""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tests.serve.server.hostile import corpus

SIZE = 40, 48
"""(height, width) of sound photos."""
ODD_NAMES: tuple[bytes, ...] = (
    b"new\nline.png",
    b"tab\tulator.png",
    b"return\r.png",
    b"bell\x07 and \x1b[31mcolour\x1b[0m.png",
    b"\x1b]0;title\x07.png",
    b"\"double\" and 'single'.png",
    b"-dash.png",
    b"--force.png",
    b" leading space.png",
    b"trailing space .png",
    b"two..dots..png",
    b"per%20cent.png",
    b"back\\slash\\x41.png",
    b"$HOME `id` $(id) ; | & >.png",
    b"*star? [a-z] {a,b}.png",
    b"~.png",
    b"#hash.png",
    b":smile: [bold]markup[/bold].png",
    b"http:__colon.png",
    b"CON.png",
    b"UPPER.PNG",
    b"upper.png",
    b"legend.png",
    b"classes.json.png",
    b"manifest.jsonl.png",
    b"two.jpg.png.tif",
    "🦀👩‍👩‍👧 crab.png".encode(),
    "صورة ١.png".encode(),
    "照片 写真 사진.png".encode(),
    "फ़ोटो ภาพ תמונה Фото.png".encode(),
    "e\u0301 combining.png".encode(),
    "\u00e9 combining.png".encode(),
    "\u202egnp.exe.png".encode(),
    "\u2028line\u2029paragraph\u0085next.png".encode(),
    "zero\u200bwidth\ufeff.png".encode(),
    "Z\u0335\u0321\u031a\u0353\u0324algo\u0301\u0302\u0303\u0304\u0305.png".encode(),
    b"undecodable \xff\xfe\x80.png",
    b"surrogate \xed\xa0\x80.png",
    b"overlong \xc0\xaf.png",
    b"a" * 251 + b".png",
    "日".encode() * 83 + b".png",
    b"\xff" * 251 + b".png",
)


@dataclass
class Hostile:
    """What lies below `root`."""

    root: bytes
    good: set[bytes] = field(default_factory=set)
    """Real paths of what must get a mask."""
    bad: set[bytes] = field(default_factory=set)
    """Paths of what must be told of, and must not."""

    def place(self, name: bytes) -> bytes:
        """The path of a new file, whose folder is made."""
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def add_good(self, name: bytes, content: bytes) -> bytes:
        path = self.place(name)
        _write(path, content)
        self.good.add(path)
        return path

    def add_bad(self, name: bytes, content: bytes | None = None) -> bytes:
        """Without content only the path is noted."""
        path = self.place(name)
        if content is not None:
            _write(path, content)
        self.bad.add(path)
        return path


def make_hostile(root: Path, elsewhere: Path, decodes: Callable[[bytes], bool]) -> Hostile:
    """Everything below. elsewhere: a folder for what links lead to. decodes: whether a damaged
    image can be decoded all the same."""
    hostile = Hostile(os.fsencode(root))
    for index, name in enumerate(ODD_NAMES):
        hostile.add_good(b"names/" + name, photo(index))
        hostile.add_good(b"names/folder " + name.rstrip(b".pngtif")[:200] + b"/a.png", photo(index))
    _kinds(hostile)
    _bodies(hostile)
    _links(hostile, elsewhere)
    _no_files(hostile)
    _locks(hostile)
    _depths(hostile)
    for index, (_, content) in enumerate(corpus(900, seed=0)):
        name = b"corpus/%04d.jpg" % index
        if decodes(content):
            hostile.add_good(name, content)
        else:
            hostile.add_bad(name, content)
    return hostile


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Large squares of strong colours."""
    height, width = SIZE
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    return image if mode == "RGB" else image.convert(mode)


def photo(seed: int = 0, format: str = "PNG", mode: str = "RGB", orientation: int = 1) -> bytes:
    """A file of `picture`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    more = {"exif": exif} if orientation != 1 else {}
    picture(seed, mode).save(buffer, format, **more)
    return buffer.getvalue()


def _kinds(hostile: Hostile) -> None:
    """Sound files that not all readers take."""
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        name = mode.replace(";", "").encode()
        hostile.add_good(b"kinds/%s.png" % name, photo(1, "PNG", mode))
    for mode in ("L", "CMYK", "I;16", "RGBA"):
        name = mode.replace(";", "").encode()
        hostile.add_good(b"kinds/tiff-%s.tif" % name, photo(2, "TIFF", mode))
    for mode in ("L", "CMYK"):
        hostile.add_good(b"kinds/jpeg-%s.jpg" % mode.encode(), photo(3, "JPEG", mode))
    for orientation in range(2, 9):
        hostile.add_good(
            b"kinds/turned-%d.jpg" % orientation, photo(4, "JPEG", orientation=orientation)
        )
    hostile.add_good(b"kinds/a-png.jpg", photo(5, "PNG"))
    hostile.add_good(b"kinds/a-jpeg.png", photo(5, "JPEG"))
    hostile.add_good(b"kinds/a-webp.tif", photo(5, "WEBP"))
    hostile.add_good(b"kinds/a-bmp.JPEG", photo(5, "BMP"))
    hostile.add_good(b"kinds/a-tiff.bmp", photo(5, "TIFF"))
    hostile.add_good(b"kinds/dots.png/inside.png", photo(6))
    hostile.add_good(b"kinds/dots.jpg", photo(7))
    for hidden in (b"kinds/.hidden.png", b"kinds/.trash/old.png"):
        _write(hostile.place(hidden), photo(8))


def _bodies(hostile: Hostile) -> None:
    for format, suffix in (
        ("JPEG", b"jpg"),
        ("PNG", b"png"),
        ("TIFF", b"tif"),
        ("WEBP", b"webp"),
        ("BMP", b"bmp"),
    ):
        whole = photo(9, format)
        for share in (0.02, 0.5, 0.9):
            cut = whole[: int(len(whole) * share)]
            hostile.add_bad(b"bodies/cut-%d.%s" % (100 * share, suffix), cut)
        hostile.add_bad(b"bodies/zero-bytes." + suffix, b"")
        hostile.add_bad(b"bodies/text." + suffix, b"not a photo\n")
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + huge
    hostile.add_bad(b"bodies/huge.png", head + bytes(4))
    size = struct.pack("<IiiHH", 40, 60_000, 60_000, 1, 24)
    hostile.add_bad(b"bodies/huge.bmp", b"BM" + bytes(8) + struct.pack("<I", 54) + size + bytes(99))
    hostile.add_bad(b"bodies/film.png", photo(9, "GIF"))
    hostile.add_bad(b"bodies/document.jpg", photo(9, "PDF"))
    with open(hostile.add_bad(b"bodies/three-gigabytes.jpg"), "wb") as file:
        file.truncate(3 * 1024**3)


def _links(hostile: Hostile, elsewhere: Path) -> None:
    outside = os.fsencode(elsewhere)
    _write(outside + b"/outside.png", photo(10))
    hostile.good.add(outside + b"/outside.png")
    os.symlink(outside + b"/outside.png", hostile.place(b"links/outside.png"))
    os.symlink(outside + b"/outside.png", hostile.place(b"links/outside-again.png"))
    os.mkdir(outside + b"/folder")
    _write(outside + b"/folder/in-folder.png", photo(11))
    hostile.good.add(outside + b"/folder/in-folder.png")
    os.symlink(outside + b"/folder", hostile.place(b"links/folder"))
    for name, target in (
        (b"broken.jpg", b"nowhere.jpg"),
        (b"broken-folder", b"nowhere"),
        (b"self.jpg", b"self.jpg"),
        (b"one.jpg", b"other.jpg"),
        (b"other.jpg", b"one.jpg"),
        (b"up", b".."),
        (b"here", b"."),
        (b"zeros.jpg", b"/dev/zero"),
        (b"null.jpg", b"/dev/null"),
        (b"terminal.jpg", b"/dev/tty"),
        (b"memory.jpg", b"/proc/self/mem"),
        (b"status.jpg", b"/proc/self/status"),
        (b"long.jpg", b"x" * 4000),
        (b"below-a-file.jpg", b"broken.jpg/x"),
    ):
        os.symlink(target, hostile.add_bad(b"links/" + name))
    # Two folders that hold links to each other: both are listed, and nothing is wrong.
    hostile.add_good(b"links/left/a.png", photo(12))
    hostile.add_good(b"links/right/b.png", photo(13))
    os.symlink(b"../right", hostile.place(b"links/left/across"))
    os.symlink(b"../left", hostile.place(b"links/right/across"))


def _no_files(hostile: Hostile) -> None:
    os.mkfifo(hostile.add_bad(b"no-files/pipe.jpg"))
    os.symlink(b"pipe.jpg", hostile.add_bad(b"no-files/link-to-pipe.jpg"))
    path = hostile.add_bad(b"no-files/socket.jpg")
    before = os.getcwd()
    os.chdir(os.path.dirname(path))  # the system takes 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket.jpg")
    finally:
        os.chdir(before)
    os.makedirs(hostile.place(b"no-files/empty.jpg/x"))
    hostile.add_good(b"no-files/folder.jpg/inside.png", photo(14))


def _locks(hostile: Hostile) -> None:
    """What its own user may not read."""
    os.chmod(hostile.add_bad(b"locks/locked.png", photo(15)), 0)
    locked = hostile.add_bad(b"locks/folder")
    os.mkdir(locked)
    _write(locked + b"/a.png", photo(15))
    os.chmod(locked, 0)
    listed = hostile.place(b"locks/names-only/a.png")
    _write(listed, photo(15))
    os.chmod(os.path.dirname(listed), 0o444)
    hostile.bad.add(listed)


def _depths(hostile: Hostile) -> None:
    hostile.add_good(b"deep/" + b"d/" * 100 + b"a.png", photo(16))
    # Its own path is short enough, that of the mask is not.
    parts = (4000 - len(hostile.root)) // 201
    path = hostile.add_bad(b"deep/" + b"/".join([b"p" * 200] * parts) + b"/a.png", photo(17))
    assert len(path) < 4096
    # Deeper than the system takes in one path.
    folder = os.open(hostile.root + b"/deep", os.O_RDONLY)
    for _ in range(20):
        os.mkdir(b"q" * 250, dir_fd=folder)
        below = os.open(b"q" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    reach = hostile.root + b"/deep"
    while len(reach) < 4096:
        reach += b"/" + b"q" * 250
    hostile.bad.add(reach)


def _write(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def snapshot(folder: Path) -> dict[bytes, tuple[int, ...]]:
    """All that can be told of everything below `folder` without reading it."""
    return dict(_look(os.fsencode(folder)))


def _look(folder: bytes) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # deeper than paths reach, or locked
        return
    for entry in entries:
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        told = (found.st_mode, found.st_ino, found.st_nlink, found.st_uid, found.st_size)
        yield entry.path, (*told, found.st_mtime_ns, found.st_ctime_ns)
        if entry.is_dir(follow_symlinks=False):
            yield from _look(entry.path)
