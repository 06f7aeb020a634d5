"""Class weights for sets in which some classes have few pixels."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from srdeploy import console
from srdeploy.console import track
from srdeploy.data import DataSet, open_dataset, spec_for
from srdeploy.data.confidence import require_confidence
from srdeploy.data.dataset import measured_policy
from srdeploy.data.photo_set import PhotoSet
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error, write_whole
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.models.weights import load_pretrained
from srdeploy.runs import (
    CONFIG,
    EXITS,
    METRICS,
    SAMPLES,
    SPEC,
    STATE,
    WEIGHTS,
    build_network,
    is_run,
    open_run,
    require_usable,
)
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.augment import augmentation_for
from srdeploy.train.config import TrainConfig, check_resumable
from srdeploy.train.device import find_device
from srdeploy.train.distributed import ALONE, World
from srdeploy.train.loader import Samples
from srdeploy.train.pictures import sample_pictures
from srdeploy.train.recorder import TENSORBOARD
from srdeploy.train.regulation import SelfRegulation
from srdeploy.validation import validated

Counts = npt.NDArray[np.int64]


def count_pixels(dataset: DataSet) -> tuple[Counts, Counts]:
    """(pixels per class, pixels of the photos in which the class occurs), both int64 [K].

    Ignored pixels count for neither.
    """
    classes = len(dataset.classes.names)
    pixels, present = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for index in track(range(len(dataset)), "counting classes"):
        _, labels = dataset.read(index)
        counts = np.bincount(labels.ravel(), minlength=256)[:classes]
        pixels += counts
        present += (counts > 0) * counts.sum()
    return pixels, present


def median_frequency(pixels: Counts, present: Counts) -> npt.NDArray[np.float64]:
    """Weights float64 [K]: the median class frequency over each class's own (Eigen and Fergus, ICCV
    2015).

    A class's frequency is its share of the pixels of the photos in which it occurs. A class without
    pixels weighs 1 and takes no part in the median. Raises UserError where no class has a pixel.
    """
    found = pixels > 0
    if not found.any():
        raise UserError("class weights: no pixel of the training split carries a class")
    frequency = pixels[found] / present[found]
    weights = np.ones(len(pixels), np.float64)
    weights[found] = np.median(frequency) / frequency
    return weights


def class_weights(dataset: DataSet, kind: str) -> Tensor | None:
    """float32 [K] for "median-frequency", None for "none"."""
    if kind == "none":
        return None
    return torch.from_numpy(median_frequency(*count_pixels(dataset))).float()


# Before the first step: everything is opened, built and checked, and only then a run folder is
# written.

PREDICTIONS = "predictions"
"""Folder of the grids of predictions inside the run."""


@dataclass(frozen=True)
class TrainingJob:
    """What a run is made of, ready to step."""

    spec: Spec
    training: DataSet
    validation: DataSet
    samples: Samples
    regulated: SelfRegulation
    weights: Tensor | None
    """Class weights float32 [K] on the CPU, or None."""
    device: torch.device
    amp: bool
    world: World = ALONE


def prepare(config: TrainConfig, trained: bool = False, world: World = ALONE) -> TrainingJob:
    """Opens the data and builds the network, exits and class weights; writes nothing. Raises
    UserError.

    The network's start depends on config.seed alone: not on regulation, nor on the device.
    `trained`: weights will be loaded from a checkpoint, so that the pretrained file need not be
    there any more. `world`: the processes that train together.
    """
    device = find_device(config.device, world)
    world.share(config.batch)
    if config.sync_batch_norm and device.type == "cpu":
        raise UserError(
            "sync_batch_norm needs GPUs, torch has none for the CPU: give "
            "--set sync_batch_norm=false"
        )
    training = open_dataset(config.data, config.train_split, config.layout)
    validation = open_dataset(config.data, config.val_split, config.layout)
    if config.confidence:
        require_confidence(training.root, training.items)
    spec = configured_spec(config, training)
    # Refuses photos too small for a network here, rather than at the first validation.
    measured_policy(validation, config.longest_side)
    torch.manual_seed(config.seed)
    probe_size = spec.input.near(PROBE_SIZE)
    network = build_network(config.network, spec.class_count, probe_size)
    require_usable(network, config.network, spec)
    if config.pretrained is not None and not trained:
        console.done(load_pretrained(network, config.pretrained, config.pretrained_missing))
    weights = class_weights(training, config.class_weights)
    regulated = SelfRegulation(
        network,
        spec.class_count,
        settings=config.regulation,
        ignore_index=spec.ignore_index,
        class_weights=weights,
        probe_size=probe_size,
    )
    if config.sync_batch_norm and world.size > 1:
        # The layers' weights and names stay, and so does what is saved.
        nn.SyncBatchNorm.convert_sync_batchnorm(regulated)
    place(regulated, device, config.channels_last)
    return TrainingJob(
        spec=spec,
        training=training,
        validation=validation,
        samples=Samples(
            training,
            spec,
            augmentation_for(config, spec),
            config.seed,
            config.cache_mib,
            config.confidence,
        ),
        regulated=regulated,
        weights=weights,
        device=device,
        amp=config.autocast(device.type),
        world=world,
    )


def place(regulated: nn.Module, device: torch.device, channels_last: bool) -> None:
    """Brings network and exits to `device`, in training mode, laid out as activations will be."""
    regulated.to(device).train()
    if channels_last:
        for parameter in regulated.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def configured_spec(config: TrainConfig, dataset: PhotoSet) -> Spec:
    """The spec of the networks that `config` trains on `dataset`. Raises UserError."""
    return spec_for(
        dataset,
        input_policy(config, dataset),
        mean=config.mean,
        std=config.std,
        colour_order=config.colour_order,
    )


def input_policy(config: TrainConfig, dataset: PhotoSet) -> InputPolicy:
    """Which sizes the run's network is given: the photos', or the crop's alone; reads their
    headers. Raises UserError where a photo is too small."""
    measured = measured_policy(dataset, config.longest_side)
    values = measured.model_dump() | {"multiple": config.multiple, "smallest": config.smallest}
    if config.fixed_size:
        values |= dict.fromkeys(("smallest", "usual", "largest"), config.crop)
    return validated(InputPolicy, values, f"{config.data}, as the network is to see it")


def require_new(folder: Path, force: bool) -> None:
    """Raises UserError where a new run can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: a run needs a folder")
    # A folder with nothing but its spec is a run that was killed while it began.
    if not folder.exists() or all(p.name == SPEC or _is_torn(p) for p in folder.iterdir()):
        return
    if not is_run(folder):
        raise UserError(f"{folder} exists and is not a run: give another --out, or remove it")
    if not force:
        raise UserError(
            f"{folder} exists: --resume goes on with that run, --force replaces it, "
            "or give another --out"
        )


