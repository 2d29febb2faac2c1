"""Ranks as operating system processes: what every method moves, and what is said when a rank is not where it should be.

Functions whose first argument is a `Place` run in the ranks.
"""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from offload.errors import ConfigError, RankFailedError, RanksDivergedError, WaitTimeoutError
from offload.ranks.collectives import ProcessRanks
from offload.ranks.groups import PART_BYTES, StagedGroup
from offload.ranks.protocol import Ranks
from offload.ranks.single import SINGLE_RANK
from offload.ranks.watch import Identity, RankWatch
from tests.ranks.world import Outcome, Place, World

HOST = torch.device("cpu")
SOON_S = 15.0
"""Seconds after which an error is too late; the deadlines it must not wait for are 60 s."""


def join(group: object = None, wait_timeout_s: float = 60.0) -> ProcessRanks:
    ranks = ProcessRanks.join(group, device=HOST, wait_timeout_s=wait_timeout_s)
    assert isinstance(ranks, ProcessRanks)
    return ranks


def wait_for(key: str) -> None:
    """Until another rank has told `key`."""
    dist.distributed_c10d._get_default_store().wait([key], timedelta(seconds=60))


def tell(key: str) -> None:
    dist.distributed_c10d._get_default_store().set(key, "")


def patterns(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """All kinds of bits: NaN with payloads, both zeros, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype)
    values[::5] = -0.0
    return values


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------- the methods


def call_all_of_the_collective_lane(place: Place) -> None:
    rank, world_size = place.rank, place.world_size
    ranks = join()
    shards = [torch.full((5,), 10 + i, dtype=torch.uint8) for i in range(world_size)]

    whole = torch.zeros(5 * world_size, dtype=torch.uint8)
    ranks.all_gather(whole, shards[rank].clone())
    assert torch.equal(whole, torch.cat(shards))

    whole.zero_()
    whole[5 * rank : 5 * rank + 5] = shards[rank]
    ranks.all_gather(whole, whole[5 * rank : 5 * rank + 5])
    assert torch.equal(whole, torch.cat(shards))

    sent = torch.arange(3 * world_size, dtype=torch.uint8) + 50 * rank
    received = torch.zeros_like(sent)
    ranks.all_to_all(received, sent)
    own = torch.arange(3 * rank, 3 * rank + 3, dtype=torch.uint8)
    assert torch.equal(received, torch.cat([own + 50 * i for i in range(world_size)]))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.arange(4 * world_size).to(dtype) + rank
        shard = torch.zeros(4, dtype=dtype)
        ranks.reduce_scatter(shard, values)
        total = torch.arange(4 * world_size) * world_size + sum(range(world_size))
        assert torch.equal(shard, total[4 * rank : 4 * rank + 4].to(dtype))

    for number in range(3):
        ranks.check_order(f"call {number}")
    ranks.close()


def call_all_of_the_other_threads(place: Place) -> None:
    rank, world_size = place.rank, place.world_size
    ranks = join()
    assert isinstance(ranks, Ranks)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.num_local) == (rank, world_size, rank, world_size)
    assert (ranks.saving.rank, ranks.saving.world_size) == (rank, world_size)

    values = np.array([0.1 * rank, -0.0, np.inf, 1e300])
    totals = ranks.totals(values)
    assert totals.tobytes() == np.array([[0.1 * i, -0.0, np.inf, 1e300] for i in range(world_size)]).tobytes()
    assert totals.shape == (world_size, 4)

    for text_of in ("".__mul__, "é".__mul__, lambda i: "x" * (i * 300_000), lambda i: "" if i else "{}"):
        assert ranks.exchange(text_of(rank)) == [text_of(i) for i in range(world_size)]
    assert list(ranks.saving.exchange(f"saved by {rank}")) == [f"saved by {i}" for i in range(world_size)]

    flags = np.zeros(7, np.uint8)
    flags[rank] = 1
    united = ranks.unite(flags)
    assert united.tolist() == [int(i < world_size) for i in range(7)]
    assert flags.sum() == 1, "the argument stays as it is"

    assert ranks.failed() is None
    ranks.close()
    ranks.close()


def broadcast_everything(place: Place) -> None:
    ranks = join()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        ours, first = patterns(1001, dtype, place.rank), patterns(1001, dtype, 0)
        ranks.broadcast(ours)
        assert bits_of(ours) == bits_of(first), dtype
    numbers = [
        torch.tensor(place.rank),
        torch.tensor([place.rank == 0]),
        torch.empty(0),
        torch.full((2, 3), place.rank),
    ]
    for tensor in numbers:
        ranks.broadcast(tensor)
    assert [int(tensor.sum()) for tensor in numbers] == [0, 1, 0, 0]
    ours = patterns(24, torch.float32, place.rank).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    first = patterns(24, torch.float32, 0).view(1, 2, 3, 4)
    ranks.broadcast(ours)
    assert bits_of(ours) == bits_of(first)
    parameter = torch.nn.Parameter(torch.full((3,), float(place.rank)))
    ranks.broadcast(parameter)
    assert parameter.tolist() == [0.0] * 3
    ranks.close()


def fill_in_everything(place: Place) -> None:
    ranks = join()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        whole = patterns(1000, dtype, 0)
        ours = torch.zeros_like(whole)
        cuts = np.linspace(3, 990, place.world_size + 1).astype(int)  # no rank has the first three
        own = slice(cuts[place.rank], cuts[place.rank + 1])
        ours[own] = whole[own]
        ranks.fill_in(ours)
        expected = torch.zeros_like(whole)
        expected[3:990] = whole[3:990]
        assert bits_of(ours) == bits_of(expected), dtype
    columns = torch.zeros(4, 6).t()
    columns[place.rank] = place.rank + 1.0
    ranks.fill_in(columns)
    assert columns[:, 0].tolist() == [float(i + 1) if i < place.world_size else 0.0 for i in range(6)]
    ranks.close()


def broadcast_more_than_one_part(place: Place) -> None:
    ranks = join()
    tensor = torch.full((PART_BYTES + 7,), place.rank, dtype=torch.uint8)
    tensor[-1] = 9 - place.rank
    ranks.broadcast(tensor)
    assert (int(tensor.max()), int(tensor[:-1].max()), int(tensor[-1])) == (9, 0, 9)
    ranks.close()


def stage_what_is_on_a_device(place: Place, device: str) -> None:
    ranks = join()
    staged = StagedGroup(ranks._order)
    whole = torch.zeros(2 * place.world_size, dtype=torch.uint8, device=device)
    whole[2 * place.rank :] = place.rank
    staged.all_gather(whole, whole[2 * place.rank : 2 * place.rank + 2])
    assert whole.tolist() == [i // 2 for i in range(2 * place.world_size)]
    received = torch.zeros_like(whole)
    staged.all_to_all(received, whole)
    assert received.tolist() == [place.rank] * len(whole)
    shard = torch.zeros(2, device=device)
    staged.reduce_scatter(shard, whole.float())
    assert shard.tolist() == [place.rank * place.world_size] * 2
    ranks.close()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_collective_lane_moves_what_its_methods_say(world: World, world_size: int) -> None:
    world.run(call_all_of_the_collective_lane, world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_other_threads_get_what_their_methods_say(world: World, world_size: int) -> None:
    world.run(call_all_of_the_other_threads, world_size, store="tcp")


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_broadcast_brings_the_bits_of_rank_0_in_every_dtype_and_layout(world: World, world_size: int) -> None:
    world.run(broadcast_everything, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_are_filled_in_bit_for_bit(world: World, world_size: int) -> None:
    world.run(fill_in_everything, world_size)


def test_a_large_tensor_is_broadcast_in_parts(world: World) -> None:
    world.run(broadcast_more_than_one_part, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_of_a_device_go_through_host_memory_where_the_group_has_gloo_alone(world: World, device: str) -> None:
    world.run(stage_what_is_on_a_device, 2, device)


# -------------------------------------------------------------------------------------------------------------- joining


def join_alone(place: Place) -> bool:
    return ProcessRanks.join(None, device=HOST, wait_timeout_s=60) is SINGLE_RANK


def join_groups_of_two(place: Place) -> list[str]:
    """Ranks 1 and 3, and 0 and 2, at once; rank 3 has made one group more than the others, as users do."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    dist.new_group([3])
    ranks = join(groups[place.rank % 2])
    assert (ranks.rank, ranks.world_size) == (place.rank // 2, 2)
    texts = ranks.exchange(f"{place.rank}")
    tensor = torch.tensor(float(place.rank))
    ranks.broadcast(tensor)
    ranks.close()
    return [*texts, str(int(tensor))]


def join_a_group_of_others(place: Place) -> None:
    others = dist.new_group([0])
    if place.rank == 1:
        ProcessRanks.join(others, device=HOST, wait_timeout_s=60)


def join_and_leave_often(place: Place) -> None:
    def left_open() -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(list(Path("/proc/self", kind).iterdir())) for kind in ("fd", "task")])

    join().close()
    dist.barrier()
    before = left_open()
    for number in range(20):
        ranks = join()
        assert ranks.exchange(f"{number}") == [f"{number}"] * 2
        ranks.close()
    dist.barrier()
    # What a session had may still be ending, in threads of gloo's that nobody can join: the first one's when counted
    # before (so fewer may be left in the end), the last one's now. A leak in each session is 20 more.
    deadline_s = time.monotonic() + SOON_S
    while (left_open() > before).any() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    after = left_open()
    assert (after <= before).all(), f"descriptors and threads: {before} before, {after} after"
    dist.barrier()  # a rank that ends takes its connections with it


