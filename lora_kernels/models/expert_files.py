"""Files of adapters of experts' stacks: older PEFTs laid A and B out with in and out exchanged, which is refused by name."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layers.lora_experts import LoRAStack, Planned, peft_places
from .adapter_keys import PREFIX, Form


def refuse_exchanged(
    values: Mapping[str, Any],
    layers: Mapping[str, object],
    saved: Mapping[str, Tensor],
    expected: Mapping[str, Form],
    source: str,
) -> None:
    """Raise ValueError where the A[E·r, out] and B[in, r·E] of a stack are those of an older PEFT.

    Until 0.18 PEFT took the second dimension of any stack for in, as if it were [E, in, out]; 0.19 the third where the stack is
    that, the second elsewhere; since 0.20 it is right. Where in and out differ the shapes say it, elsewhere the version.
    """
    version = re.match(r"0\.(\d+)", str(values.get("peft_version") or ""))
    minor = int(version[1]) if version else 20
    for path, place in peft_places(layers).items():
        layer = layers[path]
        if not isinstance(layer, (LoRAStack, Planned)):
            continue
        A, B = f"{PREFIX}{place}.lora_A.weight", f"{PREFIX}{place}.lora_B.weight"
        if A not in saved or B not in saved or saved[A].ndim != 2 or saved[B].ndim != 2:
            continue  # check_tensors says it
        (R, K), (N, _) = expected[A].shape, expected[B].shape
        by_shape = K != N and (saved[A].shape[1], saved[B].shape[0]) == (N, K)
        by_version = K == N and (minor == 19 or (minor < 19 and not layer.fan_in_fan_out))
        if by_shape or by_version:
            raise ValueError(
                f"{source}: {path} has A {tuple(saved[A].shape)} and B {tuple(saved[B].shape)} of PEFT "
                f"{values.get('peft_version', 'before 0.20')}, which exchanged in and out of experts' parameters; expected A "
                f"{(R, K)} and B {(N, R)}, as since 0.20; merge it with that PEFT, or train it again"
            )
