"""Stops a training whose loss is NaN or infinite before it spoils the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn


class LossGuard(HookBase):
    """Raises before an optimizer's step that would not be finite, and says what the batch was.

    The losses are looked at after the forward pass, the gradients before the step; it costs two
    waits for the device. With SOLVER.AMP a gradient that is not finite is no fault: GradScaler
    skips the step, and lowers its scale.
    """

    def __init__(self):
        self._handles = []

    def before_train(self) -> None:
        self._handles = [
            self.trainer.model.register_forward_pre_hook(self._note_batch),
            self.trainer.model.register_forward_hook(self._check_losses),
            self.trainer.optimizer.register_step_pre_hook(self._check_gradients),
        ]

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell more of a FloatingPointError in the body, a step: ours or one of detectron2's.

        Raises:
            FloatingPointError: with iteration, losses, and the batch's images in its message.
        """
        try:
            yield
        except FloatingPointError as error:
            images = ", ".join(image["file_name"] for image in self._batch)
            losses = ", ".join(f"{name} {loss.item():.4g}" for name, loss in self._losses.items())
            raise FloatingPointError(
                f"iteration {self.trainer.iter}: {str(error).rstrip('.')}. "
                f"Losses: {losses or 'not computed'}. "
                f"Images of the batch: {images}. The step was not taken, and the "
                "checkpoints are from before it. Check these images and their annotations; if they "
                "are good, lower SOLVER.BASE_LR, or set SOLVER.CLIP_GRADIENTS.ENABLED True"
            ) from error

    def _note_batch(self, model: nn.Module, inputs: tuple[list[dict]]) -> None:
        self._batch = inputs[0]
        self._losses = {}

    def _check_losses(
        self, model: nn.Module, inputs: tuple[list[dict]], outputs: dict[str, Tensor]
    ) -> None:
        if not model.training:  # an evaluation; the outputs are predictions
            return
        self._losses = outputs
        if not sum(outputs.values()).isfinite():
            raise FloatingPointError("the loss is not finite")

    def _check_gradients(self, optimizer: torch.optim.Optimizer, *_) -> None:
        gradients = {
            name: parameter.grad
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None
        }
        # A norm is finite only if all elements are. On a CPU, isfinite() takes 13 times as long.
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
        if not norms.isfinite().all():
            bad = [name for name, norm in zip(gradients, norms) if not norm.isfinite()]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise FloatingPointError(f"the gradient of {bad[0]}{more} is not finite")
