"""The trained parameters as one vector, and their gradients as another.

The model's own parameters are views of the vector, and so are their gradients. One all-reduce, one clip and one fused step of the optimizer take
the whole vector, without a copy. Example: a weight of shape (2, 3) and a bias of shape (2,) are a vector of 8 numbers; the bias is its last two.

The vector is in float32, whatever the model computes in: an update is often too small to change a number in bfloat16 (Micikevicius et al. 2018).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

MESSAGES = 3
"""Numbers that travel in the same all-reduce as the gradients, see `FlatParameters.exchange`."""


class FlatParameters:
    def __init__(self, parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        """``parameters``: what the run trains, in float32, in the same order on every worker. They become views of the vector."""
        self.parameters = list(parameters)
        joined = torch.cat([parameter.detach().flatten().float() for parameter in self.parameters])
        self.vector = torch.nn.Parameter(joined)
        """Shape (numbers,)."""
        self.exchanged = torch.zeros(joined.numel() + MESSAGES, device=joined.device)
        """The gradients, and behind them the messages: what the workers sum up in each step."""
        self.vector.grad = self.gradient
        at = 0
        for parameter in self.parameters:
            end = at + parameter.numel()
            parameter.data = joined[at:end].view_as(parameter)
            parameter.grad = self.exchanged[at:end].view_as(parameter)  # a backward pass adds to it in place
            at = end
        self.optimizer = torch.optim.AdamW([self.vector], learning_rate, weight_decay=weight_decay, fused=True)

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The vector and AdamW's two moments themselves, not copies, each of shape (numbers,). Missing moments are created as zeros.

        ``step`` becomes the optimizer's step count, which corrects the bias of the moments.
        """
        moments = self.optimizer.state[self.vector]
        if not moments:
            moments |= {name: torch.zeros_like(self.vector) for name in ("exp_avg", "exp_avg_sq")}
        moments["step"] = torch.tensor(float(step), device=self.vector.device)
        return {"parameters": self.vector.data, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}

    def exchange(self, messages: torch.Tensor) -> tuple[list[float], float]:
        """Add up the gradients and the messages of all workers, which call this together.

        ``messages``: shape (`MESSAGES`,). Returns their sums, and the length of the summed gradient. Example: of three workers one sends the
        message 1 and two send 0; all three get 1. Raises `RuntimeError` if another worker dies meanwhile.
        """
        self.exchanged[-MESSAGES:] = messages
        dist.all_reduce(self.exchanged)
        return self.exchanged[-MESSAGES:].tolist(), self.gradient.norm().item()

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""
        self.gradient.mul_(factor)

    @property
    def untouched(self) -> bool:
        """Whether the parameters are as they were loaded: no step has changed them, and no state was taken over."""
        return not self.optimizer.state

    @property
    def steps(self) -> int:
        """How many steps the optimizer has done with these parameters, those before a checkpoint included."""
        return int(self.optimizer.state.get(self.vector, {}).get("step", 0))  # asking must not make an entry

    @property
    def gradient(self) -> torch.Tensor:
        """Shape (numbers,)."""
        return self.exchanged[:-MESSAGES]

    def clear(self) -> None:
        """Forget the gradients."""
        self.exchanged.zero_()
