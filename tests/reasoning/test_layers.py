"""Blocks against what they are defined as."""

import pytest
import torch
from torch.nn import functional

from rtrl_moe_pl.reasoning.layers import Attention, Block, CrossAttention, PositionMLP, Rotary, SwiGLU, rms_norm


def test_rms_norm_has_root_mean_square_one() -> None:
    x = torch.randn(3, 7, dtype=torch.float64) * 100
    assert torch.allclose(rms_norm(x).square().mean(-1), torch.ones(3, dtype=torch.float64))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(8, 20).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rotary(x.expand(20, 8)) for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 7):
        assert torch.allclose(scores.diagonal(distance), scores[0, distance].expand(20 - distance), atol=1e-6)
    assert not torch.allclose(scores[0, 3], scores[0, 4], atol=1e-3)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(20), atol=1e-6)


def test_attention_is_softmax_of_scaled_scores() -> None:
    layer = Attention(6, 2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = [
        functional.softmax(q[..., part] @ k[..., part].mT / 3**0.5, -1) @ v[..., part]
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert torch.allclose(layer(x), layer.out(torch.cat(heads, -1)))


@pytest.mark.parametrize("cross", [False, True])
def test_masked_positions_do_not_count(cross: bool) -> None:
    x, mask = torch.randn(1, 5, 8, dtype=torch.float64), torch.tensor([[True, False, True, True, False]])
    other = torch.where(mask[..., None], x, 7.0)
    if cross:
        layer, queries = CrossAttention(8, 2).double(), torch.randn(1, 3, 8, dtype=torch.float64)
        outputs = [layer(queries, given, mask) for given in (x, other)]
        assert torch.allclose(outputs[0], layer(queries, x[:, mask[0]]))
        assert not torch.allclose(layer(queries, x), layer(queries, other))
    else:
        layer = Block(8, Attention(8, 2)).double()
        outputs = [layer(given, mask)[mask] for given in (x, other)]
        assert torch.allclose(outputs[0], layer(x[:, mask[0]])[0])
        assert not torch.allclose(layer(x)[mask], layer(other)[mask])
    assert torch.allclose(*outputs)


def test_position_mlp_mixes_positions_not_channels() -> None:
    layer = PositionMLP(5).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 2, 1] += 1
    moved = (layer(changed) - layer(x))[0].abs().amax(0) > 1e-12
    assert moved.tolist() == [False, True, False, False]


def test_hidden_width_is_that_of_the_published_models() -> None:
    assert SwiGLU(512).down.in_features == 1536
    assert SwiGLU(128).down.in_features == 512


@pytest.mark.parametrize(("width", "heads"), [(6, 4), (6, 0)])
def test_widths_that_heads_cannot_share_are_refused(width: int, heads: int) -> None:
    for layer in (Attention, CrossAttention):
        with pytest.raises(ValueError, match=rf"^heads must divide the width \(6, decoder\.width .*\), got {heads}$"):
            layer(width, heads)


def test_rotary_positions_need_an_even_width_per_head() -> None:
    with pytest.raises(ValueError, match=r"^rotary positions need an even width per head, got 3"):
        Rotary(3, 5)


@pytest.mark.parametrize("shape", [(3, 5, 6), (4, 6)])
def test_swiglu_is_its_formula_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    layer, x = SwiGLU(6, 0.5).double(), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    gate, up = layer.gate_up(x).chunk(2, -1)
    plain = layer.down(functional.silu(gate) * up)
    found = layer(x)
    assert torch.allclose(found, plain)
    seed, wanted = torch.randn_like(plain), [x, layer.gate_up.weight, layer.down.weight]
    for one, two in zip(*(torch.autograd.grad(y, wanted, seed) for y in (found, plain)), strict=True):
        assert torch.allclose(one, two)


def test_swiglu_keeps_one_hidden_tensor_alone() -> None:
    kept: list[int] = []
    layer, x = SwiGLU(6, 0.5), torch.randn(2, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(size for size in kept if size == 2 * 2 * layer.down.in_features) == 2 * 2 * layer.down.in_features


@pytest.mark.parametrize("expansion", [0, -1.0, float("nan")])
def test_an_expansion_without_a_hidden_layer_is_refused(expansion: float) -> None:
    with pytest.raises(ValueError, match=f"^expansion must be a finite number above 0, got {expansion}$"):
        SwiGLU(6, expansion)