def join_twice_at_once(place: Place) -> None:
    outer, inner = join(), join()
    if place.rank == 0:
        outer.note_failure("only the outer one")
    dist.barrier()
    assert inner.exchange("inner") == ["inner"] * 2
    assert inner.failed() is None
    assert outer.failed() == "rank 0: only the outer one"
    inner.close()
    outer.close()


def leave_after_torch(place: Place) -> None:
    ranks = join()
    dist.barrier()
    dist.destroy_process_group()
    assert ranks.exchange("still here") == ["still here"] * 2
    ranks.close()


def wait_for_one_that_never_joins(place: Place) -> None:
    if place.rank == 1:
        wait_for("over")
        return
    try:
        join(wait_timeout_s=0.5)
    finally:
        tell("over")


def join_after_the_others_gave_up(place: Place) -> None:
    if place.rank == 1:
        wait_for("over")
    try:
        join(wait_timeout_s=0.5)
    finally:
        tell("over")


def fail_before_joining(place: Place) -> None:
    """Rank 1 has the wrong kind of device, as with one `device=` that depends on the rank."""
    device = torch.device("meta") if place.rank == 1 else HOST
    ProcessRanks.join(None, device=device, wait_timeout_s=60)


def test_one_rank_needs_no_others(world: World) -> None:
    assert world.run(join_alone, 1) == [True]


