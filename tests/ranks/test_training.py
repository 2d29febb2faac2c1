"""Several ranks train one model: the losses of one rank, the same bits on every home, 1/N of the bytes."""

import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import offload
from offload.errors import ConfigError, OffloadError, RanksDivergedError, UnsupportedModelError
from tests.ranks.training import batches, build, loss_of, own_part, session_of, sha256_of, train
from tests.ranks.world import Place, World

TOLERANCE = 2e-6
"""Of losses, relative, over four steps: gradients of other world sizes are rounded in another order, once per rank."""


SOON_S = 60.0
"""Seconds after which an error is too late; the deadline it must not wait for is twice as long."""


def runs(place: Place, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(place, **variant) for variant in variants]


def test_one_to_four_ranks_have_the_losses_of_one_and_a_part_of_the_bytes_each(world: World) -> None:
    by_size = {size: world.run(runs, size, [{}]) for size in (1, 2, 3, 4)}
    alone = by_size[1][0][0]
    for size, by_rank in by_size.items():
        first = by_rank[0][0]
        assert first["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
        assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        for (result,) in by_rank:
            assert {key: result[key] for key in ("losses", "norms", "weights", "given back", "moments")} == {
                key: first[key] for key in ("losses", "norms", "weights", "given back", "moments")
            }
            for kind in ("gradients", "state"):
                assert result["bytes"][kind] <= alone["bytes"][kind] / size + 4096 * 4 * 5 * 3
                assert result["bytes"][kind] >= alone["bytes"][kind] / size * 0.9
    assert by_size[4][0][0]["losses"][-1] < by_size[4][0][0]["losses"][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_bits_of_a_world_size_are_the_same_in_every_run_and_on_every_home(world: World, precision: str) -> None:
    variants = [{"home": home, "precision": precision} for home in ("host", "device", "disk", "host")]
    variants += [{"home": "disk", "precision": precision, "overlap": "off"}]
    first, *others = world.run(runs, 2, variants)[0]
    assert all(
        (result["disk bytes"] > 0) == (v["home"] == "disk") for v, result in zip(variants[1:], others, strict=True)
    )
    for result in others:
        assert result["losses"] == first["losses"]
        assert result["weights"] == first["weights"]
        assert result["moments"] == first["moments"]


def test_weights_begin_as_those_of_the_first_rank(world: World) -> None:
    same = world.run(runs, 2, [{"steps": 1}])
    differing = world.run(train_with_own_seed, 2)
    assert [result["weights"] for result in differing] == [same[0][0]["weights"]] * 2


def train_with_own_seed(place: Place) -> dict[str, Any]:
    return train(place, steps=1, seed=3 + 10 * place.rank)


# ------------------------------------------------------------------------------- gradients that some ranks do not have

ROUTES = ((0,), (1,))
"""Of two ranks: each uses another expert, so that neither has the gradients of both."""


def train_routed(place: Place, routes: list[tuple[tuple[int, ...], tuple[int, ...]]], drop: bool) -> dict[str, Any]:
    """Two backwards a step, each with a route of its own."""
    model, optimizer = build()
    with session_of(place, model, optimizer) as session:
        for batch in batches(3):
            for number, route in enumerate(routes):
                loss_of(model, own_part(batch, place.rank, 2), route=route[place.rank]).backward()
                if drop and number == 0:
                    for parameter in model.blocks[1].parameters():
                        parameter.grad = None
            with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
            session.step()
            optimizer.zero_grad()
    return {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}, "with gradient": with_gradient}


def routed_in_memory(routes: list[tuple[tuple[int, ...], tuple[int, ...]]], drop: bool) -> dict[str, torch.Tensor]:
    model, optimizer = build()
    for batch in batches(3):
        for number, route in enumerate(routes):
            for rank in range(2):
                (loss_of(model, own_part(batch, rank, 2), route=route[rank]) / 2).backward()
            if drop and number == 0:
                for parameter in model.blocks[1].parameters():
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("routes", "drop"),
    [
        ([((0,), (1,))], False),
        ([((0,), (0,))], False),
        ([((0,), (1,)), ((1,), (1,))], False),
        ([((0,), (1,)), ((0, 1), ())], True),
    ],
    ids=["one each", "one that none uses", "two backwards", "gradients dropped between two"],
)
def test_a_gradient_on_any_rank_is_one_on_all(world: World, routes: Any, drop: bool) -> None:
    expected = routed_in_memory(routes, drop)
    by_rank = world.run(train_routed, 2, routes, drop)
    assert by_rank[0]["with gradient"] == by_rank[1]["with gradient"]
    for result in by_rank:
        for name, values in expected.items():
            torch.testing.assert_close(result["weights"][name], values, rtol=2e-4, atol=2e-5)
    used = {expert for route in routes for experts in route for expert in experts}
    assert ("blocks.0.experts.1.weight" in by_rank[0]["with gradient"]) == (1 in used)


