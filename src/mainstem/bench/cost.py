"""What a network costs: parameters, forward FLOPs, the time of a training step, and its peak memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..fit import Run, fit
from ..recipe import Budget, Recipe

if TYPE_CHECKING:
    from ..data import Data

aten = torch.ops.aten

WARM_UP, LEAST, MOST, ENOUGH = 3, 5, 50, 0.5  # training steps; the seconds of timing that are enough

# Operations that do the work of many multiplications and have no formula: with one of them, a count would mislead.
_HEAVY = (
    "linalg_", "_linalg_", "cholesky", "lu_", "triangular_solve", "ormqr", "svd", "geqrf", "_trilinear",
    "_cudnn_rnn", "miopen_", "mkldnn_", "mkl_", "quantized_", "_sparse", "_scaled_grouped", "_grouped",
    "_flash_attention", "_efficient_attention", "_fused_sdp", "_scaled_dot", "_native_multi_head", "_transformer",
)  # fmt: skip
_LIGHT = ("linalg_vector_norm", "linalg_cross")


def measure(
    network: nn.Module, data: Data, recipe: Recipe | None = None, device: str | torch.device = "cpu"
) -> dict[str, float | int | None]:
    """The cost of training `network` on `data`; neither it nor torch's generators change.

    The step is one of `fit`'s own: serving the batch, augmentation and the recipe's methods are in it.

    Returns:
        `parameters`: how many numbers are learned or frozen, shared ones once.
        `flops`: of one example's forward pass in evaluation mode, a multiplication and an addition counting as two;
            None where an operation of weight has no formula.
        `step_seconds`: median time of a training step, after warm-up.
        `peak_bytes`: weights, buffers and optimiser state, and the most that a training step holds besides; None on
            devices other than a CPU and CUDA.

    Raises whatever the network or the recipe raises in training.
    """
    recipe = recipe or Recipe.parse({})
    probe = _Probe()
    budget = Budget.of(f"steps={WARM_UP + MOST + 2}")
    probing = recipe.but(budget=budget, evaluations=1, checkpoint_every=None, methods=(*recipe.methods, probe))
    with _generators_kept(), contextlib.suppress(_Enough), probe.open:
        fit(copy.deepcopy(network), data, probing, device=device, progress=False)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": flops(network, torch.as_tensor(data.train.x[0])[None]),
        "step_seconds": statistics.median(probe.times[WARM_UP:]),
        "peak_bytes": probe.peak,
    }


def flops(network: nn.Module, x: Tensor) -> int | None:
    """Forward FLOPs of `network` for the first example of `x`; None where an operation of weight has no formula.

    Counted on the meta device; a network that cannot run there (its path depends on values) runs on the input's.
    """
    one = x[:1]
    with _generators_kept():
        try:
            return _count(copy.deepcopy(network).to("meta"), one.to("meta"))
        except (NotImplementedError, RuntimeError):
            pass
        try:
            return _count(copy.deepcopy(network).to(one.device), one)
        except NotImplementedError:  # a higher-order operation that the counter cannot look into
            return None


def _count(network: nn.Module, x: Tensor) -> int | None:
    network.eval()
    seen, counter = _Seen(), FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), torch.device(x.device), seen, counter:
        network(x)
    known = counter.flop_registry
    missing = any(op.overloadpacket not in known and _weighs(op) for op in seen.operations)
    return None if missing else int(counter.get_total_flops())


class _Seen(TorchDispatchMode):
    """Notes every operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func)
        return func(*args, **(kwargs or {}))


def _weighs(operation: Any) -> bool:
    """Whether `operation` may cost more than the passes over its data that are never counted."""
    name = operation.overloadpacket.__name__
    foreign = operation.namespace not in ("aten", "prims", "prim")  # nobody has said what it does
    return foreign or (name.startswith(_HEAVY) and name not in _LIGHT)


# Formulas take shapes where the operation takes tensors. FFTs count as FFT libraries report them: 5 n log2 n for a
# complex transform of length n, half of it for a real one.


def _fft_c2c(x: Any, dims: Any, *_: Any, out_shape: Any = None) -> int:
    return round(5 * math.prod(x) * math.log2(math.prod(x[d] for d in dims)))


def _fft_r2c(x: Any, dims: Any, *_: Any, out_shape: Any = None) -> int:
    return round(2.5 * math.prod(x) * math.log2(math.prod(x[d] for d in dims)))


def _fft_c2r(x: Any, dims: Any, *_: Any, out_shape: Any = None) -> int:
    return _fft_r2c(out_shape, dims)


def _matrix_vector(a: Any, b: Any, *_: Any, out_shape: Any = None) -> int:
    return 2 * math.prod(a)


def _add_matrix_vector(_: Any, a: Any, b: Any, *__: Any, out_shape: Any = None, **scales: Any) -> int:
    return 2 * math.prod(a)


def _distances(a: Any, b: Any, *_: Any, out_shape: Any = None) -> int:
    """A difference, a power and a sum for each coordinate of each pair."""
    return 3 * math.prod(a) * b[-2]


def _attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _lstm(x: Any, w_in: Any, w_hidden: Any, *_: Any, out_shape: Any = None, **options: Any) -> int:
    """One direction of one layer, `x` being `[T, B, width]`: both matrices at each step of each sequence."""
    return 2 * math.prod(x[:-1]) * (math.prod(w_in) + math.prod(w_hidden))


_FORMULAS: dict[Any, Any] = {
    aten._fft_c2c: _fft_c2c,
    aten._fft_r2c: _fft_r2c,
    aten._fft_c2r: _fft_c2r,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten._cdist_forward: _distances,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mkldnn_rnn_layer: _lstm,
}


class _Enough(Exception):
    """Ends the training run in which a step is measured."""


class _Probe:
    """A method for `fit` that times its steps, then watches the memory of one, then ends the run.

    A learning rate of zero keeps the arithmetic of an update and the weights as they were given.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak: int | None = None
        self.open = contextlib.ExitStack()
        self._last = 0.0
        self._memory: _Memory | None = None

    def start(self, run: Run) -> None:
        for group in run.optimiser.param_groups:
            group["lr"] = 0.0

    def step(self, run: Run) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if self._memory is not None:
            self.peak = _kept(run) + self._memory.most()
            raise _Enough
        self.times.append(time.perf_counter() - self._last)
        timed = self.times[WARM_UP:]
        if len(timed) == MOST or (len(timed) >= LEAST and sum(timed) > ENOUGH):
            if run.device.type not in ("cpu", "cuda"):
                raise _Enough
            run.optimiser.zero_grad(set_to_none=True)  # a step brings its gradients into being
            self.open.enter_context(_stderr_dropped())  # where torch's profiler writes its own log
            self._memory = _Memory(run.device)
        self._last = time.perf_counter()


class _Memory:
    """The most memory that is held at a time from now on, besides what is held now."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def most(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        self._profile.stop()
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
        return max(itertools.accumulate(changes), default=0)


@contextlib.contextmanager
def _stderr_dropped() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _kept(run: Run) -> int:
    """Bytes of weights, buffers and optimiser state."""
    states = [v for state in run.optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.nbytes for t in [*run.network.parameters(), *run.network.buffers(), *states])


def _generators_kept() -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
