"""A whole training step as a CUDA graph: forward, backward and update recorded once, then replayed in one launch.

One rank exchanges nothing, so between loss and update DeepSpeed has nothing to do: the recording asks autograd for the
gradients themselves, lays them flat as DeepSpeed does, and runs the same update on the same shards. DeepSpeed's hooks and
buckets stay as an eager step left them, so any step can be taken eagerly. What changes from step to step (inputs, learning
rate, EMA decay, how many steps were taken) lives in tensors on the device, which a replay reads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from duotone.engine.cuda_graph import Recorded
from duotone.engine.distributed import zero
from duotone.engine.distributed.sharded import Sharded

# Of what the eager step changed, in the norm. Sums in another order move gradients a little, and Adam's first steps, which
# look at their signs, more; an update that is not made, made twice or made with other inputs is off by 1.
_ALLOWED = {"exp_avg": 0.05, "exp_avg_sq": 0.05, "loss": 0.001}
_ALLOWED_ELSEWHERE = 0.5


class WholeStep:
    """One optimizer step a call: recorded at the first that moves anything, where it proves itself against an eager step, then replayed."""

    def __init__(self, sharded: Sharded, loss_of: Callable, say: Callable[[str], None], recorder=Recorded):
        """`loss_of(network, inputs)` is the loss of a tree of tensors; `recorder(function, tensors)` makes the replay."""
        self.sharded, self.loss_of, self.say, self.recorder = sharded, loss_of, say, recorder
        self.form = self.replay = None
        self.bare = Bare(sharded.engine.module)
        self.leaves = {name: leaf_of(p) for name, p in self.bare.named_parameters()}
        trained = {id(p): self.leaves[name] for name, p in self.bare.named_parameters()}
        self.trained = [trained[id(p)] for p in sharded.update.parameters()]

    def __call__(self, inputs: dict) -> Tensor:
        """The loss of the step taken; inputs of another form than the first ones are taken eagerly."""
        tensors, tree = tree_flatten(inputs)
        form = tree, [(tensor.shape, tensor.dtype) for tensor in tensors]
        if self.form is None and not self.sharded.optimizer.param_groups[0]["lr"]:
            return self.eager(inputs)  # a rate of 0 moves nothing, and a recording that moved nothing would pass
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
        """What is recorded: the loss and the squared norm of its gradients, after the update."""
        update = self.sharded.update

        def network(*inputs):
            return functional_call(self.bare, self.leaves, inputs)

        loss = self.loss_of(network, tree_unflatten(tensors, self.form[0]))
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        return loss.detach(), update.apply(update.laid_flat(gradients))

    # ------------------------------------------------------------------------------------------------ the first step

    def first(self, inputs: dict, tensors: list[Tensor]) -> Tensor:
        """An eager step, which stands whatever comes; then the recording, held against it from the same state."""
        before = State(self.sharded)
        loss = self.eager(inputs)
        after = State(self.sharded)
        try:
            # Warming up takes steps as well.
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
    """A module without its own hooks, which are DeepSpeed's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner.forward(*inputs)


def leaf_of(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as a leaf of its own.

    DeepSpeed keeps the node that gathers a parameter's gradient, and with it the stream that the node was made on: work of
    that stream cannot be part of a recording.
    """
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


class State:
    """All that a step changes: the device's own tensors, copies of them on the CPU, and the random generators' states."""

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
    """Names of what the recorded step left otherwise than the eager one, with how far off it is."""
    wrong = []
    for name, value in eager.items():
        allowed = _ALLOWED.get(name.split()[0], _ALLOWED_ELSEWHERE)
        value = value.double().cpu()
        changed = (value - before[name]).norm() if name in before else value.norm()
        off = (found[name].cpu() - value).norm()
        if not off <= allowed * changed:
            wrong.append(f"{name} is off by {off / changed:.2g} of what a step changes")
    return wrong
