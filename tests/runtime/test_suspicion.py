"""Which requests are taken for the cause when worker groups die."""

from __future__ import annotations

from triton_diffusion.runtime.suspicion import Suspicion


def test_the_third_death_at_the_same_steps_is_proof() -> None:
    suspicion = Suspicion()
    verdicts = []
    for _ in range(3):
        suspicion.accuse([7])
        suspicion.weigh([6])
        verdicts.append((suspicion.must_be_alone, suspicion.is_proven))
    assert verdicts == [(False, False), (True, False), (True, True)]


def test_deaths_with_progress_between_them_prove_nothing() -> None:
    suspicion = Suspicion()
    for step in range(1, 50):
        suspicion.accuse([step])
        assert suspicion.weigh([step])
    assert not suspicion.must_be_alone


def test_a_step_less_than_was_out_is_no_progress() -> None:
    """Of two ticks that were out, either may have been the last."""
    suspicion = Suspicion()
    suspicion.accuse([8])
    assert not suspicion.weigh([7])
    suspicion.accuse([7])
    assert not suspicion.weigh([7]), "the first death is not answered by less"
    assert suspicion.weigh([8])


def test_every_row_that_was_out_must_have_come_through() -> None:
    suspicion = Suspicion()
    suspicion.accuse([5, 3])
    assert not suspicion.weigh([9, 2])
    assert suspicion.weigh([5, 3])