def overflow_on_one(place: Place) -> list[bool]:
    model, optimizer = build()
    skipped = []
    with session_of(place, model, optimizer, precision="fp16") as session:
        for step, batch in enumerate(batches(6)):
            loss = loss_of(model, own_part(batch, place.rank, 2))
            session.backward(loss * (float("inf") if step == 4 and place.rank == 1 else 1.0))
            result = session.step()
            skipped.append((result.skipped, result.not_finite, result.loss_scale))
            optimizer.zero_grad()
    return skipped


def test_all_ranks_skip_a_step_whose_gradient_is_not_finite_on_one(world: World) -> None:
    first, second = world.run(overflow_on_one, 2)
    assert first == second
    assert [skipped for skipped, _, _ in first[3:]] == [False, True, False]
    assert "of partition" in first[4][1]


# ------------------------------------------------------------------------------------------------ reading and writing


def read_and_edit(place: Place) -> dict[str, Any]:
    model, optimizer = build()
    with session_of(place, model, optimizer, home="disk") as session:
        batch = next(batches(1))
        loss_of(model, own_part(batch, place.rank, 2)).backward()
        gradients = session.gathered_gradients()
        session.step()
        optimizer.zero_grad()
        with session.gathered(model.norm) as values:
            if place.rank == 0:
                values["norm.weight"].fill_(2.0)
        with session.gathered() as masters:
            read = {name: value.clone() for name, value in masters.items()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"gradients": gradients, "read": read, "state": state, "given back": model.state_dict()}


def test_every_rank_reads_whole_values_and_edits_are_those_of_the_first(world: World) -> None:
    model, _ = build()
    loss_of(model, next(batches(1))).backward()
    first, second = world.run(read_and_edit, 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)
        for key in ("read", "state", "given back"):
            assert torch.equal(first[key][name], second[key][name])
            assert torch.equal(first[key][name], first["read"][name])
    assert first["read"]["norm.weight"].eq(2.0).all()


def load_values_of_their_own(place: Place) -> tuple[str, bool]:
    model, optimizer = build()
    own = build(seed=4 + place.rank)[0].state_dict()
    kept = {name: value.clone() for name, value in own.items()}
    with session_of(place, model, optimizer) as session:
        model.load_state_dict(own)
        digest = session.weights_sha256()
    return digest, all(torch.equal(own[name], value) for name, value in kept.items())


def test_weights_that_are_loaded_are_those_of_the_first_rank(world: World) -> None:
    expected = sha256_of(build(seed=4)[0])
    assert world.run(load_values_of_their_own, 2) == [(expected, True)] * 2


def edit_on_the_second(place: Place) -> None:
    model, optimizer = build()
    with session_of(place, model, optimizer) as session, session.gathered(model.norm) as values:
        if place.rank == 1:
            values["norm.weight"].fill_(2.0)


def test_an_edit_that_the_first_rank_does_not_make_is_refused_on_all(world: World) -> None:
    for outcome in world.outcomes(edit_on_the_second, 2):
        assert isinstance(outcome.error, RanksDivergedError), outcome.output
        assert "rank 1 edited 'norm.weight'" in str(outcome.error)


# ---------------------------------------------------------------------------------------------------- several groups


