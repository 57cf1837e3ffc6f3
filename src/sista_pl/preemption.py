"""A machine that is taken away: SIGTERM and SIGUSR1 save the last checkpoint and end the run."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGREE = 10


class Preemption(Checkpoint):  # Lightning calls these behind all other callbacks
    """Saves `last.ckpt` behind the training batch in which one of `SIGNALS` came, and ends with 128 + its number.

    Of several processes one that is told is enough: every `AGREE` steps they ask one another, so that all save the same
    step; asking makes each wait for the others and for its device. In the last batch of an epoch and in validation it
    waits for the next epoch, since a checkpoint before the validation would resume behind it; the epoch's own
    checkpoint is written by then.

    It stands in the place of Lightning's handlers for the time of the training: theirs runs a collective inside of the
    handler, which deadlocks where the ranks are at different steps, and under SLURM it writes to the current folder a
    checkpoint that the next job takes for its own.
    """

    def __init__(self) -> None:
        self.received = 0

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        # Trainer puts the former handlers back when it ends
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        number = self.received
        if trainer.world_size > 1:
            if trainer.global_step % AGREE:
                return
            told = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(told, reduce_op="max"))
        if not number or trainer.is_last_batch:
            return
        last = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.filename == "last")
        path = f"{last.dirpath}/last{last.FILE_EXTENSION}"
        trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(f"{signal.Signals(number).name}: saved {path}; --ckpt_path last goes on")
        stop = SIGTERMException()
        stop.code = 128 + number  # as a shell has it of a program that a signal ended
        raise stop
