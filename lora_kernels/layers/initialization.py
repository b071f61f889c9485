"""Initial values of A[R,K], B[N,R] and AdaLoRA's E[R,1], PEFT's set: each writes them, and may return a new base weight."""

import math
import re

import torch
from torch import Tensor, nn

from ..dtypes import without_autocast

NAMES = ("True", "False", '"gaussian"', '"orthogonal"', '"pissa"', '"pissa_niter_<n>"', '"olora"')


def check_init(method: bool | str, r: int, in_features: int, out_features: int) -> None:
    """Raise ValueError for an unknown method, or a rank that the method cannot start from."""
    if not isinstance(method, bool) and method not in ("gaussian", "orthogonal") and not rewrites_weight(method):
        raise ValueError(f"init_lora_weights: got {method!r}, expected one of {', '.join(NAMES)}")
    if method == "orthogonal" and r % 2:
        raise ValueError(f'r: got {r}, expected an even rank for init_lora_weights="orthogonal"')
    if rewrites_weight(method) and r > min(in_features, out_features):
        raise ValueError(
            f"r: got {r}, expected at most {min(in_features, out_features)}, the rank of the weight, "
            f"for init_lora_weights={method!r}"
        )


def rewrites_weight(method: bool | str) -> bool:
    """Whether the method takes s·B·A out of the base weight."""
    return isinstance(method, str) and re.fullmatch(r"pissa(_niter_\d+)?|olora", method) is not None


@torch.no_grad()
def initialize(method: bool | str, A: Tensor, B: Tensor, weight: Tensor | None, scaling: float) -> Tensor | None:
    """Write A and B; return W - s·B·A in W's dtype for a method that rewrites the weight, otherwise None."""
    with without_autocast(A.device):
        if rewrites_weight(method) and weight is not None:
            return _from_weight(str(method), A, B, weight, scaling)
        if method == "orthogonal":
            _orthogonal(A, B)
            return None
    if method == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # nn.Linear's own
    if method is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)
    return None


@torch.no_grad()
def initialize_triplets(method: bool, A: Tensor, E: Tensor, B: Tensor) -> None:
    """Write AdaLoRA's: A and B normal with deviation 0.02 and E zero, so that B·(E ⊙ A) = 0; False: all standard normal."""
    for tensor in (A, B):
        nn.init.normal_(tensor, std=0.02 if method else 1.0)
    if method:
        nn.init.zeros_(E)
    else:
        nn.init.normal_(E)


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """A = Yᵀ·Q₁, B = Z·Q₂ with Q₁, Q₂ the odd and even rows of one rotation: B·A = 0 though neither is zero."""
    r, half = A.shape[0], A.shape[0] // 2
    rotation = torch.linalg.qr(torch.randn(r, r, device=A.device).double()).Q
    A.copy_((torch.randn(A.shape[1], half, device=A.device).double() @ rotation[0::2]).T / 10)
    B.copy_(torch.randn(B.shape[0], half, device=A.device).double() @ rotation[1::2] / 10)


def _from_weight(method: str, A: Tensor, B: Tensor, weight: Tensor, scaling: float) -> Tensor:
    if weight.is_meta:
        raise ValueError(
            f"init_lora_weights: got {method!r} for a weight on the meta device, whose values it needs; "
            "load the weights first, without offloading them, or use True"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    r = A.shape[0]
    if method == "olora":
        Q, R = torch.linalg.qr(wide)
        A.copy_(R[:r])
        B.copy_(Q[:, :r])
    else:
        if method == "pissa":
            U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(wide, r, niter=int(method.removeprefix("pissa_niter_")))
            Vh = V.T
        root = (S[:r] / scaling).sqrt()
        A.copy_(root[:, None] * Vh[:r])
        B.copy_(U[:, :r] * root)
    return (wide - scaling * B.to(wide.dtype) @ A.to(wide.dtype)).to(weight.dtype)
