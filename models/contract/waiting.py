# SPDX-License-Identifier: Apache-2.0
"""Waits that end, and that say what for while they last. Torch-free."""

import logging
import socket
import time

from models.contract.errors import ConfigError

logger = logging.getLogger(__name__)

LOOKUP_S = 30.0
"""How long a name may take to appear: clusters announce the first node while the others start."""
NOTICE_AFTER_S = 5.0
NOTICE_EVERY_S = 30.0
POLL_S = 0.2


class Wait:
    """Until when to wait, and when to say again what for."""

    def __init__(self, timeout_s: float, *, notice_after_s: float | None = None) -> None:
        now = time.monotonic()
        self.timeout_s = timeout_s
        self._deadline = now + timeout_s
        self._next_notice = now + (NOTICE_AFTER_S if notice_after_s is None else notice_after_s)

    @property
    def left_s(self) -> float:
        """Seconds until the time is over."""
        return max(0.0, self._deadline - time.monotonic())

    def pause(self, level: int, what_for: str) -> bool:
        """Wait a moment; False when the time is over."""
        now = time.monotonic()
        if now >= self._deadline:
            return False
        if now >= self._next_notice:
            self._next_notice = now + NOTICE_EVERY_S
            logger.log(level, "waiting for %s; %.0f s are left", what_for, self.left_s)
        time.sleep(min(POLL_S, self.left_s))
        return True


def look_up(host: str, port: int, *, source: str, timeout_s: float = LOOKUP_S) -> None:
    """Wait until a host has an address.

    Args:
        host: Name or address.
        port: Where it is going to be asked for.
        source: The variable or option that names it, for messages.
        timeout_s: How long to wait, at most `LOOKUP_S`.

    Raises:
        ConfigError: it has none.
    """
    wait = Wait(min(LOOKUP_S, timeout_s), notice_after_s=0.0)
    while True:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            problem = str(error)
        else:
            return
        if not wait.pause(logging.WARNING, f"an address of {source}={host}"):
            raise ConfigError(
                f"{source} has no address", where=source, got=f"{source}={host!r}: {problem}",
                expected="a name that this host can look up, or an address: where rank 0 is",
                fix="correct it for all ranks; 127.0.0.1 where all of them are on this host",
            )  # fmt: skip
