"""The processes of a run that torchrun starts: who joins, which rows are mine, what all know, who speaks, who writes.

    @ranks.together()
    def fit(...):
        ranks.shard(model, model.layers, device)      # each process keeps a part of every parameter
        loss = ranks.total(loss_of(ranks.mine(batch)))

Without torchrun there is one process, which is the first, owns all rows and holds all tensors whole. Knows nothing of
recipes, models and files.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# The first may tokenize for days. A process that ends closes its connections, so nobody waits for the dead.
_PATIENCE = timedelta(days=365)
# All processes, once they have joined: for plain numbers and for waiting.
_all: dist.ProcessGroup | None = None


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes of the run, where there are any, for the length of a call: a decorator.

    Raises:
        ValueError: more processes than devices.
        ConnectionError: another process ended in the middle.
    """
    global _all
    if _all is not None or not dist.is_torchelastic_launched():
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    if size == 1:
        yield
        return
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        local, n_devices = dist.get_node_local_rank(), torch.cuda.device_count()
        if local >= n_devices:
            raise ValueError(
                f"torchrun started more than {n_devices} processes on a machine with {n_devices} devices; "
                f"expected one for each: use --nproc-per-node {n_devices}"
            )
        torch.cuda.set_device(local)
    try:
        backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        _all = dist.new_group(timeout=_PATIENCE, backend="gloo")
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(
                "another process of this run ended; go on from the last saved state with --resume"
            ) from None
        raise
    # After an error the connections stay until this process has said why, and ends.
    _all = None
    dist.destroy_process_group()


def count() -> int:
    """How many processes the run has."""
    return 1 if _all is None else dist.get_world_size()


def index() -> int:
    """Number of this process, from 0."""
    return 0 if _all is None else dist.get_rank()


def is_first() -> bool:
    """Whether this process is the one that writes and shows what all would write and show alike."""
    return index() == 0


def may_speak() -> bool:
    """Whether no other process has said yet why the run ends; asked once, before saying so."""
    if not dist.is_torchelastic_launched():
        return True
    try:
        # torchrun keeps this store, so it is there before the processes join and after some have ended.
        return next(rendezvous("env://"))[0].add("onebit/said", 1) == 1
    except RuntimeError:
        return True


def first(action: Callable[[], T]) -> T:
    """Let the first process act when all have come here; return what it returned to all.

    Where it fails, the error is raised there, and the others end without a word.
    """
    if count() == 1:
        return action()
    dist.barrier(_all)
    told: list[Any] = [None, False]
    if not is_first():
        dist.broadcast_object_list(told, 0, _all)
        if told[1]:
            raise SystemExit(2)
        return told[0]
    try:
        told[0] = action()
    except Exception:
        dist.broadcast_object_list([None, True], 0, _all)
        raise
    dist.broadcast_object_list(told, 0, _all)
    return told[0]


def in_turn(make: Callable[[], T], path: Path) -> T:
    """Let the first process make files, then let the others open them.

    Args:
        make: makes what is not there, and opens it.
        path: a file that is there then.

    Raises:
        ValueError: the others do not see it.
    """
    made: list[T] = []
    first(lambda: made.append(make()))
    if made:
        return made[0]
    if not path.exists():
        raise ValueError(
            f"process {index()} of {count()} does not see {path}; expected one folder on a disk that all machines share"
        )
    return make()


def check(batch_size: int, accumulate: int) -> None:
    """Refuse a batch that cannot be divided among the processes, and then into parts.

    Raises:
        ValueError: so.
    """
    if batch_size % (count() * accumulate):
        raise ValueError(
            f"recipe: batch_size {batch_size} cannot be divided among {count()} processes and by accumulate "
            f"{accumulate}; expected a multiple of {count() * accumulate}: change one of the three"
        )


def mine(array: np.ndarray) -> np.ndarray:
    """The rows of a batch that this process computes: a contiguous part, as long as that of any other."""
    n_rows = len(array) // count()
    return array[index() * n_rows : (index() + 1) * n_rows]


def total(value: float) -> float:
    """The sum over all processes, the same bits in each."""
    if count() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed, group=_all)
    return summed.item()


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Move a model to its device, in place; of several processes each keeps a part of every parameter, by its rows.

    A block has its whole parameters while it computes; what stands in no block while the model does. Gradients are
    the means over the processes.

    Args:
        model: with the same weights in all processes.
        blocks: parts of it, which are called one after another.
        device: of this process.
    """
    if count() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (count(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # Its parameters are parts again after each forward pass, whether or not a backward pass follows.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def fused(losses: Callable[..., Tensor], blocks: Iterable[nn.Module]) -> Callable[..., Tensor]:
    """What computes the losses, compiled: as a whole, or of several processes block by block, in place.

    Between blocks parameters are gathered, which is no part of a graph. Without gradients blocks run as they are.

    Args:
        losses: from a model and a part of a batch.
        blocks: of the model.
    """
    if count() == 1:
        return torch.compile(losses)
    for block in blocks:
        plain, fast = block.forward, torch.compile(block.forward)

        def forward(*args: Any, plain: Any = plain, fast: Any = fast) -> Any:
            return (fast if torch.is_grad_enabled() else plain)(*args)

        block.forward = forward
    return losses


def whole(tensor: Any) -> Tensor:
    """All rows of a tensor of which each process has a part; all processes must ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local(tensor: Any) -> Tensor:
    """The rows of a tensor that this process keeps; they share its memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def divided(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that all processes have whole, divided among them as another one of its shape is, on its device."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # None: each takes its rows of what it has, and nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def put(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Give a parameter other values, divided as it is; return those that it had."""
    had = parameter.data
    if not hasattr(parameter, "device_mesh"):
        parameter.data = values
        return had
    # In place: what gathers the parts of a parameter knows where they lie.
    had = had.clone()
    parameter.detach().copy_(values)
    return had


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The model with whole parameters in all processes: for small ones."""
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
