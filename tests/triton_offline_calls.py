"""What tests/triton_offline.py compiles: the calls of a layer, a group and an MLP, over tensors that nothing touches."""

from typing import Any

SAFE_PAIRS = ("bf16 bf16", "fp16 fp32", "fp32 fp32")  # one of each class of dtypes: the one that needs most
BLOCK_PAIRS = ("bf16 bf16", "bf16 fp32", "fp32 fp32")  # of groups and MLPs: one of each class
D, FEW = 4096, 64  # features, few tokens


def calls(pair: str, R: int, capability: int) -> None:
    """The calls of a layer with this pair of dtypes, with dropout: its best tiles, and at rank 64 those that replace them.

    At rank 16 without dropout too and what has no rank, at 16 and 64 the products of two segments; at other ranks the four
    side kernels. On sm_80 and sm_90 in bfloat16 also the forms that few calls take: a trained bias, only dA or only dx, few
    tokens. Tiles that replace others are compiled once for each class of dtypes.
    """
    from lora_kernels import plan
    from lora_kernels.backends.triton import tuning

    tiles = tuning.tiles
    for best in (True, False) if R == 64 and (pair in SAFE_PAIRS or capability in (86, 89)) else (True,):
        tuning.tiles = lambda *call, best=best: tiles(*call)[:1] if best else tiles(*call)[1:]
        plan.changed()  # so that tiles are chosen anew
        side_kernels(pair, R, M=8192, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
        if R in (16, 64) and pair in BLOCK_PAIRS:
            group_kernels(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
            mlp_kernels(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
        if R in (16, 64) and not pair.startswith("fp32"):
            products(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
        if R in (16, 64):
            norms(pair, R)
            if best:
                segment_kernels(pair, R)
    tuning.tiles = tiles
    plan.changed()
    if R == 16:
        without_a_rank(pair)
    if R == 16 and pair == "bf16 bf16" and capability in (80, 90):
        side_kernels(pair, R, M=FEW, dropouts=(0.1,))
        rare_forms(pair, R)
        for activation in ("gelu", "gelu_tanh", "relu2"):
            mlp_kernels(pair, R, dropouts=(0.1,), activation=activation, gated=activation == "gelu_tanh")


def tensors(pair: str, R: int, M: int) -> dict[str, Any]:
    """x, dy, W, A, B, h and c of a layer 4096→4096, never touched."""
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, adapter = (types[name] for name in pair.split()[:2])
    torch.backends.cuda.matmul.fp32_precision = "tf32" if pair.endswith("tf32") else "ieee"
    shapes = {"x": (M, D), "dy": (M, D), "W": (D, D), "c": (D,)}
    found = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    return found | {name: torch.empty(shape, dtype=adapter) for name, shape in {"A": (R, D), "B": (D, R), "h": (M, R)}.items()}


def side_kernels(pair: str, R: int, M: int, dropouts: tuple[float, ...]) -> None:
    import torch

    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.prefill import prefill
    from lora_kernels.backends.triton.kernels.project import project
    from lora_kernels.values import Dropout

    t = tensors(pair, R, M)
    for p in dropouts:
        dropout = Dropout(p, torch.tensor(1)) if p else None
        project(t["x"], (t["A"],), dropout)
        grad_x(t["x"], (t["h"],), (t["A"],), dropout, t["x"].dtype, need_x=True, need_As=(True,))
    prefill(t["h"], t["B"], 2.0, t["c"], t["x"].dtype)
    grad_dy(t["dy"], t["h"], t["B"], 2.0, need_g=True, need_B=True, need_c=False)


def group_kernels(pair: str, R: int, dropouts: tuple[float, ...]) -> None:
    """Two and three members over one x."""
    import torch

    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.project import project
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for n in (2, 3):
        for p in dropouts:
            dropout = Dropout(p, torch.tensor(1)) if p else None
            project(t["x"], (t["A"],) * n, dropout)
            grad_x(t["x"], (t["h"],) * n, (t["A"],) * n, dropout, t["x"].dtype, need_x=True, need_As=(True,) * n)


def mlp_kernels(pair: str, R: int, dropouts: tuple[float, ...], activation: str = "silu", gated: bool = True) -> None:
    """Both passes of an MLP over e and u of [M, D]; without a gate with biases that are trained, as such models have them."""
    import torch

    from lora_kernels.backends.triton.kernels.glu import glu
    from lora_kernels.backends.triton.kernels.glu_backward import NOTHING, Down, Entry, glu_backward
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for p in dropouts:
        dropout = Dropout(p, torch.tensor(1)) if p else None
        e, up = t["x"] if gated else None, Entry(True, t["h"], t["B"], 2.0, True, True, not gated)
        glu(e, t["dy"], t["A"], dropout, activation)
        down = Down(t["h"], t["A"], dropout, True)
        glu_backward(t["dy"], e, t["dy"], down, up if gated else NOTHING, up, activation)


def activation_of_experts(da: Any, h: Any, activation: str, has_gate: bool) -> None:
    """Both passes over h = [e | u], or over h, without adapters."""
    from lora_kernels.backends.triton import activation as experts

    h = h.new_empty(len(h), 2 * D) if has_gate else h
    with experts.use_backend("triton"):
        experts.activated(h, activation, has_gate)
        experts.activated_backward(da, h, activation, has_gate)


def rare_forms(pair: str, R: int) -> None:
    import torch

    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.values import Dropout

    t, dropout = tensors(pair, R, 8192), Dropout(0.1, torch.tensor(1))
    grad_dy(t["dy"], t["h"], t["B"], 2.0, need_g=True, need_B=True, need_c=True)
    for need_x in (True, False):
        grad_x(t["x"], (t["h"],), (t["A"],), dropout, t["x"].dtype, need_x=need_x, need_As=(not need_x,))


def norms(pair: str, R: int) -> None:
    """Those of the rows of W + s·B·A; over a W of 4 bits at rank 16."""
    from lora_kernels.backends.triton.kernels.row_norm import row_norm

    t = tensors(pair, R, FEW)
    for W in (t["W"], weight_of_4_bits(t["W"])) if R == 16 else (t["W"],):
        row_norm(W, t["A"], t["B"], 2.0, t["x"].dtype)


def segment_kernels(pair: str, R: int) -> None:
    """Those of eight segments, with and without dropout; at rank 16 also of rows in any order."""
    import torch

    from lora_kernels.backends.triton.kernels.segment_nf4_product import add_nf4_products
    from lora_kernels.backends.triton.kernels.segments import add_products, expand, reduce, shrink
    from lora_kernels.values import Rows

    t, E = tensors(pair, R, 8192), 8
    A, B, c = (t[name].expand(E, *t[name].shape).contiguous() if name != "c" else t[name] for name in "ABc")
    factors, edges, seed = torch.empty(E), torch.empty(E, dtype=torch.int32), torch.tensor(1)
    offsets, order = torch.empty(E + 1, dtype=torch.int32), torch.empty(8192, dtype=torch.int64)
    for rows in (Rows(offsets, None, None), Rows(offsets, order, None))[: 2 if R == 16 else 1]:
        shrink(t["x"], A, False, factors, edges, seed, rows)
        shrink(t["dy"], B, True, factors, None, None, rows)
        expand(t["h"], B, True, c, t["x"].dtype, factors, None, None, rows)
        expand(t["h"], A, False, None, t["x"].dtype, factors, edges, seed, rows)
        reduce(t["h"], t["x"], False, factors, edges, seed, rows, False)
        reduce(t["h"], t["dy"], True, factors, None, None, rows, rows.order is None)
    W, rows = t["W"].expand(E, D, D), Rows(offsets, None, None)
    add_products(t["dy"], t["x"], W, rows)
    if pair.split()[0] == pair.split()[1]:  # no adapters
        for forward in (True, False):
            add_nf4_products(t["dy"], t["x"], weight_of_4_bits(W), rows, forward)


def products(pair: str, R: int, dropouts: tuple[float, ...]) -> None:
    """The products with their low-rank term in one kernel."""
    import torch

    from lora_kernels.backends.triton.kernels import lowrank_product, nf4_product
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for p in dropouts:
        lowrank_product.backward(t["dy"], t["W"], t["h"], t["A"], Dropout(p, torch.tensor(1)) if p else None)
    lowrank_product.forward(t["x"], t["W"], t["h"], t["B"], 2.0, t["c"])
    nf4_product.product(t["x"], weight_of_4_bits(t["W"]), t["h"], t["B"], 2.0, t["c"])


def without_a_rank(pair: str) -> None:
    import torch

    from lora_kernels.backends.triton.kernels import eggroll, magnitude, magnitude_backward, mask, nf4_dequantize

    t = tensors(pair, 16, 8192)
    nf4_dequantize.dequantize(weight_of_4_bits(t["W"]), torch.empty_like(t["W"]))
    m, n = t["B"][:, 0].contiguous(), torch.empty(D)
    magnitude.magnitude(t["x"], m, n, t["c"])
    magnitude_backward.magnitude_backward(t["dy"], t["x"], m, n, need_v=True, need_m=True, need_c=False)
    mask.drop(t["x"], 0.1, torch.tensor(1), out=torch.empty(t["x"].shape, dtype=t["A"].dtype))
    if pair.split()[0] == pair.split()[1] and not pair.endswith("tf32"):  # there are no adapters
        for has_gate in (True, False):
            activation_of_experts(t["dy"], t["x"], "silu" if has_gate else "relu2", has_gate)
        eggroll.low_rank_term(t["x"], D, t["c"], 64, 0.1, 1, torch.tensor(1), 0)
        eggroll.gradient(torch.empty(64), D, D, 0.1, 1, torch.tensor(1), 0)


def weight_of_4_bits(W: Any) -> Any:
    import torch

    from lora_kernels.nf4 import NF4Weight

    blocks = W.numel() // 64
    nested = (torch.empty(blocks // 256), torch.empty(256), torch.empty(()))
    codes, absmax = (torch.empty(size, dtype=torch.uint8) for size in (32 * blocks, blocks))
    return NF4Weight(codes, absmax, *nested, W.shape, W.dtype)
