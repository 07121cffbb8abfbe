"""A model of which each process of a worker has a run of decoder layers: pipeline parallelism (Huang et al. 2019, GPipe).

The first process, or stage, embeds the tokens, and the last one has the output layer and the loss. Between two stages travel the hidden states of
a portion forward, and their gradient backward. A stage does not wait until a portion has been through all of them: it begins the next one. Once
it has begun as many as there are stages after it, it makes a backward pass after each forward pass (1F1B; Narayanan et al. 2019, PipeDream).

Example: 32 layers and two stages. The first has the embedding and layers 0 to 15, the second has layers 16 to 31, the last norm and the output
layer. Of portions a, b, c the first stage computes: a, b, back a, c, back b, back c. The second: a, back a, b, back b, c, back c.

`torch.distributed.pipelining` asks that all portions have one shape, fixed before the first step, and that it runs the loop over them. Here a
portion is a row of whole examples, of any length, and the loop is that of every other run: what travels is a part of the graph that autograd knows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import ConfigError
from jobs.training.sharding.parts import Parts
from jobs.training.step.weightless import weightless


class PipelineParallel(Parts):
    """This process's layers of a model. The others are taken out of it."""

    def __init__(self, model: Any, part: int, parts: int) -> None:
        """``model``: whole, with its adapter if it has one. `check` has found that so many ``parts`` are possible."""
        super().__init__(model, part, parts, ahead=parts - 1 - part)
        self.backward: Any = None
        """`group` once more, for what travels backward. With NCCL a group's messages of both directions would wait for each other."""
        owners = owners_of(model, parts)
        self.trained = {name: (one.shape, owners[name]) for name, one in model.named_parameters() if one.requires_grad}
        """Name → shape and stage."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.common = [head.weight] if head.weight is embedding.weight and head.weight.requires_grad else []
        """The embedding that is the output layer too: the first stage and the last need it. Those between have it, and no gradient of it."""
        decoder, generator = _decoder(model), _generator(model)
        mine = range(*bounds(len(decoder.layers), part, parts))
        for number in range(len(decoder.layers)):
            if number not in mine:
                decoder.layers[number] = Elsewhere()
        if part > 0:
            decoder.embed_tokens = Receive(self, embedding.weight)
        if part < parts - 1:
            decoder.norm, generator.lm_head = Send(self, embedding.weight.dtype), torch.nn.Identity()
        if self.common and 0 < part < parts - 1:
            decoder.register_parameter("common", head.weight)  # so that it goes to the device with the others

    def form(self, world: int) -> None:
        super().form(world)
        workers = [[*range(first, first + self.parts)] for first in range(0, world * self.parts, self.parts)]
        self.backward, _ = dist.new_subgroups_by_enumeration(workers)

    def leave(self) -> None:
        super().leave()
        self.backward = None

    def divided(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        ids = {id(one) for one in self.common}
        return [one for one in self.model.parameters() if one.requires_grad and id(one) not in ids], self.common

    @torch.no_grad()
    def collect(self) -> None:
        mine = dict(self.model.named_parameters())
        for name, (shape, owner) in self.trained.items():
            if self.part == 0:
                found = mine[name].detach() if owner == 0 else torch.empty(shape, device=next(self.model.parameters()).device)
                if owner:
                    dist.recv(found, group=self.group, group_src=owner)
                self.collected[name] = found.cpu()
            elif self.part == owner:
                dist.send(mine[name].detach().contiguous(), group=self.group, group_dst=0)


class Elsewhere(torch.nn.Module):
    """In the place of a layer that another stage has."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


class Receive(torch.nn.Module):
    """In the place of the embedding, on all stages but the first: the hidden states of the stage before."""

    def __init__(self, pipeline: PipelineParallel, embedding: torch.Tensor) -> None:
        super().__init__()
        self.pipeline, self.width, self.dtype = pipeline, embedding.shape[1], embedding.dtype

    def forward(self, ids: torch.Tensor) -> Any:
        empty = torch.empty(*ids.shape, self.width, dtype=self.dtype, device=ids.device)
        return Received.apply(empty.requires_grad_(torch.is_grad_enabled()), self.pipeline)


class Send(torch.nn.Module):
    """In the place of the last norm, on all stages but the last: the hidden states go to the next stage. What is left has no vocabulary, and no
    loss."""

    def __init__(self, pipeline: PipelineParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.pipeline, self.dtype = pipeline, dtype

    def forward(self, hidden: torch.Tensor) -> Any:
        return Sent.apply(hidden.to(self.dtype), self.pipeline, torch.is_grad_enabled())


class Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, empty: torch.Tensor, pipeline: PipelineParallel) -> torch.Tensor:
        ctx.pipeline = pipeline
        hidden = torch.empty_like(empty)
        dist.recv(hidden, group=pipeline.group, group_src=pipeline.part - 1)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        dist.send(gradients[0].contiguous(), group=ctx.pipeline.backward, group_dst=ctx.pipeline.part - 1)
        return None, None


class Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, pipeline: PipelineParallel, returns: bool) -> torch.Tensor:
        """``returns``: whether a gradient comes back. Until then nobody waits for the next stage."""
        ctx.pipeline, ctx.hidden = pipeline, hidden.detach().contiguous()
        sending: Any = dist.isend(ctx.hidden, group=pipeline.group, group_dst=pipeline.part + 1)
        if not returns:
            sending.wait()
        ctx.sending = sending
        return hidden.new_empty(*hidden.shape[:-1], 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.sending.wait()
        gradient = torch.empty_like(ctx.hidden)
        dist.recv(gradient, group=ctx.pipeline.backward, group_src=ctx.pipeline.part + 1)
        return gradient, None, None


# who has what


def bounds(layers: int, part: int, parts: int) -> tuple[int, int]:
    """The first layer of a stage, and the one after its last.

    >>> [bounds(5, part, 2) for part in range(2)]
    [(0, 2), (2, 5)]
    """
    return part * layers // parts, (part + 1) * layers // parts


def owners_of(model: Any, parts: int) -> dict[str, int]:
    """The stage of each parameter, by name."""
    decoder, embedding = _decoder(model), model.get_input_embeddings()
    stages = {id(one): 0 for one in embedding.parameters()}
    for part in range(parts):
        for number in range(*bounds(len(decoder.layers), part, parts)):
            stages |= {id(one): part for one in decoder.layers[number].parameters()}
    return {name: stages.get(id(one), parts - 1) for name, one in model.named_parameters()}


def _decoder(model: Any) -> Any:
    """The module that has the layers, between an embedding and a norm."""
    embedding = model.get_input_embeddings()
    return next(one for one in _having(model, "embed_tokens", "layers", "norm") if one.embed_tokens is embedding)


def _generator(model: Any) -> Any:
    return next(_having(model, "lm_head"))


def _having(model: Any, *names: str) -> Iterator[Any]:
    return (one for one in model.modules() if all(name in dict(one.named_children()) for name in names))


def check(config: Any, parts: int) -> None:
    """Raise `ConfigError` if a model cannot be cut into so many stages. ``config``: transformers' configuration of it."""
    if parts == 1:
        return
    model = weightless(config)
    shape = config.get_text_config()
    do = "Choose a smaller number, or leave sharding.pipeline out of the recipe."
    if not all(next(_having(model, *names), None) for names in (("embed_tokens", "layers", "norm"), ("lm_head",))):
        raise ConfigError(f"The layers of {shape.model_type} are not known well enough to cut it.", do, param="sharding.pipeline")
    if len(_decoder(model).layers) < parts:
        raise ConfigError(f"{parts} stages are more than the model has layers.", do, param="sharding.pipeline")
