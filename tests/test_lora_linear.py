"""The fused LoRA layer against PEFT's own: values, gradients, and which layers it may take."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefopt.lora_linear import lora_linear
from prefopt.models import fused_lora


class Net(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(seed=0, **config):
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["first", "second"], **config}
    model = get_peft_model(Net(), LoraConfig(**settings))
    randomise(model)
    return model


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)


def rows(n=5):
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def outcome(model, x):
    """The output and the gradients of x and of all that trains."""
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), [x, *trained.values()])
    return {"out": out, "x": found[0], **dict(zip(trained, found[1:], strict=True))}


def assert_same_outcome(model, x, fused):
    """PEFT's forward and ours; `fused` layers must really have been taken."""
    expected = outcome(model, x)
    assert len(expected) > 2
    with fused_lora(model) as n:
        assert n == fused
        found = outcome(model, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    return found


def calls(monkeypatch):
    """Counts the calls of the fused operation."""
    import prefopt.lora_linear

    made = []

    def counted(*args):
        made.append(args)
        return lora_linear(*args)

    monkeypatch.setattr(prefopt.lora_linear, "lora_linear", counted)
    return made


def test_by_hand():
    """x = (1, 2), W = (1, 1), b = 5, A = (3, 0), B = 2, s = 1/2: 3 + 5 + 1/2 * 3 * 2 = 11."""
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight, bias = torch.tensor([[1.0, 1.0]]), torch.tensor([5.0])
    a = torch.tensor([[3.0, 0.0]], requires_grad=True)
    b = torch.tensor([[2.0]], requires_grad=True)
    y = lora_linear(x, weight, bias, a, b, 0.5)
    assert y.tolist() == [[11.0]]
    y.backward(torch.tensor([[10.0]]))
    assert x.grad.tolist() == [[10 * (1 + 0.5 * 2 * 3), 10.0]]
    assert a.grad.tolist() == [[10 * 0.5 * 2 * 1, 10 * 0.5 * 2 * 2]]
    assert b.grad.tolist() == [[10 * 0.5 * 3]]


@pytest.mark.parametrize("shape", [(8,), (4, 8), (1, 1, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("needs", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0)], ids=str)
def test_gradients_are_those_of_the_formula(shape, needs):
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    x, weight, bias, a, b = normal(*shape), normal(5, 8), normal(5), normal(3, 8), normal(5, 3)
    trained = [t.requires_grad_(bool(n)) for t, n in zip((x, a, b), needs, strict=True)]
    wanted = [t for t in trained if t.requires_grad]
    expected = x @ weight.t() + bias + 1.7 * (x @ a.t()) @ b.t()
    found = lora_linear(x, weight, bias, a, b, 1.7)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    for own, other in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_gradcheck():
    draw = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(s, generator=draw, dtype=torch.float64)
        for s in ((3, 4), (5, 4), (2, 4), (5, 2))
    )
    trained = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, None, a, b, 0.6), trained
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"r": 1},
        {"rank_pattern": {"first": 5}, "alpha_pattern": {"second": 2}},
    ],
    ids=["plain", "rslora", "rank 1", "patterns"],
)
def test_plain_layers_are_fused_and_equal_pefts(config, monkeypatch):
    made = calls(monkeypatch)
    assert_same_outcome(adapted(**config), rows(), fused=2)
    assert len(made) == 2


def test_the_switched_off_adapter_is_the_base_model(monkeypatch):
    made = calls(monkeypatch)
    model, x = adapted(), rows()
    with model.disable_adapter():
        expected = model(x)
        with fused_lora(model):
            assert torch.equal(model(x), expected)
    assert not torch.allclose(model(x), expected)
    with fused_lora(model), model.disable_adapter():  # switched off inside the block
        assert torch.equal(model(x), expected)
    assert made == []


def test_the_layers_are_as_before_afterwards_also_after_an_error():
    model = adapted()
    layer = model.base_model.model.first
    with fused_lora(model):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(KeyboardInterrupt), fused_lora(model):
        raise KeyboardInterrupt
    assert "forward" not in vars(layer)


def test_a_block_within_a_block_changes_nothing_and_ends_nothing(monkeypatch):
    """The reference runs inside the policy's block, on the same model."""
    model, x = adapted(), rows()
    made = calls(monkeypatch)
    with fused_lora(model) as outer:
        with fused_lora(model) as inner:
            assert (outer, inner) == (2, 0)
        model(x)
    assert len(made) == 2


def test_layers_that_somebody_else_has_replaced_are_left():
    model = adapted()
    layer = model.base_model.model.first
    hooked = layer.forward
    layer.forward = lambda x: hooked(x) + 1.0
    assert_same_outcome(model, rows(), fused=1)


@pytest.mark.parametrize(
    "config",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "DoRA", "bias of the update"],
)
def test_other_kinds_of_layers_are_left_to_peft(config):
    targets = ["first"] if "lora_bias" in config else ["first", "second"]  # it needs a bias to fit
    model = adapted(**config, target_modules=targets)
    model.eval()  # or dropout would differ by chance
    assert_same_outcome(model, rows(), fused=0)


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_a_trained_base_layer_is_left(trains):
    model = adapted()
    getattr(model.base_model.model.first.base_layer, trains).requires_grad_(True)
    found = assert_same_outcome(model, rows(), fused=1)
    assert any(f"base_layer.{trains}" in name for name in found)


def test_a_merged_layer_is_left(monkeypatch):
    made = calls(monkeypatch)
    model, x = adapted(), rows()
    expected = model(x)
    model.merge_adapter()
    with fused_lora(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert made == []


def test_two_active_adapters_are_left(monkeypatch):
    made = calls(monkeypatch)
    model, x = adapted(), rows()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"]))
    randomise(model)
    one = model(x)
    with fused_lora(model):
        torch.testing.assert_close(model(x), one)
    assert len(made) == 2
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    assert not torch.allclose(one, both)
    with fused_lora(model):
        torch.testing.assert_close(model(x), both)
    assert len(made) == 2


def test_the_adapter_that_is_active_at_the_call_counts(monkeypatch):
    """A copy of the adapter serves as the reference within the policy's block."""
    model, x = adapted(), rows()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["first"]))
    randomise(model)
    default = model(x)
    model.set_adapter("ref")
    ref = model(x)
    assert not torch.allclose(ref, default)
    with fused_lora(model):
        torch.testing.assert_close(model(x), ref)  # "second" has no adapter of that name
        model.set_adapter("default")
        torch.testing.assert_close(model(x), default)


def test_mixed_dtypes_are_left_outside_autocast_and_fused_under_it(monkeypatch):
    made = calls(monkeypatch)
    mixed = adapted()
    mixed.base_model.model.first.base_layer.bfloat16()
    mixed.base_model.model.second.base_layer.bfloat16()
    low = rows().detach().bfloat16()
    expected = mixed(low)
    with fused_lora(mixed):
        assert torch.equal(mixed(low), expected)
    assert made == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = mixed(low)
        with fused_lora(mixed):
            torch.testing.assert_close(mixed(low), expected, rtol=0.03, atol=0.03)
    assert len(made) == 2


def test_half_precision_throughout_is_fused(monkeypatch):
    made = calls(monkeypatch)
    model, x = adapted().bfloat16(), rows().detach().bfloat16()
    expected = model(x)
    with fused_lora(model):
        torch.testing.assert_close(model(x), expected, rtol=0.03, atol=0.03)
    assert len(made) == 2


def test_a_model_without_adapters_is_left_alone():
    with fused_lora(Net()) as n:
        assert n == 0
