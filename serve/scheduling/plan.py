"""How a model's sessions are laid out, and what each layout gave when it was tried."""

from pydantic import Field

from srdeploy.validation import Settings


class Layout(Settings):
    """Sessions side by side, and the CPU threads of each."""

    sessions: int = Field(ge=1)
    threads: int | None = Field(default=None, ge=1)
    """None: the runtime's own choice."""


class Measured(Settings):
    """One layout tried on images of the model's usual size."""

    layout: Layout
    batch: int
    images_per_s: float
    """With all sessions busy."""
    alone_ms: float | None
    """Of a run while the other sessions rest; None for batches of several images."""


class Plan(Settings):
    """What serves a model."""

    lone: Layout | None
    """One session for requests that are alone in the process; None: the shared ones do that."""
    shared: Layout
    """For requests that have company."""
    batch: int = Field(ge=1)
    """Images in one run, at most."""
    max_wait_ms: float = Field(ge=0)
    """How long a run waits for images that are being decoded, where it could hold more."""
    measured: tuple[Measured, ...] = ()
    """Empty where the layout was given."""

    def __str__(self) -> str:
        text = _sessions(self.shared)
        if self.batch > 1:
            text += f", up to {self.batch} images a run"
        if self.lone is not None:
            text += f"; {_sessions(self.lone)} for a lone request"
        return text


def _sessions(layout: Layout) -> str:
    many = "" if layout.sessions == 1 else "s"
    if layout.threads is None:
        return f"{layout.sessions} session{many}"
    return f"{layout.sessions} session{many} of {layout.threads} thread" + "s" * (
        layout.threads > 1
    )