def test_ranks_of_a_group_are_counted_within_it(world: World) -> None:
    assert world.run(join_groups_of_two, 4) == [["0", "2", "0"], ["1", "3", "1"], ["0", "2", "0"], ["1", "3", "1"]]


def test_a_group_of_other_ranks_is_refused(world: World) -> None:
    error = world.outcomes(join_a_group_of_others, 2)[1].error
    assert isinstance(error, ConfigError)
    assert "rank 1" in str(error)
    assert "not in" in str(error)


def test_nothing_stays_open_after_twenty_sessions(world: World) -> None:
    world.run(join_and_leave_often, 2, store="tcp")


def test_sessions_of_one_process_do_not_hear_each_other(world: World) -> None:
    world.run(join_twice_at_once, 2)


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_ranks_outlive_the_users_groups(world: World, store: str) -> None:
    world.run(leave_after_torch, 2, store=store)


def test_a_rank_that_does_not_join_is_named_at_the_deadline(world: World) -> None:
    for outcome in world.outcomes(wait_for_one_that_never_joins, 3)[::2]:
        assert isinstance(outcome.error, WaitTimeoutError)
        assert "rank 1 did not come" in str(outcome.error)


def test_a_rank_that_joins_too_late_is_told_that_the_others_left(world: World) -> None:
    first, late = world.outcomes(join_after_the_others_gave_up, 2)
    assert isinstance(first.error, WaitTimeoutError)
    assert isinstance(late.error, RankFailedError)
    assert "rank 0 failed" in str(late.error)


