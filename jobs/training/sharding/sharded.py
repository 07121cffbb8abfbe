"""A model of which each worker has a slice only, by FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, Rajbhandari et al. 2020).

A layer is whole on a worker while it computes, and no longer. Slices are cut along the first dimension of each parameter
(`jobs.training.sharding.slices`). If all weights are trained, each worker has the gradients and AdamW's moments of its own slices. If an adapter is
trained, it is whole on every worker, and only the frozen weights under it are slices.

A wrapped module cannot change its process group. So the model stays as a skeleton without weights, and each process group wraps a copy of it.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from jobs.training.sharding.slices import rows_of

Weights = Callable[[], Mapping[str, Any]]
"""Opens whole weights: by name, something whose rows ``[a:b]`` are a tensor."""


class Sharded:
    """The skeleton of a model, and its slices in the present process group."""

    def __init__(self, model: Any, weights: Weights, compute: torch.dtype | None, device: torch.device) -> None:
        """``model``: plain, on any device. Its weights are dropped; ``weights`` opens them again.

        ``compute``: what the layers compute in, where that is not what the weights are in. The model's buffers and an adapter go to the ``device``.
        """
        frozen = [one for one in model.parameters() if not one.requires_grad]
        self.adapter = [one for one in model.parameters() if one.requires_grad] if frozen else []
        self.weights, self.device = weights, device
        self.policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        self.skeleton = _skeleton(model, {id(one) for one in self.adapter}, device)
        self.module: Any = None
        """Wrapped for the present process group."""
        self.parameters: dict[str, DTensor] = {}
        """Those that are slices, by the module's names for them."""
        self.collected: dict[str, torch.Tensor] = {}
        """Whole weights in the host's memory, of the last `collect` on rank 0."""

    def form(self, world: int) -> None:
        """Wrap the model for the process group that this process has joined. The slices hold nothing yet."""
        self.module, self.parameters = None, {}
        gc.collect()  # FSDP's state and the module know each other
        own = (*self.adapter, *self.skeleton.buffers())
        model: Any = copy.deepcopy(self.skeleton, {id(one): one for one in own})
        mesh = init_device_mesh(self.device.type, (world,))
        for part in (*layers_of(model), model):
            _allocate(part, self.device)
            fully_shard(part, mesh=mesh, mp_policy=self.policy, ignored_params=set(self.adapter))
        for part in model.modules():
            if isinstance(part, FSDPModule):  # the parts of a loss add up: their gradients are summed, not averaged
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
        self.module = model
        self.parameters = {name: one for name, one in model.named_parameters() if isinstance(one, DTensor)}

    @torch.no_grad()
    def fill(self, rank: int, world: int) -> None:
        """Read this worker's slices from the whole weights."""
        weights = self.weights()
        for name, parameter in self.parameters.items():
            if rows := rows_of(parameter.shape[0], rank, world):
                parameter.to_local().copy_(weights[plain(name)][rows.start : rows.stop])

    def rows(self, tensor: str) -> int:
        """How many rows a tensor of `SlicedParameters.tensors` has on all workers together."""
        return self.parameters[tensor.partition("/")[2]].shape[0]

    @torch.no_grad()
    def collect(self, rank: int, world: int) -> None:
        """Bring the weights to the host's memory of rank 0, as ``collected``, one after the other. All workers call this together."""
        for name, parameter in self.parameters.items():
            local = parameter.to_local()
            padded = local.new_zeros(math.ceil(parameter.shape[0] / world), *parameter.shape[1:])
            padded[: len(local)] = local
            parts = None if rank else [torch.empty_like(padded) for _ in range(world)]
            dist.gather(padded, parts)
            if parts:
                self.collected[plain(name)] = torch.cat(parts)[: parameter.shape[0]].cpu()


def passes(model: Any, shares: Sequence[list[list[int]]], rank: int) -> list[list[int]]:
    """This worker's portions of a batch, of which ``shares`` has each worker's. If the model is sharded, there are as many as any worker has:
    a pass needs all workers, and those that have fewer portions make passes for empty ones."""
    mine = shares[rank]
    most = max(map(len, shares)) if isinstance(model, FSDPModule) else 0
    return [*mine, *([] for _ in range(most - len(mine)))]


