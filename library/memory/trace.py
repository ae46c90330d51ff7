"""Watches operations on tensors that have a shape but no memory: what they would allocate, read, write and compute.

Everything runs on torch's fake tensors of the CPU, so neither weights nor a device are needed. Where a GPU would do something
else than a CPU, ``Kernels`` stands in for it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from library.memory.amounts import Work

# What autocast computes in float32 on CUDA and not on the CPU (torch's list, as far as denoisers use it).
_FLOAT32_ON_CUDA = frozenset((
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt,
    Tensor.rsqrt, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, torch.sum, Tensor.sum, torch.norm, Tensor.norm,
    F.softplus, F.mse_loss, F.l1_loss))
_NORMS = frozenset((torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm))
_UNWRITTEN = frozenset((torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty))


class Trace(TorchDispatchMode):
    """Numbers every storage that comes into being while it is active. ``live``: bytes of those that still exist, ``peak``: the
    most there were since ``peak`` was last set. ``ignored`` storages (parameters, buffers) count for nothing.

    Products go to ``products``, casts of ignored storages to ``casts``: sets of numbers, which the owner may exchange.
    """

    def __init__(self, ignored: Iterable[Tensor], cuda: bool):
        super().__init__()
        self._cuda = cuda
        self._kept_alive = list(ignored)  # or another storage might get the same address
        self._ignored = {tensor.untyped_storage()._cdata for tensor in self._kept_alive}
        self._numbers: dict[int, int] = {}
        self._watched: dict[int, weakref.ref] = {}
        self.sizes: list[int] = []
        self.live = self.peak = 0
        self._flops = self._traffic = self._calls = 0
        self.products: set[int] = set()
        self.casts: set[int] = set()

    def number(self, tensor: Tensor) -> int | None:
        """Of the tensor's storage; None when that is ignored. Equal for views of each other."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._ignored:
            return None
        if address not in self._numbers:
            size = storage.nbytes()
            self._numbers[address] = self.add(size)
            self.live += size
            self.peak = max(self.peak, self.live)
            self._watched[address] = weakref.ref(storage, lambda _: self._forget(address, size))
        return self._numbers[address]

    def add(self, size: int) -> int:
        """The number of a storage that only exists on paper."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def take_work(self) -> Work:
        """What was done since it was last taken."""
        work = Work(self._flops, self._traffic, self._calls)
        self._flops = self._traffic = self._calls = 0
        return work

    def product(self, flops: int, outputs: Iterable[Tensor]) -> None:
        """A product was computed."""
        self._flops += flops
        self._calls += 1
        self.products.update(number for output in outputs if (number := self.number(output)) is not None)

    def _forget(self, address: int, size: int) -> None:
        del self._numbers[address], self._watched[address]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        numbers = [self.number(output) for output in outputs]
        if packet in flop_registry:
            self.product(flop_registry[packet](*args, **kwargs, out_val=result), outputs)
        elif not func.is_view and packet not in _UNWRITTEN:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._traffic += sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
            self._calls += 1
        if packet in _NORMS:
            self._keep_statistics_exact(outputs, args)
        if packet is torch.ops.aten._to_copy and self.number(args[0]) is None:
            self.casts.update(numbers)
        return result

    def _keep_statistics_exact(self, outputs: list[Tensor], args: tuple) -> None:
        """Mean and scale of each row are float32 on a GPU, and on a CPU when the weights are; torch's shapes do not say so."""
        weights = [arg for arg in args[1:] if isinstance(arg, Tensor)]
        if self._cuda or any(weight.dtype == torch.float32 for weight in weights):
            for statistic in outputs[1:]:
                self.sizes[self.number(statistic)] = 4 * statistic.numel()

    def saved(self, into: Callable[[], set[int]]) -> torch.autograd.graph.saved_tensors_hooks:
        """Within it, the storages that autograd keeps are put ``into()`` what is current then."""
        def pack(tensor: Tensor) -> Tensor:
            number = self.number(tensor)
            if number is not None:
                into().add(number)
            return tensor.detach()  # an output that was kept as it is would keep itself alive

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class Reading(TorchDispatchMode):
    """What is done among tensors that have a memory is really done, and counts for nothing: models read lengths off masks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given or any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():  # the fake tensors' mode among them
            return func(*args, **(kwargs or {}))


class Kernels(TorchFunctionMode):
    """Attention as fused kernels have it, on any device (without it, shapes without memory would get the matrix of all pairs);
    on ``cuda`` also the fused RMS norm, and float32 where autocast has it on CUDA but not on the CPU."""

    def __init__(self, trace: Trace, cuda: bool):
        super().__init__()
        self._trace, self._cuda = trace, cuda

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self._cuda and func is F.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if self._cuda and func in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _float32, (args, kwargs))
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                   is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (part.to(dtype) for part in (query, key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        return _Attention.apply(self._trace, query, key, value, attn_mask)

    @staticmethod
    def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is not None and weight.dtype != input.dtype:
            return F.rms_norm(input, normalized_shape, weight, eps)  # torch has no fused kernel for that
        return _RmsNorm.apply(input, weight, len(tuple(normalized_shape)))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _Attention(torch.autograd.Function):
    """Keeps its three inputs, its output and a float32 per row, as flash attention does (Dao et al. 2022). (B, H, S, D) each."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        *rows, length, width = query.shape
        # kernels lay it out as (B, S, H, D)
        out = query.new_empty((*rows[:-1], length, *rows[-1:], value.shape[-1])).transpose(-2, -3)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.trace, ctx.masked = trace, mask is not None
        ctx.flops = 2 * math.prod(rows) * length * key.shape[-2] * (width + value.shape[-1])
        trace.product(ctx.flops, (out, sums))
        ctx.save_for_backward(query, key, value, out, sums, *([mask] if ctx.masked else []))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        query, key, value, *_ = ctx.saved_tensors
        ctx.trace.product(ctx.flops * 5 // 2, ())  # five products in place of two: the scores are computed again
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        scales = input.new_empty(input.shape[:-dims] + (1,) * dims, dtype=torch.float32)
        ctx.weighted = weight is not None
        ctx.save_for_backward(input, scales, *([weight] if ctx.weighted else []))
        return torch.ones_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        input, _, *weight = ctx.saved_tensors
        return input * gradient, torch.ones_like(weight[0]) if ctx.weighted else None, None
