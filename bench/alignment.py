"""A step of alignment, whole and in parts: ours, the plain reproduction, and what of it is the gradient through Sinkhorn.

    ours       ``align``'s own step: batched warm-started transport with its adjoint, one-pass masked FFN
    autograd   the same with 50 cold Sinkhorn steps as a loop of logsumexp, which autograd goes back through
    eager      all of it as one writes it: that loop a layer at a time, a greedy loop for the rounding, R M^T as a product [T, F],
               both models' logits whole

Every one steps a model of its own with the same weights, from a state that ``start`` reaches with our step. ``Split`` charges the
time between two boundaries to the part that runs there; in the backward pass they are hooks on the tensors between modules.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import dotmoe_kernels as dk
from bench import shapes
from bench.bench_rounding import argsort_loop
from bench.experts import relative_error
from bench.paired import OURS, Case
from bench.shapes import Shape
from dotmoe_kernels import reference
from dotmoe_kernels.alignment.head import find_head
from dotmoe_kernels.alignment.losses import alignment_losses
from dotmoe_kernels.alignment.module import AlignmentFFN, all_experts
from dotmoe_kernels.alignment.transport import Transport
from tests.shapes import generator, normal

PARTS = ("teacher", "transport", "rounding", "masked FFN", "attention", "norms", "loss", "optimizer")
REST = "rest"  # embedding, residual sums, the batch
IMPLS = (OURS, "autograd", "eager")
_HOOKED = "part_of_a_split"  # attribute of a tensor that a watched module made
STEPS = 50  # of Sinkhorn
TAU = 0.1  # where the temperature stays from a fifth of a run on


class Size(NamedTuple):
    """A LLaMA and the tokens of a step."""

    name: str
    ffn: Shape
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    dtype: torch.dtype

    def __str__(self) -> str:
        tokens = f"{self.batch} x {self.length} tokens"
        return f"{self.layers} layers, {self.ffn}, vocabulary {self.vocabulary}, {tokens}"


SMALL = Size("7M", Shape("7M", 256, 16, 64, 4), 6, 2048, 4, 4, 8, 128, torch.float32)
FEWER = tuple(SMALL._replace(name=f"7M-T{128 * n}", batch=n) for n in (1, 2, 4))  # tokens a step, as micro-batches have them
TINY = Size("tiny", Shape("tiny", 64, 8, 16, 2), 2, 128, 4, 4, 2, 64, torch.float32)
Q25 = Size("Q25", shapes.Q25, 4, 152064, 28, 4, 2, 2048, torch.bfloat16)  # four of its 28 layers
L3 = Size("L3", shapes.L3, 4, 128256, 32, 8, 2, 2048, torch.bfloat16)  # four of 32
SIZES = {size.name: size for size in (SMALL, *FEWER, TINY, Q25, L3)}


# --- the split ---------------------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    now: Callable[[], Any]
    between: Callable[[Any, Any], float]  # seconds


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def clock_of(device: str) -> Clock:
    """On a GPU an event in the stream, which is read when all is done; of a single thread its CPU time, which others who use the
    machine do not stretch."""
    if device == "cuda":
        return Clock(_event, lambda a, b: 1e-3 * a.elapsed_time(b))
    return Clock(time.process_time if torch.get_num_threads() == 1 else time.perf_counter, lambda a, b: b - a)


class Split:
    """At a boundary the time since the last one goes to the part that was running."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: list[tuple[str, Any]] = []
        self.on = False

    def mark(self, part: str) -> None:
        """From here on ``part`` runs."""
        if self.on:
            self.marks.append((part, self.clock.now()))

    def watch(self, module: nn.Module, part: str) -> None:
        """``part`` is the module's passes of the student, forward and backward."""

        def begin(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self.on and torch.is_grad_enabled():
                x = args[0] if args else named["hidden_states"]
                if x.requires_grad and not hasattr(x, _HOOKED):  # else what made it goes on there
                    x.register_hook(lambda _: self.mark(REST))
                self.mark(part)

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.on and torch.is_grad_enabled():
                self.mark(REST)
                y = output[0] if isinstance(output, tuple) else output
                if y.requires_grad:
                    y.register_hook(lambda _: self.mark(part))
                    setattr(y, _HOOKED, True)

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)

    def of(self, step: Callable[[], Any]) -> dict[str, float]:
        """Seconds of one step by part; they sum to the step."""
        self.marks, self.on = [], True
        step()
        self.on = False
        self.marks.append((REST, self.clock.now()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = dict.fromkeys((*PARTS, REST), 0.0)
        for (part, a), (_, b) in zip(self.marks, self.marks[1:], strict=False):
            seconds[part] += self.clock.between(a, b)
        return seconds


# --- the plain reproduction --------------------------------------------------------------------------------------------


class EagerFFN(AlignmentFFN):
    """The same FFN by ``reference``: M [F, E] and R [T, E] with their straight-through terms, and the mask R M^T [T, F]."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if self.dense:
            y = (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            return y.view(hidden.shape)
        assert self.expert_of is not None
        self.routing = reference.route_top_k(x.to(self.router_weight.dtype) @ self.router_weight.T, self.top_k)
        y = reference.masked_ffn(
            x,
            gate,
            up,
            down,
            self.expert_of,
            self.routing.indices,
            plan=self.plan,
            probs=self.routing.probs,
            activation=functional.silu,
        )
        return y.view(hidden.shape)


class OwnTransport(Transport):
    """With a boundary around the rounding."""

    split: Split

    def assign(self, layers: list[AlignmentFFN], scores: Tensor) -> Tensor:
        self.split.mark("rounding")
        gap = super().assign(layers, scores)
        self.split.mark("transport")
        return gap


class LoopTransport:
    """Cold Sinkhorn steps in a loop that autograd goes back through; in one batch, or a layer at a time with a greedy loop."""

    def __init__(self, layers: list[AlignmentFFN], mark: Callable[[str], None], *, batched: bool) -> None:
        self.layers, self.mark, self.batched = layers, mark, batched
        self.plans: list[Tensor] = []

    def refresh(self, tau: float) -> None:
        self.mark("transport")
        affinities = [layer.affinity for layer in self.layers]
        if self.batched:
            self.plans = [_loop(torch.stack(affinities), tau)]  # type: ignore[arg-type]
            plans = list(self.plans[0])
        else:
            self.plans = plans = [_loop(a, tau) for a in affinities]  # type: ignore[arg-type]
        for layer, plan in zip(self.layers, plans, strict=True):
            layer.plan = plan.detach().requires_grad_()
        self.mark("rounding")
        if self.batched:
            for layer, expert_of in zip(self.layers, dk.balanced_assignment(self.plans[0].detach()), strict=True):
                layer.expert_of = expert_of
        else:
            for layer, plan in zip(self.layers, plans, strict=True):
                F, E = plan.shape
                layer.expert_of = torch.from_numpy(argsort_loop(plan.detach().cpu().numpy(), F // E)).to(plan.device)

    def backward(self) -> None:
        self.mark("transport")
        gradients = [layer.plan.grad for layer in self.layers]  # type: ignore[union-attr]
        if self.batched:
            self.plans[0].backward(torch.stack(gradients))  # type: ignore[arg-type]
        else:
            torch.autograd.backward(self.plans, gradients)
        self.plans = []


def _loop(affinity: Tensor, tau: float) -> Tensor:
    """reference.sinkhorn without its bookkeeping. [..., F, E]"""
    F, E = affinity.shape[-2:]
    x = affinity / tau
    g = torch.zeros_like(affinity[..., 0, :])
    for _ in range(STEPS):
        f = -torch.logsumexp(x + g[..., None, :], -1)
        g = torch.full_like(g, F / E).log() - torch.logsumexp(x + f[..., None], -2)
    f = -torch.logsumexp(x + g[..., None, :], -1)
    return torch.exp(x + f[..., None] + g[..., None, :])


# --- a step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a run has learned so far."""

    affinity: list[Tensor]
    router: list[Tensor]
    log_v: dict[str, Tensor]


def dense_model(size: Size, device: str) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.ffn.H,
        intermediate_size=size.ffn.F,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(size.dtype).eval().requires_grad_(False)


class Step:
    """Calls are the steps of a run, one after the other; each gives the loss and the gradients to routers and affinities."""

    def __init__(
        self,
        impl: str,
        size: Size,
        device: str = "cpu",
        start: Start | None = None,
        *,
        dtype: torch.dtype | None = None,
        tol: float = 1e-3,
    ) -> None:
        """``dtype``: of the copy of the model, if not its own; ``tol``: of our Sinkhorn steps."""
        self.impl, self.size = impl, size
        self.config = dk.AlignmentConfig(batch_size=size.batch, tau_start=TAU, tau_end=TAU, num_iters=STEPS, tol=tol)
        self.split = Split(clock_of(device))
        self.model = dense_model(size, device)
        if dtype is not None:
            self.model.to(dtype)
        self.layers: dict[str, AlignmentFFN] = {}
        for n, block in enumerate(self.model.model.layers):
            affinity, router = (start.affinity[n], start.router[n]) if start else noise(size, n)
            ffn, old = EagerFFN if impl == "eager" else AlignmentFFN, block.mlp
            layer = ffn(
                *(linear.weight for linear in (old.gate_proj, old.up_proj, old.down_proj)),
                router_weight=router.to(device, copy=True),  # training changes it
                top_k=size.ffn.K,
                activation="silu",
                affinity=affinity.to(device, copy=True),
            )
            if dtype == torch.float64:
                layer.double()
            self.layers[f"model.layers.{n}.mlp"] = block.mlp = layer
            self.split.watch(layer, "masked FFN")
            self.split.watch(block.self_attn, "attention")
            self.split.watch(block.input_layernorm, "norms")
            self.split.watch(block.post_attention_layernorm, "norms")
        self.split.watch(self.model.model.rotary_emb, "attention")
        self.model.model.norm.register_forward_pre_hook(lambda *_: self._ending())
        layers = list(self.layers.values())
        self.transport: Any
        if impl == OURS:
            self.transport = OwnTransport(self.layers, self.config)
            self.transport.split, self.transport.tau = self.split, TAU
            self.transport.log_v = {} if start is None else {key: value.to(device) for key, value in start.log_v.items()}
        else:
            self.transport = LoopTransport(layers, self.split.mark, batched=impl == "autograd")
        routers, affinities = [f.router_weight for f in layers], [f.affinity for f in layers]
        self.trained: list[nn.Parameter] = [*routers, *affinities]  # type: ignore[list-item]
        rates = {"lr": self.config.router_rate}, {"lr": self.config.affinity_lr}
        groups = [{"params": p, **rate} for p, rate in zip((routers, affinities), rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)
        self.tokens = torch.randint(size.vocabulary, (4 * size.batch, size.length), generator=generator(1)).to(device)
        self.done = 0
        with all_experts(self.layers):
            self.head = None if impl == "eager" else find_head(self.model, self.tokens[:1, :16])
        assert self.head is not None or impl == "eager"

    def _ending(self) -> None:
        """The last norm, the head and the loss are one part."""
        if torch.is_grad_enabled():
            self.split.mark("loss")

    def _outputs(self, batch: Tensor) -> Tensor:
        """The last hidden states, or of the plain reproduction the logits."""
        return self.model(input_ids=batch, use_cache=False).logits if self.head is None else self.head.hidden(batch)

    def _loss(self, teacher: Tensor, student: Tensor, batch: Tensor) -> Tensor:
        if self.head is not None:
            return alignment_losses(teacher, student, batch, self.layers, self.config, head=self.head).total
        wide, c = self.trained[0].dtype, self.config
        kl, ce = reference.distillation_losses(teacher.to(wide), student.to(wide), batch)
        routings = [f.routing for f in self.layers.values() if f.routing is not None]
        z, balance = (torch.stack([getattr(r, name) for r in routings]).mean() for name in ("z_loss", "balance_loss"))
        return c.kl * kl + c.ce * ce + c.z * z + c.balance * balance

    def __call__(self) -> list[Tensor]:
        mark, c = self.split.mark, self.config
        mark(REST)
        first = self.done * self.size.batch % len(self.tokens)
        batch = self.tokens[first : first + self.size.batch]
        mark("transport")
        self.transport.refresh(TAU)
        mark("optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        mark("teacher")
        with torch.no_grad(), all_experts(self.layers):
            teacher = self._outputs(batch)
        mark(REST)
        loss = self._loss(teacher, self._outputs(batch), batch)
        loss.backward()
        mark("transport")
        self.transport.backward()
        mark("optimizer")
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        assert bool(torch.isfinite(norm + loss.detach()))
        L = self.size.layers
        routers, affinities = (torch.stack([p.grad for p in some]) for some in (self.trained[:L], self.trained[L:]))  # type: ignore[misc]
        nn.utils.clip_grads_with_norm_(self.trained, c.clip, norm)
        self.optimizer.step()
        self.done += 1
        mark(REST)
        return [loss.detach(), routers, affinities]

    def state(self) -> Start:
        L = self.size.layers
        affinity, router = ([p.detach().clone() for p in some] for some in (self.trained[L:], self.trained[:L]))
        return Start(affinity, router, dict(self.transport.log_v))


def noise(size: Size, layer: int) -> tuple[Tensor, Tensor]:
    """N(0, 0.01): affinity [F, E] and router [E, H]"""
    F, E, H = size.ffn.F, size.ffn.E, size.ffn.H
    drawn = [normal(*shape, seed=10 + 2 * layer + n, scale=0.01, dtype=torch.float32) for n, shape in enumerate(((F, E), (E, H)))]
    return drawn[0], drawn[1]


@lru_cache(maxsize=1)
def start(size: Size, device: str = "cpu", steps: int = 20) -> Start:
    """After some steps of ours."""
    step = Step(OURS, size, device)
    for _ in range(steps):
        step()
    return step.state()


# --- as a case ---------------------------------------------------------------------------------------------------------


def measured_split(step: Step, rounds: int = 5) -> dict[str, float]:
    """Seconds by part, medians over steps."""
    step()
    taken = [step.split.of(step) for _ in range(rounds)]
    return {part: median(one[part] for one in taken) for part in taken[0]}


def distances(found: list[Tensor], exact: list[Tensor]) -> float:
    distance = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
    return distance if distance == distance else float("inf")


def case(size: Size, device: str = "cpu") -> Case:
    """Ours stops its Sinkhorn steps at a column error of 1e-3; that all of them give float64's loss and gradients is seen to first,
    by a step that takes them all. In 16 bits another K-th expert is taken where two are close, so there only the loss is compared;
    on a GPU with float32."""
    begin = start(size, device)
    wide = torch.float64 if device == "cpu" else torch.float32
    exact = Step("eager", size, device, begin, dtype=wide)()
    compared = len(exact) if size.dtype == torch.float32 else 1
    checked, extra, skipped = dict[str, float](), dict[str, dict[str, Any]](), dict[str, str]()
    for name in IMPLS:
        try:
            checked[name] = distances(Step(name, size, device, begin, tol=0.0)()[:compared], exact[:compared])
            extra[name] = {"split": measured_split(Step(name, size, device, begin))}
        except torch.OutOfMemoryError:
            skipped[name] = "out of memory"
    steps: dict[str, Callable[[], Any]] = {name: Step(name, size, device, begin) for name in IMPLS if name not in skipped}
    tolerance = 1e-4 if size.dtype == torch.float32 else 1e-2
    return Case(steps, lambda name, _: checked[name], tolerance, skipped=skipped, extra=extra)


def info(size: Size) -> dict[str, Any]:
    """The products of a dense pass of the teacher, one of the student, and one back to its inputs."""
    c, tokens = size.ffn, size.batch * size.length
    attention = (2 * size.heads + 2 * size.kv_heads) * c.H // size.heads * c.H
    weights = size.layers * (3 * c.F * c.H + attention) + size.vocabulary * c.H
    return {"shape": str(size), "dtype": str(size.dtype).removeprefix("torch."), "flops": 6 * tokens * weights}
