"""Validation in the middle of a run: the deployed path in torch, scored at the labels' own size."""

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress as RichProgress
from torch import nn

from srdeploy import console
from srdeploy.data import DataSet
from srdeploy.deployable import Deployable, Normalise
from srdeploy.errors import UserError
from srdeploy.imaging import fit, restore
from srdeploy.interrupt import StopRequest
from srdeploy.metrics import Score, Scores
from srdeploy.runs import STATE
from srdeploy.spec import Spec
from srdeploy.train.checkpoint import (
    EMA,
    Progress,
    items_digest,
    load_state,
    save_best,
    save_state,
)
from srdeploy.train.compiled import compiled, require_compiler
from srdeploy.train.config import TrainConfig
from srdeploy.train.device import deterministic
from srdeploy.train.distributed import ALONE, Parallel, World, lost
from srdeploy.train.guard import NORM, DivergenceGuard, explain_failure
from srdeploy.train.loader import batches
from srdeploy.train.optimize import (
    StepModel,
    accumulate_gradient,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    shares,
)
from srdeploy.train.pictures import sample_pictures, save_predictions
from srdeploy.train.recorder import Recorder, RunningMeans
from srdeploy.train.run_folder import (
    PREDICTIONS,
    remove_torn,
    require_new,
    require_same,
    require_same_spec,
    write_start,
)
from srdeploy.train.start import TrainingJob, describe, prepare


def validate(
    network: nn.Module,
    spec: Spec,
    dataset: DataSet,
    limit: int | None,
    bar: RichProgress,
    world: World = ALONE,
) -> Scores:
    """Scores of the network, in float32, on the first `limit` photos; the mode it was in is
    restored. Each process of `world` looks at a part of them; the scores are those of all."""
    training = network.training
    device = next(network.parameters()).device
    deployable = Deployable(network, spec).eval().to(device)
    score = Score(spec)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    mine = range(world.rank, count, world.size)
    task = bar.add_task("validating", total=len(mine), losses="")
    # TF32 rounds convolutions to 10 bits, which the exported graph does not do.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for index in mine:
            photo, labels = dataset.read(index)
            images = torch.from_numpy(np.array(fit(photo, spec)))[None].to(device)
            predicted = deployable(images)[0].cpu().numpy()
            score.update(labels, restore(predicted, labels.shape[0], labels.shape[1]))
            bar.advance(task)
    bar.remove_task(task)
    network.train(training)
    score.set_counts(world.sum(score.counts()))
    return score.result()


# The training loop

