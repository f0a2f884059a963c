"""DotMoeConfig: the structure of a converted model. What was trained, and how, lives elsewhere (AlignmentConfig)."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

from .._checks import is_integer, is_number, plain_numbers, require
from .._files import write_file
from ..alignment.config import AlignmentConfig
from ..routing.budgets import SoftRouter, slots
from .backbone import ffn_width

FORMAT_VERSION = 3  # 2 brought the soft router, 3 zero experts; a model without them is still written as 1, for older versions
ROUTERS = ("top_k", "soft")
# of the dense model's text config: written at the top level of config.json as well, for tools that look there
_SHOWN = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "vocab_size")
MODELING = Path(__file__).parent / "remote" / "modeling_dotmoe.py"  # copied beside the weights
_REMOTE = {"AutoConfig": "DotMoeConfig", "AutoModel": "DotMoeModel", "AutoModelForCausalLM": "DotMoeForCausalLM"}
_SOFT_FIELDS = ("router_k", "router_temperature", "router_threshold", "router_cap")


def _fitting_num_experts(dense_width: int, num_experts: int, multiple: int) -> int | None:
    """The divisor E of F nearest to ``num_experts`` (by ratio) whose s = F / E is a multiple of ``multiple``."""
    low = [e for e in range(1, math.isqrt(dense_width) + 1) if dense_width % e == 0]
    fits = [e for e in sorted({*low, *(dense_width // e for e in low)}) if dense_width // e % multiple == 0]
    return min(fits, key=lambda e: abs(math.log(e / num_experts)), default=None)


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _value(config: object, name: str) -> Any:
    """None where ``config`` has no such value, or refuses to give one since layers differ in it."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _has(config: object, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # it has one for each layer
        return True


def _is_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


