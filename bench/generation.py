"""Whole models with random weights of a shape, every one around the same tensors, and what is timed of them: prefill and decode.

    ours           the converted model                dense       the model restored from it, every neuron of every token
    transformers   its Mixtral, by the implementation of its experts; the router is scaled so that the gates come close to 1
    llama.cpp      that Mixtral as a folder, in a process of its own (``bench/serving``), where its environment is there

The Mixtral's down projections are stored as its files are, [E, H, s]; all else is shared. Weights, routers and prompts are drawn
from seeds: a token chooses K experts of a layer at random.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.experts import DTYPES, reference_rows, relative_error, without_transformers
from bench.paired import OURS, Case
from bench.quality.fetch import DATA, MODEL
from bench.serving.process import Worker, environment
from bench.shapes import Backbone
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM, materialize, moe_blocks, restore_dense, swap_ffn
from dotmoe_kernels.conversion.speeds import union
from dotmoe_kernels.exports.stock import ARCHITECTURES, stock_skeleton, stock_tensors
from tests.shapes import balanced_expert_of, generator, normal

PROMPT, NEW, PROMPTS = 512, 8, 32  # tokens of a prompt; decode steps of a timed call; prompts of a prefill, taken in turn
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' implementations
IMPLS = (OURS, "dense", *(f"transformers-{name}" for name in EXPERTS), "llama.cpp")
_SHIFT = 8  # the Mixtral's router is ours times 2^-8: close to equal gates, and no two experts tie
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of logits, whose layers may choose another K-th expert where two are close
_CHECKED = 6  # tokens
_SETTLING = 2  # prefills before one that is timed
_MOST_GATHERED = 5e8  # bytes of a layer's weights that batched_mm may copy: not those of a prompt, which take minutes
_LLAMA_TYPES = {"float32": "f32", "bfloat16": "bf16"}


# --- the models ---------------------------------------------------------------------------------------------------------


def copy_of(model: nn.Module) -> Any:
    """Modules and config of its own around the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def sparse_model(size: Backbone, dtype: str) -> DotMoeForCausalLM:
    transformers, c = importlib.import_module("transformers"), size.ffn
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=c.H,
        intermediate_size=c.F,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        max_position_embeddings=2 * PROMPT,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval().requires_grad_(False)
    layers = {
        f"model.layers.{n}.mlp": (
            balanced_expert_of(c.F, c.E, seed=n),
            normal(c.E, c.H, seed=n, scale=c.H**-0.5, dtype=torch.float32),
        )
        for n in range(size.layers)
    }
    return materialize(dense, DotMoeConfig(num_experts=c.E, top_k=c.K), layers)


def mixtral_model(model: DotMoeForCausalLM) -> Any:
    """Stock, and what its files do not hold taken from ours."""
    architecture = next(one for one in ARCHITECTURES if one.name == "mixtral")
    stock = stock_skeleton(model, architecture)
    tensors, _ = stock_tensors(model, architecture, dict.fromkeys(moe_blocks(model), _SHIFT), stock)
    stock.load_state_dict(tensors, assign=True)
    stock.tie_weights()
    stock.eval()
    stock.model.rotary_emb = model.get_submodule("model.rotary_emb")
    for module in stock.modules():
        if hasattr(module, "down_proj") and hasattr(module, "gate_up_proj"):
            module.down_proj = nn.Parameter(module.down_proj.contiguous(), requires_grad=False)
    assert stock.config._attn_implementation == model.backbone.config._attn_implementation
    return stock.requires_grad_(False)


class Reference(nn.Module):
    """A block in float64, an expert after the other; ``everyone``: the dense FFN."""

    def __init__(self, block: Any, everyone: bool) -> None:
        super().__init__()
        self.block, self.everyone = block, everyone

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, experts = hidden_states.flatten(0, -2), self.block.experts
        indices = torch.arange(experts.num_experts).expand(len(x), -1) if self.everyone else self.block.gate(x)[2]
        y = reference_rows(x, {"gate_up": experts.gate_up_proj, "down": experts.down_proj}, indices)
        return y.to(x.dtype).view(hidden_states.shape)


