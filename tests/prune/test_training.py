"""What is trained while or after weights go: schedules, lottery tickets, PERP."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ArgumentError, FormatError
from nybble.prune.lottery import LotteryTickets
from nybble.prune.perp import Perp, insert, merge
from nybble.prune.schedule import Event, one_shot, ramp, rounds

pytestmark = pytest.mark.usefixtures("one_thread")


def net(seed=0, width=24):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(10, width),
        torch.nn.LayerNorm(width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 3),
    )


def task(seed=0, count=256):
    """Inputs in three classes, by a network that knows."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 10, generator=draw)
    rule = torch.randn(10, 3, generator=torch.Generator().manual_seed(99))
    return inputs, (inputs @ rule).argmax(dim=1)


def loss_of(model, batch):
    inputs, classes = batch
    return torch.nn.functional.cross_entropy(model(inputs), classes)


def trainer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

    def step(index):
        optimizer.zero_grad()
        loss_of(model, task(index % 4, 64)).backward()
        optimizer.step()

    return step


def test_schedules():
    assert list(one_shot(0.5, 10)) == [Event("prune", 0, 0.5), Event("train", 10)]
    assert list(rounds(0.2, 2, 100, 7)) == [
        Event("train", 100),
        Event("prune", 100, pytest.approx(0.2)),
        Event("rewind", 7),
        Event("train", 100),
        Event("prune", 100, pytest.approx(0.36)),
        Event("rewind", 7),
        Event("train", 100),
    ]
    events = list(ramp(0.8, 100, every=25))
    assert events == [
        Event("train", 50),
        Event("prune", 50, pytest.approx(0.4)),
        Event("train", 75),
        Event("prune", 75, pytest.approx(0.8)),
        Event("train", 100),
    ]


@given(st.floats(0, 0.99), st.integers(20, 400), st.sampled_from([1, 3]), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_ramps_rise_to_their_end_and_have_the_known_mean(target, steps, power, every):
    events = [e for e in ramp(target, steps, every=every, power=power) if e.action == "prune"]
    shares = [event.target for event in events]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(target)
    if steps >= 200 and every == 1:
        # Density over the whole training: 1 - s/2 for a linear ramp, 1 - 5s/8 for a cubic one.
        density, now, at = 0.0, 0.0, 0
        for event in events:
            density += (event.step - at) * (1 - now)
            now, at = event.target, event.step
        density = (density + (steps - at) * (1 - now)) / steps
        assert density == pytest.approx(1 - target * (0.5 if power == 1 else 0.625), abs=0.02)


def test_wrong_schedules_are_refused():
    for wrong in (
        lambda: one_shot(1.0),
        lambda: ramp(0.5, 10, begin=0.8, end=0.2),
        lambda: ramp(0.5, 0),
        lambda: rounds(0.2, -1, 10),
        lambda: rounds(0.2, 1, 10, rewind=10),
    ):
        with pytest.raises(ArgumentError):
            list(wrong())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rewind", [0, 5])
def test_tickets_start_from_the_early_weights_and_stay_sparse(scope, rewind):
    model = net()
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    search = LotteryTickets(share=0.3, rounds=3, rewind=rewind, scope=scope)
    ticket = search.run(model, trainer, 40)
    assert ticket.density == pytest.approx(0.7**3, abs=0.02)
    for name, mask in ticket.masks.items():
        weight = model.get_parameter(name).detach().numpy()
        assert not weight[~mask].any()
        assert weight[mask].all()
        same = torch.equal(ticket.start[name], begin[name])
        assert same == (rewind == 0)
        if scope == "layer":
            assert mask.mean() == pytest.approx(0.7**3, abs=0.02)
    inputs, classes = task(50)
    dense = net()
    step = trainer(dense)
    for index in range(40):
        step(index)
    right = [(m(inputs).argmax(dim=1) == classes).float().mean() for m in (model, dense)]
    assert right[0] > right[1] - 0.1


def test_a_lottery_that_cannot_be_is_refused():
    with pytest.raises(ArgumentError, match="two or more"):
        LotteryTickets().run(torch.nn.LayerNorm(4), trainer, 3)
    with pytest.raises(ArgumentError, match="scope"):
        LotteryTickets(scope="all")
    with pytest.raises(FormatError, match="finite"):
        LotteryTickets(rounds=1).run(net(), _spoil, 2)


def _spoil(model):
    def step(_):
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))

    return step


