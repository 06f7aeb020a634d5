"""torch behind the runtime contract, for run folders. The only module here that imports torch."""

import numpy as np
import torch

from srdeploy.artifacts.artifact import Artifact
from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.runs import load_network, open_run
from srdeploy.runtimes.base import ImageShapeError, Logits, Runtime, RuntimeOptions, parse_device
from srdeploy.spec import Spec


class TorchRuntime(Runtime):
    """A run's plain network in eager torch, float32 (no TF32)."""

    backend = "torch"
    precision = "float32"

    def __init__(self, artifact: Artifact, spec: Spec, options: RuntimeOptions) -> None:
        height, width = spec.input.largest if spec.input.fixed else (None, None)
        super().__init__(artifact, spec, options.device, (None, height, width, 3))
        self._threads = options.threads
        self._threads_before: int | None = None
        self._to_labels: Deployable | None = None
        self._to_logits: Deployable | None = None

    def timed_run(self, images: Pixels) -> tuple[Pixels, dict[str, float] | None]:
        """run, and {"compute_ms"}: the GPU's time without copies, by CUDA events; None on the
        CPU."""
        if parse_device(self.device)[0] == "cpu":
            return super().timed_run(images)
        self._check(images)
        assert self._to_labels is not None
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            labels = self._infer(self._to_labels, images, (start, end))
        return labels.numpy(), {"compute_ms": start.elapsed_time(end)}

    def _open(self) -> None:
        self._require_device()
        network = load_network(open_run(self.path))
        # Two faces of one network: the weights are shared.
        self._to_labels = Deployable(network, self.spec, output="labels").eval().to(self.device)
        self._to_logits = Deployable(network, self.spec, output="logits").eval().to(self.device)
        if self._threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._threads)

    def _close(self) -> None:
        self._to_labels = self._to_logits = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def _labels(self, images: Pixels) -> Pixels:
        assert self._to_labels is not None
        return self._infer(self._to_labels, images).numpy()

    def _logits(self, images: Pixels) -> Logits:
        assert self._to_logits is not None
        return self._infer(self._to_logits, images).numpy()

    def _infer(
        self,
        module: Deployable,
        images: Pixels,
        events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None,
    ) -> torch.Tensor:
        """The module's output on the host. events: recorded before and after its work."""
        # torch.from_numpy takes no mirrored views, and warns about read-only arrays like Pillow's.
        writable = np.require(images, requirements=["C", "W"])
        try:
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                on_device = torch.from_numpy(writable).to(self.device)
                if events is not None:
                    events[0].record()
                output = module(on_device)
                if events is not None:
                    events[1].record()
                assert isinstance(output, torch.Tensor)
                return output.cpu()
        except torch.OutOfMemoryError as error:
            raise ImageShapeError(
                f"out of memory on {self.device} with images {list(images.shape)}: "
                "use smaller images or a smaller batch"
            ) from error

    def _require_device(self) -> None:
        kind, index = parse_device(self.device)
        if kind == "cuda" and (not torch.cuda.is_available() or index >= torch.cuda.device_count()):
            raise UserError(
                f"device {self.device} was asked for, but torch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices: check the driver and the torch build, "
                "or use --device cpu"
            )
