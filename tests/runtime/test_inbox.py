"""What waits at rank 0 when a request is dropped."""

from __future__ import annotations

from triton_diffusion.runtime.inbox import Inbox
from triton_diffusion.runtime.messages import AdmitRequest, DropRequest, RunTick, Shutdown, ToRanks


def admit(name: str) -> AdmitRequest:
    return AdmitRequest(request_id=name, state=b"")


def tick(number: int, *names: str) -> RunTick:
    return RunTick(tick_id=number, rows=[(name, 0) for name in names], num_steps=1)


def drain(*messages: ToRanks) -> list[ToRanks]:
    inbox = Inbox()
    for message in messages:
        inbox.put(message)
    return [inbox.take() for _ in range(len(inbox))]


def test_messages_come_out_in_their_order() -> None:
    messages = [admit("a"), tick(0, "a"), Shutdown()]
    assert drain(*messages) == messages


def test_a_dropped_request_is_taken_out_of_ticks_that_still_wait() -> None:
    drop = DropRequest(request_id="a")
    assert drain(tick(0, "a", "b"), tick(1, "a"), drop) == [tick(0, "b"), tick(1), drop], (
        "an empty tick is answered too"
    )


def test_a_request_that_was_dropped_before_it_was_admitted_is_not_held_for_ever() -> None:
    assert drain(admit("a"), tick(0, "a"), DropRequest(request_id="a"))[0] == tick(0)


def test_an_id_that_comes_again_behind_its_drop_is_run() -> None:
    messages = drain(tick(0, "a"), DropRequest(request_id="a"), admit("a"), tick(1, "a"))
    assert messages == [tick(0), DropRequest(request_id="a"), admit("a"), tick(1, "a")]
