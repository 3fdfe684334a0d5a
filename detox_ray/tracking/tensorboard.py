"""TensorBoard's event files, in the run folder."""

from pathlib import Path

from tensorboardX import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardSink:
    """Writes RUN/tensorboard; a step that is run again replaces what it was before."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
