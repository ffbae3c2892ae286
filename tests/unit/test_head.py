"""The classification layer is found from the computation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.errors import InputError
from core.models.building import ModelSpec, build_model, last_linear
from core.models.head import find_head, find_linear_head

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Forward = Callable[["Net", torch.Tensor], object]


class Net(nn.Module):
    """The head is registered first, an unused layer last."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)
        self.body = nn.Linear(3 * 64, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 5)
        self.conv = nn.Conv2d(3, 5, 1)
        self.wide = nn.Conv2d(3, 5, 3)
        self.unused = nn.Linear(6, 5)
        self._forward = forward

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x.flatten(1))).relu()

    def forward(self, x: torch.Tensor) -> object:
        return self._forward(self, x)


def test_the_last_registered_is_another() -> None:
    net = Net(lambda n, x: n.head(n.features(x)))
    assert last_linear(net)[0] == "unused"
    assert find_head(net, X).name == "head"


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.head(n.features(x)).view(-1, 5)[:, :],
        lambda n, x: n.head(n.features(x)).clone().float(),
        lambda n, x: n.head(n.features(x)).mul_(2),
        lambda n, x: F.log_softmax(n.head(n.features(x)) / 3, 1),
        lambda n, x: F.dropout(n.head(n.features(x)), training=n.training),
        lambda n, x: n.head(n.features(x)[:, None].expand(-1, 7, -1)).mean(1),
        lambda n, x: (n.head(n.features(x)), n.second(n.features(x))),
        lambda n, x: {"aux": n.second(n.features(x)), "logits": n.head(n.features(x))},
        lambda n, x: n.head(checkpoint(n.features, x, use_reentrant=False)),
        lambda n, x: n.head(checkpoint(n.features, x, use_reentrant=True)),
        lambda n, x: checkpoint(lambda z: n.head(n.features(z)), x, use_reentrant=False),
    ],
)
def test_whatever_stands_behind_and_beside_it(forward: Forward) -> None:
    assert find_head(Net(forward), X).name == "head"


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: F.adaptive_avg_pool2d(F.relu(n.conv(x), inplace=True), 1).flatten(1),
        lambda n, x: n.conv(x).mean((2, 3)),
        lambda n, x: n.conv(x),
    ],
)
def test_a_convolution_of_kernel_one(forward: Forward) -> None:
    net = Net(forward)
    assert find_head(net, X).name == "conv"
    with pytest.raises(InputError, match="come from the convolution conv"):
        find_linear_head(net, X)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda n, x: n.head(n.features(x)) + n.second(n.features(x)), "from 2 layers together"),
        (lambda n, x: x.mean((2, 3)), "from no fully connected layer"),
        (lambda n, x: n.wide(x).mean((2, 3)), "wide, is neither"),
        (lambda n, x: n.body(x.flatten(1))[:, :5], "body, is neither"),
        (lambda n, x: n.head(x), "does not take inputs of shape 3 x 8 x 8"),
    ],
)
def test_one_sentence_where_there_is_none(forward: Forward, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        find_head(Net(forward), X)


def test_nothing_shows_that_it_ran() -> None:
    net = Net(lambda n, x: n.head(F.dropout(n.features(x))))
    net.norm.eval()
    net.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        assert find_head(net, X).layer is net.head
    assert torch.equal(torch.rand(1), expected)
    assert net.training
    assert not net.norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.is_tensor(net(X))
    assert not any(module._forward_hooks for module in net.modules())


def test_a_model_that_is_its_head() -> None:
    assert find_head(nn.Linear(4, 2), torch.ones(1, 4)).name == ""


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("resnet18", "fc"),
        ("convnet", "27"),
        ("vit_tiny", "heads.head"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
    ],
)
def test_of_built_in_models(arch: str, name: str) -> None:
    model = build_model(ModelSpec(arch, n_classes=7, image_size=32, stem="cifar"))
    found, layer = find_head(model, torch.rand(1, 3, 32, 32))
    assert found == name
    assert layer.weight.shape[0] == 7


def test_of_a_model_with_auxiliary_classifiers() -> None:
    import torchvision

    model = torchvision.models.googlenet(num_classes=7, aux_logits=True, init_weights=False)
    assert find_head(model, torch.rand(1, 3, 64, 64)).name == "fc"
