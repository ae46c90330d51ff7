"""Which kernel computes attention, chosen in one place for every model and for one module at a time.

diffusers' own switch, ``set_attention_backend``, is heeded by a part of its models only, does nothing without a word on the
others, and changes a default of the whole process. Here each attention module of a denoiser runs its own forward as always, and
only its call of ``scaled_dot_product_attention`` is answered differently.

Masks are what kernels differ in. The models here hide keys, the padding of texts; torch's fast kernel takes no mask at all, and
the one it falls back to first writes a mask that was expanded to (B, H, Lq, Lk) out in full, 1 GiB for 4,096 tokens and 32 heads.
So a mask is looked at once: one that hides nothing is left out, and ``flash`` drops the hidden keys instead of masking them.

Letters: B batch, H heads, Lq and Lk tokens that ask and that are asked, D width of a head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from library.log import log

KEPT_MASKS = 4  # a forward pass has one or two, each used by every layer


def route(module: nn.Module, mode: str) -> nn.Module:
    """Every attention inside ``module`` (what has a ``processor``, as in diffusers) by ``mode``; returns ``module``.

    ``torch``: torch's ``scaled_dot_product_attention``, which chooses among its kernels. ``flash``: the package flash-attn, or
    torch's own flash kernel where that is not installed (a line in the log says so). Names of parameters, hooks and state dicts
    stay as they are. A second call replaces the first.
    """
    router = Router(TorchKernel() if mode == "torch" else flash_kernel())
    found = [part for part in module.modules() if hasattr(part, "processor")]
    assert found, f"{type(module).__name__} has no attention modules"
    for part in found:
        part.forward = _Forward(part, router)
    return module


def flash_kernel() -> Kernel:
    """flash-attn where it can be imported, else torch's own; a line in the log tells which."""
    try:
        package = importlib.import_module("flash_attn")
        kernel = FlashKernel(package.flash_attn_func, package.flash_attn_varlen_func)
    except (ImportError, AttributeError, OSError) as error:  # not there, too old, or built for another torch
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used ({error})"
        log.info("flash-attn %s: attention runs through torch's own flash kernel", reason)
        return TorchFlashKernel()
    log.info("attention runs through flash-attn %s", getattr(package, "__version__", ""))
    return kernel


def route_unmasked(module: nn.Module) -> nn.Module:
    """The same for a module without weights, which cannot look into masks: as if they hid nothing. Returns ``module``."""
    for part in module.modules():
        if hasattr(part, "processor"):
            part.forward = _Forward(part, _Unmasked())
    return module


class _Unmasked(TorchFunctionMode):
    """``scaled_dot_product_attention`` without its mask."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"attn_mask": None} if func is F.scaled_dot_product_attention else kwargs))


class _Forward:
    """Takes the place of ``forward`` on one attention module. No closure, so that copies of the module run on their weights."""

    def __init__(self, module: nn.Module, router: TorchFunctionMode):
        self.module, self.router = module, router

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.router:
            return type(self.module).forward(self.module, *args, **kwargs)


@dataclass(frozen=True)
class Keys:
    """Which keys are real: ``mask`` (B, Lk) bool. ``version``: how often its memory had been written to."""

    mask: torch.Tensor
    version: int

    @cached_property
    def counts(self) -> list[int]:
        """Real keys of each sample. (Reads from the device.)"""
        return self.mask.sum(dim=1).tolist()

    @property
    def all(self) -> bool:
        return sum(self.counts) == self.mask.numel()

    @cached_property
    def indices(self) -> torch.Tensor:
        """(sum of counts,) of the flattened (B * Lk)."""
        return self.mask.reshape(-1).nonzero()[:, 0]

    @cached_property
    def of_sample(self) -> tuple[torch.Tensor, ...]:
        """The same per sample, each within its own Lk."""
        length = self.mask.shape[1]
        return tuple(part - index * length for index, part in enumerate(self.indices.split(self.counts)))

    @cached_property
    def starts(self) -> torch.Tensor:
        """(B + 1,) int32: where each sample's keys begin in ``indices``, and the end."""
        ends = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.mask.device)


