"""The work of one photo, in the halves that the scheduler places; see `scheduling.task`."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, decode_photo, fit
from srdeploy.serve.folders.photo import Photo
from srdeploy.serve.folders.reading import read_bytes
from srdeploy.serve.folders.record import OutputFile, Record
from srdeploy.serve.folders.rendering import needs_picture, render
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.store import Store
from srdeploy.spec import Spec


@dataclass(eq=False)
class PhotoTask:
    """One photo: read and fitted, and its outputs written."""

    photo: Photo
    spec: Spec
    settings: PredictSettings
    store: Store
    decoded: bool = False
    """Whether what goes wrong from now on is the network's or the output's doing."""
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    picture: Pixels | None = None
    """The photo itself, where an output needs it."""

    def prepare(self) -> Pixels:
        """uint8 [1, h, w, 3]. Raises UserError where it can't be read or is too small."""
        content = read_bytes(self.photo.path, self.photo.bytes)
        self.sha256 = hashlib.sha256(content).hexdigest()
        most = round(self.settings.max_megapixels * 1e6)
        picture = decode_photo(content, self.photo.path, most)
        self.size = (picture.shape[0], picture.shape[1])
        fitted = fit(picture, self.spec)
        self.picture = picture if needs_picture(self.settings) else None
        self.decoded = True
        return fitted[None]

    def finish(self, result: npt.NDArray[Any], /) -> Record:
        """Writes the outputs, from labels uint8 [1, h, w] or logits float32 [1, K, h, w]. Raises
        UserError, of which OutputError concerns all photos."""
        rendered = render(self.photo, self.picture, result[0], self.size, self.spec, self.settings)
        self.picture = None
        outputs = {}
        for path, content in rendered.files.items():
            self.store.write(path, content)
            outputs[path] = OutputFile(len(content), hashlib.sha256(content).hexdigest())
        return Record(self.photo, self.sha256, self.size, outputs, rendered.pixels)

    def skipped(self, error: UserError | MemoryError) -> Record:
        """The record of a photo that can't be used."""
        reason = str(error) or "not enough memory"
        return Record(self.photo, self.sha256, error=reason.removeprefix(f"{self.photo.path}: "))