def test_a_rank_that_cannot_join_tells_the_others_why(world: World) -> None:
    first, second = world.outcomes(fail_before_joining, 2)
    assert isinstance(second.error, ConfigError)
    assert isinstance(first.error, RankFailedError)
    assert "rank 1 failed" in str(first.error)
    assert "meta" in str(first.error)


def test_ranks_that_were_meant_and_not_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4.*init_process_group"):
        ProcessRanks.join(None, device=HOST, wait_timeout_s=60)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ProcessRanks.join(None, device=HOST, wait_timeout_s=60) is SINGLE_RANK
    monkeypatch.delenv("WORLD_SIZE")
    assert ProcessRanks.join(None, device=HOST, wait_timeout_s=60) is SINGLE_RANK
    with pytest.raises(ConfigError, match=r"process_group=.*init_process_group"):
        ProcessRanks.join(object(), device=HOST, wait_timeout_s=60)


# ------------------------------------------------------------------------------------------------ ranks that are astray


def do_different_things(place: Place) -> None:
    ranks = join()
    ranks.check_order("gather the weights of h.0")
    ranks.check_order("gather the weights of h.2" if place.rank == 1 else "average the gradients of h.1")


def unite_different_lengths(place: Place) -> None:
    ranks = join()
    ranks.unite(np.zeros(3 + place.rank, np.uint8))


def never_arrive(place: Place) -> float:
    """Rank 1 stays away from the third call. What closing takes the others, who are in the middle of a call."""
    ranks = join(wait_timeout_s=1.0)
    ranks.check_order("first")
    ranks.check_order("second")
    if place.rank == 1:
        wait_for("rank 0 is over")
        wait_for("rank 2 is over")
        return 0.0
    with pytest.raises(WaitTimeoutError) as caught:
        ranks.check_order("third")
    (place.folder / f"error{place.rank}").write_text(str(caught.value))
    started = time.monotonic()
    ranks.close()
    seconds = time.monotonic() - started
    tell(f"rank {place.rank} is over")
    return seconds


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_diverge_are_told_what_each_was_about_to_do(world: World, world_size: int) -> None:
    for outcome in world.outcomes(do_different_things, world_size):
        assert isinstance(outcome.error, RanksDivergedError)
        for rank in range(world_size):
            what = "gather the weights of h.2" if rank == 1 else "average the gradients of h.1"
            assert f"rank {rank}: {what}" in str(outcome.error)


def test_values_of_different_lengths_are_refused_before_they_meet(world: World) -> None:
    for outcome in world.outcomes(unite_different_lengths, 2):
        assert isinstance(outcome.error, RanksDivergedError)
        assert "rank 0: unite (3,); rank 1: unite (4,)" in str(outcome.error)


def test_a_rank_that_does_not_arrive_is_named_at_the_deadline_and_closing_does_not_wait_for_it(world: World) -> None:
    seconds = world.run(never_arrive, 3)
    assert max(seconds) < SOON_S
    for rank in (0, 2):
        text = (world.folder_of_last_run / f"error{rank}").read_text()
        assert f"rank {rank} waited 1 s" in text
        assert "third" in text
        assert "where rank 1 did not arrive" in text


