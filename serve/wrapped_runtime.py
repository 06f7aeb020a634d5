"""What runtimes around another one share: they open and close it, and are what it is."""

from srdeploy.serve.runtime import Runtime
from srdeploy.serve.signature import Shape
from srdeploy.spec import Spec


class WrappedRuntime(Runtime):
    """A runtime that looks at images through another one."""

    def __init__(self, inner: Runtime, spec: Spec, input_shape: Shape) -> None:
        """inner: not open yet."""
        super().__init__(inner.artifact, spec, inner.device, input_shape)
        self.inner = inner
        self.backend = inner.backend
        self.precision = inner.precision

    @property
    def gives_logits(self) -> bool:
        """Whether the inner one does."""
        return self.inner.gives_logits

    def _open(self) -> None:
        self.inner.__enter__()
        self.precision = self.inner.precision  # which it knows once it is open

    def _close(self) -> None:
        self.inner.__exit__(None, None, None)
