"""The standalone teacher as a callback of Lightning's Trainer, without importing Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .schedule import Schedule
from .standalone import EmaTeacher


class LightningEma:
    """Hooks for a callback: ``class Ema(LightningEma, lightning.pytorch.Callback): pass``.

    The teacher is built when the fit starts, with the module on its device; it follows the optimizer's steps, goes into
    checkpoints, and stands in for the student while the Trainer validates.
    """

    teacher: EmaTeacher | None = None  # from the start of the fit on

    def __init__(
        self,
        decay: float | Schedule,
        *,
        of: str = "",
        validate: bool = True,
        optimizer: int = 0,
        **options: Any,
    ) -> None:
        """
        Args:
            of: the attribute of the LightningModule to follow, such as ``"encoder"``; default the module itself.
            validate: validation sees the teacher's weights; the student's come back afterwards.
            optimizer: which of the Trainer's optimizers to follow, where it has several.
            options: of :class:`EmaTeacher`: decay aside, ``buffers``, ``dtype``, ``model``.
        """
        super().__init__()
        self._decay, self._of, self._validate, self._optimizer, self._options = decay, of, validate, optimizer, options
        self._saved: Mapping[str, Any] | None = None
        self._following: RemovableHandle | None = None
        self._swapped = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        student: torch.nn.Module = attrgetter(self._of)(pl_module) if self._of else pl_module
        self.teacher = EmaTeacher(student, self._decay, **self._options)
        if self._saved is not None:
            self.teacher.load_state_dict(self._saved)
            self._saved = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.teacher is not None
        self._following = self.teacher.attach(trainer.optimizers[self._optimizer])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._following is not None:
            self._following.remove()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._validate and self.teacher is not None:
            self._swapped.enter_context(self.teacher.in_student())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._swapped.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._swapped.close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.teacher is None else self.teacher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning restores callbacks before the fit starts, with some strategies afterwards."""
        if self.teacher is None:
            self._saved = state_dict or None
        elif state_dict:
            self.teacher.load_state_dict(state_dict)