# ------------------------------------------------------------------------------------------------------ ranks that fail


def be_killed(place: Place, victim: int) -> float:
    """One rank is killed between two calls of a loop. How long the others take to know and to leave."""
    ranks = join()
    whole = torch.zeros(1000 * place.world_size, dtype=torch.uint8)
    shard = whole[1000 * place.rank : 1000 * place.rank + 1000]
    for number in range(5):
        ranks.check_order(f"gather {number}")
        ranks.all_gather(whole, shard)
    if place.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for number in range(5, 20):
            ranks.check_order(f"gather {number}")
            ranks.all_gather(whole, shard)
    except RankFailedError as error:
        (place.folder / f"error{place.rank}").write_text(str(error))
    ranks.close()
    return time.monotonic() - started


def be_killed_while_others_are_everywhere(place: Place) -> None:
    """Each of the others waits in another call, none of which rank 1 makes."""
    ranks = join()
    dist.barrier()
    if place.rank == 1:
        wait_for("rank 0 goes")
        wait_for("rank 2 goes")
        os.kill(os.getpid(), signal.SIGKILL)
    tell(f"rank {place.rank} goes")
    try:
        ranks.exchange("") if place.rank == 0 else ranks.totals(np.zeros(1))
    finally:
        ranks.close()


def tell_of_a_failure(place: Place) -> None:
    ranks = join()
    if place.rank == 2:
        ranks.note_failure("no space left on /swap")
        ranks.note_failure("a later failure is not the cause")
        wait_for("rank 0 knows")
        wait_for("rank 1 knows")
        return
    try:
        ranks.saving.exchange("")
    finally:
        assert ranks.failed() == "rank 2: no space left on /swap"
        tell(f"rank {place.rank} knows")
        if place.rank == 0:
            wait_for("rank 1 knows")  # the store goes with this rank


def leave_early(place: Place) -> None:
    ranks = join()
    ranks.exchange("")
    if place.rank != 1:
        ranks.exchange("one more")
    ranks.close()


def assert_killed(outcomes: list[Outcome], victim: int) -> list[Outcome]:
    assert outcomes[victim].status == -signal.SIGKILL
    return [each for each in outcomes if each.rank != victim]


@pytest.mark.parametrize(("victim", "store"), [(2, "file"), (0, "tcp")], ids=["any", "the-one-with-the-store"])
def test_all_others_name_a_killed_rank_within_seconds_and_leave(world: World, victim: int, store: str) -> None:
    for outcome in assert_killed(world.outcomes(be_killed, 4, victim, store=store), victim):
        assert outcome.status == 0, outcome.output
        assert outcome.value < SOON_S
        text = (world.folder_of_last_run / f"error{outcome.rank}").read_text()
        assert f"rank {victim} failed, and rank {outcome.rank} was at gather" in text
        assert "restart all ranks" in text


def test_ranks_that_wait_in_different_calls_all_name_the_killed_one(world: World) -> None:
    for outcome in assert_killed(world.outcomes(be_killed_while_others_are_everywhere, 3), 1):
        assert isinstance(outcome.error, RankFailedError), outcome.output
        assert "rank 1 failed" in str(outcome.error)


def test_ranks_that_wait_learn_of_a_failure_elsewhere_and_of_the_first_alone(world: World) -> None:
    for outcome in world.outcomes(tell_of_a_failure, 3, store="tcp")[:2]:
        assert isinstance(outcome.error, RankFailedError), outcome.output
        assert "rank 2 failed" in str(outcome.error)
        assert "no space left on /swap" in str(outcome.error)


def test_a_rank_that_left_is_named_by_those_that_still_call(world: World) -> None:
    outcomes = world.outcomes(leave_early, 3)
    assert outcomes[1].error is None
    for outcome in outcomes[::2]:
        assert isinstance(outcome.error, RankFailedError), outcome.output
        assert "rank 1 failed" in str(outcome.error)
        assert "left the session" in str(outcome.error)


