"""4-bit weights in one launch; where that does not compile, by PyTorch operations."""

from torch import Tensor

from ...nf4 import NF4Weight
from ...plan import use_backend
from ..torch import nf4 as pytorch
from .compilation import give_up
from .gpu import device_of
from .gpu import why_not as why_not_device
from .kernels import nf4_dequantize


def why_not(t: Tensor) -> str | None:
    """None where tensors like `t` can be dequantised here, otherwise the reason that they cannot."""
    return why_not_device(t.device, use_backend.current)


def dequantize(w: NF4Weight, out: Tensor) -> None:
    """W's elements, in order, into the rows of out[rows, columns]."""
    try:
        with device_of(w.codes):
            nf4_dequantize.dequantize(w, out)
    except Exception as error:
        give_up(w.device, error, use_backend.current)
        pytorch.dequantize(w, out)
