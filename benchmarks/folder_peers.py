"""What people write to segment a folder of photos: Pillow, a runtime, and what overlaps the two.

    python benchmarks/folder_peers.py loop deploy/night/model.onnx camvid/images/test

For each line `FOLDER` on stdin every *.jpg is done into that new folder, and {"images", "seconds"}
is answered: from the first file opened to the last mask written, with the network loaded. Photos
are fitted, and masks restored, by the functions that ours uses.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import typer
from plain_runtime import MaskWriter, Run, decode, open_sessions, spec_of

from srdeploy.environment import usable_cores
from srdeploy.imaging import Pixels, fit, restore

CORES = usable_cores()
LOADERS = 2
"""Processes of the DataLoader."""
AHEAD = 8
"""Photos that threads decode before their turn, and masks that wait to be encoded, at most."""


@dataclass(frozen=True)
class Sample:
    """One photo on its way."""

    photo: Pixels
    """As the network sees it, uint8 [h, w, 3]."""
    size: tuple[int, int]
    """(height, width) of the photo itself."""
    name: str


class Codec:
    """Photos by their number, and masks to files, with Pillow."""

    def __init__(self, graph: Path, files: Sequence[Path]) -> None:
        self._files = files
        self._spec = spec_of(graph)
        self._encode = MaskWriter(graph)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Sample:
        """The photo, decoded and fitted."""
        file = self._files[index]
        photo = decode(file.read_bytes())
        return Sample(fit(photo, self._spec), (photo.shape[0], photo.shape[1]), file.stem)

    def write(self, sample: Sample, labels: Pixels, out: Path) -> None:
        """Labels uint8 [h, w] as the photo's mask."""
        (out / f"{sample.name}.png").write_bytes(self._encode(restore(labels, *sample.size)))


class LoadedByProcesses:
    """torch's DataLoader, whose processes decode, before one session; this process encodes."""

    def __init__(self, codec: Codec) -> None:
        """Starts the processes: before the runtime's threads, which don't survive a fork."""
        import torch
        from torch.utils.data import DataLoader

        torch.set_num_threads(1)
        # Any object with numbers for items and a length is a data set.
        self._loader: Iterable[Any] = DataLoader(
            _Items(codec),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=LOADERS,
            collate_fn=_as_it_is,
            persistent_workers=True,
        )
        for _ in self._loader:
            pass

    def __call__(self, codec: Codec, sessions: Sequence[Run], out: Path) -> None:
        """A pass over all photos."""
        for photo, size, name in self._loader:
            sample = Sample(photo.numpy(), size, name)
            codec.write(sample, sessions[0](sample.photo[None])[0], out)


class _Items:
    """The photos as the DataLoader likes them: a tensor goes to another process by shared
    memory."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def __len__(self) -> int:
        return len(self._codec)

    def __getitem__(self, index: int) -> tuple[object, tuple[int, int], str]:
        import torch

        sample = self._codec.read(index)
        return torch.tensor(sample.photo), sample.size, sample.name


def _as_it_is(item: object) -> object:
    return item


def plain_loop(codec: Codec, sessions: Sequence[Run], out: Path) -> None:
    """One photo after the other through one session."""
    for index in range(len(codec)):
        sample = codec.read(index)
        codec.write(sample, sessions[0](sample.photo[None])[0], out)


def threads_around(codec: Codec, sessions: Sequence[Run], out: Path) -> None:
    """Threads that decode before, and threads that encode behind, one session."""
    written: deque[Future[None]] = deque()
    with ThreadPoolExecutor(CORES) as decoders, ThreadPoolExecutor(CORES) as encoders:
        for sample in _ahead(codec, decoders):
            labels = sessions[0](sample.photo[None])[0]
            written.append(encoders.submit(codec.write, sample, labels, out))
            if len(written) > AHEAD:
                written.popleft().result()
        for one in written:
            one.result()


def _ahead(codec: Codec, decoders: ThreadPoolExecutor) -> Iterator[Sample]:
    """The photos in their order, some of them decoded before their turn."""
    coming: deque[Future[Sample]] = deque()
    for index in range(len(codec)):
        coming.append(decoders.submit(codec.read, index))
        if len(coming) > AHEAD:
            yield coming.popleft().result()
    for one in coming:
        yield one.result()


def side_by_side(codec: Codec, sessions: Sequence[Run], out: Path) -> None:
    """A thread for each session, which takes a photo from its file to its mask, then the next."""
    left = iter(range(len(codec)))  # its next() is one step of the interpreter
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(_do_what_is_left, repeat(codec), sessions, repeat(left), repeat(out)))


def _do_what_is_left(codec: Codec, run: Run, left: Iterator[int], out: Path) -> None:
    for index in left:
        sample = codec.read(index)
        codec.write(sample, run(sample.photo[None])[0], out)


@dataclass(frozen=True)
class Kind:
    """A way to do it."""

    sessions: int
    threads: int
    """Of each session."""
    go: Callable[[Codec, Sequence[Run], Path], None] | None
    """None: LoadedByProcesses."""


KINDS = {
    "loop": Kind(1, CORES, plain_loop),
    "dataloader": Kind(1, CORES, None),
    "threads": Kind(1, CORES, threads_around),
    "side-by-side": Kind(CORES, 1, side_by_side),
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    graph: Annotated[Path, typer.Argument(help="The ONNX file.")],
    photos: Annotated[Path, typer.Argument(help="Folder of JPEGs.")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: fp32, bf16, fp16.")] = "fp32",
) -> None:
    """Do all photos into each FOLDER that stdin names, until it ends."""
    kind = KINDS[name]
    codec = Codec(graph, sorted(photos.glob("*.jpg")))
    go = kind.go or LoadedByProcesses(codec)
    sessions = open_sessions(graph, kind.sessions, kind.threads, runtime, precision)
    print("ready", flush=True)
    for line in sys.stdin:
        out = Path(line.rstrip("\n"))
        out.mkdir()
        began = time.perf_counter()
        go(codec, sessions, out)
        seconds = time.perf_counter() - began
        print(json.dumps({"images": len(codec), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    typer.run(main)