@dataclass(frozen=True)
class Call:
    """One attention: ``query`` (B, H, Lq, D), ``key`` and ``value`` (B, H or fewer, Lk, D); ``keys`` None: all are real."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: Keys | None
    scale: float | None
    enable_gqa: bool

    def by_torch(self) -> torch.Tensor:
        mask = None if self.keys is None else self.keys.mask[:, None, None, :]
        return F.scaled_dot_product_attention(self.query, self.key, self.value, attn_mask=mask, scale=self.scale,
                                              enable_gqa=self.enable_gqa)


Kernel = Callable[[Call], torch.Tensor]


class Router(TorchFunctionMode):
    """While it is active, ``scaled_dot_product_attention`` goes to ``kernel``, unless it asks for more than hiding keys."""

    def __init__(self, kernel: Kernel):
        super().__init__()
        self.kernel, self.kept = kernel, []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.answer(*args, **kwargs)

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:
        """In place of ``scaled_dot_product_attention``, with its arguments."""
        mask = None if attn_mask is None else key_mask(attn_mask, len(query))
        if dropout_p or is_causal or (attn_mask is not None and mask is None):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                                                  is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        keys = None if mask is None else self.known(mask)
        return self.kernel(Call(query, key, value, None if keys is None or keys.all else keys, scale, enable_gqa))

    def known(self, mask: torch.Tensor) -> Keys:
        """What is known of ``mask`` from an earlier layer: looking into it makes the processor wait for the device.

        A kept mask keeps its memory from being given to another one, and the version counts writes into it.
        """
        for keys in self.kept:
            same = keys.mask.data_ptr() == mask.data_ptr() and keys.mask.shape == mask.shape
            if same and keys.mask.stride() == mask.stride() and keys.version == mask._version:
                return keys
        keys = Keys(mask, mask._version)
        self.kept = [keys, *self.kept[:KEPT_MASKS - 1]]
        return keys


def key_mask(mask: torch.Tensor, batch: int) -> torch.Tensor | None:
    """(B, Lk) bool of a mask (B, 1, 1, Lk), or one that was expanded from it; None when it is of another kind."""
    if mask.dtype != torch.bool or mask.dim() != 4 or len(mask) != batch:
        return None
    expanded = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
    return mask[:, 0, 0] if expanded else None


class TorchKernel:
    """torch's own choice."""

    def __call__(self, call: Call) -> torch.Tensor:
        return call.by_torch()


class TorchFlashKernel:
    """torch without masks, so that its flash kernel can be chosen: samples with hidden keys are computed one by one."""

    def __call__(self, call: Call) -> torch.Tensor:
        if call.keys is None:
            return call.by_torch()
        parts = []
        for index, real in enumerate(call.keys.of_sample):
            query, key, value = (tensor[index:index + 1] for tensor in (call.query, call.key, call.value))
            parts.append(F.scaled_dot_product_attention(query, key.index_select(2, real), value.index_select(2, real),
                                                        scale=call.scale, enable_gqa=call.enable_gqa))
        return torch.cat(parts)


def half_on_cuda(tensor: torch.Tensor) -> bool:
    """What flash-attn computes: 16-bit numbers on a CUDA device."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)


class FlashKernel:
    """flash-attn: ``dense`` and ``varlen`` are its ``flash_attn_func`` and ``flash_attn_varlen_func``.

    Hidden keys of all samples are dropped, and the rest is one call. What ``takes`` refuses is left to torch.
    """

    def __init__(self, dense: Callable, varlen: Callable, takes: Callable[[torch.Tensor], bool] = half_on_cuda):
        self.dense, self.varlen, self.takes = dense, varlen, takes

    def __call__(self, call: Call) -> torch.Tensor:
        # (B, L, H, D) each
        query, key, value = (_as_autocast(tensor).transpose(1, 2) for tensor in (call.query, call.key, call.value))
        if not self.takes(query):
            return call.by_torch()
        if call.keys is None:
            return self.dense(query, key, value, softmax_scale=call.scale).transpose(1, 2)
        batch, length = query.shape[:2]
        key, value = (tensor.flatten(0, 1).index_select(0, call.keys.indices) for tensor in (key, value))
        starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
        output = self.varlen(query.flatten(0, 1), key, value, starts, call.keys.starts, length, max(call.keys.counts),
                             softmax_scale=call.scale)
        return output.unflatten(0, (batch, length)).transpose(1, 2)


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """As autocast casts the arguments of torch's own function."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