def write_start(folder: Path, config: TrainConfig, job: TrainingJob) -> None:
    """Writes spec.json, config.yaml and samples/; removes what an older run left, and nothing else
    there. Raises UserError where the folder can't be written to."""
    # Read before anything is removed: a photo may turn out unreadable.
    pictures = sample_pictures(job.validation, job.spec)
    try:
        for name in (CONFIG, STATE, WEIGHTS, EXITS, METRICS, SPEC):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    for name in (SAMPLES, PREDICTIONS, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_whole(folder / SPEC, job.spec.model_dump_json(indent=1) + "\n")
    write_whole(folder / CONFIG, config.to_yaml())
    for name, content in pictures.items():
        write_whole(folder / SAMPLES / name, content)


def remove_torn(folder: Path) -> None:
    """Removes what killed writes left in the run: half a state.pt is as large as a whole one."""
    for path in folder.rglob(".*.part*"):
        if _is_torn(path):
            path.unlink(missing_ok=True)


def _is_torn(path: Path) -> bool:
    """Whether it is a temporary file of `srdeploy.files.whole_file`, such as
    .state.pt.x7_2ab9q.part.pt."""
    return re.fullmatch(r"\..+\.\w+\.part(\.\w+)?", path.name) is not None and path.is_file()


def saved_config(folder: Path) -> TrainConfig:
    """The configuration a run was started with. Raises UserError where `folder` is no run."""
    run = open_run(folder)
    return validated(TrainConfig, run.config, str(folder / CONFIG))


def require_same(folder: Path, config: TrainConfig) -> None:
    """Raises UserError where `config` is not that of the run in `folder`, naming the first other
    key."""
    check_resumable(saved_config(folder), config, folder)


def require_same_spec(folder: Path, spec: Spec) -> None:
    """Raises UserError where the data set is not the one that the run in `folder` began with."""
    before = open_run(folder).spec
    for name in type(spec).model_fields:
        if getattr(before, name) != getattr(spec, name):
            raise UserError(
                f"{folder} began with another data set: {name} was {getattr(before, name)}, "
                f"is {getattr(spec, name)}; restore the data, or start a new run with another --out"
            )


def describe(config: TrainConfig, job: TrainingJob) -> str:
    """One line: what is trained, how, where."""
    count = sum(parameter.numel() for parameter in job.regulated.network.parameters())
    taps = len(job.regulated.taps)
    how = f"self-regulation at {taps} exits + its own" if taps else "no regulation (baseline)"
    images = config.batch * config.accumulate
    averaged = "; the moving average of the weights is validated and saved" if config.ema else ""
    return (
        f"{config.network.name}, {count / 1e6:.2f} M parameters, {how}, on {_device_name(job)}: "
        f"{config.steps} steps of {images} images, {len(job.training)} to train on, "
        f"{len(job.validation)} to validate{averaged}"
    )


def _device_name(job: TrainingJob) -> str:
    precision = "bfloat16" if job.amp else "float32"
    if job.world.size > 1:
        precision = f"{job.world.size} processes, {precision}"
    if job.device.type == "cuda":
        return f"{torch.cuda.get_device_name(job.device)} ({precision})"
    return f"the CPU ({precision}, {torch.get_num_threads()} threads)"
