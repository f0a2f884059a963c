"""A model that runs from its files: a layer's weights are read when it is called and given up after it, so that a model of any size
takes the memory of a layer. Every forward pass reads all of it once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from .._checks import require
from .backbone import meta_backbone
from .block import moe_blocks
from .config import DotMoeConfig
from .modeling import DotMoeForCausalLM
from .names import no_bar, read_conversions
from .shards import ShardReader, find_dtype, read_generation
from .surgery import find_ffns


def _owner(name: str, layers: Iterable[str]) -> str:
    """Path of the module with which the tensor ``name`` is read."""
    return next((layer for layer in layers if name.startswith(f"{layer}.")), name.rpartition(".")[0])


class Layerwise:
    """``model`` in eval mode, whose forward and ``generate`` work although it has no storage.

    Args:
        model: on the meta device; its parameters get ``dtype``.
        folder: of its files.
        conversions: from the names in files to those of the model, as transformers has them.
        layers: paths of the modules that are read as a whole; any other module with tensors of its own is read alone.
        keep: paths of modules inside those that are read at once, and stay.
        dtype: None takes that of the config, or of the files.
        read_as: dtype that the tensors are rounded to before; likewise.
        device: where layers run.
        on_call: a layer is read when it is called; else by ``take``.
    """

    def __init__(
        self,
        model: Any,
        folder: str | os.PathLike[str],
        conversions: list[Any],
        layers: Iterable[str],
        *,
        keep: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        read_as: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        on_call: bool = True,
    ) -> None:
        self.model, self.device, self.layers = model.eval().requires_grad_(False), device, tuple(layers)
        self._reader, self._conversions = ShardReader(folder), conversions
        self._set_dtype(find_dtype(read_as, model.config, self._reader))
        self._stored: dict[str, Tensor] = model.state_dict()
        self._set_dtype(find_dtype(dtype, model.config, self._reader))
        self._fill_buffers()
        self._blank: dict[str, Tensor] = model.state_dict(keep_vars=True)
        modules = [*keep, *self.layers]
        self.units: dict[str, dict[str, str]] = {}  # by module, the names in files by those that the loader is given
        for given, name in self._names().items():
            self.units.setdefault(_owner(self._key(given), modules), {})[given] = name
        self._keys: dict[str, list[str]] = {unit: [] for unit in self.units}
        for name in self._blank:
            self._keys.setdefault(_owner(name, modules), []).append(name)
        for unit in keep:
            self._load(unit)
            del self.units[unit]
        for unit in self.units if on_call else ():
            module = model.get_submodule(unit)
            module.register_forward_pre_hook(lambda *_, unit=unit: self._load(unit))
            module.register_forward_hook(lambda *_, unit=unit: self._drop(unit), always_call=True)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def _fill_buffers(self) -> None:
        """Those that no file has; a module's may be another's to fill, as when a checkpoint is loaded."""
        for module in self.model.modules():
            module._is_hf_initialized = False  # it was, without storage
            for name in module._non_persistent_buffers_set & module._buffers.keys():
                if module._buffers[name] is not None:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
        self.model.initialize_weights()

    def _key(self, name: str) -> str:
        """Name in the model, the first where one tensor of the file becomes several."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        return rename_source_key(name, renamings, converters, self.model.base_model_prefix, self._blank)[0]

    def _names(self) -> dict[str, str]:
        """The names in files, and for the second of a tied pair its own."""
        names = {name: name for name in self._reader.specs}
        have = {self._key(name): name for name in names}
        for target, source in self.model.all_tied_weights_keys.items():
            for one, other in ((target, source), (source, target)):
                if one not in have and other in have:
                    names[one] = have[other]
        return names

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        """Where the module has the tensor ``name``."""
        path, _, last = name.rpartition(".")
        module: nn.Module = self.model.get_submodule(path)
        own: Any = module._parameters if last in module._parameters else module._buffers
        return own, last

    def _load(self, unit: str) -> None:
        for name in self._keys[unit]:  # not in the wider dtype at once: experts may be merged, which takes several copies
            own, last = self._place(name)
            if own[last].dtype != self._stored[name].dtype:
                own[last] = nn.Parameter(self._stored[name], requires_grad=False)
        tensors = {given: self._reader.read(name) for given, name in self.units[unit].items()}
        places = {"": self.device, "nothing": "disk"}  # with a disk among them no threads are started, which cost more than a layer
        options = LoadStateDictConfig(device_map=places, weight_mapping=self._conversions)
        with no_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, options)
        lacking = sorted(info.missing_keys & set(self._keys[unit]))
        require(not lacking, unit, f"without {', '.join(lacking[:4])}", "a checkpoint with every tensor of the model")
        tensors.clear()
        for name in self._keys[unit]:
            own, last = self._place(name)
            if own[last].dtype != self._blank[name].dtype:
                own[last] = nn.Parameter(own[last].to(self._blank[name].dtype), requires_grad=False)

    def _drop(self, unit: str) -> None:
        for name in self._keys[unit]:
            own, last = self._place(name)
            own[last] = self._blank[name]

    def take(self, path: str) -> None:
        """Reads what the model then keeps: a layer, or of "" all that is in none."""
        for unit in [path] if path else [unit for unit in self.units if unit not in self.layers]:
            self._load(unit)
        if not path:
            self.model.tie_weights(recompute_mapping=False)

    @contextmanager
    def loaded(self, unit: str) -> Iterator[None]:
        """Inside, the module has its weights."""
        self._load(unit)
        try:
            yield
        finally:
            self._drop(unit)


def converted_layers(
    folder: str | os.PathLike[str],
    config: DotMoeConfig,
    **options: Any,
) -> Layerwise:
    """The converted model in ``folder``, which has been checked, with the fields of ``config``; options as of ``Layerwise``."""
    with torch.device("meta"):
        model = DotMoeForCausalLM(config)
    model.generation_config = read_generation(Path(folder)) or model.generation_config
    layers, embeddings = [name.rpartition(".")[0] for name in moe_blocks(model)], model.get_input_embeddings()
    if config.get_text_config() is not config.dense_config:  # what is around the text model reads them without a call
        options["keep"] = [name for name, module in model.named_modules() if module is embeddings]
    return Layerwise(model, folder, read_conversions(model.backbone), layers, **options)


def dense_layers(folder: str | os.PathLike[str], config: PreTrainedConfig, **options: Any) -> Layerwise:
    """The dense model in ``folder``, of this config; options as of ``Layerwise``."""
    model = meta_backbone(config)
    layers = [name.rpartition(".")[0] for name in find_ffns(model)]
    return Layerwise(model, folder, get_model_conversion_mapping(model), layers, **options)
