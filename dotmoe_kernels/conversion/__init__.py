"""A dense model into a sparse one: transformers is imported once one of these names is touched.

pipeline.py    convert: the FFNs found, aligned or partitioned, made sparse
starts.py      what the alignment starts from
finetuning.py  the sparse model trained on text       teacher.py            whose distribution it then learns
tuning.py      its options                            adapters.py           on the attention's projections
passes.py      the passes of one of its steps         zero_experts.py       router rows whose choice is nothing
files.py       both of a model that no process has whole, from folder to folder
sharded.py     the fine-tuning with divided weights   origins.py            where those come from
checks.py      what every conversion checks of itself
data.py        text -> packed token sequences         readers.py             kinds of files -> their documents
token_cache.py  those on disk, mapped into memory
recipes.py     topologies and options by name         dryrun.py, costs.py    what a run would take
scaling.py     and on several GPUs
streaming.py   a conversion without training, folder to folder in the memory of a layer
plans.py       the topologies that fit                speeds.py              predicted times of a routed FFN
timing.py      tokens a second, measured             machine.py             what they are measured on
report.py      a page of a converted model            measure.py, figures.py what it shows
demo.py        the whole job on a small model

The names of ``models`` and ``exports`` are here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from ..exports import export
    from ..models import (
        DenseFFN,
        DotMoeBlock,
        DotMoeConfig,
        DotMoeExperts,
        DotMoeForCausalLM,
        DotMoeRouter,
        all_experts,
        count_parameters,
        find_ffns,
        interleave_storage,
        load,
        materialize,
        moe_blocks,
        register_experts,
        restore_dense,
        save,
        swap_ffn,
    )
    from .checks import check_lines, self_check
    from .data import load_tokens
    from .finetuning import FinetuneConfig, finetune
    from .pipeline import convert
    from .streaming import convert_folder

__all__ = [
    "DenseFFN",
    "DotMoeBlock",
    "DotMoeConfig",
    "DotMoeExperts",
    "DotMoeForCausalLM",
    "DotMoeRouter",
    "FinetuneConfig",
    "all_experts",
    "check_lines",
    "convert",
    "convert_folder",
    "count_parameters",
    "export",
    "find_ffns",
    "finetune",
    "interleave_storage",
    "load",
    "load_tokens",
    "materialize",
    "moe_blocks",
    "register_experts",
    "restore_dense",
    "save",
    "self_check",
    "swap_ffn",
]

_HERE = {
    ".checks": ("check_lines", "self_check"),
    ".data": ("load_tokens",),
    ".finetuning": ("FinetuneConfig", "finetune"),
    ".pipeline": ("convert",),
    ".streaming": ("convert_folder",),
    "..exports": ("export",),
}
_MODELS = [name for name in __all__ if not any(name in names for names in _HERE.values())]

__getattr__, __dir__ = lazy_names(__name__, {**_HERE, "..models": _MODELS})
