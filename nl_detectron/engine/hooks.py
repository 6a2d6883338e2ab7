"""What the trainer does beside training."""

from detectron2.engine import HookBase
from torch import nn

from ..layers import NonLocalBlock


class NonLocalNorms(HookBase):
    """Writes how far each non-local block is from the identity: ``nonlocal/<name>/out_norm``.

    It is the L2 norm of what starts at zero, the scale of the norm after W_z or W_z itself. A block
    whose value stays near zero sleeps: it costs time and does nothing.
    """

    def __init__(self, model: nn.Module, period: int = 20):
        """
        Args:
            model: may be wrapped for distributed training.
            period: iterations between two values; DefaultTrainer's writers have the same.
        """
        self._period = period
        self._weights = {}
        for name, block in model.named_modules():
            if isinstance(block, NonLocalBlock):
                starts_at_zero = block.out if block.out.norm is None else block.out.norm
                self._weights[name.removeprefix("module.")] = starts_at_zero.weight

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if step % self._period and step != self.trainer.max_iter:
            return
        for name, weight in self._weights.items():
            self.trainer.storage.put_scalar(
                f"nonlocal/{name}/out_norm", weight.detach().norm().item(), smoothing_hint=False
            )
