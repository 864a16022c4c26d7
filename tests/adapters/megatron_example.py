"""The example's trainer on a few ranks."""

import sys
from pathlib import Path

import psutil

from .megatron_on_cpu import initialize, megatron_on_cpu, writers_are_processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron"


def example_losses(options: dict, steps: int, save: bool) -> list[float]:
    """The loss before each of `steps` updates, from the last checkpoint on if there is one."""
    sys.path.insert(0, str(EXAMPLE))
    with megatron_on_cpu():
        import pretrain

        config = pretrain.Config(**options)
        initialize(config.tp, config.pp, config.cp, config.ep)
        trainer = pretrain.Trainer(config)
        losses = [trainer.train_step()[0].item() for _ in range(steps)]
        assert trainer.evaluate().item() > 0
        assert all(group.get("fused", True) for group in trainer.optimizer.param_groups)
        if save:
            with writers_are_processes():
                trainer.save()
                # as a rank's end, with which torchrun sends it to all of its processes
                for child in psutil.Process().children(recursive=True):
                    child.terminate()
                trainer.save()
    return losses
