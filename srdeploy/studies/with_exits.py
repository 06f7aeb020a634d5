"""The regulated network with its exits still in the graph: what deployment would cost without
stripping them. For benchmarks only; srdeploy export never makes such a file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from srdeploy.deployable import Normalise, cut_logits, pad_images
from srdeploy.errors import UserError
from srdeploy.export.to_onnx import export_onnx
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.models.weights import load_exactly
from srdeploy.runs import Run, load_trained, open_run
from srdeploy.spec import Spec
from srdeploy.train.regulation import SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import validated


class WithExits(nn.Module):
    """images uint8 [N, H, W, 3] -> labels uint8 [N, H, W], then the exits' logits at their size."""

    def __init__(self, regulated: SelfRegulation, spec: Spec) -> None:
        super().__init__()
        self.normalise = Normalise(spec)
        self.regulated = regulated
        self.multiple = spec.input.multiple

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        exits = self.regulated(pad_images(self.normalise(images), self.multiple)).logits
        logits = cut_logits(exits[-1], (images.shape[1], images.shape[2]), self.multiple)
        return logits.argmax(1).to(torch.uint8), *exits[:-1]


def load_regulated(run_folder: Path) -> tuple[Run, SelfRegulation]:
    """A regulated run with its network and trained exits, in evaluation mode on the CPU.

    Raises UserError where the run is a baseline or its exits don't load.
    """
    run = open_run(run_folder)
    if run.exits is None:
        raise UserError(f"{run_folder} has no exits to leave in: it is a baseline run")
    return run, attach_exits(run, load_trained(run))


def attach_exits(run: Run, network: nn.Module) -> SelfRegulation:
    """The network of a run that has exits, with these, in evaluation mode.

    Raises UserError where they don't load.
    """
    assert run.exits is not None
    regulated = SelfRegulation(
        network,
        run.spec.class_count,
        settings=regulation_of(run),
        probe_size=run.spec.input.near(PROBE_SIZE),
    )
    if regulated.exits is None:
        raise UserError(f"{run.folder}: config.yaml says it is a baseline, yet it has exits")
    load_exactly(regulated.exits, run.exits)
    return regulated.eval()


def regulation_of(run: Run) -> RegulationConfig:
    """The run's regulation settings. Raises UserError where they can't be read."""
    section = run.config.get("regulation") or {}
    return validated(RegulationConfig, section, f"{run.folder}/config.yaml, regulation")


def export_with_exits(run_folder: Path, path: Path) -> None:
    """Exports a regulated run with its trained exits to `path`: outputs labels, exit1, exit2, ...

    Raises UserError where the run is a baseline or its exits don't load.
    """
    run, regulated = load_regulated(run_folder)
    names = ["labels", *(f"exit{index + 1}" for index in range(len(regulated.taps)))]
    export_onnx(WithExits(regulated, run.spec), run.spec, path, output_names=names)
