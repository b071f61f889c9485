"""The tolerance rule over lora_kernels.cases.grouped_linear, and the forms and sizes of segments that its tests run over."""

from typing import Any

import pytest
import torch
from kinds import KINDS, Kind
from members_accuracy import draw_and_run

from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase, SegmentsCase
from lora_kernels.cases.rule import Results, violations

FORMS: dict[str, tuple[type[SegmentsCase], dict[str, Any]]] = {
    "own": (GroupedCase, {}),
    "shared": (GroupedCase, {"own": ()}),
    "adapters": (MultiCase, {}),
}
SIZES = {
    "several": (17, (5, 0, 9, 2)),
    "all in one": (17, (0, 17, 0, 0)),
    "none in one": (5, (0, 0, 0, 0)),
    "no rows": (0, (0, 0, 0, 0)),
    "more segments than rows": (3, (0, 1, 1, 0)),
    "many": (129, (64, 33, 1, 20)),
}
DRAWS = 16  # of a case that breaks the rule in one
ON_A_CPU = [kind for kind in KINDS if kind.backend in ("torch", "cpu")]
DENSE = [kind for kind in ON_A_CPU if kind.quant_type is None]
every_kind = pytest.mark.parametrize("kind", ON_A_CPU, ids=str, indirect=True)
every_dtype = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in ON_A_CPU for dtype in kind.dtypes], ids=str, indirect=["kind"]
)
every_form = pytest.mark.parametrize("form", FORMS)


def case_of(form: str, kind: Kind, **options: Any) -> SegmentsCase:
    """A case of this form; K and N let the blocks of a 4-bit stack end with its segments."""
    case, own = FORMS[form]
    four_bits = {"K": 64, "N": 40, "quant_type": kind.quant_type} if kind.quant_type else {}
    return case(**{**own, **four_bits, **options})


def check(case: SegmentsCase) -> None:
    """Assert the rule, that dtypes are PyTorch's, and that no input was written to.

    Of a segment with one row a gradient may be one number times x, and its error luck: a case that breaks the rule is drawn
    again and judged over all its draws, a few, and where these break it, many.
    """
    judged: list[tuple[Results, Results, Results]] = []
    for count in (1, 4, DRAWS):
        judged += [draw_and_run(case) for _ in range(count - len(judged))]
        results = [
            {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]} for draws in zip(*judged, strict=True)
        ]
        if not (broken := violations(*results, case.read_dtype)):
            return
    raise AssertionError(f"{case}: {broken}")
