"""Channels of arbitrary torch modules: a network with channels masked is the network cut."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nybble.errors import ArgumentError, FormatError, UnsupportedError
from nybble.prune.allocate import Global, Uniform, meet
from nybble.prune.evidence import Evidence
from nybble.prune.flap import Fluctuation
from nybble.prune.graph import Group, Slice
from nybble.prune.llm_pruner import Taylor
from nybble.prune.magnitude_units import Magnitude
from nybble.prune.networks import cut, observe, prune_network, trace
from nybble.prune.normalised import Normalised
from nybble.prune.plan import Plan, apply_masks
from nybble.prune.random_units import Chance

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class DenseNet(nn.Module):
    """Every layer reads what all before it gave; in the end places and channels are one axis."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.squeeze = nn.Conv2d(20, 10, 1)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(10 * 16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            new = layer(torch.relu(norm(x)))
            x = torch.cat([new, x], dim=1)
        x = self.pool(self.squeeze(x)).flatten(1)
        return self.head(F.gelu(self.hidden(x)))


class Inverted(nn.Module):
    """MobileNet's block with squeeze and excitation: depthwise and gated by itself."""

    def __init__(self, width, inner):
        super().__init__()
        self.up = nn.Conv2d(width, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.depth = nn.Conv2d(inner, 2 * inner, 3, padding=1, groups=inner)
        self.squeeze = nn.Conv2d(2 * inner, 6, 1)
        self.excite = nn.Conv2d(6, 2 * inner, 1)
        self.act = nn.PReLU(2 * inner)
        self.down = nn.Conv2d(2 * inner, width, 1)

    def forward(self, x):
        y = self.act(self.depth(F.hardswish(self.norm(self.up(x)))))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.down(y * gate)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Inverted(8, 12), Inverted(8, 10))
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 12)
        self.scale = nn.Parameter(torch.randn(12, 1, 1))
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.grouped(self.blocks(self.stem(x)))) * self.scale
        return self.head(F.silu(self.up(x)).mean(dim=(2, 3)))


NETWORKS = [ResNet, DenseNet, MobileNet]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def made(kind, seed=0):
    """A network whose norms have seen something and whose biases are not zero."""
    torch.manual_seed(seed)
    network = kind()
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_()
    return network.eval()


def drawn(graph, seed, share=0.6):
    draw = np.random.default_rng(seed)
    keep = {}
    for group in graph.groups.values():
        if draw.random() < 0.8:
            count = max(1, int(share * group.size))
            keep[group.name] = np.sort(draw.choice(group.size, count, replace=False))
    return keep


