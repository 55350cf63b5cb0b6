"""The shim tells right kernels from wrong ones, whichever thread runs first."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

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


@pytest.mark.parametrize(("order", "seen"), [("forward", 1), ("lazy", 0)])
def test_who_has_posted_a_word_may_take_long_to_post_the_next(built, order, seen):
    built.configure({"forward": 0, "lazy": 3}[order], 0)
    assert built.two_words() == [1] + [seen] * (THREADS - 1)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_product_of_a_warp(shim, dtype):
    a, b = (torch.randn(16, n, generator=torch.Generator().manual_seed(n)) for n in (16, 8))
    got = torch.tensor(shim.product(str(dtype)[6:], a.flatten().tolist(), b.flatten().tolist(), True)).view(16, 8)
    torch.testing.assert_close(got, a.to(dtype).float() @ b.to(dtype).float())


def test_a_product_of_what_others_have_not_written_yet_is_a_race(shim):
    with pytest.raises(RuntimeError, match="race"):
        shim.product("bfloat16", [1.0] * 256, [1.0] * 128, False)


TILES = [(7 * i) % 101 for i in range(5 * 4 * THREADS)]


def test_copies_that_land_while_the_thread_computes(shim):
    sums = [
        sum(sum(TILES[4 * (i + t) : 4 * (i + t) + 4]) for i in range(0, 5 * THREADS, THREADS)) for t in range(THREADS)
    ]
    assert shim.sum_of_tiles(TILES, True, True, True) == sums[1:] + sums[:1]


def test_a_copy_that_nobody_waits_for_is_not_there(shim):
    sums = shim.sum_of_tiles(TILES, True, True, True)
    assert all(got != want for got, want in zip(shim.sum_of_tiles(TILES, False, True, True), sums))


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_copy_without_a_barrier_on_either_side_is_a_race(shim, before, after):
    with pytest.raises(RuntimeError, match="race"):
        shim.sum_of_tiles(TILES, True, before, after)
