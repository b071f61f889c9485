"""The contract over the compiled extension (csrc/), for 4-bit base weights on NVIDIA GPUs.

Few tokens take the extension's own product; otherwise W is dequantised into fresh memory, which is freed with the call, and
the Triton backend computes with it: its side kernels and the vendor's product. nf4_plan.py says which.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ...nf4 import weight as nf4
from ...nf4.codec import NESTED_BLOCKSIZE, mean_absmax, refuse
from ...nf4.tables import code_values, dynamic_map
from ...nf4.weight import NF4Weight
from ...plan import use_backend
from .. import triton
from ..torch import linear as reference
from ..torch.linear import Needs
from ..triton import forward, tuning
from ..triton.blocks import row_major
from ..triton.tuning import NothingCompilesError

try:
    extension: Any = importlib.import_module("lora_kernels._C")
except ImportError as error:
    raise ImportError(
        "the CUDA extension was not built; where nvcc is, `pip install .` or `python setup.py build_ext --inplace` builds it"
    ) from error

READS_NF4 = True
EMULATED = hasattr(extension, "emulated")  # the tests' build for CPUs
DTYPES = {
    torch.bfloat16: extension.Dtype.bf16,
    torch.float16: extension.Dtype.fp16,
    torch.float32: extension.Dtype.fp32,
}


def why_not(x: Tensor, weight: Tensor | NF4Weight | None, lora_A: Tensor | None, lora_B: Tensor | None) -> str | None:
    """None where these kernels can compute with these tensors, otherwise the reason that they cannot."""
    if weight is None and use_backend.current == "auto":
        return "there is no 4-bit weight in this call"
    if weight is not None and not isinstance(weight, NF4Weight):
        return "its kernels are for 4-bit weights, those for others are Triton's"
    return nf4_why_not(x) or triton.why_not(x, None, lora_A, lora_B)


def nf4_why_not(t: Tensor) -> str | None:
    """Why 4-bit weights on t's device cannot be quantised and dequantised here, or None."""
    if EMULATED and use_backend.current == "auto":
        return "the extension is the tests' emulation: it runs only if asked for by use_backend('cuda')"
    if t.device.type != "cuda" and not EMULATED:
        return f"needs CUDA tensors, got {t.device.type}"
    capability = tuning.gpu(t.device).capability
    return None if capability >= (8, 0) else "needs compute capability 8.0 or newer, got {}.{}".format(*capability)


def notes(x: Tensor) -> list[str]:
    """What the Triton kernels that it uses had to replace on x's GPU."""
    return triton.notes(x)


