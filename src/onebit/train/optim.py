"""The optimiser's schedule: warm-up, two stages of learning rate and weight decay.

Ternary weights gain from a high learning rate that drops half-way, and from weight decay that ends there: decay acts
on the latent weights, whose size is the confidence of a code.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay over a run.

    Stage 1 is the first `switch` of the steps, stage 2 the rest; both decay linearly towards zero at the last step.

    Args:
        lr: peak of stage 1.
        lr_second: peak that stage 2 would have had from the start.
        weight_decay: decoupled, stage 1.
        weight_decay_second: stage 2.
        switch: share of the steps in stage 1.
        warmup_steps: of a linear rise from zero.
        beta1: of Adam's first moment.
        beta2: of Adam's second moment.
        grad_clip: largest norm of the gradient of all weights; 0 for no limit.

    Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ", section 1.
    """

    lr: float = 3e-3
    lr_second: float = 2e-3
    weight_decay: float = 0.1
    weight_decay_second: float = 0.0
    switch: float = 0.5
    warmup_steps: int = 375
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Learning rate and weight decay of a step.

        Args:
            step: from 0.
            steps: in the whole run.

        Returns:
            (learning rate, weight decay)
        """
        first = step < self.switch * steps
        peak, decay = (self.lr, self.weight_decay) if first else (self.lr_second, self.weight_decay_second)
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return peak * (1 - step / steps) * rise, decay