# --------------------------------------------------------------------------------------------------------- who is where


def met(watch_rank: int, world_size: int, others: dict[int, Identity]) -> RankWatch:
    """A watch that has met these other ranks."""
    store = dist.HashStore()
    for rank, identity in others.items():
        store.set(f"here/{rank}", json.dumps(asdict(identity)))
    watch = RankWatch(store, watch_rank, world_size, wait_timeout_s=1.0)
    watch.meet()
    return watch


def test_ranks_of_other_nodes_are_not_local_and_their_pids_say_nothing_here() -> None:
    own = Identity.own()
    elsewhere = replace(own, node="another", pid=2**22 + 1)
    contained = replace(own, pid_view="pid:[1]", pid=2**22 + 1)
    watch = met(1, 4, {0: elsewhere, 2: own, 3: contained})
    assert watch.local_ranks == [1, 2, 3]
    assert watch.failed() is None


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"start": "1"}], ids=["ended", "pid-used-again"])
def test_a_rank_of_this_node_that_has_ended_is_found_by_its_pid(change: dict[str, object]) -> None:
    watch = met(0, 2, {1: replace(Identity.own(), **change)})
    found = watch.failed()
    assert found is not None
    assert found[0] == 1


# -------------------------------------------------------------------------------------------------------------- threads


def speak_from_all_threads_at_once(place: Place) -> None:
    """The lane, the step lane, the one that saves and the training thread, while the user's own thread reduces."""
    ranks = join()
    errors: list[BaseException] = []

    def users_own() -> None:
        for number in range(40):
            tensor = torch.full((100,), float(number))
            dist.all_reduce(tensor)
            assert tensor[0] == number * place.world_size

    def lane() -> None:
        whole = torch.zeros(4 * place.world_size, dtype=torch.uint8)
        for number in range(40):
            ranks.check_order(f"gather {number}")
            ranks.all_gather(whole, torch.full((4,), number + place.rank, dtype=torch.uint8))
            assert whole[::4].tolist() == [number + rank for rank in range(place.world_size)]

    def step() -> None:
        for number in range(40):
            assert ranks.totals(np.full(2, float(number))).tolist() == [[number, number]] * place.world_size

    def saving() -> None:
        for number in range(40):
            assert ranks.saving.exchange(f"{number}") == [f"{number}"] * place.world_size

    def kept(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    # Started in another order on every rank: the order between threads must not matter.
    works = [users_own, lane, step, saving]
    works = works[place.rank :] + works[: place.rank]
    threads = [threading.Thread(target=kept, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for number in range(40):
        assert ranks.exchange(f"{number}") == [f"{number}"] * place.world_size
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    ranks.close()


def test_no_thread_meets_the_calls_of_another_or_the_users(world: World) -> None:
    world.run(speak_from_all_threads_at_once, 3)


# ----------------------------------------------------------------------------------------------------- the world itself


def hang_alone(place: Place) -> None:
    print("rank", place.rank, "is here", os.getpid(), flush=True)  # noqa: T201 - what the test looks for
    if place.rank == 1:
        wait_for("what nobody tells")


def test_a_rank_that_hangs_is_killed_at_the_deadline_and_shows_where_it_was(world: World) -> None:
    ended, hanging = world.outcomes(hang_alone, 2, timeout_s=1.0)
    assert (ended.status, ended.output.split()[:4]) == (0, ["rank", "0", "is", "here"])
    assert hanging.status == -signal.SIGKILL
    assert "in wait_for" in hanging.output
    for outcome in (ended, hanging):
        with pytest.raises(ProcessLookupError):
            os.kill(int(outcome.output.split()[4]), 0)
    with pytest.raises(AssertionError, match=r"rank 1, exit status -9\nrank 1 is here"):
        world.run(hang_alone, 2, timeout_s=0.2)
