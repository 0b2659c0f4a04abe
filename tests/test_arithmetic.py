"""Linear layers in each arithmetic against `nn.Linear`."""

import pytest
import torch
from torch import nn

from models.arithmetic import Arithmetic, CastLinear, Int8Linear, PackedLinear, choose_linear, fused, with_linears
from tools.errors import BadInput

CPU = torch.device("cpu")
ERRORS: dict[Arithmetic, float] = {"fp32": 1e-5, "bf16": 0.01, "fp16": 0.002, "int8": 0.02}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("arithmetic", ERRORS)
def test_each_arithmetic_is_as_near_as_its_bits_allow(arithmetic: Arithmetic, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    inputs = torch.randn(3, 5, 96) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    make, dtype = choose_linear(arithmetic, CPU)
    with torch.inference_mode():
        expected, found = linear(inputs), make(linear)(inputs)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < ERRORS[arithmetic]


def test_int8_of_nothing_is_the_bias() -> None:
    linear = nn.Linear(8, 4)
    nn.init.zeros_(linear.weight[0])
    found = Int8Linear(linear)(torch.zeros(2, 8))
    assert torch.equal(found, linear.bias.detach().expand(2, 4))


def test_a_copy_has_other_linears_and_the_original_its_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 2)}), nn.LayerNorm(4)).train()
    copied = with_linears(module, choose_linear("bf16", CPU)[0])
    assert [type(part) for part in copied.modules() if isinstance(part, PackedLinear | CastLinear)] == [
        PackedLinear
    ] * 2
    assert (module.training, copied.training) == (True, False)
    copied.to(torch.bfloat16)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert isinstance(module[0], nn.Linear)


def test_fused_layers_give_what_each_gives() -> None:
    layers = [nn.Linear(6, width, bias=False) for width in (3, 5)]
    inputs = torch.randn(2, 6)
    assert torch.allclose(fused(layers)(inputs), torch.cat([layer(inputs) for layer in layers], dim=1), atol=1e-6)


def test_int8_on_a_gpu_is_refused() -> None:
    with pytest.raises(BadInput, match="`precision` int8 runs on the CPU only"):
        choose_linear("int8", torch.device("cuda"))
