"""Thousands of damaged and hostile images: each is decoded or refused in one line."""

import time

import psutil
import pytest

from srdeploy.imaging import Pixels
from srdeploy.serve.server.admission import BadRequest, Refusal, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.segment_task import SegmentOptions, SegmentTask
from srdeploy.spec import InputPolicy, Spec
from tests.serve.server.hostile import corpus

SPEC = Spec(
    classes=("a", "b"),
    palette=((1, 2, 3), (200, 0, 0)),
    input=InputPolicy(smallest=(1, 1), usual=(32, 32), largest=(512, 512)),
)
LIMITS = ServerLimits(megapixels=1)

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on the damage


def prepared(content: bytes) -> Pixels | Refusal:
    try:
        return SegmentTask(content, "it.jpg", SPEC, LIMITS, SegmentOptions(), 3).prepare()
    except Refusal as refusal:
        return refusal


def test_two_thousand_hostile_images_are_decoded_or_refused_in_one_line() -> None:
    decoded = refused = oversized = 0
    for what, content in corpus(2500, seed=0):
        result = prepared(content)
        if isinstance(result, Refusal):
            message = str(result)
            assert type(result) in (BadRequest, TooLarge), what
            assert message.startswith("image 3 ('it.jpg'): "), what
            assert len(message) < 300, what
            assert message.isprintable(), what
            assert " at 0x" not in message, what
            assert "/" not in message, what
            refused += 1
            oversized += isinstance(result, TooLarge)
        else:
            assert result.dtype == "uint8", what
            assert result.ndim == 4, what
            assert result.shape[0] == 1, what
            assert result.shape[3] == 3, what
            decoded += 1
    assert decoded > 300
    assert refused > 1000
    assert oversized > 20


def test_memory_stays_what_it_was_after_the_first_pass() -> None:
    process = psutil.Process()
    files = [content for _, content in corpus(900, seed=1)]
    sizes = []
    for _ in range(3):
        for content in files:
            prepared(content)
        sizes.append(process.memory_info().rss)
    assert sizes[2] - sizes[0] < 16 * 2**20, sizes


def test_the_corpus_is_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(corpus(800, seed=5))
    # Some formats note when they were written: the second time, it is years later.
    later = time.gmtime(2.2e9)
    for clock in ("gmtime", "localtime"):
        monkeypatch.setattr(time, clock, lambda *_: later)
    monkeypatch.setattr(time, "time", lambda: 2.2e9)
    assert list(corpus(800, seed=5)) == first
    assert list(corpus(800, seed=6)) != first
