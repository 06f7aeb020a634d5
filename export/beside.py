"""Work that goes on in a process of its own while this one does something else.

Tracing is Python through and through and takes one core; a fork starts with everything imported.
"""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from srdeploy.errors import UserError


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Runs `work` in a forked process from now on; calling what is yielded waits until it is done.

    `work` hands its result over in files: nothing that it changes in memory comes back. It must not
    touch a GPU. The call raises `work`'s own UserError, and RuntimeError with the traceback for
    anything else. A process that the block did not wait for is ended with the block.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, sender), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that the fork leaves behind; the child starts none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()

    def finish() -> None:
        try:
            people, fault = receiver.recv()
        except EOFError:
            process.join()
            raise UserError(
                f"the process that exports the plain network ended (exit code {process.exitcode}): "
                "perhaps memory ran out"
            ) from None
        process.join()
        if fault:
            raise UserError(fault) if people else RuntimeError(fault)

    try:
        yield finish
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        receiver.close()


def _run(work: Callable[[], None], sender: Connection) -> None:
    """Sends (whether people made the mistake, what it was: empty where all went well)."""
    torch.set_num_threads(1)  # threads of a pool do not survive a fork
    try:
        work()
    except UserError as error:
        sender.send((True, str(error)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    else:
        sender.send((False, ""))
    finally:
        sender.close()
