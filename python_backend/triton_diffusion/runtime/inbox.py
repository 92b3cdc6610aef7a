"""Inbox: what the service has sent to rank 0 and the ranks have not done yet."""

from __future__ import annotations

from collections import deque

import msgspec

from triton_diffusion.runtime.messages import AdmitRequest, DropRequest, RunTick, ToRanks


class Inbox:
    """Messages in their order, but for one: a request that was dropped is in no tick that still waits here.

    The next tick is sent before the last one has come back. Without this, a cancelled row would run once more.
    """

    def __init__(self) -> None:
        self._messages: deque[ToRanks] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: ToRanks) -> None:
        """Take a message in."""
        if isinstance(message, DropRequest):
            self._messages = deque(
                _without(each, message.request_id)
                for each in self._messages
                if not (isinstance(each, AdmitRequest) and each.request_id == message.request_id)
            )
        self._messages.append(message)

    @property
    def next_is_tick(self) -> bool:
        """Whether the next message is a tick."""
        return bool(self._messages) and isinstance(self._messages[0], RunTick)

    def take(self) -> ToRanks:
        """The next message; raises IndexError when there is none."""
        return self._messages.popleft()


def _without(message: ToRanks, request_id: str) -> ToRanks:
    if isinstance(message, RunTick):
        return msgspec.structs.replace(message, rows=[row for row in message.rows if row[0] != request_id])
    return message
