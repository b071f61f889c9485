"""drop(v) = v · keep / (1 - p̂); undrop is its transpose, the same product."""

from torch import Tensor

from ..mask import dropout_mask, keep_scale
from ..values import Dropout


def drop(v: Tensor, dropout: Dropout | None, member: int) -> Tensor:
    """drop(v[M, K]) with the mask of the call's member number `member`."""
    if dropout is None:
        return v
    M, K = v.shape
    keep = dropout_mask(M, K, dropout.p, dropout.seed, offset=dropout.offset + member, device=v.device)
    return v * keep * keep_scale(dropout.p)