def plain(name: str) -> str:
    """A parameter's name without what an adapter puts around it.

    >>> plain("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _skeleton(model: Any, adapter: set[int], device: torch.device) -> Any:
    """The model with its parameters on the meta device, which has no memory; what is tied stays tied."""
    emptied: dict[int, torch.nn.Parameter] = {}
    for owner in model.modules():
        for name, one in [*owner.named_parameters(recurse=False)]:
            if id(one) in adapter:
                one.data = one.data.to(device)
            else:
                setattr(owner, name, emptied.setdefault(id(one), torch.nn.Parameter(one.to("meta"), one.requires_grad)))
        for name, buffer in [*owner.named_buffers(recurse=False)]:
            setattr(owner, name, buffer.to(device))
    return model


def layers_of(model: Any) -> Iterator[torch.nn.Module]:
    """The model's decoder layers: what transformers recomputes as a whole, where it is told to keep no activations."""
    yield from (part for part in model.modules() if isinstance(part, GradientCheckpointingLayer))


def _allocate(part: torch.nn.Module, device: torch.device) -> None:
    """Give the parameters that are still on the meta device memory, which nobody has written to."""
    made: dict[int, torch.nn.Parameter] = {}
    for owner in part.modules():
        for name, one in [*owner.named_parameters(recurse=False)]:
            if one.is_meta:
                empty = torch.empty_like(one, device=device)
                setattr(owner, name, made.setdefault(id(one), torch.nn.Parameter(empty, one.requires_grad)))


class SlicedParameters:
    """This worker's slices of the trained parameters, with their gradients and AdamW's moments. `FlatParameters` is the same for whole parameters."""

    def __init__(self, parameters: Mapping[str, DTensor], learning_rate: float, weight_decay: float) -> None:
        """``parameters``: of a module that FSDP2 has wrapped, in float32."""
        self.parameters = parameters
        with torch.no_grad():
            self.slices = {name: torch.nn.Parameter(one.to_local()) for name, one in parameters.items()}
        self.optimizer = torch.optim.AdamW(self.slices.values(), learning_rate, weight_decay=weight_decay, fused=True)

    @property
    def untouched(self) -> bool:
        """See `FlatParameters.untouched`."""
        return not self.optimizer.state

    @property
    def steps(self) -> int:
        """See `FlatParameters.steps`."""
        return max((int(moments["step"]) for moments in self.optimizer.state.values() if "step" in moments), default=0)

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The slices and AdamW's two moments themselves, not copies, as ``parameters/<name>`` and so on. Missing moments are created as zeros.

        ``step`` becomes the optimizer's step count, which corrects the bias of the moments.
        """
        found: dict[str, torch.Tensor] = {}
        for name, one in self.slices.items():
            moments = self.optimizer.state[one]
            if not moments:
                moments |= {moment: torch.zeros_like(one) for moment in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.tensor(float(step), device=one.device)
            found |= {f"parameters/{name}": one.data}
            found |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        return found

    @torch.no_grad()
    def exchange(self, messages: torch.Tensor) -> tuple[list[float], float]:
        """See `FlatParameters.exchange`. The gradients are added up already, in the backward passes; only their length is not known yet."""
        for name, one in self.slices.items():
            gradient: Any = self.parameters[name].grad
            one.grad = gradient if gradient is None else gradient.to_local()
        mine = torch.nn.utils.get_total_norm([one.grad for one in self.slices.values() if one.grad is not None])
        sums = torch.stack([*messages, mine**2]).double()
        dist.all_reduce(sums)
        *told, squares = sums.tolist()
        return told, math.sqrt(squares)

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""
        for one in self.slices.values():
            if one.grad is not None:
                one.grad.mul_(factor)

    def clear(self) -> None:
        """Forget the gradients."""
        for name, one in self.slices.items():
            self.parameters[name].grad = one.grad = None
