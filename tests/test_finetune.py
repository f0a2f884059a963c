"""Fine-tuning a converted model: with plain torch and with the Trainer, against the reference's experts, step by step."""

import warnings

import pytest
import torch
from checks import error
from tiny import E, K, V, dense_model, random_layers
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.activations import ACT2FN

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, materialize, moe_blocks
from dotmoe_kernels.experts.training import cpu as training
from dotmoe_kernels.models import block

STEPS, BATCH, LENGTH = 10, 4, 12
ROUTERS = pytest.mark.parametrize("router", ["top_k", "soft"])


def sparse(router="top_k", *, dtype=torch.float32):
    model = dense_model(dtype=dtype, initializer_range=0.1)
    return materialize(model, DotMoeConfig(num_experts=E, top_k=K, router=router), random_layers(model)).train()


def sequences(count=BATCH * STEPS):
    """Arithmetic progressions: the next token is the last one plus the sequence's step."""
    draw = torch.Generator().manual_seed(5)
    start, step = torch.randint(0, 60, (count, 1), generator=draw), torch.randint(1, 3, (count, 1), generator=draw)
    return 3 + (start + step * torch.arange(LENGTH)) % (V - 4)


def by_reference(monkeypatch):
    """The experts of every block by the reference from here on."""

    def routed_ffn(x, gate_up_proj, down_proj, indices, weights, activation, path):
        return reference.expert_ffn(x, gate_up_proj, down_proj, indices, weights, activation=ACT2FN[activation])

    monkeypatch.setattr(block, "routed_ffn", routed_ffn)


def checkpointing(model):
    with warnings.catch_warnings():  # the newer name is not there in every supported version
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    return model


@torch.no_grad()
def loss_of(model):
    rows = sequences()
    return model(rows, labels=rows, use_cache=False).loss.item()


def train(model, *, autocast=False, lr=1e-3, parameters=None):
    """Losses of STEPS steps of AdamW, whose normalised steps multiply a difference from one step to the next: at a higher rate
    the soft router's rounding errors alone reach 1e-4, with either experts."""
    optimiser = torch.optim.AdamW(model.parameters() if parameters is None else parameters, lr=lr)
    losses = []
    for batch in sequences().split(BATCH):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


# --- plain torch ------------------------------------------------------------------------------------------------------


@ROUTERS
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
def test_equal_to_the_reference_step_by_step(router, recompute, monkeypatch):
    prepare = checkpointing if recompute else lambda model: model
    model = prepare(sparse(router))
    before, found, after = loss_of(model), train(model), loss_of(model)
    by_reference(monkeypatch)
    expected = train(sparse(router))
    assert (found - expected).abs().max() < 2e-5
    assert after < before - 0.2


@ROUTERS
def test_weights_after_training_equal_the_references(router, monkeypatch):
    found = sparse(router, dtype=torch.float64)
    train(found)
    by_reference(monkeypatch)
    expected = sparse(router, dtype=torch.float64)
    start = {n: p.detach().clone() for n, p in expected.named_parameters()}
    train(expected)
    there = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        assert error(parameter, there[name]) < 1e-7, name
        assert error(parameter, start[name]) > 1e-4, name


@ROUTERS
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
def test_autocast(router, recompute, monkeypatch):
    """Against the losses in float32: no further away than the reference's experts under the same autocast, twice."""
    prepare = checkpointing if recompute else lambda model: model
    model = prepare(sparse(router))
    before, exact, found = loss_of(model), train(sparse(router)), train(model, autocast=True)
    by_reference(monkeypatch)
    plain = train(sparse(router), autocast=True)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2e-3
    assert loss_of(model) < before - 0.2


def test_parameters_and_gradients_stay_float32_under_autocast():
    model, batch = sparse(), sequences(BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch, labels=batch).loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- the Trainer ------------------------------------------------------------------------------------------------------


class Sequences(Dataset):
    def __init__(self):
        self.rows = sequences()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return {"input_ids": self.rows[n], "labels": self.rows[n]}


def trainer(model, folder, **options):
    options = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 2e-3, "logging_steps": 1} | options
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        dataloader_pin_memory=False,
        save_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=Sequences())


def trainer_losses(model, folder, **options):
    made, before = trainer(model, folder, **options), loss_of(model)
    made.train()
    assert loss_of(model) < before - 0.2
    return torch.tensor([row["loss"] for row in made.state.log_history if "loss" in row])


@ROUTERS
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}],
    ids=["", "checkpointing", "accumulation"],
)
def test_trainer_equals_the_reference(router, options, tmp_path, monkeypatch):
    found = trainer_losses(sparse(router), tmp_path, **options)
    by_reference(monkeypatch)
    expected = trainer_losses(sparse(router), tmp_path)
    assert len(found) == STEPS
    assert (found - expected).abs().max() < 1e-4


def test_trainer_in_bfloat16(tmp_path):
    losses = trainer_losses(sparse(), tmp_path, bf16=True)
    assert (losses - trainer_losses(sparse(), tmp_path)).abs().max() < 1e-2


def test_what_the_trainer_saves(tmp_path):
    model = sparse()
    made = trainer(model, tmp_path)
    made.train()
    made.save_model(str(tmp_path / "out"))
    again, x = DotMoeForCausalLM.from_pretrained(tmp_path / "out"), sequences(2)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)


# --- the router -------------------------------------------------------------------------------------------------------


def frozen_experts(router="top_k"):
    model = sparse(router)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    return model


