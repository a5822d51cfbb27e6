"""A whole training step as a CUDA graph: forward, backward and update recorded once, then replayed in one launch.

A single rank exchanges nothing, so DeepSpeed has nothing to do between loss and update: the recording gets the
gradients directly from autograd, flattens them as DeepSpeed does, and runs the same update on the same shards.
DeepSpeed's hooks and buckets stay as an eager step left them, so any step can be taken eagerly. What changes from step
to step (inputs, learning rate, EMA decay, number of steps) lives in tensors on the device, which a replay reads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from duotone.engine.cuda_graph import Recorded
from duotone.engine.distributed import zero
from duotone.engine.distributed.sharded import Sharded

# Allowed differences, as norms relative to what the eager step changed. Summing in another order moves gradients a
# little, and Adam's first steps, which follow their signs, more; an update left out, made twice or made from other
# inputs is off by 1.
_ALLOWED = {"exp_avg": 0.05, "exp_avg_sq": 0.05, "loss": 0.001}
_ALLOWED_ELSEWHERE = 0.5


class WholeStep:
    """One optimizer step per call: the first that moves weights is recorded and checked, later ones replay it."""

    def __init__(self, sharded: Sharded, loss_of: Callable, say: Callable[[str], None], recorder=Recorded):
        """`loss_of(network, inputs)` is the loss of a tree of tensors; `recorder(function, tensors)` makes the replay."""
        self.sharded, self.loss_of, self.say, self.recorder = sharded, loss_of, say, recorder
        self.form = self.replay = None
        self.bare = Bare(sharded.engine.module)
        self.leaves = {name: leaf_of(p) for name, p in self.bare.named_parameters()}
        trained = {id(p): self.leaves[name] for name, p in self.bare.named_parameters()}
        self.trained = [trained[id(p)] for p in sharded.update.parameters()]

    def __call__(self, inputs: dict) -> Tensor:
        """Takes a step and returns its loss; inputs unlike the first in structure, shape or dtype are taken eagerly."""
        tensors, tree = tree_flatten(inputs)
        form = tree, [(tensor.shape, tensor.dtype) for tensor in tensors]
        if self.form is None and not self.sharded.optimizer.param_groups[0]["lr"]:
            return self.eager(inputs)  # at a rate of 0 nothing moves, so a recording that does nothing would pass
        if self.form is None:
            self.form = form
            return self.first(inputs, tensors)
        if self.replay is None or form != self.form:
            return self.eager(inputs)
        return self.replayed(tensors)

    def eager(self, inputs: dict) -> Tensor:
        loss = self.loss_of(self.sharded, inputs)
        self.sharded.backward(loss)
        self.sharded.step()
        return loss.detach()

    def replayed(self, tensors: list[Tensor]) -> Tensor:
        self.sharded.update.set_rates()
        loss, squares = self.replay(*tensors)
        self.sharded.update.tell(squares)
        zero.count_step(self.sharded.engine)
        return loss.clone()

    def recorded(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The function that is recorded: updates, and returns the loss and the squared norm of its gradients."""
        update = self.sharded.update

        def network(*inputs):
            return functional_call(self.bare, self.leaves, inputs)

        loss = self.loss_of(network, tree_unflatten(tensors, self.form[0]))
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        return loss.detach(), update.apply(update.laid_flat(gradients))

    # ------------------------------------------------------------------------------------------------ the first step

    def first(self, inputs: dict, tensors: list[Tensor]) -> Tensor:
        """Takes an eager step, which counts in any case; then records one from the same state and compares the two."""
        before = State(self.sharded)
        loss = self.eager(inputs)
        after = State(self.sharded)
        try:
            # Warming up takes steps too, so the state is restored again after it.
            before.restore()
            self.replay = self.recorder(self.recorded, tensors)
            before.restore()
            found, _ = self.replay(*tensors)
            wrong = differences(before.named, after.named | {"loss": loss}, before.own | {"loss": found})
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}".splitlines()[0]]
        after.restore()
        if wrong:
            self.replay = None
            self.say(f"speed.whole_step: steps are taken one launch at a time, since the recording failed ({wrong[0]})")
        return loss


class Bare(nn.Module):
    """A module called without its hooks, which are DeepSpeed's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner.forward(*inputs)


def leaf_of(parameter: nn.Parameter) -> nn.Parameter:
    """A new leaf that shares the parameter's memory.

    DeepSpeed keeps the autograd node that accumulates a parameter's gradient, and with it the stream that the node was
    created on; work on that stream cannot be part of a recording.
    """
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


class State:
    """All that a step changes: the tensors on the device, copies of them on the CPU, the random generators' states."""

    def __init__(self, sharded: Sharded):
        self.own = sharded.update.state()
        self.named = {name: tensor.to("cpu", copy=True) for name, tensor in self.own.items()}
        self.on_cuda = sharded.device.type == "cuda"
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state(sharded.device) if self.on_cuda else None
        self.device = sharded.device

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self.own.items():
            tensor.copy_(self.named[name])
        torch.set_rng_state(self.random[0])
        if self.on_cuda:
            torch.cuda.set_rng_state(self.random[1], self.device)


def differences(before: dict, eager: dict, found: dict) -> list[str]:
    """A line for each tensor in which the recorded step differs too much from the eager one, and by how much."""
    wrong = []
    for name, value in eager.items():
        allowed = _ALLOWED.get(name.split()[0], _ALLOWED_ELSEWHERE)
        value = value.double().cpu()
        changed = (value - before[name]).norm() if name in before else value.norm()
        off = (found[name].cpu() - value).norm()
        if not off <= allowed * changed:
            wrong.append(f"{name} is off by {off / changed:.2g} of what a step changes")
    return wrong
