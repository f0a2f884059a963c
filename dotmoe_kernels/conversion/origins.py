"""Where the weights of a model come from that the ranks divide: one that each of them has whole, or files that none of them reads
whole.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .._checks import require
from ..alignment.ranks import Ranks
from ..alignment.sharding import Prepare, is_divided, shard_blocks, spread, twin
from ..models.block import moe_blocks
from ..models.folder import check_folder
from ..models.inspect import is_converted
from ..models.layerwise import Layerwise, converted_layers, dense_layers
from ..models.modeling import DotMoeForCausalLM
from ..models.surgery import find_ffns
from ..models.untrusted import check_files


def ffn_names(model: nn.Module) -> list[str]:
    """Of a dense or converted model."""
    return list(moe_blocks(model) or find_ffns(model))


class Memory:
    """A model that this process has whole, and that keeps its weights."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fresh(self, trains: bool = False) -> tuple[Any, Prepare | None]:
        """Modules of the model, of which what trains in it trains or nothing, and what reads the weights of a part."""
        return twin(self.model, trains=trains), None

    def spread(self, ranks: Ranks) -> Any:
        """The model with its blocks divided, to compute what it gives. All ranks."""
        return spread(self.model, ffn_names(self.model), ranks)


class Files:
    """A dense or converted model in a folder of safetensors files; methods as of ``Memory``.

    Args:
        folder: of the model.
        dtype: of the weights. None: as saved.

    Raises:
        ValueError: no such folder, or a file that must not be read or cannot be; a tensor of the model is in none of them.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.folder, self._dtype = Path(folder).expanduser(), dtype
        allowed = "a local folder of safetensors files, of which every process reads a part"
        require(self.folder.is_dir(), "model", os.fspath(folder), allowed)
        self.converted = is_converted(self.folder)
        if self.converted:
            self.config: Any = check_folder(self.folder, DotMoeForCausalLM)
        else:
            check_files(self.folder)
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.model: PreTrainedModel = self._layers().model  # without weights, to look at

    def _layers(self) -> Layerwise:
        make = converted_layers if self.converted else dense_layers
        return make(self.folder, copy.deepcopy(self.config), dtype=self._dtype, on_call=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters())

    def fresh(self, trains: bool = False) -> tuple[Any, Prepare]:
        layers = self._layers()

        def fill(path: str) -> None:
            layers.take(path)
            for parameter in layers.model.get_submodule(path).parameters():
                if not is_divided(parameter):
                    parameter.requires_grad_(trains)

        return layers.model, fill

    def spread(self, ranks: Ranks) -> Any:
        model, fill = self.fresh()
        shard_blocks(model, ffn_names(model), ranks, fill)
        return model