def half(model):
    """Masks of half of each linear's weights, applied."""
    draw = np.random.default_rng(0)
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            masks[name] = draw.random(tuple(parameter.shape)) < 0.5
            parameter.data.mul_(torch.from_numpy(masks[name]))
    return masks


@pytest.mark.parametrize("kind", ["mask", "scale"])
def test_adapters_change_nothing_when_put_in_and_nothing_when_merged(kind):
    model = net()
    masks = half(model)
    inputs, _ = task()
    before = model(inputs)
    insert(model, masks, kind, 4, 8.0)
    torch.testing.assert_close(model(inputs), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".a", ".b")):
                parameter.add_(torch.randn_like(parameter))
    inserted = model(inputs)
    merge(model)
    torch.testing.assert_close(model(inputs), inserted, rtol=0, atol=0)
    for name, mask in masks.items():
        values = model.get_parameter(name).detach().numpy()
        assert not values[~mask].any()
        assert values[mask].all()


@pytest.mark.parametrize("kind", ["mask", "scale", "none"])
def test_recovery_lowers_the_loss_and_keeps_zeros(kind):
    model = net()
    step = trainer(model)
    for index in range(60):
        step(index)
    masks = half(model)
    weights = {name: model.get_parameter(name).detach().clone() for name in masks}
    before = float(loss_of(model, task(70)).detach())
    method = Perp(adapters=kind, rank=4, alpha=8.0, rate=0.01)
    losses = method.run(model, masks, (task(i, 64) for i in range(100)), loss_of, 80)
    assert len(losses) == 80
    assert float(loss_of(model, task(70)).detach()) < 0.8 * before
    for name, mask in masks.items():
        values = model.get_parameter(name).detach().numpy()
        assert not values[~mask].any()
        assert np.array_equal(values, weights[name].numpy()) == (kind == "none")
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_is_reconstructed():
    torch.manual_seed(0)
    linear = torch.nn.Linear(10, 6)
    inputs = torch.randn(256, 3) @ torch.randn(3, 10)  # what one channel loses others know
    wanted = linear(inputs).detach()
    masks = {"weight": np.random.default_rng(0).random((6, 10)) < 0.5}
    holder = torch.nn.ModuleDict({"layer": linear})
    masks = {"layer.weight": masks["weight"]}
    linear.weight.data.mul_(torch.from_numpy(masks["layer.weight"]))

    def off(model, _):
        return torch.square(model["layer"](inputs) - wanted).mean()

    before = float(off(holder, None).detach())
    Perp(rank=4, alpha=8.0, rate=0.02).run(holder, masks, range(60), off, 60)
    assert float(off(holder, None).detach()) < 0.5 * before


def test_recoveries_that_cannot_be_are_refused():
    model = net()
    masks = half(model)
    with pytest.raises(ArgumentError, match=r"did you mean 0\.weight"):
        Perp().run(model, {"0.weigh": masks["0.weight"]}, [task()], loss_of, 1)
    with pytest.raises(ArgumentError, match="shape"):
        Perp().run(model, {"0.weight": masks["3.weight"]}, [task()], loss_of, 1)
    with pytest.raises(ArgumentError, match="batches"):
        Perp().run(model, masks, [task()], loss_of, 3)
    with pytest.raises(ArgumentError, match="to train"):
        Perp(adapters="none", biases=False, norms=False).run(model, masks, [task()], loss_of, 1)
    with pytest.raises(FormatError, match="finite"):
        Perp().run(model, masks, [task()], lambda m, b: loss_of(m, b) * float("nan"), 1)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ArgumentError, match="rank"):
        Perp(rank=0)
