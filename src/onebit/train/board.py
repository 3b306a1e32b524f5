"""The metrics of a run as event files of TensorBoard, below the run folder, where the recipe asks for them.

    tensorboard --logdir runs

Nothing of it is imported where it does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebit.formats.files import naming

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


def library() -> "type[SummaryWriter]":
    """PyTorch's writer of event files.

    Raises:
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"the recipe says tensorboard = true, and it cannot be imported ({error}); install it with: "
            'pip install "onebit[tensorboard]", or --set tensorboard=false'
        ) from None
    return SummaryWriter


class Board:
    """Takes the records of steps; what is drawn of the steps from `first` on is that of this run.

    Args:
        out: the run folder.
        first: step that the run begins or goes on with.
    """

    def __init__(self, out: Path, first: int) -> None:
        self._folder = out / FOLDER
        with naming(self._folder):
            self._writer = library()(str(self._folder), purge_step=first)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the record of a step; figures of layers become "flips/layer_0" and so on.

        Raises:
            OSError: the disk is full, ...
        """
        scalars: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, list):
                scalars |= {f"{name}/layer_{i}": figure for i, figure in enumerate(value)}
            elif name != "step":
                scalars[name] = value
        with naming(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Write what was taken: before a state is saved, as a resumed run does not give it again."""
        with naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Write the rest."""
        with naming(self._folder):
            self._writer.close()