def close(found, wanted):
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", NETWORKS)
def test_masked_is_cut(kind):
    network = made(kind)
    graph = trace(network, IMAGES)
    before = network(IMAGES).detach()
    for seed in range(4):
        plan = Plan(graph.digest, drawn(graph, seed))
        masked = made(kind)
        apply_masks(masked, graph, plan)
        small = cut(network, graph, plan)
        with torch.no_grad():
            close(small(IMAGES), masked(IMAGES))
            assert (masked(IMAGES) - before).abs().max() > 1e-2 * before.abs().max()
        assert sum(p.numel() for p in small.parameters()) == graph.parameters_left(plan.keep)
        # Traced again, it is what its modules say it is, and training goes on.
        again = trace(small, IMAGES)
        assert again.shapes == {n: tuple(t.shape) for n, t in small.state_dict().items()}
        small(IMAGES).sum().backward()
    assert torch.equal(network(IMAGES), before)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_unit_alone_can_go(kind):
    """No unit hides in another: without any one of them the network is the masked one."""
    network = made(kind)
    graph = trace(network, IMAGES)
    for group in graph.groups.values():
        plan = Plan(graph.digest, {group.name: np.delete(np.arange(group.size), group.size // 2)})
        masked = made(kind)
        apply_masks(masked, graph, plan)
        with torch.no_grad():
            close(cut(network, graph, plan)(IMAGES), masked(IMAGES))


def test_what_goes_together_is_found():
    graph = trace(made(ResNet), IMAGES)
    tensors = {name: {(s.tensor, s.axis) for s in g.slices} for name, g in graph.groups.items()}
    inner = tensors["blocks.0.conv1"]
    bn = {(f"blocks.0.bn1.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")}
    ends = {("blocks.0.conv1.weight", 0), ("blocks.0.conv2.weight", 1)}
    assert inner == ends | bn
    stream = tensors["stem.0"]
    assert {
        ("stem.0.bias", 0),
        ("blocks.0.conv2.weight", 0),
        ("blocks.1.short.0.weight", 1),
    } < stream
    assert not any("running" in s.tensor for g in graph.groups.values() for s in g.weights)
    assert graph.groups["blocks.0.conv1"].cost == 2 * 9 * 8 + 2
    assert graph.whole == {"head": "the network's output: it needs all of them"}
    assert graph.parameters() == sum(p.numel() for p in made(ResNet).parameters())
    # Three layers' channels in one axis, and in the end 16 places of each.
    dense = trace(made(DenseNet), IMAGES)
    reader = next(s for s in dense.groups["layers.1"].slices if s.tensor == "squeeze.weight")
    assert reader.units == (-1,) * 4 + (0, 1, 2, 3) + (-1,) * 12
    flat = next(s for s in dense.groups["squeeze"].slices if s.tensor == "hidden.weight")
    assert flat.units == tuple(np.repeat(np.arange(10), 16))
    # Groups of a grouped convolution are units, with the channels of the norm behind it.
    mobile = trace(made(MobileNet), IMAGES)
    assert mobile.groups["stem"].size == 4
    assert mobile.groups["blocks.0.up"].size == 12
    assert mobile.groups["blocks.0.squeeze"].size == 6


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(6, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.lift(x)
        x = x + self.mix(x, x, x)[0]
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.choose, self.last = Choosing(), nn.Linear(8, 8)
        self.end = nn.Linear(8, 2)

    def forward(self, x):
        return self.end(self.last(self.choose(self.second(self.first(x)))))


def test_what_is_not_understood_stays_and_is_told():
    graph = trace(Attending(), torch.randn(2, 3, 6))
    assert list(graph.groups) == ["up"]
    assert graph.whole["lift"] == "mix (MultiheadAttention): it has no rule"
    partly = trace(Partly(), torch.randn(2, 6))
    assert list(partly.groups) == ["first", "last"]
    assert partly.whole["choose"].startswith("cannot be traced: symbolically traced variables")
    assert partly.whole["second"] == "choose (Choosing): it has no rule"
    with pytest.raises(UnsupportedError, match="Choosing: cannot be traced"):
        trace(Choosing(), torch.randn(2, 8))
    with pytest.raises(UnsupportedError, match=r"inner\.weight: expected float32"):
        trace(Choosing().double(), torch.randn(2, 8))


class Telling(nn.Module):
    """Returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return {"hidden": [hidden], "out": self.second(hidden[:, : hidden.shape[1]])}


def test_outputs_of_any_form_stay():
    graph = trace(Telling(), torch.randn(2, 6))
    assert not graph.groups
    assert set(graph.whole) == {"first", "second"}


class Written(nn.Module):
    """Sizes in its code: those that stand there, and one that is a formula of them."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.conv, self.end = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)
        self.spare = nn.Linear(2, 9)
        self.last = nn.Linear(9, 2)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        x = self.form(x)
        return self.last(self.spare(self.end(x)))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.view(-1, 8),
        lambda x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
        lambda x: x * x.shape[1] ** -0.5,
        lambda x: torch.softmax(x, dim=1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x + torch.arange(8.0),
        lambda x: torch.cat([x[:, :4], x[:, 4:]], dim=1),
    ],
)
def test_channels_that_the_code_counts_stay(form):
    graph = trace(Written(form), IMAGES)
    assert set(graph.groups) == {"end", "spare"}
    assert "conv" in graph.whole


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.view(x.size(0), x.shape[1]),
        lambda x: x.reshape(x.shape) * 2 + 1,
        lambda x: 1 - x.unsqueeze(-1).permute(0, 2, 1).transpose(1, 2).flatten(1),
        lambda x: x.clamp(min=0).float() * x.dim(),
    ],
)
def test_channels_that_only_pass_may_go(form):
    network = Written(form).eval()
    graph = trace(network, IMAGES)
    assert set(graph.groups) == {"conv", "end", "spare"}
    plan = Plan(graph.digest, {"conv": np.array([1, 4, 7])})
    assert cut(network, graph, plan)(IMAGES).shape == (3, 2)


class Tied(nn.Module):
    """A layer that is used twice, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.lift, self.loop, self.end = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.loop.weight

    def forward(self, x):
        return self.end(self.twin(self.loop(torch.tanh(self.loop(self.lift(x))))))


def test_shared_weights_are_cut_once():
    network = made(Tied)
    x = torch.randn(4, 6)
    graph = trace(network, x)
    assert list(graph.groups) == ["lift"]
    plan = Plan(graph.digest, {"lift": np.array([0, 2, 5])})
    small = cut(network, graph, plan)
    assert small.twin.weight is small.loop.weight
    masked = made(Tied)
    apply_masks(masked, graph, plan)
    close(small(x), masked(x))


class Again(nn.Module):
    """A layer that reads the network's input and, later, what another has made of it."""

    def __init__(self):
        super().__init__()
        self.both, self.between, self.end = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 2)

    def forward(self, x):
        return self.end(self.both(self.between(self.both(x))))


