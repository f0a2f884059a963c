"""The processes of a run: which of them this is, and what they say to one another. Alone, nothing here does anything.

torchrun starts them and torch.distributed connects them; who calls the library from processes of his own initialises their group
himself. Then every rank makes the same calls. All of them hold the same parameters, and the passes of a step are dealt out:

    micro-batches   whole ones, in turn; a rank that is left without one in the last round repeats one that counts nothing, so that
                    all make as many passes
    none            the batch is one pass over all ranks, a part of the rows on each; the balance loss, a product of two means, is
                    then of the load of all ranks

so that a step is the same whatever their number, but for the rounding of its sums. torch's DistributedDataParallel would not do:
the gradient of an affinity comes out of Sinkhorn, after all passes, and not out of a module's backward pass that it could follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import require
from ..reference import Routing
from ..routing import balance_of

_T = TypeVar("_T")
_BUCKET = 1 << 28  # bytes that are summed at a time, and copied for it
_PATIENCE = timedelta(hours=2)  # for the slowest rank, such as one that reads the data or saves the model


class Ranks:
    """Rank ``rank`` of ``count``; tensors that are exchanged lie on ``device``."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count, self.device = rank, count, device or torch.device("cpu")
        self._seconds, self._events = 0.0, list[tuple[Any, Any]]()

    @property
    def grouped(self) -> bool:
        """Whether there is a process group, be it of one."""
        return dist.is_available() and dist.is_initialized()

    @property
    def first(self) -> bool:
        """This one prints, and writes what one alone can write."""
        return self.rank == 0

    # --- the passes of a step ---

    def require_passes(self, batch_size: int, micro_batch_size: int | None) -> None:
        """
        Raises:
            ValueError: a rank would have nothing to do.
        """
        if self.count == 1:
            return
        require(batch_size >= self.count, "batch_size", batch_size, f"at least {self.count}, a sequence for each rank")
        most = (batch_size - 1) // (self.count - 1)
        fits = micro_batch_size is None or micro_batch_size <= most
        require(fits, "micro_batch_size", micro_batch_size, f"at most {most}: a pass for each of the {self.count} ranks")

    def passes(self, batch: Tensor, micro_batch_size: int | None) -> list[tuple[Tensor, float]]:
        """The passes of this rank of a step on ``batch`` [B, ...]: the rows, and what share of the step they are."""
        if self.splits(micro_batch_size):
            part = batch.tensor_split(self.count)[self.rank]
            return [(part, len(part) / len(batch))]
        parts = batch.split(micro_batch_size or len(batch))
        mine = [(part, len(part) / len(batch)) for part in parts[self.rank :: self.count]]
        return mine + [(parts[0], 0.0)] * (-(-len(parts) // self.count) - len(mine))

    def splits(self, micro_batch_size: int | None) -> bool:
        """Whether a pass is one over all ranks."""
        return self.count > 1 and micro_batch_size is None

    def balanced(self, routings: Sequence[Routing], **options: Any) -> list[Routing]:
        """These of a pass that is split, with the load of all ranks, and their balance losses. ``options``: of ``balance_of``."""
        slots = [(r.indices < r.load.numel()).sum() for r in routings]
        counts = [r.load * n for r, n in zip(routings, slots, strict=True)]
        self.sum(counts)
        loads = [count / count.sum().clamp(min=1) for count in counts]
        return [r._replace(load=load, balance_loss=balance_of(r, load, **options)) for r, load in zip(routings, loads, strict=True)]

    # --- the layers of a model ---

    def own(self, items: Any) -> Any:
        """The part of a list, or of the rows of a tensor, that this rank works on."""
        each = -(-len(items) // self.count)
        return items[self.rank * each : (self.rank + 1) * each]

    def gather(self, part: Tensor, total: int) -> Tensor:
        """[total, ...] of the parts [n, ...] that are each rank's ``own``."""
        if self.count == 1:
            return part
        each = -(-total // self.count)
        padded = part.new_zeros((each, *part.shape[1:]))
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in range(self.count)]
        with self._timed():
            dist.all_gather(found, padded)
        return torch.cat(found)[:total]

    # --- numbers ---

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sums each over the ranks, in place: as few messages as fit ``_BUCKET``."""
        if self.count == 1:
            return
        todo = list(tensors)
        while todo:
            size, n = 0, 0
            while n < len(todo) and todo[n].dtype == todo[0].dtype and (n == 0 or size + todo[n].nbytes <= _BUCKET):
                size, n = size + todo[n].nbytes, n + 1
            bucket, todo = todo[:n], todo[n:]
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            with self._timed():
                dist.all_reduce(flat)
            for tensor, value in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.detach().copy_(value.view(tensor.shape))

    def most(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The largest over the ranks of each, []; all have the same names."""
        if self.count == 1 or not values:
            return values
        found = torch.stack([value.to(torch.float64) for value in values.values()])
        with self._timed():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return dict(zip(values, found, strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is true on one of them."""
        return bool(self.most({"flag": torch.tensor(float(flag), device=self.device)})["flag"])

    def agree(self, tensors: Sequence[Tensor | None], source: int = 0) -> None:
        """Gives all ranks the values that ``source`` has, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            if tensor is not None:
                dist.broadcast(tensor.detach(), source)

    # --- what one does for all ---

    def tell(self, value: _T, source: int = 0) -> _T:
        """The value that ``source`` has."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source, device=self.device)
        return box[0]

    def collect(self, value: _T) -> list[_T]:
        """The values of all ranks."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value)
        return found

    def once(self, action: Callable[[], _T]) -> _T:
        """Does it on the first rank; its result, or its error, is that of all."""
        if self.count == 1:
            return action()
        result, error = None, None
        if self.first:
            try:
                result = action()
            except (ValueError, ImportError, OSError) as caught:
                error = caught
        result, error = self.tell((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def in_turn(self, action: Callable[[], _T]) -> _T:
        """Does it on the first rank, whose error is that of all, and then on the others, which find what it left on disk."""
        done: list[_T] = []
        self.once(lambda: done.append(action()))
        return done[0] if done else action()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            here = torch.zeros((), device=self.device)
            dist.all_reduce(here)
            here.item()  # on a GPU the call itself comes back at once

    # --- time ---

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def communication(self) -> float:
        """Seconds since the last call that were spent on messages and on waiting for the other ranks; of the gathering of sharded
        weights, which runs beside the products, nothing."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds

    def speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """For the log of a step that took so long: tokens a second a GPU, and the share of the time that went into messages."""
        if self.count == 1:
            return {}
        seconds = max(seconds, 1e-9)
        return {"tokens_per_second": tokens / seconds / self.count, "communication": min(self.communication() / seconds, 1.0)}


def computing_device(device: torch.device) -> torch.device:
    """Of this rank, whose model lies on ``device``: the GPU that was set for it if the group connects GPUs, else that."""
    gpus = torch.cuda.is_available() and dist.is_initialized() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if gpus else device


def find_ranks(device: torch.device | None = None) -> Ranks:
    """Those of the process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(device=device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def local_rank() -> int:
    """Of the processes that torchrun started on this machine."""
    return dist.get_node_local_rank(0)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Inside, the processes that torchrun started are connected; without it there is but this one."""
    if not launched() or dist.is_initialized():
        yield find_ranks(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield find_ranks(device)
    dist.destroy_process_group()  # not after an error: the others may never come to it
