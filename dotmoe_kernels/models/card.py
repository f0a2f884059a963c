"""README.md of a saved model: its structure, how it was made and the figures that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .block import moe_blocks
from .counts import count_parameters

if TYPE_CHECKING:
    from .config import DotMoeConfig
    from .modeling import DotMoeForCausalLM


_ALONE = (
    "Without dotmoe_kernels, by the code in `modeling_dotmoe.py` of this folder, which takes torch and transformers alone:\n\n"
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)\n'
    'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)\n```\n\n'
    "The tokenizer needs no code. AutoTokenizer looks at the config first, all the same, whose class is in that file: told "
    "nothing, it asks whether the code may run."
)
_OF_A_RUN = ("steps", "tokens", "lora_rank", "teacher", "loss", "kl", "zero", "perplexity")  # the order of the columns


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_table(heads: Sequence[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _table(rows: Mapping[str, Any], heads: tuple[str, str]) -> str:
    return markdown_table(heads, rows.items())


def _run_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row a run; a file has the figures in the alphabet's order."""
    rows = [dict(_stage_rows(run)) for run in runs]
    found = {key for row in rows for key in row}
    columns = [*(key for key in _OF_A_RUN if key in found), *sorted(found.difference(_OF_A_RUN))]
    return markdown_table(["run", *columns], [[n, *(row.get(key, "-") for key in columns)] for n, row in enumerate(rows, 1)])


def _stage_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A stage's figures, a row each: of a pair how it began and how it ended."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _stage_rows({f"{key} of {name}": v for name, v in value.items()})
        elif isinstance(value, list | tuple):
            yield key, " -> ".join(map(_cell, value))
        else:
            yield key, value


def router_facts(config: DotMoeConfig) -> dict[str, Any]:
    """The router in words: what it takes, by layer where layers differ."""
    if config.router != "soft":
        zeros = {"zero experts": config.num_zero_experts} if config.num_zero_experts else {}
        return {("at most " if zeros else "") + "experts a token": config.num_experts_per_tok, **zeros, "weight": 1}
    layers = [router for router in config.soft_routers(len(config.router_k)) if router is not None]
    return {
        "k a layer": " ".join(f"{router.k:.4g}" for router in layers),
        "mean k": round(sum(float(router.k) for router in layers) / len(layers), 4),
        "at most a layer": " ".join(str(router.max_active) for router in layers),
        "temperature": config.router_temperature,
        "threshold": config.router_threshold,
        "cap": config.router_cap,
    }


def _collapse(stages: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """What there is to say of experts that no token visits: on the text that was held out, or else at the end of the training."""
    unused, (_, share) = figures.get("unused experts"), stages.get("align", {}).get("experts_in_use", (1, 1))
    if isinstance(unused, Mapping) and unused:
        seen = f"{len(unused)} layers leave experts without a token on the text that was held out (the table below)"
    elif share < 1 and "held-out tokens" not in figures:
        seen = f"{1 - share:.1%} of the experts saw no token at the end of the training"
    else:
        return []
    return [f"**Unused experts.** {seen}: what those hold is pruned, not routed."]


def model_card(model: DotMoeForCausalLM, title: str, figures: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        model: the sparse model.
        title: heading.
        figures: name -> number or text; a dictionary becomes a table of its own; ``base_model`` goes into the metadata too.
    """
    config = model.config
    total, active = count_parameters(model)
    soft = [block.gate.soft for block in moe_blocks(model).values() if block.gate.soft is not None]
    mean = sum(float(r.k) for r in soft) / max(len(soft), 1)
    head = ["---", "library_name: transformers", "tags: [dotmoe, mixture-of-experts]"]
    if isinstance(figures.get("base_model"), str):
        head.append(f"base_model: {json.dumps(figures['base_model'])}")
    head.append("---")
    structure = {
        "dense architecture": config.dense_config.model_type,
        "experts a layer": config.num_experts,
        "experts a token": config.num_experts_per_tok,
        "neurons an expert": config.moe_intermediate_size,
        "router": config.router,
        "parameters": f"{total:,}",
        "active a token": f"{active:,} ({active / total:.1%})",
    }
    if config.router == "soft":
        structure["experts a token"] = f"{mean:.4g} nominal, the sum of their weights; at most {max(r.max_active for r in soft)}"
        structure["active a token"] += " at that nominal number"
    if config.num_zero_experts:
        structure["experts a token"] = f"at most {config.num_experts_per_tok}"
        structure["zero experts a layer"] = f"{config.num_zero_experts}, whose choice is nothing"
        structure["active a token"] += " at most"
    stages = config.stages or {}
    with_all = "with every expert active it equals the dense model"
    if config.finetune_runs:
        with_all = "its weights were fine-tuned afterwards, so that with every expert active it is not the dense model any more"
    parts = [
        "\n".join(head),
        f"# {title}",
        "A dense language model whose feed-forward neurons were partitioned into experts; no neuron was copied or removed, and "
        f"{with_all}.",
        _table(structure, ("structure", "")),
    ]
    parts += _collapse(stages, figures)
    if config.router == "soft":
        parts += [
            "## Router",
            "LapSum soft top-k of the router scores (SoftMoE): the experts with p above the threshold, at least one a token and at "
            "most so many, each weighted by p.",
            _table(router_facts(config), ("soft router", "value")),
        ]
    if config.assignment:
        parts += ["## Assignment", _table(config.assignment, ("setting", "value"))]
    for stage in ("reconstruct", "align"):  # a config that was read has them in the alphabet's order
        if stage in stages:
            parts += [f"## Stage: {stage}", _table(dict(_stage_rows(stages[stage])), ("figure", "value"))]
    if config.finetune_runs:
        parts += ["## Stage: finetune", _run_table(config.finetune_runs)]
    flat = {key: value for key, value in figures.items() if not isinstance(value, Mapping)}
    if flat:
        parts += ["## Measured", _table(flat, ("figure", "value"))]
    for key, value in figures.items():
        if isinstance(value, Mapping):
            parts += [f"## {_cell(key)}", _table(value, ("figure", "value"))]
    parts += [
        "## Use",
        '```python\nimport dotmoe_kernels as dk\n\nmodel = dk.load("path/to/this/folder")\n```',
        _ALONE,
    ]
    return "\n\n".join(parts) + "\n"


def put_section(text: str, title: str, body: str) -> str:
    """``text`` of a README.md with the section ``## title`` in the place of the one of that name, else before ``## Use``, else at
    the end."""
    lines, heads, fenced = text.split("\n"), list[tuple[int, str]](), False
    for n, line in enumerate(lines):
        fenced ^= line.startswith(("```", "~~~"))
        if line.startswith(("# ", "## ")) and not fenced:
            heads.append((n, line.strip()))
    places = {line: n for n, line in reversed(heads)}
    begin = end = places.get(f"## {title}", places.get("## Use", len(lines)))
    if f"## {title}" in places:
        end = next((n for n, _ in heads if n > begin), len(lines))
    parts = ["\n".join(lines[:begin]).rstrip(), f"## {title}\n\n{body.strip()}", "\n".join(lines[end:]).strip()]
    return "\n\n".join(part for part in parts if part) + "\n"