class DotMoeConfig(PreTrainedConfig):
    """A dense causal LM whose FFNs of F neurons are cut into E experts of s = F / E, of which a token visits K.

    ``DotMoeConfig(num_experts=16, top_k=4)`` is all a user writes; the rest is filled in from the dense model. An attribute that
    is not found here is the dense model's (hidden_size, vocab_size, num_hidden_layers, ...), and setting one sets it there.

    Args:
        num_experts: E >= 1, a divisor of F.
        num_experts_per_tok: K, 1 <= K <= E; ``top_k`` is its alias.
        moe_intermediate_size: s = F / E; None fills it in.
        router: "top_k", or "soft" (SoftMoE): LapSum's p as the weights, whose sum is K in the mean of the layers; the
            experts with p > theta may be more or fewer.
        router_k: of the soft router, the k_l expected in each layer, from 1 to E - 1; None is K in each, and ``convert`` learns it.
            Loading with another ``top_k`` scales it.
        router_temperature, router_threshold, router_cap: of the soft router: LapSum's temperature > 0; theta in [0, 1), at and
            below which an expert is off; the most experts of a token over k_l, at least 1. None: what ``convert`` trains with.
        num_zero_experts: N, rows of the router beyond those of the experts: choosing one of them is choosing nothing, so that K is
            the most experts of a token. Fine-tuning adds them; beside router "top_k" alone.
        dense_config: the dense model's config, as an object or as its dictionary with ``model_type``.
        assignment: where the partition came from (method, seed, steps, ...), a plain JSON dictionary.
        stages: by training stage, what it trained on and what it reached, plain JSON dictionaries; of "finetune" a list, one a run.
        ffn_modules: the activation's name by the path of each sparse FFN, filled in by the model; a saved model's
            ``modeling_dotmoe.py`` builds itself from it.
        format_version: of the checkpoint format; newer ones than ``FORMAT_VERSION`` are refused.

    Raises:
        ValueError: E < 1, K outside [1, E], an unknown router or format version, F not a multiple of E, s not F / E, a field of
            the soft router out of range or beside router "top_k".

    Warns:
        UserWarning: s is not a multiple of 8; it names the nearest E that fits.
    """

    model_type = "dotmoe"
    attribute_map = {"top_k": "num_experts_per_tok"}  # noqa: RUF012 (class-level in every config of transformers)
    sub_configs = {"dense_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (one object, by its older and its newer name)

    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int | None = None
    router: str = "top_k"
    router_k: Any = None
    router_temperature: Any = None
    router_threshold: Any = None
    router_cap: Any = None
    num_zero_experts: int = 0
    dense_config: Any = None
    assignment: dict[str, Any] | None = None
    stages: dict[str, Any] | None = None
    ffn_modules: dict[str, str] | None = None
    format_version: int = 1
    if TYPE_CHECKING:  # the alias, for the type checker: at run time it is no field
        top_k: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        if "top_k" in kwargs:  # the base class drops it: generation has a parameter of that name
            self.num_experts_per_tok = kwargs.pop("top_k")
        plain_numbers(self)
        dense = self.__dict__.pop("dense_config", None)  # the base class must not see the dense attributes through us
        if dense is not None:  # whose own values these are
            kwargs = {name: value for name, value in kwargs.items() if name not in _SHOWN}
        super().__post_init__(**kwargs)
        self.dense_config = None
        if self.router == "soft" and self.format_version == 1:
            self.format_version = 2
        if self.num_zero_experts and self.format_version < 3:
            self.format_version = 3
        if isinstance(dense, dict):
            values = dict(dense)
            dense = AutoConfig.for_model(values.pop("model_type", "dense_config without a model_type"), **values)
            self.attach(dense)
        elif dense is not None:
            self.bind(dense)
        self.check()

    def attach(self, dense: PreTrainedConfig) -> None:
        """Take ``dense`` (not a copy) as the dense model's config."""
        require(isinstance(dense, PreTrainedConfig), "dense_config", type(dense).__name__, "a PreTrainedConfig or its dictionary")
        require(dense.model_type != self.model_type, "dense_config", f"of type {dense.model_type}", "a dense model's config")
        if self._attn_implementation is not None:
            dense._attn_implementation = self._attn_implementation
        object.__setattr__(self, "dense_config", dense)

    def bind(self, dense_config: PreTrainedConfig, *, dense_width: int | None = None) -> None:
        """Take ``dense_config`` (not a copy), fill in s = F / E and warn if s is not a multiple of 8.

        Args:
            dense_config: the dense model's config object.
            dense_width: F; None takes ``dense_config.intermediate_size``.

        Raises:
            ValueError: see the class.
        """
        self.attach(dense_config)
        width = self.dense_width if dense_width is None else dense_width
        if width is not None and _is_count(self.num_experts) and width % self.num_experts == 0:
            if self.moe_intermediate_size is None:
                self.moe_intermediate_size = width // self.num_experts
            if self.moe_intermediate_size % 8:
                fit = _fitting_num_experts(width, self.num_experts, 8)
                advice = f"num_experts = {fit} (s = {width // fit}) fits" if fit else f"no number of experts fits F = {width}"
                warnings.warn(
                    f"num_experts = {self.num_experts} gives experts of s = {self.moe_intermediate_size} neurons; grouped 16-bit "
                    f"products need a multiple of 8: {advice}",
                    stacklevel=3,
                )
        self.check(dense_width=width)

    def check(self, *, dense_width: int | None = None) -> None:
        """Raise the ValueErrors listed in the class; ``dense_width`` F defaults to the dense config's."""
        E, K, s = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        require(_is_count(E), "num_experts", repr(E), "an integer of at least 1")
        require(_is_count(K) and K <= E, "top_k", repr(K), f"an integer from 1 to num_experts = {E}")
        require(self.router in ROUTERS, "router", repr(self.router), " | ".join(ROUTERS))
        version = self.format_version
        require(_is_count(version), "format_version", repr(version), "an integer of at least 1")
        require(
            version <= FORMAT_VERSION,
            "format_version",
            version,
            f"at most {FORMAT_VERSION}, the newest this dotmoe_kernels reads: upgrade it",
        )
        for name, value in (("assignment", self.assignment), ("stages", self.stages)):
            require(value is None or isinstance(value, dict), name, repr(value), "a dictionary, or None")
        runs = (self.stages or {}).get("finetune", [])
        listed = isinstance(runs, dict) or (isinstance(runs, list) and all(isinstance(run, dict) for run in runs))
        require(listed, "stages", f"with finetune {runs!r}", "a list of dictionaries there")
        self._check_router()
        require(s is None or _is_count(s), "moe_intermediate_size", repr(s), "an integer of at least 1, or None")
        width = self.dense_width if dense_width is None else dense_width
        if width is None:
            return
        near = _fitting_num_experts(width, E, 8) or _fitting_num_experts(width, E, 1)
        require(width % E == 0, "num_experts", E, f"a divisor of F = {width}, such as {near}")
        require(s in (None, width // E), "moe_intermediate_size", s, f"F / num_experts = {width // E}, or None")

    def _check_router(self) -> None:
        E, k, given = self.num_experts, self.router_k, {name: getattr(self, name) for name in _SOFT_FIELDS}
        zeros = self.num_zero_experts
        require(is_integer(zeros) and zeros >= 0, "num_zero_experts", repr(zeros), "an integer of at least 0")
        require(not zeros or self.router == "top_k", "num_zero_experts", zeros, f'0 with router "{self.router}"')
        if self.router != "soft":
            for name, value in given.items():
                require(value is None, name, repr(value), 'None, unless router is "soft"')
            return
        require(E >= 2, "num_experts", E, 'at least 2 with router "soft"')
        allowed = f'at most num_experts - 1 = {E - 1} with router "soft"'
        require(self.num_experts_per_tok <= E - 1, "top_k", self.num_experts_per_tok, allowed)
        for name, value, fits, allowed in (
            ("router_temperature", self.router_temperature, lambda v: v > 0, "a number above 0"),
            ("router_threshold", self.router_threshold, lambda v: 0 <= v < 1, "a number in [0, 1)"),
            ("router_cap", self.router_cap, lambda v: v >= 1, "a number of at least 1"),
        ):
            require(value is None or (_is_number(value) and fits(value)), name, repr(value), allowed)
        listed = isinstance(k, list | tuple) and bool(k) and all(_is_number(v) and 1 <= v <= E - 1 for v in k)
        require(k is None or listed, "router_k", repr(k), f"a list of numbers from 1 to num_experts - 1 = {E - 1}, one a layer")

    def soft_routers(self, num_layers: int) -> list[SoftRouter | None]:
        """The soft router of every layer, with the fields that are None filled in; None for the layers of router "top_k".

        Raises:
            ValueError: ``router_k`` of another length.
        """
        if self.router != "soft":
            return [None] * num_layers
        options, E = AlignmentConfig(), self.num_experts
        if self.router_k is None:
            self.router_k = [float(self.num_experts_per_tok)] * num_layers
        for name, default in (
            ("router_temperature", options.router_temperature_end),
            ("router_threshold", options.threshold),
            ("router_cap", options.cap),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        require(len(self.router_k) == num_layers, "router_k", f"of length {len(self.router_k)}", f"one a layer, {num_layers}")
        shared = (self.router_temperature, self.router_threshold)
        return [SoftRouter(k, *shared, slots(k, self.router_cap, E)) for k in self.router_k]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of every config, but where ``kwargs`` replace K alone, the soft router's budgets follow: every layer keeps its share,
        k_l = 1 + (k_l - 1) (K' - 1) / (mean k - 1), whose mean is K' while none is clamped to E - 1."""
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        K, k = config.num_experts_per_tok, config.router_k
        given = kwargs.keys() & {"top_k", "num_experts_per_tok"} and "router_k" not in kwargs
        if given and k is not None and _is_count(K) and config_dict.get("num_experts_per_tok") != K:
            extra, most = sum(k) / len(k) - 1, config.num_experts - 1
            config.router_k = [min(most, 1 + (v - 1) * (K - 1) / extra) if extra > 0 else float(K) for v in k]
        return made

    @property
    def finetune_runs(self) -> list[dict[str, Any]]:
        """The figures of every fine-tuning, in their order."""
        runs = (self.stages or {}).get("finetune", [])
        return [runs] if isinstance(runs, dict) else list(runs)  # once only the last run's were kept, without a list

    @property
    def dense_width(self) -> int | None:
        """F, where the dense config says it in ``intermediate_size``."""
        width = _value(self.__dict__.get("dense_config"), "intermediate_size")
        return width if _is_count(width) else None

    @classmethod
    def for_dense(
        cls,
        dense_config: PreTrainedConfig,
        *,
        expert_size: int | None = None,
        active_fraction: float | None = None,
        num_experts: int | None = None,
        top_k: float | None = None,
        **kwargs: Any,
    ) -> DotMoeConfig:
        """A topology for a dense model, as E = F / expert_size and K = ceil(active_fraction E).

        Args:
            dense_config: of the dense model; its ``intermediate_size`` is F, or else the width of its FFNs.
            expert_size: s, a divisor of F (default 128); or give ``num_experts``.
            active_fraction: share of the FFN's neurons a token uses, in (0, 1] (default 0.25); or give ``top_k``.
            num_experts: E.
            top_k: K; a fractional K rounds up.
            kwargs: further fields of DotMoeConfig.

        Raises:
            ValueError: both of a pair given, a value out of range, or no model of one FFN width.
        """
        said = _value(dense_config, "intermediate_size")
        width: int = said if _is_count(said) else ffn_width(dense_config)
        require(num_experts is None or expert_size is None, "expert_size", expert_size, "None when num_experts is given")
        require(top_k is None or active_fraction is None, "active_fraction", active_fraction, "None when top_k is given")
        if num_experts is None:
            size = 128 if expert_size is None else expert_size
            near = _fitting_num_experts(width, max(width // size, 1), 8) if _is_count(size) else None
            allowed = f"a divisor of F = {width}" + (f", such as {width // near}" if near else "")
            require(_is_count(size) and width % size == 0, "expert_size", repr(size), allowed)
            num_experts = width // size
        if top_k is None:
            fraction = 0.25 if active_fraction is None else active_fraction
            require(is_number(fraction) and 0 < fraction <= 1, "active_fraction", fraction, "a number in (0, 1]")
            top_k = fraction * num_experts
        whole = int(top_k) if is_integer(top_k) else math.ceil(top_k - 1e-9)  # 0.28 * 100 is 28.000000000000004
        return cls(num_experts=num_experts, num_experts_per_tok=whole, dense_config=dense_config, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The dense model's text config: caches, masks and generation read their sizes there."""
        dense = self.__dict__.get("dense_config")
        return self if dense is None else dense.get_text_config(decoder=decoder, encoder=encoder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As of every config; that of a model also writes the file by which the model loads without this package."""
        if self.ffn_modules is not None:
            self.auto_map = {auto: f"{MODELING.stem}.{name}" for auto, name in _REMOTE.items()}
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / MODELING.name, lambda file: file.write(MODELING.read_bytes()))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As of every config; without the path the dense model was loaded from, and with its sizes beside ours."""
        output = super().to_dict()
        text = self.get_text_config()
        if text is not self:
            output |= {name: value for name in _SHOWN if _is_count(value := _value(text, name))}
        if isinstance(output.get("dense_config"), dict):
            output["dense_config"].pop("_name_or_path", None)
        return output

    def _get_generation_parameters(self) -> dict[str, Any]:
        """``top_k`` is ours here, not the sampling parameter of the same name, which would forbid saving."""
        return {key: value for key, value in super()._get_generation_parameters().items() if key != "top_k"}

    def __getattr__(self, name: str) -> Any:
        dense = self.__dict__.get("dense_config")
        if dense is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(dense, name)
        except AttributeError:
            raise
        except Exception as error:  # some configs refuse what differs by layer with an error that hasattr lets through
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {error}") from error

    def __setattr__(self, key: str, value: Any) -> None:
        dense = self.__dict__.get("dense_config")
        ours = key.startswith("_") or key in self.__dict__ or hasattr(type(self), key) or key in self.attribute_map
        if dense is not None and not ours and _has(dense, key):
            setattr(dense, key, value)
        else:
            super().__setattr__(key, value)
