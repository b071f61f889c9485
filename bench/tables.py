"""A table in Markdown of each kind of run in a result file."""

from collections.abc import Callable
from typing import Any

from result_files import cases, ratios, table

from lora_kernels.commands.bench.peers import BARE, HEADINGS, PEFT
from lora_kernels.commands.console import format_bytes


def layer_table(run: dict[str, Any]) -> str:
    names = [name for name in HEADINGS if any(row["variant"] == name for row in run["rows"])]
    columns = [
        "case",
        "variant",
        "µs",
        "p20–p80",
        "TFLOP/s",
        "GB/s",
        "× bare",
        *(HEADINGS[n].replace("x ", "× ") for n in names),
    ]
    with_host = any("host_us" in row for row in run["rows"])  # not in runs before it was measured
    rows = []
    for name, case in cases(run["rows"]):
        for row in case:
            times = [f"{row['median_us']:,.0f}", f"{row['p20_us']:,.0f}–{row['p80_us']:,.0f}", f"{row['tflops']:.3g}"]
            gbs = f"{row['gbs']:.3g}" if "gbs" in row else ""
            launches = "" if row.get("launches") is None else str(row["launches"])
            sizes = [format_bytes(row["saved_bytes"]), format_bytes(row["peak_bytes"]), launches]
            host = [f"{row['host_us']:,.0f}" if row.get("host_us") else ""] if with_host else []
            rows.append([name, row["variant"], *times, gbs, *ratios(row, case, names), *sizes, *host])
    return table([*columns, "saved", "peak", "launches", *(["host µs"] if with_host else [])], rows)


def model_table(run: dict[str, Any]) -> str:
    rows = []
    for name, case in cases(run["rows"]):
        saved = {row["variant"]: row["saved_bytes"] for row in case}
        for row in case:
            times = [f"{1e3 * row['median_s']:,.1f}", f"{1e3 * row['p20_s']:,.1f}–{1e3 * row['p80_s']:,.1f}"]
            over = [f"{row['saved_bytes'] / saved[other]:.3f}" if other in saved else "" for other in (BARE, PEFT)]
            held, peak = (format_bytes(row[key]) for key in ("held_bytes", "peak_bytes"))
            about = [name, row["variant"], *times, f"{row['tokens_per_s']:,.0f}", *ratios(row, case, [PEFT])]
            rows.append([*about, format_bytes(row["saved_bytes"]), *over, held, peak])
    times = ["ms", "p20–p80", "tokens/s", "× bare", "× PEFT"]
    return table(["model", "variant", *times, "saved", "of bare's", "of PEFT's", "held", "peak"], rows)


def memory_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['variant']}{', checkpointed' if row['checkpointing'] else ''}",
            str(row["tokens"]),
            "" if row["saved_bytes"] is None else format_bytes(row["saved_bytes"]),
            format_bytes(row["held_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        for row in run["rows"]
    ]
    about = f"{run['model']}, r={run['R']}, p={run['p']:g}, {run['dtype']}; beyond the model itself.\n\n"
    return about + table(["training", "tokens", "saved", "held", "peak"], rows)


def kernels_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['variant']} {row['K']}→{row['N']} M={row['M']} r={row['R']} p={row['p']:g} {row['adapter']}",
            *(f"{1e6 * row['timing'][key]:,.1f}" for key in ("median", "p20", "p80")),
            f"{row['flops'] / row['timing']['median'] * 1e-12:.0f}" if row["flops"] else "",
            "" if row["flops"] else f"{row['bytes'] / row['timing']['median'] * 1e-9:.0f}",
            f"{row['over']:.3f}",
        ]
        for row in run["rows"]
    ]
    return table(["kernel", "µs", "p20", "p80", "TFLOP/s", "GB/s", "× copy or bare"], rows)


def nf4_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['section']} {row['variant']} {row['K']}→{row['N']} M={row['M']} p={row['p']:g}",
            *(f"{1e6 * row['timing'][key]:,.1f}" for key in ("median", "p20", "p80")),
            f"{row['bytes'] / row['timing']['median'] * 1e-9:.0f}" if row["bytes"] else "",
            f"{row['over']:.3f}",
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
        ]
        for row in run["rows"]
    ]
    about = "over: dequantise, × the copy's bandwidth; product, byte floor / time; training, time / bare products.\n\n"
    return about + table(["NF4", "µs", "p20", "p80", "GB/s", "over", "peak"], rows)


def parts_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        case = f"{row['op']} {row['K']}→{row['N']}" + "".join(f" {name}={row[name]:g}" for name in ("M", "p") if name in row)
        for variant, t in row["variants"].items():
            times = [f"{1e3 * t['median']:,.2f}", f"{1e3 * t['p20']:,.2f}–{1e3 * t['p80']:,.2f}"]
            rows.append([f"{case} {row['dtype']}", variant, *times, f"{t['times_ours']:.2f}"])
    return table(["case", "variant", "ms", "p20–p80", "time over ours"], rows)