WIDE = 140
"""Columns of a terminal in which all losses fit beside the progress bar."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    folder: Path
    steps: int
    """Steps done, all in all."""
    best_miou: float | None
    """Best mIoU on val, 0..1: that of network.safetensors. None before the first validation."""
    best_step: int
    finished: bool
    """False where Ctrl-C or SIGTERM stopped it; its state is saved."""
    seconds: float
    """Time of only this call, validation included."""

    def summary(self) -> dict[str, Any]:
        """The result as JSON."""
        return {**self.__dict__, "folder": str(self.folder), "seconds": round(self.seconds, 3)}


def train(
    config: TrainConfig,
    folder: Path,
    resume: bool = False,
    force: bool = False,
    world: World = ALONE,
) -> TrainResult:
    """Trains as `config` says into the run folder (its files: srdeploy/runs.py); returns how it
    ended.

    resume: continues from the last checkpoint of the run in `folder`, with the very results that an
    uninterrupted run has on the CPU. force: replaces a run that is there. world: the processes that
    train together, each of which calls this (`distributed.joined`).
    Raises UserError for anything that can't be used, before the folder is touched; and where a loss
    stops being finite, the memory does not suffice, or a photo can't be read in the middle of the
    run.
    """
    began = time.perf_counter()
    folder = Path(folder)
    config = config.model_copy(update={"data": config.data.resolve()})

    # What can be refused is refused here, before anything is written.
    if resume and force:
        raise UserError(
            "--resume and --force exclude each other: go on with the run, or replace it"
        )
    if resume:
        require_same(folder, config)
    else:
        require_new(folder, force)
    has_state = resume and (folder / STATE).exists()
    job = prepare(config, trained=has_state, world=world)
    regulated, device = job.regulated, job.device
    if config.compile:
        require_compiler(device, world.size)
    optimizer = make_optimizer(regulated, config)
    ema = None if config.ema is None else EMA(regulated, config.ema)
    guard = DivergenceGuard(config, job.data.samples)
    normalise = Normalise(job.spec).to(device)
    items = items_digest(job.data.training)
    world.require_same(items, "other photos")
    world.require_same(config.to_yaml() + str(has_state), "another configuration or run folder")

    # A new folder, or the state of the old one. A run that was killed before its first checkpoint
    # begins anew.
    progress = Progress()
    if has_state:
        require_same_spec(folder, job.spec)
        progress = load_state(folder, regulated, optimizer, items, ema)
        if progress.step >= config.steps:
            console.done(f"{folder} is finished already: {progress.step} steps")
            return _result(folder, progress, config, began)
        console.done(f"going on with {folder} after step {progress.step}")
    elif world.leads:
        # Read before anything is removed: a photo may turn out unreadable.
        pictures = sample_pictures(job.data.validation, job.spec)
        write_start(folder, config, job.spec, pictures)
    if world.leads:
        remove_torn(folder)
    parallel = Parallel(regulated, config, world) if world.size > 1 else None
    model = StepModel(regulated, normalise, job.amp, config.channels_last, parallel)
    console.say(describe(config, job))

    with (
        deterministic(config.deterministic),
        compiled(regulated, config.compile),
        StopRequest("stopping after this step; once more to stop at once") as stop,
        Recorder(folder, resumed_at=progress.step, writes=world.leads) as recorder,
        console.progress("{task.fields[losses]}") as bar,
        closing(
            batches(
                job.data.samples,
                config.batch,
                progress.step * config.accumulate,
                config.steps * config.accumulate,
                config.workers,
                world,
            )
        ) as stream,
    ):
        task = bar.add_task("training", total=config.steps, completed=progress.step, losses="")
        running = RunningMeans()
        stopping = False
        while progress.step < config.steps and not stopping:
            # One step of SGD on batch x accumulate images.
            group = list(islice(stream, config.accumulate))
            rate = learning_rate(config, progress.step)
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
            world.seed(config.seed, progress.step)
            try:
                weights = shares(group, job.spec.ignore_index, job.weights, world)
                terms = accumulate_gradient(model, group, weights, progress.step / config.steps)
            except RuntimeError as error:
                known = None if lost(error) else explain_failure(error, config, device)
                if known is None:
                    raise
                raise known from error
            if config.clip is not None:
                terms[NORM] = nn.utils.clip_grad_norm_(regulated.parameters(), config.clip)
            guard.look(terms, progress.step + 1)
            if config.clip is not None:
                terms[NORM] /= world.size  # all have the same, and parts are added up
            optimizer.step()
            running.add(terms)
            progress.step += 1
            if ema is not None:
                ema.update(progress.step)
            bar.advance(task)

            # Losses, live and on record. Before every checkpoint too, so that no sum outlives it.
            last = progress.step == config.steps
            # Read once a step: a request that comes later is met after the next step.
            stopping = world.any(stop.requested)
            saving = last or stopping or progress.step % config.checkpoint_interval == 0
            validating = last or progress.step % config.val_every == 0
            if saving or validating or progress.step % config.log_every == 0:
                guard.check()
                means = running.means(world)
                images_per_s = running.rate() * config.batch * config.accumulate
                loss, norm = means.pop("total"), means.pop(NORM, None)
                recorder.train(progress.step, rate, loss, means, images_per_s, norm)
                live = _live(loss, means, images_per_s)
                wide = bar.console.width >= WIDE
                bar.update(task, losses=live if wide else f"loss {loss:.3f}")
                if bar.disable:
                    console.say(f"step {progress.step}/{config.steps}: {live}")
                running = RunningMeans()

            # Validation; the best weights so far become the run's network.
            if validating:
                with nullcontext() if ema is None else ema.in_place():
                    _validate(folder, config, job, progress, recorder, bar)
                running = RunningMeans()

            # The checkpoint comes last: whatever it counts as done is on the disk by now.
            if saving:
                if world.leads:
                    save_state(folder, regulated, optimizer, progress, items, ema)
                running = RunningMeans()

    result = _result(folder, progress, config, began)
    _say_how_it_ended(result, config)
    return result


def _validate(
    folder: Path,
    config: TrainConfig,
    job: TrainingJob,
    progress: Progress,
    recorder: Recorder,
    bar: RichProgress,
) -> None:
    """Scores the network on val, on record and in pictures; keeps its weights where they are the
    best."""
    scores = validate(
        job.regulated.network, job.spec, job.data.validation, config.val_limit, bar, job.world
    )
    recorder.val(progress.step, scores)
    better = progress.best_miou is None or scores.miou > progress.best_miou
    if better:
        progress.best_miou, progress.best_step = scores.miou, progress.step
    if not job.world.leads:
        return
    if better:
        save_best(folder, job.regulated, progress)
    console.say(
        f"step {progress.step}/{config.steps}: val mIoU {100 * scores.miou:.2f}, pixel accuracy "
        f"{100 * scores.pixel_accuracy:.2f}{' (best)' if better else ''}"
    )
    picture = folder / PREDICTIONS / f"step-{progress.step:06d}.png"
    last = progress.step == config.steps
    save_predictions(picture, job.regulated, job.data.validation, job.spec, with_exits=last)


def _result(folder: Path, progress: Progress, config: TrainConfig, began: float) -> TrainResult:
    return TrainResult(
        folder=folder,
        steps=progress.step,
        best_miou=progress.best_miou,
        best_step=progress.best_step,
        finished=progress.step >= config.steps,
        seconds=time.perf_counter() - began,
    )


def _say_how_it_ended(result: TrainResult, config: TrainConfig) -> None:
    if not result.finished:
        console.warn(
            f"stopped after step {result.steps} of {config.steps}, everything is saved; "
            f"go on with: srdeploy train --out {result.folder} --resume"
        )
    elif result.best_miou is not None:
        console.done(
            f"{result.folder}: best val mIoU {100 * result.best_miou:.2f} at step "
            f"{result.best_step}, {result.seconds / 60:.1f} minutes; "
            f"next: srdeploy export {result.folder}"
        )


def _live(loss: float, terms: dict[str, float], images_per_s: float) -> str:
    parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return f"loss {loss:.3f} ({parts}), {images_per_s:.1f} images/s"
