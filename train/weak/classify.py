"""Training the classifier of tags: one linear function, as `srdeploy.train.loop`; it resumes bit
for bit on the CPU."""

from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from srdeploy import console
from srdeploy.data.tags import TaggedSet
from srdeploy.deployable import Normalise
from srdeploy.errors import UserError
from srdeploy.imaging import fit
from srdeploy.interrupt import StopRequest
from srdeploy.models.tracing import PROBE_SIZE
from srdeploy.models.weights import load_exactly, load_pretrained, save_weights
from srdeploy.runs import build_network
from srdeploy.spec import Spec
from srdeploy.train.augment import augmentation_for
from srdeploy.train.checkpoint import FORMAT, read_state, write_state
from srdeploy.train.config import TrainConfig
from srdeploy.train.device import deterministic, find_device
from srdeploy.train.distributed import ALONE
from srdeploy.train.guard import NORM, DivergenceGuard, explain_failure
from srdeploy.train.loader import Batch, Samples, batches
from srdeploy.train.optimize import learning_rate, make_optimizer, set_learning_rate
from srdeploy.train.recorder import Recorder, RunningMeans
from srdeploy.train.start import place
from srdeploy.train.weak.pseudo_run import UNUSED
from srdeploy.train.weak.tag_network import TagNetwork

CLASSIFIER = "classifier.safetensors"
"""All weights of a trained TagNetwork."""
STATE = "classifier-state.pt"
STATE_KEYS = frozenset({"format", "step", "network", "optimizer", "rng", "cuda_rng"})


def build_classifier(config: TrainConfig, tagged: TaggedSet, spec: Spec) -> TagNetwork:
    """The untrained classifier, on the CPU; its start depends only on config.seed. Raises
    UserError."""
    torch.manual_seed(config.seed)
    probe_size = spec.input.near(PROBE_SIZE)
    network = build_network(config.network, spec.class_count, probe_size)
    return TagNetwork(network, len(tagged.foreground), config.regulation, probe_size)


def check_classifier(config: TrainConfig, tagged: TaggedSet, spec: Spec) -> None:
    """Raises UserError for what would keep the classifier from being trained; writes nothing."""
    refuse_unused(config)
    find_device(config.device, ALONE)
    network = build_classifier(config, tagged, spec)
    if config.pretrained is not None:
        load_pretrained(network.network, config.pretrained, config.pretrained_missing)


def load_classifier(
    config: TrainConfig, tagged: TaggedSet, spec: Spec, folder: Path, device: torch.device
) -> TagNetwork:
    """The trained classifier of a folder of pseudo masks. Raises UserError."""
    network = build_classifier(config, tagged, spec)
    load_exactly(network, folder / CLASSIFIER)
    return network.to(device).eval()


def refuse_unused(config: TrainConfig) -> None:
    """Raises UserError for a key that would be passed over in silence."""
    for key in UNUSED:
        if getattr(config, key) != TrainConfig.model_fields[key].default:
            raise UserError(f"{key} is not used in training the classifier of tags: leave it away")