def beta_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['direction']} {row['K']}→{row['N']} M={row['M']} {row['dtype']}",
            *(f"{1e6 * row[key]['median']:,.1f}" for key in ("beta0", "beta1", "mm_add")),
            f"{row['ratio']:.3f}",
        ]
        for row in run["rows"]
    ]
    return table(["product", "beta=0 µs", "beta=1 µs", "mm, then add_ µs", "beta=1 / beta=0"], rows)


def curves_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['model']}, p={row['dropout']:g}",
            f"{row['peft'][0]:.3f}, {row['peft'][-1]:.3f}",
            f"{row['accelerated'][-1]:.3f}",
            f"{row['distance_of_accelerated']:.1e}",
            f"{row['distance_of_seeds']:.1e}",
            ", ".join(f"{calls} {reason}" for reason, calls in row["calls"].items()),
        ]
        for row in run["rows"]
    ]
    about = f"Mean distance from PEFT's loss curve over {run['steps']} steps, beside that of PEFT with another seed.\n\n"
    columns = ["model", "PEFT's first and last loss", "accelerated last", "accelerated", "PEFT, another seed", "calls"]
    return about + table(columns, rows)


def ranks_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][name]['median']:,.1f}" for name in ("peft", "ours")]
        rows.append([f"{row['layers']} layers of {row['features']} features", *times, f"{row['ratio']:.1f}"])
    return "A step of AdaLoRA's allocator.\n\n" + table(["layers", "PEFT ms", "ours ms", "× PEFT"], rows)


def populations_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][name]['median']:,.2f}" for name in ("one by one", "population", "frozen")]
        case = f"P={row['members']} M={row['M']} {row['K']}→{row['N']}"
        rows.append([case, *times, f"{row['ratio']:.1f}", f"{row['times_frozen']:.2f}"])
    columns = ["EGGROLL", "members one by one, ms", "population, ms", "frozen layer, ms", "× one by one", "× frozen"]
    return "A forward pass of P members with M rows each.\n\n" + table(columns, rows)


def experts_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][name]['median']:,.1f}" for name in ("peft", "accelerated")]
        rows.append([f"{row['experts']}, {row['tokens']} tokens", *times, f"{row['ratio']:.1f}"])
    about = "Forward and backward with LoRA on experts' parameters.\n\n"
    return about + table(["experts", "PEFT's target_parameters, ms", "accelerated, ms", "× PEFT"], rows)


def adapters_table(run: dict[str, Any]) -> str:
    columns = ["batch", "adapters", "PEFT's loop, ms", "one call, ms", "one adapter for all, ms", "× PEFT"]
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][way]['median']:,.2f}" for way in ("peft", "accelerated", "one adapter")]
        batch = f"{row['samples']} × {row['tokens']}, {row['K']}→{row['N']}"
        rows.append([batch, str(row["adapters"]), *times, f"{row['ratio']:.2f}"])
    return "A layer in evaluation over a batch whose samples have different adapters.\n\n" + table(columns, rows)


def unet_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        form = "channels-last" if row["channels_last"] else "contiguous"
        for name, times in row["ms"].items():
            saved, theirs = row["saved_bytes"][name], row["saved_bytes"]["peft"]
            ratio = row["ms"]["peft"]["median"] / times["median"]
            case = f"{row['samples']} samples, r={row['R']}, p={row['p']:g}, {form}"
            rows.append(
                [case, name, f"{times['median']:,.0f}", f"{ratio:.2f}", f"{saved / 2**20:,.0f}", f"{saved / theirs:.2f}"]
            )
    columns = ["UNet", "variant", "ms", "× PEFT", "saved MiB", "of PEFT's"]
    return "A training step with LoRA in the convolutions and the attention of a UNet, in float32.\n\n" + table(columns, rows)


def fitness_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        curve, last = row["fitness"], len(row["fitness"]) - 1
        marks = ", ".join(f"{curve[last * quarter // 4]:.2f}" for quarter in range(5))
        rows.append(
            [
                f"rank {row['rank']}, P={row['population']}, {row['dtype']}",
                marks,
                f"{row['final']:.3f}",
                f"{row['majority']:.3f}",
            ]
        )
    about = f"Accuracy of a network of sign activations over {last + 1} steps of EGGROLL by that accuracy.\n\n"
    return about + table(["training", "mean of the population, by quarters", "the model's at the end", "of one answer"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": layer_table,
    "model": model_table,
    "memory": memory_table,
    "kernels": kernels_table,
    "nf4": nf4_table,
    "parts": parts_table,
    "beta": beta_table,
    "curves": curves_table,
    "ranks": ranks_table,
    "populations": populations_table,
    "experts": experts_table,
    "adapters": adapters_table,
    "fitness": fitness_table,
    "unet": unet_table,
}
