"""The recurrent mixture of experts: slots that are read and written sparsely, and experts that are used sparsely."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtrl_moe_pl.cells.base import at_least, not_negative, positive
from rtrl_moe_pl.cells.chrono import chrono_bias
from rtrl_moe_pl.cells.experts import expert_linear
from rtrl_moe_pl.cells.routed import RoutedCell, Routing, put_slots, take_slots


class RecurrentMoE(RoutedCell):
    """Slots as memory, a few experts as what to do with them; state_size = num_slots slot_size.

    With e = LN(W x + b), the slots' addresses a_i and two queries q_r, q_w made from e, a step is

        read      the ``read_slots`` slots of largest q_r . (s_i + a_i); each attends over LN(s + a) of these and e
        content   c = LN(e + sum_i sigmoid(q_r . (s_i + a_i) / sqrt d) (s_i + attended_i))
        experts   the ``active_experts`` experts of largest r_j . c; m = c + sum_j sigmoid(r_j . c) gelu(W_j c + b_j)
        write     the ``write_slots`` slots of largest q_w . (s_i + a_i): u, v = split(W_m m + W_s LN(s_i + a_i));
                  s_i' = s_i + g (tanh v - s_i),  g = sigmoid(q_w . (s_i + a_i) / sqrt d) sigmoid(u)

    All other slots stay exactly as they are: a slot that is not written keeps its content for ever. A gate depends on
    the chosen scores alone (a softmax over all would let what is not chosen matter), and is no share of one, which
    for a single choice would be constant. A state within [-1, 1] stays there, whatever the inputs (``orthogonal``:
    within [-sqrt d, sqrt d]). Scores depend on the slot and on the input, so that routing does not freeze.

    The biases ``read_bias``, ``write_bias`` and ``expert_bias`` take part in the choice alone; ``balance`` moves them
    towards what is used too little. They are buffers: no gradient, saved with the weights.

    Args:
        input_size: D.
        slot_size, num_slots, num_experts: d at least 2, S and E at least 1.
        read_slots, write_slots, active_experts: R, W and A, how many are chosen; all of them makes a dense cell.
        max_memory: T, in steps, at least 2: begin with sigmoid(u) of about 1/T..1/2, so that a slot that is written at
            every step is kept for that many steps or longer (``chrono_bias``).
        temperature: tau, which divides the scores inside the sigmoids; towards 0 they become choices. An attribute,
            to be changed between batches, saved with the weights.
        balance_rate, slot_balance_rate: by how much ``balance`` moves a bias; 0 for not at all.
        drift_penalty: weight of max(0, |s'|^2 - |s|^2) / d, growth of the state's norm (its Lyapunov function),
            for each step (``SequenceModule``: their mean, beside the mean loss of what is labelled).
        expert_penalty: weight of the mean square of the chosen experts' answers, likewise.
        orthogonal: write only what is orthogonal to a slot's old content, v with its part along s_i removed.
        learned_initial_state: see ``Cell``.

    Raises:
        ValueError: for a number of choices below 1 or above what there is, or an option out of range.
    Cost: (4 R + 2 W + A + 6) d^2 + (2 S + E + D) d multiply-adds a row.
    References: Shazeer et al. 2017, arXiv:1701.06538 (experts chosen by score); Goyal et al. 2021, arXiv:1909.10893
        (slots of which few are active); Wang et al. 2024, arXiv:2408.15664 (balancing by biases).
    """

    banks = ("router", "expert_weight", "expert_offset")
    read_bias: Tensor
    write_bias: Tensor
    expert_bias: Tensor

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        num_slots: int,
        num_experts: int,
        read_slots: int = 2,
        write_slots: int = 2,
        active_experts: int = 2,
        *,
        max_memory: int | None = None,
        temperature: float = 1.0,
        balance_rate: float = 0.01,
        slot_balance_rate: float = 0.001,
        drift_penalty: float = 0.0,
        expert_penalty: float = 0.0,
        orthogonal: bool = False,
        learned_initial_state: bool = False,
    ) -> None:
        at_least(1, "num_experts", num_experts)
        at_least(2, "slot_size", slot_size)  # a norm of one number is nothing
        sizes = num_slots, slot_size, num_experts, read_slots, write_slots, active_experts
        super().__init__(input_size, *sizes, learned_initial_state=learned_initial_state)
        self.temperature = positive("temperature", temperature)
        self.balance_rate = not_negative("balance_rate", balance_rate)
        self.slot_balance_rate = not_negative("slot_balance_rate", slot_balance_rate)
        self.drift_penalty = not_negative("drift_penalty", drift_penalty)
        self.expert_penalty = not_negative("expert_penalty", expert_penalty)
        self.orthogonal = orthogonal
        d = slot_size
        self.embed = nn.Linear(input_size, d)
        self.input_norm = nn.LayerNorm(d)
        self.slot_query = nn.Linear(d, 2 * d, bias=False)  # q_r above q_w: choices that inputs alone make
        self.address = nn.Parameter(torch.randn(num_slots, d))
        self.read_norm = nn.LayerNorm(d)
        self.attention_query = nn.Linear(d, d, bias=False)
        self.attention_source = nn.Linear(d, 2 * d, bias=False)  # keys above values
        self.attention_output = nn.Linear(d, d, bias=False)
        self.content_norm = nn.LayerNorm(d)
        self.router = nn.Parameter(torch.randn(num_experts, 1, d) / math.sqrt(d))  # r_j
        self.expert_weight = nn.Parameter(torch.randn(num_experts, d, d) / math.sqrt(d))
        self.expert_offset = nn.Parameter(torch.zeros(num_experts, d))
        self.write_norm = nn.LayerNorm(d)
        self.write_message = nn.Linear(d, 2 * d)  # u above v
        self.write_old = nn.Linear(d, 2 * d, bias=False)
        if max_memory is not None:
            with torch.no_grad():
                self.write_message.bias[:d] = -chrono_bias(d, max_memory)
        self.register_buffer("read_bias", torch.zeros(num_slots))
        self.register_buffer("write_bias", torch.zeros(num_slots))
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    # ---- a step

    def advance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Routing]:
        slots = s.unflatten(-1, (self.num_slots, self.slot_size))
        inputs, content, routing = self._choose(x, slots)
        new = self._write(inputs, content, take_slots(slots, routing.written), routing)
        return put_slots(slots, routing.written, new).flatten(1), routing

    @torch.no_grad()
    def route(self, x: Tensor, s: Tensor) -> Routing:
        return self._choose(x, s.unflatten(-1, (self.num_slots, self.slot_size)))[2]

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        inputs = self._inputs(x)
        return self._write(inputs, self._content(inputs, read, routing.read), old, routing)

    def _choose(self, x: Tensor, slots: Tensor) -> tuple[_Inputs, Tensor, Routing]:
        """What is chosen from x [N, D] and slots [N, S, d], and what is found on the way: c [N, d]."""
        inputs = self._inputs(x)
        read, written = self._choose_slots(inputs, slots)
        content = self._content(inputs, take_slots(slots, read), read)
        return inputs, content, Routing(read, written, self._choose_experts(content))

    def _inputs(self, x: Tensor) -> _Inputs:
        embedded = self.input_norm(self.embed(x))
        return _Inputs(embedded, *self.slot_query(embedded).chunk(2, -1))

    @torch.no_grad()
    def _choose_slots(self, inputs: _Inputs, slots: Tensor) -> tuple[Tensor, Tensor]:
        queries = torch.stack([inputs.read_query, inputs.write_query], -1)  # [N, d, 2]
        read, written = torch.matmul(slots + self.address, queries).mul_(self._scale).unbind(-1)  # [N, S] each
        return (
            (read + self.read_bias).topk(self.read_slots, sorted=False).indices,
            (written + self.write_bias).topk(self.write_slots, sorted=False).indices,
        )

    @torch.no_grad()
    def _choose_experts(self, content: Tensor) -> Tensor:
        scores = torch.addmm(self.expert_bias, content, self.router[:, 0].T)
        return scores.topk(self.active_experts, sorted=False).indices

    def _content(self, inputs: _Inputs, read: Tensor, index: Tensor) -> Tensor:
        """c [N, d], from the read slots [N, R, d]."""
        place = read + functional.embedding(index, self.address)
        gate = self._gate(place, inputs.read_query)
        place = self.read_norm(place)
        sources = torch.cat([place, inputs.embedded.unsqueeze(1)], 1)
        keys, values = self.attention_source(sources).chunk(2, -1)  # [N, R + 1, d] each
        scores = torch.matmul(self.attention_query(place), keys.transpose(1, 2)) * self._scale
        attended = self.attention_output(torch.matmul(torch.softmax(scores, -1), values))
        return self.content_norm(inputs.embedded + (gate * (read + attended)).sum(1))

    def _answers(self, content: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [N, A, 1] and answers [N, A, d] of the chosen experts."""
        each = content.unsqueeze(1).expand(-1, self.active_experts, -1)
        gates = torch.sigmoid(expert_linear(each, self.router, None, experts) / self.temperature)
        return gates, functional.gelu(expert_linear(each, self.expert_weight, self.expert_offset, experts))

    def _write(self, inputs: _Inputs, content: Tensor, old: Tensor, routing: Routing) -> Tensor:
        """The new contents of the written slots [N, W, d]."""
        gates, answers = self._answers(content, routing.experts)
        message = content + (gates * answers).sum(1)  # [N, d]
        place = old + functional.embedding(routing.written, self.address)
        mixed = self.write_message(message).unsqueeze(1) + self.write_old(self.write_norm(place))
        share, new = mixed.chunk(2, -1)
        new = torch.tanh(new)
        if self.orthogonal:
            along = (new * old).sum(-1, keepdim=True) / (old.square().sum(-1, keepdim=True) + 1e-6)
            new = new - along * old
        return torch.lerp(old, new, self._gate(place, inputs.write_query) * torch.sigmoid(share))

    def _gate(self, place: Tensor, query: Tensor) -> Tensor:
        """[N, I, 1], of slots with their addresses [N, I, d] and a query [N, d]."""
        scores = (place * query.unsqueeze(1)).sum(-1, keepdim=True)
        return torch.sigmoid(scores * (self._scale / self.temperature))

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.slot_size)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.temperature, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.temperature = float(state)

    # ---- beside it

    def auxiliary(self, x: Tensor, s: Tensor) -> Tensor | None:
        """The penalties of steps from x [N, D] and s [N, S], [N]; None without any."""
        if not (self.drift_penalty or self.expert_penalty):
            return None
        slots = s.unflatten(-1, (self.num_slots, self.slot_size))
        inputs, content, routing = self._choose(x, slots)
        total = x.new_zeros(len(s))
        if self.drift_penalty:
            old = take_slots(slots, routing.written)
            new = self._write(inputs, content, old, routing)
            drift = (new.square() - old.square()).sum((1, 2)) / self.slot_size
            total = total + self.drift_penalty * torch.relu(drift)
        if self.expert_penalty:
            _, answers = self._answers(content, routing.experts)
            total = total + self.expert_penalty * answers.square().mean((1, 2))
        return total

    @torch.no_grad()
    def balance(self, used: Routing) -> None:
        """Move the biases towards what was used less than the mean, by a fixed step.

        Args:
            used: how often each slot was read [S] and written [S] and each expert chosen [E]; of all processes.
        """
        for bias, counts, rate in (
            (self.read_bias, used.read, self.slot_balance_rate),
            (self.write_bias, used.written, self.slot_balance_rate),
            (self.expert_bias, used.experts, self.balance_rate),
        ):
            counts = counts.to(bias)
            bias.add_(torch.sign(counts.mean() - counts), alpha=rate)


class _Inputs(NamedTuple):
    embedded: Tensor  # [N, d]
    read_query: Tensor
    write_query: Tensor
