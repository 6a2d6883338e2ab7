"""What the trainer does beside training."""

import math

from detectron2.engine import HookBase
from torch import Tensor, nn

from ..layers import NonLocalBlock


class NonLocalNorms(HookBase):
    """Writes two L2 norms for each non-local block, by which one sees whether it sleeps.

    ``nonlocal/<name>/out_norm`` is how far the block is from the identity: the norm of what starts
    at zero, the scale of the norm layer after W_z or W_z itself. A block whose value stays near
    zero costs time and does nothing.

    ``nonlocal/<name>/grad_norm`` is the norm of the gradient of all its parameters as the optimizer
    used it: the mean over the processes, without AMP's scale, and after SOLVER.CLIP_GRADIENTS.
    """

    def __init__(self, model: nn.Module, period: int = 20):
        """
        Args:
            model: may be wrapped for distributed training.
            period: iterations between two values; DefaultTrainer's writers have the same.
        """
        self._period = period
        self._blocks = {
            name.removeprefix("module."): module
            for name, module in model.named_modules()
            if isinstance(module, NonLocalBlock)
        }

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if step % self._period and step != self.trainer.max_iter:
            return
        for name, block in self._blocks.items():
            starts_at_zero = block.out if block.out.norm is None else block.out.norm
            self._write(name, "out_norm", [starts_at_zero.weight.detach()])
            gradients = [p.grad for p in block.parameters() if p.grad is not None]
            self._write(name, "grad_norm", gradients)

    def _write(self, block: str, name: str, tensors: list[Tensor]) -> None:
        norm = math.hypot(*(tensor.norm().item() for tensor in tensors))
        self.trainer.storage.put_scalar(f"nonlocal/{block}/{name}", norm, smoothing_hint=False)
