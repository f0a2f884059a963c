"""Q4_K_M as llama.cpp makes it, for an environment without its program: the type of each tensor, and its fall-backs.

A K-quant packs 256 numbers of a row: where rows are no multiple of that, Q4_K falls back to Q5_0 and Q6_K to Q8_0.
"""

from __future__ import annotations

import re
from pathlib import Path

import libgguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

_FALL_BACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}
_FILE_TYPE = 15  # MOSTLY_Q4_K_M


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def kind_of(name: str, rows: list[int], layers: int, tied: bool) -> Kind:
    """Of a tensor whose rows are ``rows[-1]`` long; F32 where it is not quantised."""
    if len(rows) < 2 or "ffn_gate_inp" in name or not name.endswith("weight"):
        return Kind.F32
    found = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)", name)
    if name == ("token_embd.weight" if tied else "output.weight") or (found and _more_bits(int(found[1]), layers)):
        kind = Kind.Q6_K
    else:
        kind = Kind.Q4_K
    return _FALL_BACK[kind] if rows[-1] % 256 else kind


def quantise(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{architecture}.block_count"].contents()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        value = _FILE_TYPE if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = kind_of(tensor.name, list(values.shape), layers, tied)
        if kind == Kind.F32:
            writer.add_tensor(tensor.name, values)
            continue
        packed = libgguf.quantize_rows(values.reshape(-1, values.shape[-1]), libgguf.GGMLQuantizationType(kind.value))
        data = np.asarray(packed, dtype=np.uint8).reshape(*values.shape[:-1], -1)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