def train_classifier(config: TrainConfig, tagged: TaggedSet, spec: Spec, folder: Path) -> bool:
    """Trains on the tags and writes classifier.safetensors into `folder`; False where Ctrl-C or
    SIGTERM stopped it, its state saved.

    Continues from the folder's state if there is one. Raises UserError.
    """
    device = find_device(config.device, ALONE)
    network = build_classifier(config, tagged, spec)
    if config.pretrained is not None:
        weights = load_pretrained(network.network, config.pretrained, config.pretrained_missing)
        console.done(weights)
    place(network, device, config.channels_last)
    optimizer = make_optimizer(network, config)
    samples = Samples(tagged, spec, augmentation_for(config, spec), config.seed, config.cache_mib)
    guard = DivergenceGuard(config, samples)
    normalise = Normalise(spec).to(device)
    table = torch.from_numpy(tag_table(tagged))

    state, step = folder / STATE, 0
    if state.exists():
        step = _load(state, network, optimizer)
        console.done(f"going on with the classifier after step {step}")
    exits = f"{len(network.stages)} exits and its own" if network.stages else "one"
    console.say(
        f"classifier of {len(tagged.foreground)} tags on {config.network.name} "
        f"({network.source.name}, {exits}): {config.steps} steps of {config.batch} images, "
        f"{len(tagged)} to train on"
    )
    amp = config.autocast(device.type)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    with (
        deterministic(config.deterministic),
        StopRequest("stopping after this step; once more to stop at once") as stop,
        Recorder(folder, resumed_at=step) as recorder,
        console.progress("{task.fields[losses]}") as bar,
        closing(batches(samples, config.batch, step, config.steps, config.workers)) as stream,
    ):
        task = bar.add_task("classifier", total=config.steps, completed=step, losses="")
        running = RunningMeans()
        stopping = False
        while step < config.steps and not stopping:
            # One step of SGD.
            (batch,) = islice(stream, 1)
            rate = learning_rate(config, step)
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
            tags = table[_indices(samples, batch)].to(device)
            images = normalise(batch.to(device).images).contiguous(memory_format=layout)
            try:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                    losses = network.losses(images, tags, step / config.steps)
                torch.autograd.backward(losses.total)
            except RuntimeError as error:
                known = explain_failure(error, config, device)
                if known is None:
                    raise
                raise known from error
            terms = {"total": losses.total.detach(), **losses.terms}
            if config.clip is not None:
                terms[NORM] = nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            guard.look(terms, step + 1)
            optimizer.step()
            running.add(terms)
            step += 1
            bar.advance(task)

            # Losses on record, and the state.
            last = step == config.steps
            stopping = stop.requested
            saving = last or stopping or step % config.checkpoint_interval == 0
            if saving or step % config.log_every == 0:
                guard.check()
                means = running.means(ALONE)
                speed = running.rate() * config.batch
                loss, norm = means.pop("total"), means.pop(NORM, None)
                recorder.train(step, rate, loss, means, speed, norm)
                bar.update(task, losses=f"loss {loss:.3f}")
                if bar.disable:
                    console.say(
                        f"step {step}/{config.steps}: loss {loss:.3f}, {speed:.1f} images/s"
                    )
                running = RunningMeans()
            if saving:
                _save(state, network, optimizer, step)
    if step < config.steps:
        return False
    save_weights(network, folder / CLASSIFIER)
    state.unlink()
    return True


def tag_table(tagged: TaggedSet) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32 [items, K]: 1 where the photo shows the class, in the order of
    `tagged.foreground`."""
    table = np.zeros((len(tagged), len(tagged.foreground)), np.float32)
    for row, tags in enumerate(tagged.tags):
        for column, one in enumerate(tagged.foreground):
            table[row, column] = one in tags
    return table


def tag_scores(network: TagNetwork, tagged: TaggedSet, spec: Spec) -> dict[str, float | None]:
    """F1 of each tag, by class name, at a probability of 0.5; None where no photo has it, truly or
    as predicted. Whole photos, as the network sees them, one by one."""
    device = next(network.parameters()).device
    normalise = Normalise(spec).to(device)
    truth = tag_table(tagged) > 0
    said = np.zeros_like(truth)
    network.eval()
    with torch.inference_mode():
        for row in console.track(range(len(tagged)), "checking tags", total=len(tagged)):
            photo = np.array(fit(tagged.read(row)[0], spec))
            logits = network(normalise(torch.from_numpy(photo)[None].to(device))).class_logits[-1]
            said[row] = (logits[0] > 0).cpu().numpy()
    hits = (truth & said).sum(0)
    marks = truth.sum(0) + said.sum(0)
    return {
        spec.classes[one]: float(2 * hits[i] / marks[i]) if marks[i] else None
        for i, one in enumerate(tagged.foreground)
    }


def _indices(samples: Samples, batch: Batch) -> Tensor:
    """The indices of the batch's photos, int64 [N]: a view of a photo keeps its tags."""
    count = len(batch.labels)
    return torch.tensor([samples.index(batch.position + i) for i in range(count)])


def _save(path: Path, network: TagNetwork, optimizer: torch.optim.Optimizer, step: int) -> None:
    on_cuda = next(network.parameters()).is_cuda
    state = {
        "format": FORMAT,
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_cuda else None,
    }
    write_state(path, state)


def _load(path: Path, network: TagNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Puts a state back; returns the steps that it had done. Raises UserError."""
    state = read_state(path, STATE_KEYS)
    try:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: of another classifier: start over with --force") from error
    torch.set_rng_state(state["rng"])
    if next(network.parameters()).is_cuda and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    step: int = state["step"]
    return step
