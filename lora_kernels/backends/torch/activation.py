"""a = act(e)·u, and its gradients de = da·u·act'(e), du = da·act(e): what lies between the products of a gated MLP.

In float32 or wider, each result rounded once. On a CPU csrc/cpu/glu.cpp reads each tensor once; elsewhere, and in float64, they
are PyTorch operations on chunks of rows that stay in a CPU's cache. Without e, in a plain MLP: a = act(u), du = da·act'(u).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import cpu_extension
from ...cpu_extension import rows as rows_of
from ...mask import row_chunks
from .engine import part, to


class Activation(NamedTuple):
    """act(v), and its gradient da·act'(v), by PyTorch operations."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda v: F.gelu(v, approximate="tanh"), lambda da, v: torch.ops.aten.gelu_backward(da, v, approximate="tanh")
    ),
    "relu2": Activation(lambda v: F.relu(v).square(), lambda da, v: da * F.relu(v).mul_(2)),
}
NATIVE = (torch.float32, torch.bfloat16, torch.float16)  # in float64 nobody trains


def why_not(h: Tensor) -> str | None:
    """PyTorch computes any h."""
    return None


def activated(h: Tensor, activation: str, has_gate: bool) -> Tensor:
    """a[M, I] = act(e)·u of h[M, 2·I] = [e | u], or act(h) of h[M, I], in h's dtype."""
    return gated(*_halves(h, has_gate), activation)


def activated_backward(da: Tensor, h: Tensor, activation: str, has_gate: bool) -> Tensor:
    """dh of the same."""
    dh = torch.empty_like(h)
    gated_backward(da, *_halves(h, has_gate), activation, *_halves(dh, has_gate))
    return dh


def _halves(h: Tensor, has_gate: bool) -> tuple[Tensor | None, Tensor]:
    return h.chunk(2, dim=1) if has_gate else (None, h)  # type: ignore[return-value]


def gated(e: Tensor | None, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """a = act(e)·u[M,I], or act(u), in u's dtype; out: memory for it, which may be e's or u's."""
    if out is None:
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
    if _native(e, u, out):
        extension, threads = cpu_extension.extension, torch.get_num_threads()
        extension.glu_forward(activation, *u.shape, rows_of(out), rows_of(e), rows_of(u), threads)
        return out
    act, chunks = ACTIVATIONS[activation].value, row_chunks(len(u), u.shape[1], u.device)
    for rows in chunks:
        u_rows = _wide(part(u, rows, chunks))
        a = act(u_rows) if e is None else act(_wide(part(e, rows, chunks))).mul_(u_rows)
        part(out, rows, chunks).copy_(a)
    return out


def gated_backward(da: Tensor, e: Tensor | None, u: Tensor, activation: str, de: Tensor | None, du: Tensor) -> None:
    """Write de = da·u·act'(e) and du = da·act(e), or du = da·act'(u); de or du may be da's own memory."""
    if _native(da, e, u, de, du):
        extension, threads = cpu_extension.extension, torch.get_num_threads()
        extension.glu_backward(activation, *u.shape, rows_of(da), rows_of(e), rows_of(u), rows_of(de), rows_of(du), threads)
        return
    (act, gradient), chunks = ACTIVATIONS[activation], row_chunks(len(u), u.shape[1], u.device)
    for rows in chunks:
        da_rows, u_rows = _wide(part(da, rows, chunks)), _wide(part(u, rows, chunks))
        if e is None:
            part(du, rows, chunks).copy_(gradient(da_rows, u_rows))
            continue
        e_rows = _wide(part(e, rows, chunks))
        de_rows, du_rows = gradient(da_rows * u_rows, e_rows), act(e_rows).mul_(da_rows)
        part(de, rows, chunks).copy_(de_rows)  # type: ignore[arg-type]
        part(du, rows, chunks).copy_(du_rows)


def _native(*tensors: Tensor | None) -> bool:
    """Whether csrc/cpu can address all of them: its dtypes, and adjacent elements in each row."""
    if not cpu_extension.takes(*tensors):
        return False
    return all(t is None or (t.dtype in NATIVE and t.stride(1) == 1) for t in tensors)


def _wide(t: Tensor) -> Tensor:
    """t in float32 or wider."""
    return to(t, torch.promote_types(t.dtype, torch.float32))
