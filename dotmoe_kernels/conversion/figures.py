"""The pictures of a report, each a PNG as bytes. matplotlib is imported here, in the functions, and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measure import Point, lift

_LAYERS = 4  # that are shown where a layer has a picture of its own
_BINS = 128  # of the dense neurons along an axis


def require_matplotlib() -> None:
    """
    Raises:
        ValueError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is missing; allowed: an environment with it: pip install 'dotmoe_kernels[demo]'") from None


def some(names: Sequence[str]) -> list[str]:
    """At most four layers, the first and the last among them."""
    if len(names) <= _LAYERS:
        return list(names)
    return [names[round(n * (len(names) - 1) / (_LAYERS - 1))] for n in range(_LAYERS)]


def short(name: str) -> str:
    """ "model.layers.3.mlp" -> "layer 3"."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else name


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _by_layer(axes: Any, values: np.ndarray, title: str, colours: str, **limits: Any) -> None:
    """An image [L, E] with its scale."""
    image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest", **limits)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="expert", ylabel="layer")
    _whole_ticks(axes)
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def _whole_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _height(layers: int) -> float:
    return min(8.0, 1.6 + 0.12 * layers)


def _panels(layers: Sequence[str], size: float) -> tuple[Any, Any]:
    figure = _figure(size * len(layers) + 0.6, size + 0.4)
    return figure, figure.subplots(1, len(layers), squeeze=False)[0]


def draw_assignment(experts: Mapping[str, Tensor], num_experts: int) -> bytes:
    """Where each expert's neurons lie in the dense FFN, for some layers: experts [F] by layer -> shares [E, bins]."""
    layers = some(list(experts))
    figure, panels = _panels(layers, 2.9)
    image = None
    for axes, name in zip(panels, layers, strict=True):
        expert_of = experts[name].numpy()
        bins = min(_BINS, len(expert_of), max(8, len(expert_of) // (4 * num_experts)))  # of four neurons an expert
        counts = np.zeros((num_experts, bins))
        np.add.at(counts, (expert_of, np.arange(len(expert_of)) * bins // len(expert_of)), 1)
        counts *= num_experts / counts.sum(0)  # in multiples of the even share
        image = axes.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, extent=(0, 1, num_experts, 0))
        axes.set_title(short(name), fontsize=10)
        axes.set_xlabel("neuron / F")
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=panels, pad=0.01, label="multiple of the even share")
    return _png(figure)


def draw_plan(affinities: Mapping[str, Tensor], plans: Mapping[str, Tensor], experts: Mapping[str, Tensor]) -> bytes:
    """Affinity and plan [F, E] of some layers, neurons sorted by their expert."""
    layers = some(list(affinities))
    figure = _figure(2.9 * len(layers) + 0.6, 6.2)
    rows = figure.subplots(2, len(layers), squeeze=False)
    for row, (values, title, colours) in enumerate(((affinities, "affinity", "RdBu_r"), (plans, "plan", "viridis"))):
        image = None
        most = max(float(values[name].abs().max()) for name in layers) or 1.0
        for axes, name in zip(rows[row], layers, strict=True):
            shown = _bin_rows(values[name].float()[experts[name].argsort(stable=True)])
            low = -most if title == "affinity" else 0.0
            image = axes.imshow(
                shown.numpy(),
                aspect="auto",
                cmap=colours,
                interpolation="nearest",
                vmin=low,
                vmax=most,
                extent=(0, shown.shape[1], 1, 0),
            )
            axes.set_title(f"{title}, {short(name)}", fontsize=10)
            axes.set_xlabel("expert")
        rows[row][0].set_ylabel("neuron / F, sorted by expert")
        figure.colorbar(image, ax=rows[row], pad=0.01)
    return _png(figure)


def _bin_rows(values: Tensor, most: int = 512) -> Tensor:
    """Means of neighbouring rows, so that no more are left than can be seen."""
    step = -(-len(values) // most)
    return torch.stack([part.mean(0) for part in values.split(step)])


def draw_norms(neurons: Tensor, routers: Tensor) -> bytes:
    """[L, E] each, as ``expert_norms`` gives them."""
    figure = _figure(11.5, _height(len(neurons)))
    for axes, values, title in zip(
        figure.subplots(1, 2),
        (neurons, routers),
        ("size of an expert's neurons, |gate| |up| |down|", "norm of a router's row"),
        strict=True,
    ):
        scaled = (values / values.mean(1, keepdim=True).clamp(min=1e-30)).clamp(min=2**-4).log2().numpy()
        spread = max(float(np.abs(scaled).max()), 0.05)
        _by_layer(axes, scaled, f"{title}: log2, against the layer's mean", "RdBu_r", vmin=-spread, vmax=spread)
    return _png(figure)


def draw_load(load: Tensor) -> bytes:
    """Shares [L, E] of the slots: in multiples of the even share, and their least, median and most by layer."""
    scaled = (load * load.shape[1]).numpy()
    figure = _figure(11.5, max(3.2, _height(len(scaled))))
    image, lines = figure.subplots(1, 2)
    _by_layer(image, scaled, "load, multiple of the even share", "viridis", vmin=0)
    layers = np.arange(len(scaled))
    lines.fill_between(layers, scaled.min(1), scaled.max(1), alpha=0.2, color="C0", label="least to most")
    lines.plot(layers, scaled.max(1), ".-", color="C0", linewidth=0.8)
    lines.plot(layers, scaled.min(1), ".-", color="C0", linewidth=0.8)
    lines.plot(layers, np.median(scaled, 1), "o-", color="C3", markersize=4, label="median")
    lines.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    lines.set(xlabel="layer", ylabel="multiple of the even share", ylim=(0, None))
    lines.set_title("spread of the load", fontsize=10)
    lines.legend(frameon=False, fontsize=8)
    _whole_ticks(lines)
    lines.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_pairs(pairs: Mapping[str, Tensor]) -> bytes:
    """Co-routing of some layers: log2 of how much more often than by chance two experts serve one token."""
    layers = some(list(pairs))
    figure, panels = _panels(layers, 2.9)
    image = None
    for axes, name in zip(panels, layers, strict=True):
        values = lift(pairs[name]).clamp(min=2**-3).log2().numpy()
        image = axes.imshow(values, cmap="RdBu_r", interpolation="nearest", vmin=-3, vmax=3)
        axes.set_facecolor("0.85")  # of what is not a number
        axes.set_title(short(name), fontsize=10)
        axes.set_xlabel("expert")
        _whole_ticks(axes)
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=panels, pad=0.01, label="log2 of the ratio to chance")
    return _png(figure)


def draw_perplexity(points: Sequence[Point], total: int) -> bytes:
    """Perplexity against active parameters."""
    figure = _figure(7.5, 3.8)
    axes = figure.subplots()
    shares = [100 * point.active / total for point in points]
    axes.plot(shares, [point.perplexity for point in points], "o-", color="C3", linewidth=1.2)
    for share, point in zip(shares, points, strict=True):
        axes.annotate(
            f"{point.label}: {point.perplexity:.4g}", (share, point.perplexity), (5, 6), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="active parameters, % of all", ylabel="perplexity (lower is better)", yscale="log")
    axes.margins(x=0.18, y=0.15)
    _plain_log(axes)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _plain_log(axes: Any) -> None:
    """Ticks such as 50 rather than 5 x 10^1."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    low, high = axes.get_ylim()
    steps = (1, 2, 3, 5, 7) if high / low < 30 else (1, 3) if high / low < 3000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")


def draw_curves(log: Sequence[Mapping[str, float]]) -> bytes:
    """The terms of the loss by step, and what was set or measured beside them."""
    steps = [entry["step"] for entry in log]
    terms = [key for key in ("loss", "kl", "ce") if key in log[0]]
    others = [key for key in ("balance", "grad_norm", "tau", "lr") if key in log[0]]
    figure = _figure(11.5, 3.4)
    panels = figure.subplots(1, 2)
    for axes, keys, title in zip(
        panels, (terms, others), ("loss and its terms, nats a token", "beside it, by its largest"), strict=True
    ):
        for key in keys:
            values = np.array([entry.get(key, np.nan) for entry in log], dtype=float)
            if keys is others:
                values = values / max(float(np.nanmax(np.abs(values))), 1e-30)
            axes.plot(steps, values, label=key, linewidth=1.2, marker="." if len(steps) < 40 else "")
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if all(entry[key] > 0 for entry in log for key in terms):
        panels[0].set_yscale("log")
        _plain_log(panels[0])
    return _png(figure)
