"""Parameters that share one vector are trained as PyTorch trains them one by one."""

import copy

import torch

from jobs.training.step.flat import MESSAGES, FlatParameters


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False))


def test_steps_are_those_of_adamw_on_each_parameter() -> None:
    ours, theirs = network(), network()
    flat = FlatParameters(list(ours.parameters()), 0.01, weight_decay=0.1)
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.1)
    for step in range(5):
        points = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        for half in points.split(4):  # gradients of two passes add up
            (ours(half) ** 2).sum().backward()
            (theirs(half) ** 2).sum().backward()
        flat.optimizer.step()
        flat.clear()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_gradients_and_messages_are_one_tensor_without_copies() -> None:
    model = network()
    flat = FlatParameters(list(model.parameters()), 0.01, weight_decay=0)
    model(torch.ones(2, 5)).sum().backward()
    assert flat.exchanged.numel() == sum(p.numel() for p in model.parameters()) + MESSAGES
    joined = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(flat.gradient, joined) and joined.any()
    flat.clear()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_copy_of_the_state_goes_on_as_the_original() -> None:
    models = [network(), network()]
    first, second = (FlatParameters(list(model.parameters()), 0.01, weight_decay=0) for model in models)
    points = torch.randn(8, 5, generator=torch.Generator().manual_seed(9))

    def step(model: torch.nn.Module, flat: FlatParameters) -> None:
        (model(points) ** 2).sum().backward()
        flat.optimizer.step()
        flat.clear()

    for _ in range(3):
        step(models[0], first)
    state = copy.deepcopy(first.tensors(3))
    with torch.no_grad():
        for name, tensor in second.tensors(3).items():
            tensor.copy_(state[name])
    step(models[0], first)
    step(models[1], second)
    assert torch.equal(first.vector, second.vector)
