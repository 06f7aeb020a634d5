"""Which steps of making pseudo masks are done, and with which settings: pseudo/progress.json."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from srdeploy import console
from srdeploy.data import DataSet, open_dataset
from srdeploy.data.tags import TaggedSet, has_all_masks, open_tagged
from srdeploy.deployable import Normalise
from srdeploy.errors import UserError
from srdeploy.files import read_json, sha256_of, write_json, write_whole
from srdeploy.imaging import restore
from srdeploy.interrupt import StopRequest
from srdeploy.runs import load_network, open_run
from srdeploy.spec import Spec
from srdeploy.train.data import configured_spec
from srdeploy.train.device import find_device
from srdeploy.train.distributed import ALONE
from srdeploy.train.weak import classify
from srdeploy.train.weak.decide import decide, score_photo, with_background, write_scores
from srdeploy.train.weak.maps import (
    Activation,
    MapMaker,
    Teacher,
    at_size,
    averaged_maps,
    of_tags,
    read_maps,
    refined,
    write_maps,
)
from srdeploy.train.weak.mirror import Mirror, groups_of_one_size, read_ahead, read_fitted
from srdeploy.train.weak.pseudo_report import write_report
from srdeploy.train.weak.pseudo_run import (
    CONFIG,
    HOME,
    MAPS,
    REPORT,
    SCORES,
    PseudoRun,
    require_ours,
    require_same_classifier,
    saved_pseudo_run,
)

PROGRESS = "progress.json"

Step = Literal["classify", "maps", "masks"]
STEPS: tuple[Step, ...] = get_args(Step)
"""The steps in their order."""


def key_of(*values: Any) -> str:
    """A digest of settings; equal for equal JSON."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


