"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, instructions, and predicted times.

    python -m bench.kernels [--kernel NAME ...] [--target sm_90 ...] [--first] [--no-json]

compiles the registry of ``bench.kernels`` for sm_80, sm_90, sm_100 and gfx942, prints a table, and writes it to
``bench/results/compile/<date>-<commit>.json``. ``--first`` takes one tile a kernel. That place is a whole report's: a part of one
is printed, and written only where ``--output`` says. A predicted time is arithmetic, not a measurement: counts of the shape over
the rates of ``_tiles/hardware.py``, from a low to a high end. What a product's program waits for outside its products is counted in
the SASS: barriers, shuffles and loads before its first and behind its last matrix instruction.

TRITON_INTERPRET must not be set: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from bench.kernels import KERNELS, forms, predictions_alignment, predictions_token
from bench.kernels.predictions import experts_against_dense, reductions, training_against_dense
from bench.kernels.registry import Kernel, Variant
from dotmoe_kernels._tiles.hardware import GPUS


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}

# what to count in the disassembly; wide: 16 bytes a thread
_SASS = {
    "wgmma": r"\bHGMMA\b",
    "mma": r"\b[HDIQ]MMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "exp": r"\bMUFU\.EX2\b",
    "load": r"\bLDG\b",
    "load_wide": r"\bLDG\.[\w.]*128\b",
    "load_async": r"\b(LDGSTS|UTMALDG|UBLKCP)\b",
    "store": r"\bSTG\b",
    "atomic": r"\b(ATOMG|RED|REDG)\b",
    "barrier": r"\bBAR\.",
    "local": r"\b(LDL|STL)\b",
}
_MATRIX = r"\b(HGMMA|[HDIQ]MMA|UTC\w*MMA)\b"
_WAITS = {"barrier": r"\bBAR\.", "shuffle": r"\bSHFL\b", "load": r"\bLDG\b", "store": r"\bSTG\b"}
_GCN = {
    "mfma": r"\bv_mfma",
    "exp": r"\bv_exp_f32\b",
    "load": r"\b(global|buffer)_load",
    "load_wide": r"\b(global|buffer)_load_dwordx4\b",
    "store": r"\b(global|buffer)_store",
    "atomic": r"\b(global|buffer)_atomic",
    "barrier": r"\bs_barrier\b",
    "local": r"\bscratch_(load|store)",
}


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _count(text: str, patterns: dict[str, str]) -> dict[str, int]:
    found = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {name: count for name, count in found.items() if count}


def around_products(sass: str) -> dict[str, dict[str, int]]:
    """What lies before the first and behind the last matrix instruction of a kernel; empty where there is none."""
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    at = [i for i, line in enumerate(lines) if re.search(_MATRIX, line)]
    if not at:
        return {}
    parts = {"prologue": lines[: at[0]], "epilogue": lines[at[-1] + 1 :]}
    return {name: {"instructions": len(part), **_count("\n".join(part), _WAITS)} for name, part in parts.items()}


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers and local memory by cuobjdump, instructions by nvdisasm; both come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True)
    stack, local = (int(re.search(rf"\b{field}:(\d+)", usage.stdout)[1]) for field in ("STACK", "LOCAL"))  # type: ignore[index]
    instructions = _count(sass.stdout, _SASS)
    # a stack frame alone need not be a spill; loads and stores of local memory are
    spilled = max(stack, local) if instructions.get("local") else 0
    registers = int(re.search(r"\bREG:(\d+)", usage.stdout)[1])  # type: ignore[index]
    return {"registers": registers, "spill_bytes": spilled, "instructions": instructions, **around_products(sass.stdout)}


def _read_gcn(text: str) -> dict[str, Any]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    # spilled scalar registers go into lanes of vector registers, not to memory
    return {"registers": field("vgpr_count"), "spill_bytes": 4 * field("vgpr_spill_count"), "instructions": _count(text, _GCN)}


