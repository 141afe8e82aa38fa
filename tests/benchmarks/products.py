"""Matrix products and attention of a diffusion transformer alone: what its passes cost if all else were free."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from svgpipe.models.attention import attend, fastest_kernel
from svgpipe.models.dit import DiT
from svgpipe.models.ema import update_averages
from svgpipe.models.transformer_blocks import Attention
from svgpipe.stages.runtime.device import autocast
from svgpipe.stages.train_diffusion.trainer import FlowTrainer


class Products:
    """The products and the attention of one call of a model, on prepared tensors of the dtypes of that call."""

    def __init__(self, model: DiT, call: Callable[[], object]) -> None:
        """Record the shapes of `call`, which runs the model once, under autocast or not."""
        self.linear: list[tuple[Tensor, Tensor, Tensor]] = []  # rows (R,I), weight (O,I), output (R,O)
        self.heads: list[Tensor] = []  # (B,heads,N,D)
        self.first = model.ln1
        self.first_number = -1
        with ExitStack() as hooks, torch.no_grad():
            for module in model.modules():
                hooks.callback(module.register_forward_hook(self._remember).remove)
            call()

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            if module is self.first:
                self.first_number = len(self.linear)
            rows = inputs[0].detach().flatten(0, -2).to(output.dtype)
            self.linear.append((rows, module.weight.detach().to(output.dtype), output.detach().flatten(0, -2)))
        elif isinstance(module, Attention):
            b, tokens, width = inputs[0].shape
            split = (b, module.heads, tokens, width // module.heads)
            self.heads.append(torch.randn(split, dtype=output.dtype, device=output.device))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Compute the products of the forward pass."""
        for rows, weight, out in self.linear:
            torch.mm(rows, weight.t(), out=out)
        for x in self.heads:
            attend(x, x, x, fastest_kernel())
        return self.linear[-1][-1]

    def forward_and_backward(self) -> Tensor:
        """Compute the products of both passes. The gradient of the model's input is not computed."""
        with torch.no_grad():
            for number, (rows, weight, out) in enumerate(self.linear):
                torch.mm(rows, weight.t(), out=out)
                torch.mm(out.t(), rows)
                if number != self.first_number:
                    torch.mm(out, weight)
        for x in self.heads:
            q, k, v = (x.detach().requires_grad_() for _ in range(3))
            attend(q, k, v, fastest_kernel()).backward(x)
        return self.linear[-1][-1]


def step_of_products(trainer: FlowTrainer, batch: int) -> Callable[..., None]:
    """Return a training step of the products, the optimizer and the averages of `trainer` alone; gradients are 0."""
    model, config, device = copy.deepcopy(trainer.model), trainer.config, trainer.group.device
    cells, channels = model.grid[0] * model.grid[1], model.in_channels
    x, times = torch.randn(batch, cells, channels, device=device), torch.rand(batch, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    with autocast(device, config.precision):
        products = Products(model, lambda: model(x, times, labels))
    parameters = list(model.parameters())
    averages = [[parameter.detach().clone() for parameter in parameters] for _ in config.ema_decays]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step(*given: object) -> None:
        products.forward_and_backward()
        optimizer.step()
        update_averages(averages, config.ema_decays, parameters, 0)

    return step
