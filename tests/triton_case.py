"""One LoRA linear layer: its inputs, and what the Triton backend, plain PyTorch and float64 make of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy import violations
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import DEVICE

from lora_kernels.backends import triton as backend
from lora_kernels.backends.torch.linear import Needs
from lora_kernels.mask import dropout_mask, keep_scale

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16)]
ALL = Needs(True, True, True, True)
S = 1.7
SEED = -0x123456789ABCDEF


@contextmanager
def refusing_synchronisation() -> Iterator[None]:
    """Whatever waits for the GPU inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty holds NaN: an element that no kernel writes is seen, where stale memory may hold the right value."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: Any, **options: Any) -> Tensor:
        tensor = allocate(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


@dataclass
class Case:
    """x[M,K] W[N,K] A[R,K] B[N,R] c[N] dy[M,N], dropout p and its seed; B is not zero."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    c: Tensor
    dy: Tensor
    p: float
    seed: Tensor

    @classmethod
    def draw(
        cls, M: int, K: int, N: int, R: int, dtype: torch.dtype = FP16, adapter: torch.dtype = FP16, p: float = 0.3
    ) -> "Case":
        generator = torch.Generator(DEVICE).manual_seed(hash((M, K, N, R, p)) % 2**63)

        def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE).mul_(scale).to(dtype)

        return cls(
            normal(M, K), normal(N, K, scale=K**-0.5), normal(R, K, dtype=adapter, scale=K**-0.5),
            normal(N, R, dtype=adapter, scale=R**-0.5), normal(N), normal(M, N), p, torch.tensor(SEED, device=DEVICE),
        )  # fmt: skip

    def run(self, s: float | Tensor = S, needs: Needs = ALL) -> dict[str, Tensor]:
        """What the Triton backend computes; the backward pass is given only what `needs` must read."""
        dx, dA, dB, _ = needs
        with nan_in_fresh_memory():
            y, h = backend.lora_forward(self.x, self.W, self.A, self.B, s, self.c, self.p, self.seed)
            grads = backend.lora_backward(
                self.dy, self.x if dA else None, self.W if dx else None, self.A if dx else None,
                self.B if dx or dA else None, h if dB else None, s, self.p, self.seed if dx or dA else None, needs,
            )  # fmt: skip
        found = dict(zip(("y", "h", "dx", "dA", "dB", "dc"), (y, h, *grads), strict=True))
        assert {name for name in found if found[name] is None} == {f for f in Needs._fields if not getattr(needs, f)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The same in plain PyTorch with autograd, at the case's own dtypes or all in `dtype`."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.x, self.W, self.A, self.B, self.c)]
        x, W, A, B, c = leaves
        work = torch.promote_types(x.dtype, A.dtype)
        dropped = x.to(work)
        if self.p > 0:
            dropped = dropped * dropout_mask(*x.shape, self.p, self.seed) * keep_scale(self.p)
        h = (dropped @ A.to(work).T).to(A.dtype)
        y = F.linear(x, W, c) + (S * (h.to(work) @ B.to(work).T)).to(x.dtype)
        y.backward(self.dy.to(y.dtype))
        return {"y": y, "h": h, "dx": x.grad, "dA": A.grad, "dB": B.grad, "dc": c.grad}

    def check(self, results: dict[str, Tensor]) -> None:
        """Raise AssertionError unless every result obeys the tolerance rule and has the contract's dtype."""
        plain, truth = self.plain(), self.plain(torch.float64)
        for name, tensor in results.items():
            adapters = self.A.dtype if name in ("h", "dA", "dB") else FP32 if name == "dc" else self.x.dtype
            assert tensor.dtype == adapters, f"{name}: {tensor.dtype}, expected {adapters}"
        broken = []
        for name, tensor in results.items():
            broken += violations({name: tensor}, {name: plain[name]}, {name: truth[name]}, tensor.dtype)
        assert not broken, broken