def lora_forward(
    x: Tensor, W: NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    if 0 in (*x.shape, W.shape[0]):
        return reference.lora_forward(x, W, A, B, s, c, p, seed)
    x = row_major(x)
    path, _ = plan(x, W, A)
    if path == "skinny":
        try:
            with torch.cuda.device_of(x):
                h = forward.project(x, A.contiguous(), p, seed)
                return skinny(x, W, h, B, s, c), h
        except NothingCompilesError:
            pass  # the Triton backend notes it, and replaces its kernels
    return triton.lora_forward(x, W if path in triton.NF4_FORWARD else nf4_dequantize(W, x.dtype), A, B, s, c, p, seed)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    W: NF4Weight | None,
    A: Tensor | None,
    B: Tensor | None,
    h: Tensor | None,
    s: float | Tensor,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6: those of (dx, dA, dB, dc) that `needs` names, as reference.lora_backward."""
    dense = nf4_dequantize(W, dy.dtype) if needs.dx and W is not None else None
    return triton.lora_backward(dy, x, dense, A, B, h, s, p, seed, needs)


def plan(x: Tensor, W: NF4Weight, A: Tensor) -> tuple[str, str]:
    """(path, why) of the forward product, by nf4_plan's table."""
    return triton.plan(x, W, A, lambda: skinny_refusal(x, W, A.shape[0]))


def skinny_refusal(x: Tensor, W: NF4Weight, R: int) -> str | None:
    """Why the product for few tokens cannot be used, or None."""
    if x.dtype == torch.float32:
        return "it multiplies bf16 and fp16, x is float32"
    if R > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    if W.codes.data_ptr() % 8 or x.data_ptr() % 16 or _row_stride(x) % 8:
        return "codes or x's rows are not aligned to 8 and 16 bytes"
    return extension.nf4_skinny_refuses(len(x), *W.shape, W.blocksize) or None


def skinny(x: Tensor, W: NF4Weight, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 for at most 16 tokens: y[M, N], rounded once."""
    y, B, h = torch.empty(len(x), W.shape[0], dtype=x.dtype, device=x.device), B.contiguous(), h.contiguous()
    c = None if c is None else c.contiguous()
    on_device = s.to(torch.float32) if isinstance(s, Tensor) and s.device == x.device else None
    extension.nf4_skinny(
        descriptor(W), x.data_ptr(), _row_stride(x), h.data_ptr(), B.data_ptr(), _address(c), y.data_ptr(), len(x), h.shape[1],
        1.0 if on_device is not None else float(s), _address(on_device), DTYPES[x.dtype], DTYPES[h.dtype], _stream(x),
    )  # fmt: skip
    return y


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Equations 7 and 8 in one launch: W in `dtype`, into `out` if given, whose rows may lie apart."""
    if out is None:
        out = torch.empty(w.shape, dtype=dtype or w.dtype, device=w.device)
    if out.numel() == 0:
        return out
    if out.dtype not in DTYPES:
        return out.copy_(nf4_dequantize(w, torch.float32))
    flat = out.is_contiguous()
    rows, columns = (1, w.numel()) if flat else (w.numel() // w.shape[-1], w.shape[-1])
    if not flat and (out.ndim != 2 or out.stride(1) != 1 or out.stride(0) < columns):
        return out.copy_(nf4_dequantize(w, out.dtype))
    with torch.cuda.device_of(out):
        weight = descriptor(w, rows, columns)
        extension.nf4_dequantize(weight, out.data_ptr(), columns if flat else out.stride(0), DTYPES[out.dtype], _stream(out))
    return out


def nf4_quantize(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """`nf4.quantize` on a GPU, to the same bytes. Raises ValueError for NaN and inf, naming the first position."""
    flat = weight.detach().reshape(-1)
    n, device = flat.numel(), weight.device
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=device)
    w = NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, blocksize, quant_type)
    if n == 0:
        return nf4.quantize(weight, quant_type, blocksize, double_quant)
    first_bad = torch.full((), torch.iinfo(torch.int64).max, device=device)
    with torch.cuda.device_of(flat):
        extension.nf4_quantize(
            flat.data_ptr(), n, DTYPES[flat.dtype], blocksize, _values(quant_type), codes.data_ptr(), absmax.data_ptr(),
            first_bad.data_ptr(), _stream(flat),
        )  # fmt: skip
    if (position := int(first_bad)) < n:
        refuse(w, flat[position : position + 1].float(), position)
    return _nest(w) if double_quant else w


def _nest(w: NF4Weight) -> NF4Weight:
    """absmax in 8 bits."""
    blocks, device = len(w.absmax), w.device
    offset, nested_map = mean_absmax(w.absmax).to(device), dynamic_map().to(device, copy=True)
    quantized = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested = torch.empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
    with torch.cuda.device_of(nested):
        extension.nf4_quantize_absmax(
            w.absmax.data_ptr(), blocks, offset.data_ptr(), nested_map.data_ptr(), quantized.data_ptr(), nested.data_ptr(),
            _stream(nested),
        )  # fmt: skip
    return w.with_tensors(absmax=quantized, nested_absmax=nested, nested_map=nested_map, nested_offset=offset)


def descriptor(w: NF4Weight, rows: int | None = None, columns: int | None = None) -> Any:
    """The extension's view of a weight, by default of its rows and columns; it holds addresses, not the tensors."""
    nested = [_address(t) for t in (w.nested_absmax, w.nested_map, w.nested_offset)]
    shape = rows or w.numel() // w.shape[-1], columns or w.shape[-1]
    return extension.Weight(w.codes.data_ptr(), w.absmax.data_ptr(), *nested, *shape, w.blocksize, _values(w.quant_type))


@functools.cache
def _values(quant_type: str) -> list[float]:
    return code_values(quant_type).tolist()


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if len(x) > 1 else 0  # that of a single row means nothing


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.device.type == "cuda" else 0
