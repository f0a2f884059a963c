"""What a rank of several takes of a model's memory: its part, what is around the blocks, and a block or two."""

import json

from test_streaming import MB, SIZES, VOCABULARY, layer_bytes, needs_proc, run, write_dense

from dotmoe_kernels import DotMoeConfig
from dotmoe_kernels.conversion import convert_folder

_PEAK = """
import gc, json, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor
from pathlib import Path
from dotmoe_kernels.alignment.ranks import find_ranks
from dotmoe_kernels.conversion import files
from dotmoe_kernels.conversion.finetuning import FinetuneConfig
from dotmoe_kernels.conversion.origins import Files
from dotmoe_kernels.conversion.sharded import divide_student

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

dense, sparse, out, meeting, rank = sys.argv[1:6]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
ranks = find_ranks()
torch.nn.functional.linear(torch.ones(64, 512).bfloat16(), torch.ones(512, 512).bfloat16())

def spread():
    with torch.no_grad():
        logits = Files(dense).spread(ranks)(input_ids=torch.arange(16)[None], use_cache=False).logits
    assert bool(torch.isfinite(logits).all())

def tune():
    origin = Files(sparse)
    files.write_student(divide_student(origin, FinetuneConfig(router_lr=0.0), ranks, True), origin, Path(out), ranks)

spread()  # what the first pass brings of the libraries is not the model's
gc.collect()
growth = {}
for work in (spread, tune):
    ranks.wait()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    held = status("VmRSS")
    work()
    growth[work.__name__] = status("VmHWM") - held
    gc.collect()
ranks.wait()
dist.destroy_process_group()
print(json.dumps(growth))
"""


@needs_proc
def test_a_rank_takes_its_part_and_a_block(tmp_path):
    """A model that is read, divided and run, and one that is made to train, in float32, and written again."""
    size = "many layers"
    total = sum(spec.nbytes for spec in write_dense(tmp_path / "dense", size).values())
    config = DotMoeConfig(num_experts=16, top_k=4)
    convert_folder(tmp_path / "dense", tmp_path / "moe", config, method="random", max_shard_size="100MB")
    layers, H, _ = SIZES[size]
    block, around = layer_bytes(size), 2 * 2 * VOCABULARY * H
    most = {
        "spread": layers * block / 2 + around + 2 * block + 30 * MB,
        # in float32 the part of everything, and a block as it is read, as it becomes float32 and while it is divided
        "tune": 2 * total / 2 + 2 * around + 3 * block + 30 * MB,
    }
    assert total > 200 * MB
    assert most["spread"] < 0.8 * total
    assert most["tune"] < 0.8 * 2 * total
    places = [tmp_path / name for name in ("dense", "moe", "out", "meeting")]
    # glibc gives back what is freed at once, so that figures repeat
    ranks = [run(_PEAK, *places, rank, MALLOC_MMAP_THRESHOLD_=str(MB)) for rank in range(2)]
    for process in ranks:
        said, error = process.communicate(timeout=1200)
        assert process.returncode == 0, error[-2000:]
        found = json.loads(said.splitlines()[-1])
        assert {name: size for name, size in found.items() if size > most[name]} == {}, most
    assert (tmp_path / "out" / "config.json").is_file()
