"""What every encoder must do, and what each one alone does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.randomness import integers, normal
from rtrl_moe_pl.reasoning.encoders import (
    Encoder,
    HybridEncoder,
    HybridVariationalEncoder,
    IterativeEncoder,
    LPNEncoder,
    PairTokenEncoder,
    PuzzleEmbedding,
    StandardEncoder,
    VariationalEncoder,
)
from rtrl_moe_pl.reasoning.encoders.heads import LOGVAR_LIMIT, Gaussian
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleShape

SHAPE = PuzzleShape(vocabulary=6, height=2, width=3, max_demos=4, identities=7)
WIDTH, PREFIX = 16, 3
MASK = torch.tensor([[True, False, True, True], [False, False, True, False], [False, True, False, True]])
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "pair tokens": PairTokenEncoder,
    "standard, mean": StandardEncoder,
    "standard, attention": partial(StandardEncoder, pool="attention"),
    "standard, weighted": partial(StandardEncoder, pool="weighted"),
    "hybrid": HybridEncoder,
    "variational": VariationalEncoder,
    "hybrid variational": HybridVariationalEncoder,
    "LPN": LPNEncoder,
    "LPN, variational": partial(LPNEncoder, variational=True, latent_size=5),
    "iterative": IterativeEncoder,
}
VARIATIONAL = ["variational", "hybrid variational", "LPN, variational"]


def make(name: str) -> Encoder:
    return ENCODERS[name](SHAPE, WIDTH, PREFIX).double()


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return make(request.param)


def puzzles_of(mask: Tensor = MASK, seed: int = 0) -> Puzzles:
    batch, demos = mask.shape
    row, slot = torch.arange(batch)[:, None], torch.arange(demos * SHAPE.cells)
    before, after = (
        integers(seed, use, row, slot, low=0, high=SHAPE.vocabulary).view(batch, demos, -1) for use in (0, 1)
    )
    query = before[:, 0]
    return Puzzles(query, query, before, after, mask, integers(seed, 2, row[:, 0], low=0, high=SHAPE.identities))


def noise_of(encoder: Encoder, batch: int = len(MASK), seed: int = 0) -> Tensor | None:
    """Standard normal numbers; None for an encoder that wants none."""
    if not encoder.noise_size:
        return None
    row, column = torch.arange(batch)[:, None], torch.arange(encoder.noise_size)
    return normal(seed, 3, row, column, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def without_gradient(encoder: Encoder) -> list[str]:
    return [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


def probe(context: Tensor) -> Tensor:
    """A number that depends on all of the context."""
    return (context * torch.linspace(-1, 2, context.numel(), dtype=context.dtype).view_as(context)).sum()


def test_the_context_begins_at_the_scale_of_token_embeddings(encoder: Encoder):
    encoding = encoder(puzzles_of(), noise_of(encoder))
    assert encoding.context.shape == (len(MASK), PREFIX, WIDTH)
    size = encoding.context.square().mean(-1).sqrt() * math.sqrt(WIDTH)
    assert torch.allclose(size, torch.ones_like(size), atol=0.01)


def test_every_parameter_gets_a_gradient(encoder: Encoder):
    probe(encoder(puzzles_of(), noise_of(encoder)).context).backward()
    assert without_gradient(encoder) == []


def test_padding_is_never_looked_at(encoder: Encoder):
    puzzles, noise = puzzles_of(), noise_of(encoder)
    context = encoder(puzzles, noise).context
    absent = ~MASK[..., None]
    padded = puzzles._replace(
        demo_inputs=puzzles.demo_inputs.masked_fill(absent, 10**6),  # no embedding has this row
        demo_labels=puzzles.demo_labels.masked_fill(absent, -100),
    )
    assert torch.equal(encoder(padded, noise).context, context)
    there = puzzles._replace(demo_mask=torch.ones_like(MASK))
    assert not close(encoder(there, noise).context, context)


def test_only_real_demonstrations_go_through_the_blocks(encoder: Encoder):
    rows: list[int] = []
    [first] = [module for name, module in encoder.named_modules() if name.endswith("blocks.0")]
    first.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    encoder(puzzles_of())
    assert rows == [int(MASK.sum())]


def test_rows_do_not_know_of_each_other(encoder: Encoder):
    puzzles, noise = puzzles_of(), noise_of(encoder)
    together = encoder(puzzles, noise)
    for row in range(len(MASK)):
        one = slice(row, row + 1)
        alone = encoder(Puzzles(*(tensor[one] for tensor in puzzles)), None if noise is None else noise[one])
        assert close(alone.context, together.context[one])
        assert alone.kl is None or close(alone.kl, together.kl[one])
    assert not close(together.context[0], together.context[1])


def test_no_rows_at_all(encoder: Encoder):
    """Where contexts are cached, there is nothing to encode in many steps."""
    none = torch.arange(0)
    encoding = encoder(puzzles_of().rows(none), noise_of(encoder, 0))
    assert encoding.context.shape == (0, PREFIX, WIDTH)
    assert encoding.kl is None or encoding.kl.shape == (0,)
    (encoding.context.sum() + sum(p.sum() for p in encoder.parameters())).backward()


def test_the_order_of_demonstrations_does_not_matter(encoder: Encoder):
    puzzles = puzzles_of()
    order = torch.tensor([2, 0, 3, 1])
    moved = puzzles._replace(**{name: getattr(puzzles, name)[:, order] for name in puzzles._fields if "demo" in name})
    context = encoder(puzzles).context
    assert close(encoder(moved).context, context)
    for name in ("demo_inputs", "demo_labels"):
        grids = getattr(puzzles, name).clone()
        grids[0, 2, 1] = (grids[0, 2, 1] + 1) % SHAPE.vocabulary  # one cell of one demonstration
        changed = encoder(puzzles._replace(**{name: grids})).context
        assert not close(changed[0], context[0])
        assert close(changed[1:], context[1:])


def test_which_cell_holds_a_colour_matters(encoder: Encoder):
    """A pool that has lost the positions would not see this."""
    puzzles = puzzles_of()
    flipped = puzzles._replace(demo_labels=puzzles.demo_labels.flip(-1))
    assert not close(encoder(flipped).context, encoder(puzzles).context)


def test_what_is_asked_is_not_used(encoder: Encoder):
    puzzles = puzzles_of()
    other = puzzles._replace(inputs=puzzles.inputs.flip(0), labels=puzzles.labels * 0, identity=puzzles.identity * 0)
    assert torch.equal(encoder(other).context, encoder(puzzles).context)


@pytest.mark.parametrize("demos", range(1, SHAPE.max_demos + 1))
def test_fewer_slots_than_the_maximum(encoder: Encoder, demos: int):
    """Slots cut off are slots that were empty."""
    mask = MASK.clone()
    mask[:, demos:] = False
    mask[:, demos - 1] = True
    puzzles, noise = puzzles_of(mask), noise_of(encoder)
    cut = puzzles._replace(**{name: getattr(puzzles, name)[:, :demos] for name in puzzles._fields if "demo" in name})
    assert close(encoder(cut, noise).context, encoder(puzzles, noise).context)


@pytest.mark.parametrize("name", ENCODERS)
def test_noise_and_kl_belong_to_variational_encoders(name: str):
    encoder = make(name)
    encoding = encoder(puzzles_of())
    assert bool(encoder.noise_size) == (encoding.kl is not None) == (name in VARIATIONAL)
    assert (encoding.state is not None) == (name == "iterative")


@pytest.mark.parametrize("name", VARIATIONAL)
def test_samples_follow_the_noise_and_none_means_the_mean(name: str):
    encoder, puzzles = make(name), puzzles_of()
    noise = noise_of(encoder)
    assert noise is not None
    mean, sample = encoder(puzzles), encoder(puzzles, noise)
    assert torch.equal(encoder(puzzles, 0 * noise).context, mean.context)
    assert torch.equal(encoder(puzzles, noise).context, sample.context)
    assert not close(sample.context, mean.context)
    assert torch.equal(sample.kl, mean.kl)


@pytest.mark.parametrize("name", VARIATIONAL)
def test_kl_is_that_of_normal_distributions_and_each_rows_own(name: str):
    """Against torch.distributions; a batch of copies has the KL of one, not a share of it."""
    encoder, puzzles = make(name), puzzles_of()
    read: list[Tensor] = []
    [gaussian] = [module for module in encoder.modules() if isinstance(module, Gaussian)]
    gaussian.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    kl = encoder(puzzles).kl
    mu, logvar = gaussian.posterior(read[0]).chunk(2, -1)
    normal, prior = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    each = torch.distributions.kl_divergence(normal, prior).sum(-1)  # [B], or [N] one per demonstration
    if name.startswith("LPN"):
        each = torch.stack([part.mean() for part in each.split(MASK.sum(1).tolist())])
    assert kl.shape == (len(MASK),)
    assert close(kl, each)
    copies = encoder(puzzles.rows(torch.tensor([0] * 5))).kl
    assert close(copies, kl[0].expand(5))


def test_the_log_variance_is_cut():
    gaussian = Gaussian(WIDTH, 4).double()
    nn.init.constant_(gaussian.posterior.weight, 1e3)
    for sign in (1, -1):
        sample, kl = gaussian(torch.full((1, WIDTH), float(sign)).double(), torch.ones(1, 4).double())
        mu = sign * 1e3 * WIDTH
        assert close(sample, torch.full_like(sample, mu + math.exp(sign * LOGVAR_LIMIT / 2)))
        limit = sign * LOGVAR_LIMIT
        assert kl.item() == pytest.approx(4 * 0.5 * (mu**2 + math.exp(limit) - 1 - limit))


@pytest.mark.parametrize("variational", [False, True])
def test_everything_goes_through_a_latent_of_the_size_asked_for(variational: bool):
    """A latent of one number leaves each position of the prefix one direction; two numbers do not."""
    puzzles = puzzles_of(MASK[:1].expand(8, -1))
    for size, collinear in ((1, True), (2, False)):
        encoder = LPNEncoder(SHAPE, WIDTH, PREFIX, latent_size=size, variational=variational).double()
        assert encoder.noise_size == (SHAPE.max_demos * size if variational else 0)
        context = encoder(puzzles, noise_of(encoder, 8)).context
        cosine = torch.cosine_similarity(context, context[:1], -1).abs()
        assert torch.allclose(cosine, torch.ones_like(cosine)) == collinear


def test_the_iterative_encoder_goes_on_from_its_state():
    encoder, puzzles = make("iterative"), puzzles_of()
    first = encoder(puzzles)
    zero = torch.zeros(len(MASK), PREFIX, WIDTH, dtype=torch.float64)
    assert torch.equal(encoder(puzzles, state=zero).context, first.context)
    memory = first.context * math.sqrt(WIDTH)
    assert torch.allclose(encoder.queries + first.state, memory, atol=1e-4)  # an offset: zero is the start
    second = encoder(puzzles, state=first.state)
    assert not close(second.context, first.context)
    halted = torch.tensor([True, False, False])
    renewed = encoder(puzzles, state=first.state.masked_fill(halted[:, None, None], 0))
    assert close(renewed.context[0], first.context[0])
    assert close(renewed.context[1:], second.context[1:])


def test_every_parameter_of_the_iterative_encoder_gets_a_gradient_in_every_call():
    encoder, puzzles = make("iterative"), puzzles_of()
    state = encoder(puzzles).state.detach().requires_grad_()
    probe(encoder(puzzles, state=state).context).backward()
    assert without_gradient(encoder) == []
    assert state.grad is not None  # a state that kept its graph would be learned through
    assert bool(state.grad.flatten(1).any(1).all())


@pytest.mark.parametrize("layers", [0, 1])
def test_without_layers_queries_read_the_pairs_themselves(layers: int):
    """Which demonstration a pair of cells is in makes no difference, but for layers within a demonstration."""
    encoder, puzzles = PairTokenEncoder(SHAPE, WIDTH, PREFIX, layers=layers).double(), puzzles_of(torch.ones(3, 4) > 0)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(SHAPE.cells)], 1)
    order = order.expand(3, -1, -1)  # another one at every position
    mixed = puzzles._replace(
        demo_inputs=puzzles.demo_inputs.gather(1, order), demo_labels=puzzles.demo_labels.gather(1, order)
    )
    assert not torch.equal(mixed.demo_inputs, puzzles.demo_inputs)
    assert close(encoder(mixed).context, encoder(puzzles).context) == (layers == 0)


def test_the_state_stays_bounded():
    encoder, puzzles, state = make("iterative"), puzzles_of(), None
    with torch.no_grad():
        for _ in range(50):
            encoding = encoder(puzzles, state=state)
            state = encoding.state
    assert encoding.context.square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(WIDTH), rel=1e-3)


def test_the_puzzle_embedding_knows_the_identity_and_nothing_else():
    encoder, puzzles = PuzzleEmbedding(SHAPE, WIDTH, PREFIX), puzzles_of()
    assert not encoder(puzzles).context.any()
    nn.init.normal_(encoder.table)
    context = encoder(puzzles).context
    assert torch.equal(context[:, 0], encoder.table[puzzles.identity])
    assert not context[:, 1:].any()
    assert torch.equal(encoder(puzzles_of(seed=1)._replace(identity=puzzles.identity)).context, context)


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (StandardEncoder, {"pool": "max"}, "pool must be one of 'mean', 'attention', 'weighted', got 'max'"),
        (VariationalEncoder, {"layers": 0}, "layers must be at least 1, got 0"),
        (HybridEncoder, {"layers": 0}, "layers must be at least 1, got 0"),
        (PairTokenEncoder, {"layers": -1}, "layers must be at least 0, got -1"),
        (LPNEncoder, {"latent_size": 0}, "latent_size must be at least 1, got 0"),
        (IterativeEncoder, {"heads": 3}, r"heads must divide the width \(16, .*\), got 3"),
    ],
)
def test_an_option_out_of_range_is_refused(encoder: Callable[..., Encoder], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        encoder(SHAPE, WIDTH, PREFIX, **options)


def test_puzzles_without_demonstrations_are_refused():
    with pytest.raises(ValueError, match=r"the data have no demonstrations to encode .*: use PuzzleEmbedding"):
        StandardEncoder(PuzzleShape(5, 2, 2), WIDTH, PREFIX)