def train_in_pairs(place: Place) -> dict[str, Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return train(place, group=groups[place.rank // 2])


def test_a_process_group_trains_as_that_many_ranks(world: World) -> None:
    pair = world.run(runs, 2, [{}])[0][0]
    for result in world.run(train_in_pairs, 4):
        assert result["losses"] == pair["losses"]
        assert result["weights"] == pair["weights"]


def test_sums_in_the_working_dtype_are_near_those_in_fp32(world: World) -> None:
    wide, narrow = world.run(runs, 3, [{"precision": "bf16"}, {"precision": "bf16", "reduce_dtype": "working"}])[0]
    assert narrow["losses"] == pytest.approx(wide["losses"], rel=2e-3)
    assert narrow["weights"] != wide["weights"]


# ----------------------------------------------------------------------------------------------------------- failures


def leave_out_a_block(place: Place) -> None:
    model, optimizer = build()
    with session_of(place, model, optimizer, wait_timeout_s=2 * SOON_S) as session:
        for step, batch in enumerate(batches(3)):
            skip = 1 if step == 1 and place.rank == 1 else -1
            loss_of(model, own_part(batch, place.rank, 2), skip=skip).backward()
            session.step()
            optimizer.zero_grad()


def test_ranks_whose_control_flow_differs_get_an_error_that_names_both_sides(world: World) -> None:
    begin_s = time.monotonic()
    outcomes = world.outcomes(leave_out_a_block, 2)
    assert time.monotonic() - begin_s < SOON_S
    texts = [str(outcome.error) for outcome in outcomes]
    assert all(isinstance(outcome.error, OffloadError) for outcome in outcomes), [o.output for o in outcomes]
    assert any("rank 0" in text and "rank 1" in text and "blocks." in text for text in texts), texts


def die_in_the_middle(place: Place) -> None:
    model, optimizer = build()
    with session_of(place, model, optimizer, wait_timeout_s=2 * SOON_S) as session:
        for step, batch in enumerate(batches(50)):
            loss = loss_of(model, own_part(batch, place.rank, 3))
            if step == 2 and place.rank == 1:
                signal.raise_signal(signal.SIGKILL)
            loss.backward()
            session.step()
            optimizer.zero_grad()


def test_when_a_rank_dies_the_others_end_with_an_error_that_names_it(world: World) -> None:
    begin_s = time.monotonic()
    first, dead, third = world.outcomes(die_in_the_middle, 3)
    assert time.monotonic() - begin_s < SOON_S
    assert dead.status == -signal.SIGKILL
    for outcome in (first, third):
        assert isinstance(outcome.error, OffloadError), outcome.output
        assert "rank 1" in str(outcome.error), outcome.output
    assert list((world.folder_of_last_run / "swap").iterdir()) == []


def raise_on_one(place: Place) -> None:
    model, optimizer = build()
    with session_of(place, model, optimizer, wait_timeout_s=2 * SOON_S) as session:
        for step, batch in enumerate(batches(50)):
            loss_of(model, own_part(batch, place.rank, 2)).backward()
            if step == 2 and place.rank == 1:
                raise ZeroDivisionError("the user's own")
            session.step()
            optimizer.zero_grad()


def test_an_exception_on_one_rank_ends_all_and_hangs_none(world: World) -> None:
    begin_s = time.monotonic()
    first, second = world.outcomes(raise_on_one, 2)
    assert time.monotonic() - begin_s < SOON_S
    assert isinstance(second.error, ZeroDivisionError), second.output
    assert isinstance(first.error, OffloadError), first.output
    assert "rank 1" in str(first.error)
    assert list((world.folder_of_last_run / "swap").iterdir()) == []


def refusals(place: Place) -> list[str]:
    texts = []
    for wrong in (
        lambda m, o: session_of(place, m, o, overlap="backward", accumulate=1, max_grad_norm=None),
        lambda m, o: session_of(place, m, torch.optim.Muon([p for p in m.parameters() if p.dim() == 2])),
        lambda m, o: session_of(place, nn.parallel.DistributedDataParallel(m), o),
        lambda m, o: session_of(place, *build(num_blocks=2 + place.rank)),
    ):
        model, optimizer = build()
        before = sha256_of(model)
        try:
            with wrong(model, optimizer):
                texts.append("")
        except (ConfigError, UnsupportedModelError, RanksDivergedError) as error:
            texts.append(str(error))
        assert sha256_of(model) == before
    return texts


def test_what_ranks_cannot_do_is_refused_with_the_remedy(world: World) -> None:
    for backward, whole, wrapped, unequal in world.run(refusals, 2):
        assert 'overlap="forward"' in backward
        assert "whole" in whole
        assert "DistributedDataParallel" in wrapped
        assert "differ" in unequal


def without_torch_distributed(place: Place) -> str:
    model, optimizer = build()
    try:
        offload.enable(model, optimizer, device="cpu", device_memory="64MiB")
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_would_each_train_alone_are_refused(world: World) -> None:
    (text,) = world.run(without_torch_distributed, 1, store="none", WORLD_SIZE="2", RANK="0")
    assert "init_process_group" in text


# ------------------------------------------------------------------------------------------------------------ averages


def gradients_of_one_backward(place: Place) -> dict[str, torch.Tensor]:
    model, optimizer = build()
    with session_of(place, model, optimizer) as session:
        loss_of(model, own_part(next(batches(1)), place.rank, place.world_size)).backward()
        return session.gathered_gradients()


def sums_in_order(place: Place, num_parts: int) -> dict[str, torch.Tensor]:
    """In a process like the ranks': with another number of threads torch rounds the gradient of a norm differently."""
    sums: dict[str, torch.Tensor] = {}
    for part in range(num_parts):
        model, _ = build()
        loss_of(model, own_part(next(batches(1)), part, num_parts)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums[name] + parameter.grad if part else parameter.grad
    return sums


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_average_is_the_sum_in_the_order_of_ranks_divided_once(world: World, world_size: int) -> None:
    (sums,) = world.run(sums_in_order, 1, world_size)
    for gradients in world.run(gradients_of_one_backward, world_size):
        for name, total in sums.items():
            assert torch.equal(gradients[name], total * torch.tensor(1.0 / world_size)), name