def compile_variant(kernel: Kernel, variant: Variant, target_name: str) -> dict[str, Any]:
    """One row of the report. A failure to compile is raised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    function = kernel.load()
    names = function.arg_names
    if missing := [n for n in names if n not in variant.signature and n not in variant.constexprs]:
        raise ValueError(f"{kernel.name} ({variant.name}): the registry says nothing about {', '.join(missing)}")
    if unknown := [n for n in (*variant.signature, *variant.constexprs) if n not in names]:
        raise ValueError(f"{kernel.name} ({variant.name}): the kernel has no argument {', '.join(unknown)}")
    signature = {n: "constexpr" if n in variant.constexprs else variant.signature[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in variant.divisible]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in variant.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=dict(variant.options))
    read = _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_gcn(compiled.asm["amdgcn"])
    return {
        "kernel": kernel.name,
        "variant": variant.name,
        "target": target_name,
        "tile": {n: v for n, v in variant.constexprs.items() if n.isupper() and isinstance(v, int) and v < 2**31 - 1},
        "options": variant.options,
        **read,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": target.shared,
    }


def compile_all(kernels: list[str], targets: list[str], first: bool = False) -> list[dict[str, Any]]:
    """Every variant (or the first) of every kernel for every target; a failure becomes a row with its error."""
    rows = []
    for name in kernels:
        kernel = KERNELS[name]
        for target in targets:
            variants = [one for one in kernel.variants(TARGETS[target].backend) if target in (one.targets or (target,))]
            for variant in variants[:1] if first else variants:
                try:
                    rows.append(compile_variant(kernel, variant, target))
                except Exception as problem:
                    reason = f"{type(problem).__name__}: {problem}"
                    rows.append({"kernel": name, "variant": variant.name, "target": target, "error": reason})
    return rows


def predictions(kernels: list[str]) -> list[dict[str, Any]]:
    """Bytes, flops and predicted times of one launch at the named shapes, from the low to the high end."""
    rows = []
    for name, shape, cost in [(kernel, *one) for kernel in kernels for one in KERNELS[kernel].costs.items()]:
        row = {"kernel": name, "shape": shape, "bytes": cost.bytes, "flops": cost.flops, "programs": cost.programs}
        rows.append(row | {f"{gpu.name}_predicted_seconds": list(cost.seconds(gpu)) for gpu in GPUS})
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text, aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def render(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> str:
    compiled = []
    for row in rows:
        start = [row["kernel"], row["variant"], row["target"]]
        if "error" in row:
            compiled.append([*start, row["error"].splitlines()[0][:100], "", "", "", ""])
            continue
        shared = f"{row['shared_bytes'] / 1024:.1f}/{row['shared_limit'] // 1024} KB"
        instructions = " ".join(f"{name} {count}" for name, count in row["instructions"].items())
        warps = str(row["options"].get("num_warps", 4))
        compiled.append([*start, str(row["registers"]), str(row["spill_bytes"]), shared, warps, instructions])
    expected = []
    for p in predicted:
        spans = (" - ".join(f"{1e3 * end:.3f}" for end in p[f"{gpu.name}_predicted_seconds"]) + " ms" for gpu in GPUS)
        expected.append([p["kernel"], p["shape"], f"{p['bytes'] / 1e6:.1f} MB", f"{p['flops'] / 1e9:.2f} G", *spans])
    beside = forms.table()
    ranges = [f"{gpu.name}, {whose}" for gpu in GPUS for whose in ("ours", "dense")]
    against = []
    for row in experts_against_dense():
        limit, time, dense = (
            f"{row[key] * 1e3:.3f} ms" for key in ("limit_seconds", "predicted_seconds", "dense_predicted_seconds")
        )
        ends = []
        for gpu in GPUS:
            ends += [" - ".join(f"{1e3 * t:.3f}" for t in row[f"{gpu.name}_{whose}predicted_seconds"]) for whose in ("", "dense_")]
        against.append([row["shape"], row["path"], limit, time, dense, f"{row['predicted_times_dense']:.2f}x", *ends])
    training = []
    for row in training_against_dense():
        limit, time, dense = (
            f"{row[key] * 1e3:.3f} ms" for key in ("limit_seconds", "predicted_seconds", "dense_predicted_seconds")
        )
        kept = (f"{row[key] / 1e6:.0f} MB" for key in ("kept_bytes", "grouped_mm_kept_bytes"))
        training.append([row["shape"], limit, time, dense, f"{row['predicted_times_dense']:.2f}x", *kept])
    parts, ratios = predictions_alignment.tables()
    layer = predictions_alignment.layer_table()
    tokens = predictions_token.table()
    ways = [[row["shape"], row["reduction"], f"{row['predicted_seconds'] * 1e3:.2f} ms"] for row in reductions()]
    return "\n\n".join(
        [
            table(["kernel", "variant", "target", "registers", "spilled", "shared", "warps", "instructions"], compiled),
            "PREDICTED time of one launch, from the low to the high end: arithmetic from counts, not a measurement",
            table(["kernel", "shape", "bytes", "flops", *(f"{gpu.name}, predicted" for gpu in GPUS)], expected),
            f"PREDICTED time of a kernel's older and newer form in bfloat16; Sinkhorn in float32, {forms.STEPS} steps",
            table(beside[0], beside[1:]),
            "PREDICTED time of expert_ffn in bfloat16 on an H200 against the dense FFN, the limit beside it",
            table(["shape", "path", "limit", "ours", "dense", "dense / ours", *ranges], against),
            "PREDICTED time of its forward and backward pass, and what is kept in between beside x and the routing weights",
            table(["shape", "limit", "ours", "dense", "dense / ours", "kept", "kept by transformers' grouped_mm"], training),
            "PREDICTED time of the grouped path by its reduction",
            table(["shape", "reduction", "ours"], ways),
            "PREDICTED milliseconds of a step of alignment in bfloat16 by part (the eager rounding is a loop on the CPU)",
            table(parts[0], parts[1:]),
            table(ratios[0], ratios[1:]),
            "PREDICTED time of masked_ffn, forward and back to tokens, plan and router, the limit beside it",
            table(layer[0], layer[1:]),
            f"PREDICTED time of a model's decode step in bfloat16 as one CUDA graph, {predictions_token.CONTEXT} tokens behind it",
            table(tokens[0], tokens[1:]),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Compile every kernel for every target.")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="only these kernels")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only these targets")
    parser.add_argument("--first", action="store_true", help="one tile a kernel")
    parser.add_argument("--no-json", action="store_true", help="print only")
    parser.add_argument("--output", type=Path, help="write the JSON there instead")
    chosen = parser.parse_args(arguments)

    from triton import knobs

    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    kernels, targets = chosen.kernel or list(KERNELS), chosen.target or list(TARGETS)
    rows = compile_all(kernels, targets, chosen.first)
    predicted = predictions(kernels)
    print(render(rows, predicted))
    part = set(kernels) != set(KERNELS) or set(targets) != set(TARGETS) or chosen.first
    if part and not chosen.output and not chosen.no_json:
        print("\na part of a report, which is not written without --output FILE")
    elif not chosen.no_json:
        path = chosen.output or machine.RESULTS / "compile" / f"{datetime.date.today().isoformat()}-{machine.commit()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"versions": machine.versions(), "commit": machine.commit(), "compiled": rows, "predicted_not_measured": predicted}
        result["forms_predicted_not_measured"] = forms.forms()
        result["experts_against_dense_not_measured"] = experts_against_dense()
        result["training_against_dense_not_measured"] = training_against_dense()
        result["reductions_not_measured"] = reductions()
        result["alignment_steps_not_measured"] = predictions_alignment.steps()
        result["alignment_layers_not_measured"] = predictions_alignment.layers()
        result["tokens_not_measured"] = predictions_token.tokens()
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{path}")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