@ROUTERS
def test_router_alone(router, monkeypatch):
    """It learns, equal to the reference's experts, and no product is spent on the gradient of a weight."""
    given, whole = [], training.backward

    def spy(*arguments):
        given.append(whole(*arguments))
        return given[-1]

    monkeypatch.setattr(training, "backward", spy)
    model = frozen_experts(router)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2
    before = [p.detach().clone() for p in model.parameters()]
    found = train(model, parameters=parameters, lr=0.02)
    assert len(given) == 2 * STEPS
    assert all(dgate_up is None and ddown is None and dw is not None for _, dgate_up, ddown, dw in given)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()]
    by_reference(monkeypatch)
    model = frozen_experts(router)
    expected = train(model, parameters=[p for p in model.parameters() if p.requires_grad], lr=0.02)
    assert (found - expected).abs().max() < 1e-4
    assert loss_of(model) < loss_of(frozen_experts(router)) - 1e-3


def test_unit_weights_carry_the_gradient_of_the_softmax():
    """w = 1 in the forward; dZ is the softmax's, of the selected experts' <h, dh>."""
    model, batch = sparse(dtype=torch.float64), sequences(BATCH)
    seen = {}

    def keep(name):
        def hook(gate, arguments, output):
            logits, weights, indices = output
            weights.retain_grad()
            seen[name] = arguments[0].detach(), logits.detach(), weights, indices

        return hook

    for name, layer in moe_blocks(model).items():
        layer.gate.register_forward_hook(keep(name))
    model(batch, labels=batch).loss.backward()
    for name, layer in moe_blocks(model).items():
        x, logits, weights, indices = seen[name]
        assert bool((weights == 1).all())
        assert weights.grad.count_nonzero() == weights.numel() - BATCH * K  # a sequence's last token predicts nothing
        q = logits.softmax(-1)
        dq = torch.zeros_like(q).scatter(1, indices, weights.grad)
        dz = q * (dq - (q * dq).sum(-1, keepdim=True))
        assert error(layer.gate.weight.grad, dz.T @ x) < 1e-12


def test_a_balance_loss_by_a_hook():
    """None is part of the model's loss: a forward hook of the gate gives the logits it is made from."""
    model = frozen_experts()
    losses = []

    def hook(gate, arguments, output):
        losses.append(dk.route_top_k(output[0], gate.top_k).balance_loss)

    for layer in moe_blocks(model).values():
        layer.gate.register_forward_hook(hook)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = []
    for _ in range(STEPS):
        losses.clear()
        batch = sequences(BATCH)
        loss = model(batch, labels=batch, use_cache=False).loss
        balance = torch.stack(losses).mean()
        (loss + balance).backward()
        optimiser.step()
        optimiser.zero_grad()
        history.append(balance.item())
    assert len(losses) == 2
    assert history[-1] < history[0] - 0.1
    assert history[-1] >= 0.9  # 1 is even


# --- gradients in and out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gaps", [False, True])
def test_the_fused_optimizer_is_the_plain_one(gaps, dtype, micro, monkeypatch):
    """It goes along memory, so that weights stored transposed need gradients stored alike; with gaps it is not taken."""
    used, plain, found = [], torch.optim.AdamW, []

    def optimizer(fused):
        def make(*arguments, **options):
            used.append(options["fused"])
            made = plain(*arguments, **(options | {"fused": options["fused"] and fused}))
            made.register_step_pre_hook(lambda one, *_: matching(one))
            return made

        def matching(one):
            parameters = [p for group in one.param_groups for p in group["params"]]
            assert any(not p.is_contiguous() for p in parameters)
            assert gaps or all(p.grad.stride() == p.stride() for p in parameters)

        return make

    for fused in (True, False):
        model = sparse(dtype=dtype)
        gate = next(iter(moe_blocks(model).values())).gate
        weight = gate.weight.data.float()
        gate.weight = torch.nn.Parameter(torch.cat([weight] * 2, 1)[:, : weight.shape[1]] if gaps else weight.T.contiguous().T)
        monkeypatch.setattr(torch.optim, "AdamW", optimizer(fused))
        dk.finetune(model, sequences(8), dk.FinetuneConfig(steps=3, batch_size=4, micro_batch_size=micro, lr=1e-2, router_lr=1e-2))
        found.append(list(model.parameters()))
    assert used == [not gaps] * 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@ROUTERS
def test_micro_batches_add_up(router):
    whole, parts, batch = sparse(router, dtype=torch.float64), sparse(router, dtype=torch.float64), sequences(BATCH)
    whole(batch, labels=batch).loss.backward()
    for part in batch.split(1):
        (parts(part, labels=part).loss / BATCH).backward()
    grads = dict(whole.named_parameters())
    for name, parameter in parts.named_parameters():
        assert error(parameter.grad, grads[name].grad) < 1e-10, name


def test_autograd_grad_is_backward():
    model, batch = sparse(dtype=torch.float64), sequences(BATCH)
    wanted = dict(model.named_parameters())
    found = torch.autograd.grad(model(batch, labels=batch).loss, list(wanted.values()))
    assert all(p.grad is None for p in wanted.values())
    model(batch, labels=batch).loss.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, wanted.values(), strict=True))


@ROUTERS
@pytest.mark.parametrize("part", ["experts.gate_up_proj", "experts.down_rows", "gate.weight"])
def test_second_derivative_is_refused(router, part):
    model, batch = sparse(router), sequences(BATCH)
    model.set_attn_implementation("eager")
    parameter = model.get_parameter(f"model.layers.1.mlp.{part}")
    gradient = torch.autograd.grad(model(batch, labels=batch).loss, parameter, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + parameter.square().sum(), parameter)
