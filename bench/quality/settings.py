"""What is converted and measured on: a dense model, tokens to train on, held-out documents; and the presets, which name them.

The models of "ci", "demo" and "7m" are LLaMAs trained here on the sources of the Python standard library; "smollm2" is the one of
``fetch``, on its corpus. A dense model is trained once, with seed 0, and kept in the data folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dotmoe_kernels._checks import require
from dotmoe_kernels._files import write_folder
from dotmoe_kernels.alignment.checkpoints import tokens_checksum, weights_checksum
from dotmoe_kernels.conversion.data import pack_documents
from dotmoe_kernels.conversion.demo import SHAPE, split_documents, standard_library, train_dense, train_tokenizer

from .fetch import CORPUS, MODEL

_SHORTEST = 2000  # characters


class Held(NamedTuple):
    """Held-out documents in windows: every one on its own, what is beyond a document's end is not counted."""

    tokens: Tensor  # [N, S] int64
    valid: Tensor  # [N, S] bool
    document: Tensor  # [N] int64
    names: list[str]


@dataclass(frozen=True)
class Topology:
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Plan:
    """A setting before it is made.

    Attributes:
        shape: of the LLaMA that is trained here; None: the model of ``fetch``.
        dense_steps: of its training.
        sequence: tokens of a sequence and of a window.
        windows: of a held-out document, at most.
        documents: held out, at most.
        texts: of the standard library, the shortest that are no mere stubs; None: all.
        options: of AlignmentConfig, for every method alike.
        tuning: of FinetuneConfig, for what trains weights after the alignment.
    """

    name: str
    topology: Topology
    shape: dict[str, int] | None = None
    dense_steps: int = 0
    vocabulary: int = 2048
    sequence: int = 128
    windows: int = 8
    documents: int = 256
    texts: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    plan: Plan
    dense: PreTrainedModel
    tokenizer: Any
    train: Tensor  # [M, S]
    held: Held

    def marks(self) -> dict[str, Any]:
        """What a result depends on besides its arm."""
        return {
            "setting": self.plan.name,
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "weights": weights_checksum(self.dense.parameters()),
            "train": [list(self.train.shape), tokens_checksum(self.train)],
            "held": [list(self.held.tokens.shape), tokens_checksum(self.held.tokens), int(self.held.valid.sum())],
            "topology": [self.plan.topology.num_experts, self.plan.topology.top_k],
        }


CI = Plan(
    "ci",
    Topology(8, 2),
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    dense_steps=200,
    vocabulary=384,
    sequence=64,
    windows=2,
    texts=200,
    options={"steps": 8, "batch_size": 4},
    tuning={"steps": 8, "batch_size": 4},
)
DEMO = Plan("demo", Topology(32, 8), SHAPE, dense_steps=700, options={"steps": 200}, tuning={"steps": 200})
SEVEN = Plan(
    "7m",
    Topology(16, 4),
    {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4},
    dense_steps=700,
    windows=4,
    options={"steps": 200},
)
SMOLLM2 = Plan(
    "smollm2",
    Topology(24, 6),
    sequence=256,
    windows=2,
    options={"steps": 256, "batch_size": 2, "hidden": 4.0, "checkpoint_every": 32},
    tuning={"steps": 256, "batch_size": 2, "checkpoint_every": 64},
)


def hold_out(documents: Sequence[tuple[str, str]], tokenizer: Any, plan: Plan) -> Held:
    """``documents``: (name, text). The beginning of each, cut into windows."""
    rows, valid, owner = [], [], []
    names: list[str] = []
    end, S = tokenizer.eos_token_id, plan.sequence
    for name, text in documents[: plan.documents]:
        ids = [end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]][: S * plan.windows]
        windows = [ids[n : n + S] for n in range(0, len(ids), S)]
        windows = [window for window in windows if len(window) >= 2]
        for window in windows:
            rows.append(window + [end] * (S - len(window)))
            valid.append([True] * len(window) + [False] * (S - len(window)))
            owner.append(len(names))
        if windows:
            names.append(name)
    require(len(names) >= 2, "held-out text", f"{len(names)} documents", "at least two, to draw from")
    return Held(torch.tensor(rows), torch.tensor(valid), torch.tensor(owner), names)


def _own(plan: Plan, data: Path, progress: bool) -> tuple[PreTrainedModel, Any, Tensor, Held]:
    """A LLaMA trained here, or the one that was."""
    assert plan.shape is not None
    texts = standard_library()
    if plan.texts is not None:
        texts = sorted((t for t in texts if len(t) >= _SHORTEST), key=lambda text: (len(text), text))[: plan.texts]
    train_texts, held_texts = split_documents(texts, 0)
    recipe = [plan.shape, plan.dense_steps, plan.vocabulary, plan.sequence, [hashlib.sha256(t.encode()).hexdigest() for t in texts]]
    mark = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = data / "models" / f"{plan.name}-{mark}"
    made = folder.exists()
    tokenizer = AutoTokenizer.from_pretrained(folder) if made else train_tokenizer(train_texts, plan.vocabulary)
    train = pack_documents(train_texts, tokenizer, sequence_length=plan.sequence)
    held = hold_out([(f"{n}", text) for n, text in enumerate(held_texts)], tokenizer, plan)
    if not made:
        dense = train_dense(train, plan.dense_steps, vocab_size=len(tokenizer), seed=0, progress=progress, shape=plan.shape)
        with write_folder(folder) as new:
            dense.save_pretrained(new)
            tokenizer.save_pretrained(new)
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer, train, held


def fast_dtype() -> torch.dtype:
    """bfloat16 where a product of it is a matrix instruction, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else torch.float32


def _fetched(plan: Plan, data: Path, tokens: int) -> tuple[PreTrainedModel, Any, Tensor, Held]:
    """The model and the corpus of ``fetch``."""
    for place in (data / MODEL, data / CORPUS):
        require(place.is_dir(), "--data", f"{data}, without {place.name}", "a folder that `python -m bench.quality fetch` filled")
    tokenizer = AutoTokenizer.from_pretrained(data / MODEL)
    parts = {}
    for part in ("train", "held-out"):
        lines = (data / CORPUS / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
        parts[part] = [json.loads(line) for line in lines if line]
        random.Random(0).shuffle(parts[part])
    train = pack_documents((d["text"] for d in parts["train"]), tokenizer, sequence_length=plan.sequence, max_tokens=tokens)
    held = hold_out([(f"{d['source']}: {d['name']}", d["text"]) for d in parts["held-out"]], tokenizer, plan)
    return AutoModelForCausalLM.from_pretrained(data / MODEL, dtype=fast_dtype()), tokenizer, train, held


def make_setting(plan: Plan, data: Path, *, tokens: int = 0, progress: bool = False) -> Setting:
    """``tokens`` are read of a corpus, more than any arm trains on. The model in eval mode, nothing trains."""
    make: Callable[[], tuple[PreTrainedModel, Any, Tensor, Held]]
    make = (lambda: _own(plan, data, progress)) if plan.shape is not None else (lambda: _fetched(plan, data, tokens))
    dense, tokenizer, train, held = make()
    if torch.cuda.is_available():
        dense = dense.to("cuda")  # type: ignore[arg-type]
    return Setting(plan, dense.eval().requires_grad_(False), tokenizer, train, held)
