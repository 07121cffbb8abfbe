"""A model of which each process of a worker has a part of every layer: tensor parallelism (Shoeybi et al. 2019, Megatron-LM).

transformers says of each layer how it is cut (`PreTrainedModel.tp_plan`). A column-parallel layer has some of the outputs. A row-parallel layer has
some of the inputs, so its outputs are a sum over the worker's processes. A pair of them, as in attention and in a feed-forward layer, needs one
sum forward and one backward. What the plan does not name, every process has whole, and computes as the others do. Of an adapter, the matrix beside
the cut is cut too.

Example: a feed-forward layer of 8 numbers has 32 neurons, and two processes. Each has 16 neurons: the rows of ``up_proj`` for them and the columns
of ``down_proj``. Their outputs of 8 numbers add up to the whole layer's.

transformers' own way (`DistributedConfig`) makes parameters that are bound to one process group. A run changes its group with every worker that
comes or goes. So here parameters stay plain tensors, and a layer asks for the group when it computes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from cluster.errors import ConfigError
from jobs.training.sharding.parts import Parts
from jobs.training.step.weightless import weightless

COLUMNS, ROWS, GATHERED, VOCABULARY, SUMMED = (
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
)
"""transformers' names for how a layer is cut. The last is whole, and sees only some of the heads."""
CUT_ALONG = {COLUMNS: 0, GATHERED: 0, VOCABULARY: 0, ROWS: 1}
"""Which dimension of a layer's weight is cut."""


class Cut(NamedTuple):
    """A layer, and how it is cut."""

    name: str
    layer: Any
    how: str


class TensorParallel(Parts):
    """The model's layers are changed in place."""

    def __init__(self, model: Any, part: int, parts: int) -> None:
        """``model``: whole, with its adapter if it has one. `check` has found that so many ``parts`` are possible."""
        super().__init__(model, part, parts, share=1 / parts)
        self.dimensions: dict[int, int] = {}
        """The id of a parameter that is cut → the dimension."""
        for one in [*cuts(model, parts)]:
            self._apply(one.layer, one.how)

    def divided(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        trained = [one for one in self.model.parameters() if one.requires_grad]
        own = [one for one in trained if id(one) in self.dimensions]
        return own, [one for one in trained if id(one) not in self.dimensions]

    @torch.no_grad()
    def collect(self) -> None:
        for name, one in self.model.named_parameters():
            if not one.requires_grad:
                continue
            parts = [one.detach()]
            if (dimension := self.dimensions.get(id(one))) is not None:
                parts = [torch.empty_like(one) for _ in range(self.parts)] if self.part == 0 else None
                dist.gather(one.detach().contiguous(), parts, group=self.group, group_dst=0)
            if self.part == 0 and parts:
                self.collected[name] = torch.cat(parts, dimension or 0).cpu()

    def _apply(self, layer: Any, how: str) -> None:
        for name, one in [*layer.named_parameters(recurse=False)]:
            if how in CUT_ALONG and not (how == ROWS and name == "bias"):
                self._cut(one, CUT_ALONG[how])
        layer.forward = getattr(self, f"_{how}")(layer, layer.forward)

    def _cut(self, parameter: torch.nn.Parameter, dimension: int) -> None:
        if id(parameter) not in self.dimensions:  # what is tied is cut once
            self.dimensions[id(parameter)] = dimension
            parameter.data = parameter.data.chunk(self.parts, dimension)[self.part].clone()

    # how a layer computes then; `original` is its own forward

    def _colwise(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: original(SumOfGradients.apply(x, self))

    def _rowwise(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: torch.Tensor) -> Any:
            whole: Any = Sum.apply(linear(x, layer.weight), self)
            return whole if layer.bias is None else whole + layer.bias

        return forward

    def _colwise_gather_output(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: Gather.apply(original(SumOfGradients.apply(x, self)), self)

    def _embedding_rowwise(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        rows = layer.weight.shape[0]
        first = self.part * rows
        if layer.padding_idx is not None:  # the row that is never trained
            layer.padding_idx = layer.padding_idx - first if first <= layer.padding_idx < first + rows else None

        def forward(ids: torch.Tensor) -> Any:
            outside = (ids < first) | (ids >= first + rows)
            return Sum.apply(original((ids - first).masked_fill(outside, 0)).masked_fill(outside[..., None], 0), self)

        return forward

    def _replicated_with_grad_allreduce(self, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        for one in layer.parameters(recurse=False):
            if one.requires_grad:
                one.register_hook(lambda gradient: self.sum(gradient.clone()))
        return original


# what travels


class Sum(torch.autograd.Function):
    """Adds up the parts of a tensor. All processes have the gradient already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.mark_dirty(x)
        return parallel.sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class SumOfGradients(torch.autograd.Function):
    """Passes on what all processes have. Each knows a part of its gradient, and the parts are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.parallel.sum(gradients[0].clone(memory_format=torch.contiguous_format)), None


class Gather(torch.autograd.Function):
    """Puts the parts of a tensor together along its last dimension. All processes have the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.part, ctx.parts = parallel.part, parallel.parts
        parts = [torch.empty_like(x) for _ in range(ctx.parts)]
        dist.all_gather(parts, x.contiguous(), group=parallel.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].chunk(ctx.parts, -1)[ctx.part], None


# which layers are cut


def cuts(model: Any, parts: int) -> Iterator[Cut]:
    """The layers of a model that are cut, by transformers' plan.

    A vocabulary that so many ``parts`` cannot share is whole on all of them. If the output layer is the embedding too, both are cut along the
    vocabulary.
    """
    plan: dict[str, str] = {name: how.replace("colwise_rep", GATHERED) for name, how in model.tp_plan.items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, layer in model.named_modules():
        if not [*layer.parameters(recurse=False)]:
            continue
        place, _, matrix = name.removeprefix("base_model.model.").replace(".base_layer", "").partition(".lora_")
        how = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", place), "")
        if layer is embedding and head is not None and head.weight is embedding.weight and GATHERED in plan.values():
            how = VOCABULARY
        if any(layer is one for one in (embedding, head)) and layer.weight.shape[0] % parts:
            continue
        if how and (not matrix or matrix[0] == {COLUMNS: "B", ROWS: "A"}.get(how)):
            yield Cut(name, layer, how)


def check(config: Any, parts: int) -> None:
    """Raise `ConfigError` if a model cannot be cut into so many parts. ``config``: transformers' configuration of it."""
    if parts == 1:
        return
    model = weightless(config)
    shape = config.get_text_config()
    do = "Choose another number of parts, or leave sharding.tensor out of the recipe."
    if not model.tp_plan:
        raise ConfigError(f"transformers has no plan how to cut the layers of {shape.model_type}.", do, param="sharding.tensor")
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(shape, key, None)) and heads % parts:
            raise ConfigError(f"sharding.tensor {parts} does not divide the model's {heads} {key}.", do, param="sharding.tensor")
    for name, how in model.tp_plan.items():
        if how.replace("colwise_rep", GATHERED) not in (*CUT_ALONG, SUMMED):
            raise ConfigError(f"{name} would be cut as {how}, which is not supported.", do, param="sharding.tensor")
    for one in cuts(model, parts):
        if one.how in CUT_ALONG and (wide := one.layer.weight.shape[CUT_ALONG[one.how]]) % parts:
            raise ConfigError(f"sharding.tensor {parts} does not divide the {wide} of {one.name}.", do, param="sharding.tensor")