class StepLog:
    """Steps by name; each has the key of what it depends on, and whether it is done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROGRESS
        found: Any = read_json(self.path) if self.path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: not a record of steps: remove it and run again")
        self._steps: dict[str, dict[str, Any]] = found

    def key(self, step: Step) -> str | None:
        """The key of the settings with which the step began; None if it never began."""
        return self._steps.get(step, {}).get("key")

    def done(self, step: Step, key: str) -> bool:
        """True if the step is done with these settings."""
        return self._steps.get(step) == {"key": key, "done": True}

    def begin(self, step: Step, key: str) -> None:
        """Marks the step as begun and forgets the steps after it."""
        after = STEPS[STEPS.index(step) :]
        self._steps = {name: one for name, one in self._steps.items() if name not in after}
        self._steps[step] = {"key": key, "done": False}
        write_json(self.path, self._steps)

    def forget(self) -> None:
        """Marks every step as not begun."""
        self._steps = {}
        write_json(self.path, self._steps)

    def finish(self, step: Step) -> None:
        """Marks the step as done."""
        self._steps[step]["done"] = True
        write_json(self.path, self._steps)


# The three steps: classify, maps, masks

STOP = "stopping after these photos; once more to stop at once"
MAP_KEYS = {"scales", "flip", "grid"}
"""Settings that decide the maps; the others decide the masks."""


@dataclass(frozen=True)
class Sets:
    """The data, opened."""

    training: TaggedSet
    validation: DataSet | TaggedSet
    """Tagged where it has no masks: it then gets pseudo masks too."""
    spec: Spec

    @property
    def tagged(self) -> tuple[TaggedSet, ...]:
        """The splits that get pseudo masks."""
        last = self.validation
        return (self.training, last) if isinstance(last, TaggedSet) else (self.training,)


def make_pseudo(
    run: PseudoRun, folder: Path, only: Step | None = None, force: bool = False
) -> dict[str, Any] | None:
    """Makes the data set of pseudo masks in `folder`; returns its report, or None where Ctrl-C or
    SIGTERM stopped it (the same call resumes).

    only: only this step. force: trains anew a classifier that was trained with other settings.
    A step that is done with these settings is not done again; maps and masks of other settings are
    made anew. Raises UserError.
    """
    folder = Path(folder)
    home = folder / HOME
    require_ours(folder)
    sets = open_sets(run)
    log = StepLog(home)
    keys = step_keys(run, sets)
    saved = saved_pseudo_run(folder)
    anew = False
    if run.teacher is None and saved is not None and log.key("classify") is not None:
        same_photos = log.key("classify") == keys["classify"]
        # Settings are compared as they are read today, not by a digest: a later version's new key
        # makes no other classifier.
        anew = not same_photos or saved.classifier_values() != run.classifier_values()
        if anew and not force:
            require_same_classifier(saved, run, folder)
    steps: dict[Step, Callable[[PseudoRun, Sets, Path], bool]] = {
        "classify": _classify,
        "maps": _make_maps,
        "masks": _make_masks,
    }
    if run.teacher is not None:
        del steps["classify"]
    if only is not None and only not in steps:
        raise UserError("a teacher takes the classifier's place: leave --only classify away")
    _check(run, sets, trained=log.done("classify", keys["classify"]) and not anew)
    for step in steps:
        if step == only:
            break
        if only is not None and (anew or not log.done(step, keys[step])):
            raise UserError(
                f"step '{step}' is not done with these settings in {folder}: run it first, or "
                "leave --only away"
            )
    if anew:
        log.forget()
    write_whole(home / CONFIG, run.to_yaml())
    for step, act in steps.items():
        key = keys[step]
        if log.done(step, key):
            console.done(f"{folder}: step '{step}' is done already")
        else:
            if log.key(step) != key:
                _forget(step, sets, folder)
            log.begin(step, key)
            if not act(run, sets, folder):
                return None
            log.finish(step)
        if step == only:
            break
    return _report(home)


def _check(run: PseudoRun, sets: Sets, trained: bool) -> None:
    """Raises UserError for what would stop a step: nothing is written before. trained: the
    classifier is there."""
    find_device(run.classifier.device, ALONE)
    if run.teacher is None:
        if not trained:
            classify.check_classifier(run.classifier, sets.training, sets.spec)
        return
    known, wanted = open_run(run.teacher).spec.classes, sets.spec.classes
    if known != wanted:
        raise UserError(
            f"{run.teacher} knows other classes ({', '.join(known)}) than the data set "
            f"({', '.join(wanted)})"
        )


def _report(home: Path) -> dict[str, Any]:
    """The report so far."""
    found: dict[str, Any] = read_json(home / REPORT) if (home / REPORT).exists() else {}
    return found


def open_sets(run: PseudoRun) -> Sets:
    """Opens the splits; reads no photo but its header. Raises UserError."""
    config = run.classifier
    training = open_tagged(config.data, config.train_split, config.layout, run.labels_from_masks)
    if not training.foreground:
        raise UserError(f"{config.data}: no scored class but the background: nothing to recognise")
    validation: DataSet | TaggedSet
    if has_all_masks(config.data, config.val_split, config.layout):
        validation = open_dataset(config.data, config.val_split, config.layout)
    else:
        validation = open_tagged(config.data, config.val_split, config.layout)
        console.warn(
            f"split '{config.val_split}' has no masks: it gets pseudo masks too, and a mIoU on it "
            "says how well they are followed, not how well objects are found"
        )
    return Sets(training, validation, configured_spec(config, training))


def step_keys(run: PseudoRun, sets: Sets) -> dict[Step, str]:
    """What each step's results depend on beside the step before it, as a digest."""
    photos = [
        (str(item.image.relative_to(one.root)), sorted(tags))
        for one in sets.tagged
        for item, tags in zip(one.items, one.tags, strict=True)
    ]
    settings = run.pseudo.model_dump(mode="json", exclude={"batch"})
    teacher = None if run.teacher is None else sha256_of(open_run(run.teacher).weights)
    maps = key_of(teacher, photos, {k: settings[k] for k in MAP_KEYS})
    rest = {k: v for k, v in settings.items() if k not in MAP_KEYS}
    return {
        "classify": key_of(photos[: len(sets.training)]),
        "maps": maps,
        "masks": key_of(maps, rest),
    }


def _classify(run: PseudoRun, sets: Sets, folder: Path) -> bool:
    """Trains the classifier, and says how well it knows the tags of val."""
    home = folder / HOME
    if not classify.train_classifier(run.classifier, sets.training, sets.spec, home):
        return False
    last = sets.validation
    if isinstance(last, DataSet):
        config = run.classifier
        last = open_tagged(config.data, config.val_split, config.layout, from_masks=True)
    device = find_device(run.classifier.device, ALONE)
    network = classify.load_classifier(run.classifier, sets.training, sets.spec, home, device)
    found = classify.tag_scores(network, last, sets.spec)
    known = [one for one in found.values() if one is not None]
    mean = sum(known) / len(known) if known else None
    write_json(home / REPORT, {"tags": {"mean_f1": mean, "f1": found, "images": len(last)}})
    if mean is not None:
        console.done(f"tags of {len(last)} photos of val: mean F1 {100 * mean:.1f}")
    return True


