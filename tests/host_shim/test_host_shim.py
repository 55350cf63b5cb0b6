"""The shim tells right kernels from wrong ones, whichever thread runs first."""

from __future__ import annotations

from types import ModuleType

import pytest

THREADS = 96


@pytest.fixture(scope="module")
def built(build) -> ModuleType:
    return build("shim.cpp")


@pytest.fixture(params=[(0, 0), (1, 0), (2, 1), (2, 2)], ids=["forward", "reverse", "shuffled1", "shuffled2"])
def shim(built: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    built.configure(*request.param)
    return built


def test_a_barrier_orders_the_threads_of_a_block(shim):
    assert shim.rotate("block") == [(t + 1) % THREADS for t in range(THREADS)]


@pytest.mark.parametrize("barrier", ["warp", "none"])
def test_a_missing_block_barrier_is_a_race(shim, barrier):
    with pytest.raises(RuntimeError, match="race"):
        shim.rotate(barrier)


def test_a_warp_barrier_orders_the_threads_of_a_warp(shim):
    assert shim.rotate_in_warp("warp") == [t // 32 * 32 + (t + 1) % 32 for t in range(THREADS)]


@pytest.mark.parametrize("barrier", ["shuffle", "none"])
def test_a_missing_warp_barrier_is_a_race_and_a_shuffle_is_none(shim, barrier):
    with pytest.raises(RuntimeError, match="race"):
        shim.rotate_in_warp(barrier)


def test_overwriting_what_others_may_still_read_is_a_race(shim):
    with pytest.raises(RuntimeError, match="race"):
        shim.rotate_in_place()


def test_threads_at_different_barriers_are_a_deadlock(shim):
    with pytest.raises(RuntimeError, match="deadlock"):
        shim.half_a_barrier()


def test_shuffles_and_votes(shim):
    assert shim.sum_and_vote() == [1] * THREADS


def test_a_thread_that_waits_for_a_flag_lets_the_others_run(shim):
    assert shim.mailboxes() == [3] * THREADS


def test_a_flag_that_never_comes_is_a_deadlock(shim):
    with pytest.raises(RuntimeError, match="deadlock"):
        shim.nobody_writes()


def test_atomics(shim):
    assert shim.count() == [THREADS] * THREADS


def test_shared_memory_starts_as_nan(shim):
    assert shim.read_shared() == [1] * THREADS
