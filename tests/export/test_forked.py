"""Work in a process of its own: it ends with the block, and its faults arrive."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from srdeploy.errors import UserError
from srdeploy.export.pipeline import forked


def test_work_goes_on_while_the_block_runs_and_leaves_its_files(tmp_path: Path) -> None:
    torch.ones(512, 512).matmul(torch.ones(512, 512))  # threads that the fork will not have

    def work() -> None:
        total = torch.ones(512, 512).matmul(torch.ones(512, 512)).sum()
        (tmp_path / "made").write_text(f"{os.getpid()} {int(total)}")

    with forked(work) as finish:
        finish()
    process, total = (tmp_path / "made").read_text().split()
    assert int(process) != os.getpid()
    assert int(total) == 512**3


def test_mistakes_of_people_and_bugs_arrive_as_what_they_are() -> None:
    def mistake() -> None:
        raise UserError("no such network: unett")

    def bug() -> None:
        raise KeyError("unexpected")

    def death() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(mistake) as finish, pytest.raises(UserError, match="^no such network: unett$"):
        finish()
    with forked(bug) as finish, pytest.raises(RuntimeError, match=r"in bug\n(.|\n)*unexpected"):
        finish()
    with forked(death) as finish, pytest.raises(UserError, match="exit code -9"):
        finish()


def test_work_that_nobody_waits_for_ends_with_the_block(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def work() -> None:
        (tmp_path / "part").write_text(str(os.getpid()))
        os.replace(tmp_path / "part", started)
        time.sleep(60)

    def fail_once_it_started() -> None:
        with forked(work):
            while not started.exists():
                time.sleep(0.01)
            raise ValueError("the block's own")

    with pytest.raises(ValueError, match="the block's own"):
        fail_once_it_started()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
