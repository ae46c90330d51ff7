"""Muon for whole models: torch's Muon for matrices, AdamW for what is none (Jordan et al. 2024; Liu et al. 2025)."""

from __future__ import annotations

import torch

from library.optim.matrices import as_matrices


class Muon(torch.optim.Optimizer):
    """Steps of orthogonal matrices for weights of two and more dimensions (convolutions as (outputs, all others)); AdamW for
    vectors, scalars, and matrices with a single row or column, whose orthogonal step would be a mere normalisation.

    The default ``adjust_lr_fn`` scales steps so that one learning rate (that of AdamW) fits both kinds.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.01, momentum: float = 0.95, nesterov: bool = True,
                 ns_steps: int = 5, adjust_lr_fn: str = "match_rms_adamw", adamw_betas: tuple[float, float] = (0.9, 0.999),
                 adamw_eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._inner: list[tuple[torch.optim.Optimizer, list[int]]] = []
        muon_settings = dict(momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
        adamw_settings = dict(betas=adamw_betas, eps=adamw_eps)
        for cls, settings, wanted in ((torch.optim.Muon, muon_settings, True), (torch.optim.AdamW, adamw_settings, False)):
            inner = cls([torch.zeros(2, 2)], lr=lr, weight_decay=weight_decay, **settings)  # raises for wrong settings
            inner.param_groups.clear()
            inner.state = self.state  # one state by parameter, whichever of the two made it
            positions = []
            for at, group in enumerate(self.param_groups):
                members = [parameter for parameter in group["params"] if _is_matrix(parameter) == wanted]
                if members:
                    inner.add_param_group({"params": members})  # unlike the constructor it takes convolutions, flat by the step
                    positions.append(at)
            self._inner.append((inner, positions))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "a closure would see the flattened weights"
        with as_matrices([p for group in self.param_groups for p in group["params"] if p.grad is not None and p.ndim > 2]):
            for inner, positions in self._inner:
                for held, at in zip(inner.param_groups, positions, strict=True):
                    held["lr"], held["weight_decay"] = self.param_groups[at]["lr"], self.param_groups[at]["weight_decay"]
                inner.step()


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
