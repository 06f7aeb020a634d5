"""Validation in the middle of a run: the deployed path in torch, scored at the labels' own size."""

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from srdeploy.data import DataSet
from srdeploy.deployable import Deployable
from srdeploy.imaging import fit, restore
from srdeploy.metrics import Score, Scores
from srdeploy.spec import Spec
from srdeploy.train.distributed import ALONE, World


def validate(
    network: nn.Module,
    spec: Spec,
    dataset: DataSet,
    limit: int | None,
    bar: Progress,
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