def _make_maps(run: PseudoRun, sets: Sets, folder: Path) -> bool:
    """Writes the class maps of every photo that has none yet."""
    config = run.classifier
    device = find_device(config.device, ALONE)
    maker: MapMaker
    if run.teacher is not None:
        teacher = open_run(run.teacher)
        spec = teacher.spec
        maker = Teacher(load_network(teacher).to(device), spec)
    else:
        spec = sets.spec
        trained = classify.load_classifier(config, sets.training, spec, folder / HOME, device)
        maker = Activation(trained, sets.training.foreground, spec)
    normalise = Normalise(spec).to(device)
    mirror = _mirror(sets, folder)
    with StopRequest(STOP) as stop:
        for tagged in sets.tagged:
            places = [folder / HOME / MAPS / f"{mirror.key(i)}.npz" for i in tagged.items]
            missing = [i for i in range(len(tagged)) if not places[i].exists()]
            groups = groups_of_one_size(tagged, spec, missing, run.pseudo.batch)
            reading = read_ahead(groups, partial(read_fitted, spec=spec), config.workers)
            text = f"class maps of {tagged.split}"
            for group, read in console.track(reading, text, total=len(groups)):
                photos = torch.from_numpy(np.stack([photo for photo, _ in read])).to(device)
                maps = averaged_maps(maker, photos, normalise, spec, run.pseudo)
                for index, found in zip(group.indices, maps, strict=True):
                    kept = of_tags(found, maker.classes, tagged.tags[index], tagged.background)
                    write_maps(places[index], kept)
                if stop.requested:
                    return False
    return True


def _make_masks(run: PseudoRun, sets: Sets, folder: Path) -> bool:
    """Refines the maps, writes the masks that are missing, scores them, and draws them."""
    config, settings, spec = run.classifier, run.pseudo, sets.spec
    device = find_device(config.device, ALONE)
    mirror = _mirror(sets, folder)
    mirror.add_classes(sets.training.classes)
    with StopRequest(STOP) as stop:
        for tagged in sets.tagged:
            scored = tagged.has_masks
            missing = [i for i, item in enumerate(tagged.items) if not mirror.mask(item).exists()]
            groups = groups_of_one_size(tagged, spec, missing, settings.batch)
            reading = read_ahead(groups, partial(read_fitted, spec=spec), config.workers)
            text = f"pseudo masks of {tagged.split}"
            for group, read in console.track(reading, text, total=len(groups)):
                items = [tagged.items[index] for index in group.indices]
                cams = [read_maps(folder / HOME / MAPS / f"{mirror.key(i)}.npz") for i in items]
                photos = [photo for photo, _ in read]
                found = refined(photos, cams, tagged.background, settings, device)
                for index, item, cam, fine, (photo, size) in zip(
                    group.indices, items, cams, found, read, strict=True
                ):
                    whole = with_background(fine, tagged.background, settings.background)
                    labels, confidence = decide(
                        whole, tagged.background, settings.certain, spec.ignore_index
                    )
                    mask = restore(labels, *size)
                    if scored:
                        counts = score_photo(
                            tagged.mask(index),
                            at_size(cam, (photo.shape[0], photo.shape[1])),
                            fine,
                            mask,
                            spec,
                            tagged.background,
                            settings.background,
                        )
                        write_scores(folder / HOME / SCORES / f"{mirror.key(item)}.npz", counts)
                    sure = restore(confidence, *size)
                    mirror.add_pseudo(item, mask, sure, spec, tagged.lookup)
                if stop.requested:
                    return False
            mirror.add_list(tagged.split, tagged.items)
    last = sets.validation
    if isinstance(last, DataSet):
        for item in console.track(last.items, f"{last.split} as it is", total=len(last)):
            mirror.add_true(item)
        mirror.add_list(last.split, last.items)
    write_report(run, sets.tagged, spec, mirror, folder / HOME, _report(folder / HOME))
    return True


def _forget(step: Step, sets: Sets, folder: Path) -> None:
    """Removes what the step, with other settings, left half or wholly done."""
    home, mirror = folder / HOME, _mirror(sets, folder)
    if step == "classify":
        for name in (classify.STATE, classify.CLASSIFIER, REPORT):
            (home / name).unlink(missing_ok=True)
    elif step == "maps":
        shutil.rmtree(home / MAPS, ignore_errors=True)
    else:
        shutil.rmtree(home / SCORES, ignore_errors=True)
        for tagged in sets.tagged:
            for item in tagged.items:
                mirror.mask(item).unlink(missing_ok=True)
                mirror.confidence(item).unlink(missing_ok=True)


def _mirror(sets: Sets, folder: Path) -> Mirror:
    return Mirror(folder, sets.training.root, sets.training.layout)
