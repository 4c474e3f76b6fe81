"""A command's work -> its exit status, with signals, errors and a reader that went away told in words.

0 done, 1 refused, 3 done but the gate is not passed, 130 stopped by the user, 141 nobody read the
output to its end (`| head`), which is no error of ours, 143 stopped by SIGTERM. Knows no command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from prefopt.errors import GateFailed, PrefoptError

UNREAD = 141
"""As shells count it: 128 and SIGPIPE's number."""


class Unread(Exception):
    """Whoever read the output has gone."""


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Flush the output while an error can still be caught; raise `Unread` where nobody reads it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _nobody_reads():
            raise  # some other pipe
        # Python flushes once more on its way out, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unread from error


def _nobody_reads() -> bool:
    import select

    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such call, or no file behind stdout
        return True


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: from a scheduler, or a machine that is taken back."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does: what is under way is written down, not torn off."""
    import signal
    import threading

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(work: Callable[[], None]) -> int:
    """Do the work, tell in words what stopped it, and return the command's exit status.

    What is nobody's fault that a user could mend is raised, with its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Third parties warn about each other's deprecated names at every step; nobody here can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    for noisy in (
        "bitsandbytes", "datasets", "httpx", "httpx2", "huggingface_hub", "matplotlib", "transformers",
    ):  # fmt: skip
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with flushed(), _terminable():
            work()
    except Unread:
        return UNREAD
    except GateFailed as error:
        print(f"prefopt: {error}", file=sys.stderr)
        return 3
    except (PrefoptError, ValueError) as error:
        print(f"prefopt: {error}", file=sys.stderr)
        return 1
    except _Terminated:
        print("\nprefopt: stopped by SIGTERM; the same command goes on from here.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\nprefopt: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except Exception as error:
        from prefopt.data.records import disk_trouble, unwritable
        from prefopt.out_of_memory import is_out_of_memory, memory_words

        if is_out_of_memory(error):
            print(
                f"prefopt: out of memory ({memory_words(error)}). Lower what goes through a model at "
                "once: batch_size of sampling, micro_batch_tokens of training, or max_length; "
                "`prefopt plan` says what fits. What was finished is kept; the same command goes on "
                "from it.",
                file=sys.stderr,
            )
            return 1

        trouble = disk_trouble(error)
        if trouble is None:
            raise
        where = trouble.filename or "a file"
        print(f"prefopt: {unwritable(where, trouble)}", file=sys.stderr)
        return 1
    return 0
