"""What a run shows and leaves behind: progress, validations, metrics.jsonl, TensorBoard, loss.png."""

import sys
import time
from pathlib import Path

from .checkpoint import Progress
from .config import TrainConfig
from .metrics import History, plot_loss


class Report:
    """The voice of a run. Only the first process speaks; on the others every method does nothing."""

    def __init__(self, config: TrainConfig, folder: Path, *, speaks: bool):
        self.config, self.folder, self.speaks = config, folder, speaks

    def already_finished(self, step: int, checkpoint: Path) -> None:
        """There is nothing left to do but what a kill may have cut off."""
        if self.speaks:
            if not (self.folder / "loss.png").exists():
                plot_loss(self.folder)
            print(f"finished: {step} updates, checkpoint {checkpoint}")
            print(f"to train on, run the same command with steps={2 * step}")

    def begin(self, facts: list[str], progress: Progress) -> None:
        """Print what starts and open the logs at the step that is resumed."""
        if not self.speaks:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        print("\n".join(facts), flush=True)
        if progress.step:
            print(f"going on from update {progress.step}", flush=True)
        self.history = History(self.folder, progress.step)
        self.board = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=progress.step + 1 if progress.step else 0
        )
        self.started, self.first = time.monotonic(), progress.step
        self.bar = tqdm(total=self.config.steps, initial=progress.step, unit="update", disable=not sys.stderr.isatty())

    def updated(self, row: dict) -> None:
        """Show and keep the numbers of one update."""
        if not self.speaks:
            return
        self.history.add(**row)
        step = row["step"]
        for name in row.keys() - {"step"}:
            self.board.add_scalar(name, row[name], step)
        if "loss" not in row:
            return
        speed = f"{row['tokens_per_s']:,.0f} tokens/s" + (f" mfu {row['mfu']:.1%}" if "mfu" in row else "")
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} {speed}", refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.config.log_every == 0 or step == self.config.steps):
            left = (time.monotonic() - self.started) / (step - self.first) * (self.config.steps - step)
            print(f"update {step}/{self.config.steps} loss {row['loss']:.4f} {speed} {_clock(left)} left", flush=True)

    def validated(self, row: dict, gzip_bits: float) -> None:
        """Print one validation beside what gzip needs."""
        if self.speaks:
            self.bar.write(
                f"update {row['step']}: validation {row['validation']:.4f} nats per token, "
                f"{row['bits_per_byte']:.3f} bits per byte (gzip {gzip_bits:.3f})",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def end(self, checkpoint: Path) -> None:
        """Close the logs and say where everything is."""
        if not self.speaks:
            return
        self.bar.close()
        self.board.close()
        print(f"checkpoint {checkpoint}\nlosses {plot_loss(self.folder)}\ntensorboard --logdir {self.folder}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