class Models:
    """Everybody's model of one size and dtype."""

    def __init__(self, size: Backbone, dtype: str) -> None:
        self.size, self.dtype = size, dtype
        ours = sparse_model(size, dtype)
        self.stock = mixtral_model(ours)
        self.by_name: dict[str, Any] = {OURS: ours, "dense": restore_dense(ours)}
        for name in EXPERTS:
            self.by_name[f"transformers-{name}"] = other = copy_of(self.stock)
            other.set_experts_implementation(name)
        self.checked: dict[str, float] = {}  # the errors, once known
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.worker: Worker | None = None

    def errors(self) -> dict[str, float]:
        """Of everybody's logits, against the same backbone around ``Reference``: a short prompt and one step after it."""
        ids = prompts(self.size, 2, _CHECKED)
        ours: Any = self.by_name[OURS]
        expected = {}
        for everyone in (False, True):
            plain = copy_of(ours)
            for path, block in moe_blocks(plain).items():
                swap_ffn(plain, path, Reference(block, everyone))
            expected[everyone] = two_passes(plain.backbone, ids)
        return {name: relative_error(two_passes(one, ids), expected[name == "dense"]) for name, one in self.by_name.items()}

    def llama(self, kind: str) -> Worker | str:
        """The Mixtral in llama.cpp, or the reason why there is none."""
        if self.worker is not None:
            return self.worker
        python = environment("llama.cpp") / "bin" / "python"
        if not python.exists():
            return f"no environment at {python.parent.parent}; `python -m bench.serving llama.cpp DIR` says how to make it"
        tokenizer = _known_tokenizer(self.size.vocabulary)
        if isinstance(tokenizer, str):
            return tokenizer
        self.scratch = tempfile.TemporaryDirectory()
        folder = Path(self.scratch.name)
        self.stock.save_pretrained(folder / "mixtral")
        tokenizer.save_pretrained(folder / "mixtral")
        settings = {"type": kind, "threads": torch.get_num_threads(), "top": 1, "scratch": str(folder)}
        self.worker = Worker("llama.cpp", python, str(folder / "mixtral"), settings, folder / "log")
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.__exit__()
        if self.scratch is not None:
            self.scratch.cleanup()


def _known_tokenizer(vocabulary: int) -> Any:
    """One that llama.cpp's converter knows, or why there is none: SmolLM2's, as ``bench.quality fetch`` leaves it."""
    folder = DATA / MODEL
    if not (folder / "tokenizer.json").is_file():
        return "its converter takes known tokenizers alone: `python -m bench.quality fetch` brings one"
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    return tokenizer if len(tokenizer) == vocabulary else f"its converter knows no tokenizer of {vocabulary} tokens"


_kept: list[Models] = []


def models(size: Backbone, dtype: str) -> Models:
    """The last ones are kept: the groups of a size and dtype follow one another."""
    if not _kept or (_kept[0].size, _kept[0].dtype) != (size, dtype):
        while _kept:
            _kept.pop().close()
        _kept.append(Models(size, dtype))
    return _kept[0]


# --- what is timed ------------------------------------------------------------------------------------------------------


def prompts(size: Backbone, batch: int, length: int, number: int = 0) -> Tensor:
    return torch.randint(size.vocabulary, (batch, length), generator=generator(5 + number))


class Anew:
    """``call`` of another prompt each time, in the same order for everybody: a user's prompts differ, and with them the rows of an
    expert, for which a library may have to compile a product that it has at hand for a prompt it saw before."""

    def __init__(self, call: Callable[[Tensor], Any], several: list[Tensor]) -> None:
        self.call, self.several = call, cycle(several)

    def __call__(self) -> Any:
        return self.call(next(self.several))


@torch.no_grad()
def two_passes(model: Any, ids: Tensor) -> Tensor:
    """Logits along the prompts but for their last tokens, which follow by themselves."""
    first = model(input_ids=ids[:, :-1], use_cache=True)
    last = model(input_ids=ids[:, -1:], cache=first.cache, use_cache=True)
    return torch.cat((first.logits, last.logits), 1)


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


