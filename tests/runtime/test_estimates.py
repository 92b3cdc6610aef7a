"""What the chain model estimates."""

from __future__ import annotations

import pytest

from checkpoints.requests import make_request
from triton_diffusion.runtime.estimates import DecodingTime, EndRate


def test_decoding_time_is_in_proportion_to_the_pixels() -> None:
    decoding = DecodingTime()
    assert decoding.estimate_s(make_request()) == 0.0
    decoding.observe(make_request(height=32, width=32), 0.5)
    assert decoding.estimate_s(make_request(height=64, width=32, num_outputs=2)) == pytest.approx(2.0)


def test_the_time_of_a_full_queue_follows_from_how_often_requests_end() -> None:
    now_s = 0.0
    rate = EndRate(lambda: now_s)
    assert rate.expected_s(10) is None
    for _ in range(200):
        rate.note_end()
        now_s += 0.5
    assert rate.expected_s(10) == pytest.approx(5.0, rel=0.05)
