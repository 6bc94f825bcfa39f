"""The part of a policy that no subnet changes, computed once for all networks of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.policy_data import Batch
from training.objective import Objective
from training.policies.elastic_diffusion_policy_t import ElasticDiffusionPolicyT


class SharedStem:
    """Tokens of one batch, of which every network of a step takes the first rows, and the gradients they leave.

    Embeddings, the memory MLP and image encoders are the same function of the same input for every network of a step.
    The gradients of all networks add up at their outputs (in float32) and go back through them once.
    """

    def __init__(self, model: ElasticDiffusionPolicyT, objective: Objective, noisy: Tensor, batch: Batch) -> None:
        """Run the stem of ``model`` on noisy actions (B, H, Da) and the observations of ``batch``."""
        self._model, self._objective = model, objective
        with objective.autocast():
            self._outputs = model.stem(noisy, batch.timesteps, batch.observation)
        self._leaves = [output.detach().to(torch.float32).requires_grad_() for output in self._outputs]

    def predict(self, size: int) -> Tensor:
        """Noise (size, H, Da) float32 that the active network predicts in the first ``size`` chunks."""
        with self._objective.autocast():
            return self._model.trunk(*(leaf[:size] for leaf in self._leaves)).float()

    def backward(self) -> None:
        """Add what the backward passes of all networks left at the stem's outputs to its parameters' gradients."""
        pairs = [
            (out, leaf.grad.to(out.dtype))
            for out, leaf in zip(self._outputs, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])
