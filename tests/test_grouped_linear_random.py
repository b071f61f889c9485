"""lora_grouped_linear and multi_lora_linear under random options and segments: the rule holds for all of them."""

from kinds import DTYPES
from properties import given, settings, st
from segments_accuracy import check

from lora_kernels import use_backend
from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase

SCALINGS = st.floats(-4, 4, allow_subnormal=False)
COMMON = {
    "K": st.integers(1, 100),
    "N": st.integers(1, 90),
    "p": st.sampled_from([0.0, 0.05, 0.5]),
    "dtype": st.sampled_from(DTYPES),
    "needs": st.sets(st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias"]), min_size=1).map(tuple),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "strided": st.booleans(),
    "bias": st.booleans(),
}
ROWS = st.integers(0, 20)
SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stacks(device, data):
    sizes, four_bits = data.draw(SIZES), data.draw(st.booleans())
    options = {name: data.draw(values) for name, values in COMMON.items()}
    options |= (
        {"K": 32 * (1 + options["K"] // 32), "quant_type": data.draw(st.sampled_from(["nf4", "fp4"]))} if four_bits else {}
    )
    own = data.draw(st.sets(st.sampled_from(["weight", "bias"])).map(tuple))
    rest = {"R": data.draw(st.integers(1, 40)), "scaling": data.draw(SCALINGS), "own": own, "device": device}
    with use_backend("torch"):
        check(GroupedCase(M=sum(sizes) + data.draw(ROWS), sizes=sizes, **options, **rest))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists(device, data):
    sizes = data.draw(SIZES)
    options = {name: data.draw(values) for name, values in COMMON.items()}
    options["quant_type"] = data.draw(st.sampled_from([None, None, "nf4", "fp4"]))
    ranks, scalings = (tuple(data.draw(values) for _ in sizes) for values in (st.integers(1, 40), SCALINGS))
    frozen = data.draw(st.sets(st.sampled_from(["base", "adapter0", "adapter1"])).map(tuple))
    M = sum(sizes) + data.draw(ROWS)
    with use_backend("torch"):
        check(MultiCase(M=M, sizes=sizes, ranks=ranks, scalings=scalings, frozen=frozen, device=device, **options))