def test_a_layer_that_reads_something_else_elsewhere_reads_all_of_it():
    network = made(Again)
    graph = trace(network, torch.randn(2, 6))
    assert list(graph.groups) == ["both"]
    assert graph.whole["between"] == "both (Linear): not all that it reads are channels"
    small = cut(network, graph, Plan(graph.digest, {"both": np.array([1, 2])}))
    assert small(torch.randn(2, 6)).shape == (2, 2)


def loss_of(network, batch):
    images, classes = batch
    return F.cross_entropy(network(images), classes)


def no_number(network, batch):
    return loss_of(network, batch) * float("nan")


BATCHES = [(IMAGES, torch.tensor([0, 1, 2])), (IMAGES.flip(0), torch.tensor([3, 4, 0]))]


@pytest.mark.parametrize("allocator", [Uniform(), Global()])
@pytest.mark.parametrize("criterion", [Magnitude(), Chance(3), Taylor("first"), Taylor("second")])
@pytest.mark.parametrize("kind", NETWORKS)
def test_budgets_are_shares_of_all_parameters(kind, criterion, allocator):
    network = made(kind)
    found = prune_network(
        network,
        IMAGES,
        0.4,
        criterion=Normalised(criterion),
        allocator=allocator,
        loss=loss_of,
        batches=BATCHES,
    )
    size, total = (sum(p.numel() for p in n.parameters()) for n in (found.module, network))
    assert found.removed == pytest.approx(1 - size / total)
    assert found.removed == pytest.approx(0.4, abs=0.05)
    for name, group in found.graph.groups.items():
        assert len(found.plan.keep[name]) >= max(1, 0.1 * group.size)


def test_gradients_are_torchs():
    network = made(ResNet)
    seen = observe(network, {"gradient", "fisher"}, loss_of, BATCHES)
    total = {n: [] for n, _ in network.named_parameters()}
    for batch in BATCHES:
        network.zero_grad()
        loss_of(network, batch).backward()
        for name, parameter in network.named_parameters():
            total[name].append(parameter.grad.clone())
    for name, found in total.items():
        torch.testing.assert_close(torch.from_numpy(seen.gradient[name]), sum(found) / 2)
        squares = sum(one * one for one in found)
        torch.testing.assert_close(torch.from_numpy(seen.fisher[name]), squares)


def test_normalised_scores_are_of_one_scale():
    weights = {"up.weight": np.array([[3.0], [4.0], [0.0]], dtype=np.float32)}
    group = Group("up", "channel", 3, (Slice.regular("up.weight", 0, 3, 1, "out"),))
    seen = Evidence(weights.__getitem__)
    for how, wanted in (
        ("mean", [9 / 7, 12 / 7, 0]),
        ("max", [0.75, 1, 0]),
        ("l2", np.array([3, 4, 0]) / np.sqrt(25 / 3)),
        ("standard", (np.array([3, 4, 0]) - 7 / 3) / np.std([3, 4, 0])),
    ):
        np.testing.assert_allclose(Normalised(Magnitude(), how).score(group, seen), wanted)
    assert Normalised(Taylor("first")).needs == {"gradient"}
    with pytest.raises(ArgumentError, match="how"):
        Normalised(Magnitude(), "sum")


def test_a_ratio_is_met_where_shares_multiply():
    kept = meet(0.75, 0.9, lambda s: {"a": np.arange(round(100 * (1 - s)))}, _square)
    assert len(kept["a"]) == 50
    with pytest.raises(ArgumentError, match=r"at most 0\.19"):
        meet(0.5, 0.1, lambda s: {"a": np.arange(round(100 * (1 - s)))}, _square)


def _square(kept):
    return 1 - (len(kept["a"]) / 100) ** 2


class Counting(nn.Module):
    """Reads its own attribute, which no cut changes."""

    def __init__(self):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.end(x.mean((2, 3)) * self.norm.num_features**-0.5)


def test_networks_that_cannot_be_pruned_are_refused():
    network = made(ResNet)
    with pytest.raises(ArgumentError, match="left empty"):
        prune_network(network, IMAGES, 0.95, floor=0.5)
    with pytest.raises(ArgumentError, match="ratio"):
        prune_network(network, IMAGES, 1.0)
    with pytest.raises(ArgumentError, match="give a loss"):
        prune_network(network, IMAGES, 0.2, criterion=Taylor())
    with pytest.raises(ArgumentError, match="moments"):
        prune_network(network, IMAGES, 0.2, criterion=Fluctuation())
    with pytest.raises(FormatError, match="finite"):
        prune_network(network, IMAGES, 0.2, criterion=Taylor(), loss=no_number, batches=BATCHES)
    with pytest.raises(ArgumentError, match="none"):
        prune_network(nn.Linear(3, 4), torch.randn(1, 3), 0.2)
    with pytest.raises(UnsupportedError, match="number of channels"):
        prune_network(Counting(), IMAGES, 0.2)