class Decode:
    """NEW steps after the prompts, and back to where they began. ``experts``: transformers' implementation of the steps; the
    prompts have another, since batched_mm would copy the weights of all their slots."""

    def __init__(self, model: Any, ids: Tensor, experts: str | None = None) -> None:
        self.model = model
        if experts is not None:
            model.set_experts_implementation("eager")
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        if experts is not None:
            model.set_experts_implementation(experts)
        self.cache, self.first = out.cache, out.logits.argmax(-1)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        tokens, found = self.first, []
        for _ in range(NEW):
            logits = self.model(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits.argmax(-1)
            found.append(tokens)
        self.cache.crop(-NEW)
        return torch.cat(found, 1)


def ratio_of_weights(size: Backbone, phase: str, batch: int) -> float:
    """What the sparse model can gain at most: bytes of the weights that a decode step reads, or flops of a prefill's products; its
    head sees the last token alone."""
    c = size.ffn
    if phase == "prefill":
        return (size.read(c.E) - size.head) / (size.read(c.K) - size.head)
    return size.read(c.E) / size.read(union(batch, c) * c.E)


def info(size: Backbone, dtype: str, phase: str, batch: int) -> dict[str, Any]:
    c, passes = size.ffn, 1 if phase == "prefill" else NEW
    tokens = batch * (PROMPT if phase == "prefill" else NEW)
    read = size.read(union(batch * PROMPT if phase == "prefill" else batch, c) * c.E)
    what = f"{batch} x {PROMPT} tokens" if phase == "prefill" else f"{batch} x {NEW} tokens after {PROMPT}"
    return {
        "shape": f"{what}, {size}",
        "dtype": dtype,
        "tokens": tokens,
        "flops": round(2 * tokens * (size.read(c.K) - (size.head if phase == "prefill" else 0))),
        "bytes": round(passes * read * DTYPES[dtype].itemsize),
        "bound": ratio_of_weights(size, phase, batch),
    }


def _llama_call(found: Models, phase: str, several: list[Tensor]) -> Callable[[], Any] | str:
    worker = found.llama(_LLAMA_TYPES[found.dtype])
    if isinstance(worker, str):
        return worker
    request = {"new": 1 if phase == "prefill" else NEW, "cached": phase == "decode"}
    return Anew(lambda ids: worker.ask("generate", prompts=ids.tolist(), **request), several)


def case(size: Backbone, dtype: str, phase: str, batch: int, length: int = PROMPT) -> Case:
    found, ids = models(size, dtype), prompts(size, batch, length)
    several = [prompts(size, batch, length, n) for n in range(PROMPTS if phase == "prefill" else 1)]
    found.checked = found.checked or found.errors()
    errors, run, skipped = dict(found.checked), dict[str, Callable[[], Any]](), dict[str, str]()
    for name, model in found.by_name.items():
        tokens = ids.numel() if phase == "prefill" else batch
        experts = name.removeprefix("transformers-") if name.startswith("transformers-") else None
        if experts and (reason := without_transformers(experts, size.ffn, tokens, _MOST_GATHERED)):
            skipped[name] = reason
        else:
            run[name] = Anew(partial(prefill, model), several) if phase == "prefill" else Decode(model, ids, experts)
    call = _llama_call(found, phase, several)
    if isinstance(call, str):
        skipped["llama.cpp"] = call
    else:
        run["llama.cpp"], errors["llama.cpp"] = call, 0.0  # its answers are compared by bench.serving
    stocks = frozenset(name for name in run if name not in (OURS, "dense"))
    bound = "by the bytes of the weights" if phase == "decode" else "by the products of the weights"
    notes = {"dense": {"note": f"{bound} at most {ratio_of_weights(size, phase, batch):.2f}x"}}
    if "llama.cpp" in run:
        notes["llama.cpp"] = {"note": "a process of its own"}
    told: dict[str, Any] = {
        "may_differ": stocks,
        "skipped": skipped,
        "extra": notes,
        "elsewhere": frozenset({"llama.cpp"} & run.keys()),
        "settling": _SETTLING if phase == "prefill" else 0,
    }
    return Case(run, lambda name, _: errors[name], _TOLERANCE[dtype], **told)
