"""SIGHUP: read the files now, and tell the service manager about it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import trio

from llamesh.config.problems import ConfigError
from llamesh.config.store import Change, Store
from llamesh.service.notifier import Notifier
from llamesh.telemetry.logs import get_logger

log = get_logger("service")

_STDIN = 0

# Files on a network that is gone can't be read, nor can the attempt be ended.
_MOST_SECONDS = 30.0


async def reload_at_hangup(
    store: Store,
    notifier: Notifier,
    status: Callable[[], str],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reload at each SIGHUP, for ever. What changed, and each mistake, is logged by the store's owner.

    SIGHUP has an older meaning: the terminal is gone. Who closes the window of a node wants its end, and gets
    it by SIGTERM; `kill -HUP` in a terminal that is still there reloads.
    """
    terminal = os.isatty(_STDIN)
    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        task_status.started()
        async for _ in hangups:
            if terminal and not os.isatty(_STDIN):
                log.warning("the terminal was closed")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            notifier.reloading()
            await _reload(store)
            notifier.ready(status())


async def _reload(store: Store) -> None:
    try:
        with trio.fail_after(_MOST_SECONDS):
            change = await store.reload()
    except ConfigError as error:
        log.error("SIGHUP: nothing was taken in", mistakes=len(error.problems))
    except trio.TooSlowError:
        log.error("SIGHUP: the files can't be read; nothing was taken in", waited_seconds=_MOST_SECONDS)
    else:
        log.info("SIGHUP: the files were read", changed=change != Change())
