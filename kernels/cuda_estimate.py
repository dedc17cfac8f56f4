"""The least time that the CUDA kernels can take, by calculation.

    python -m fbitrain.kernels.cuda_estimate        prints the table of docs/kernels.md

NOT MEASURED. For each call the plan says which kernel runs; from its data path follow bytes, products and instructions,
and from the GPU's data sheet the time of each. The longest is the bound. No torch, no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from fbitrain.kernels.cuda_linear_plan import LinearCall, plan_linear
from fbitrain.kernels.cuda_plan import Plan, ceil_div, plan_xnor_gemm
from fbitrain.kernels.layout import n_words

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # N, K: the Linears of the 7b preset
TOKENS = (1, 512)
OPS = ("binary_linear float", "binary_linear int8", "xnor_gemm")
REACHED = 0.75  # part of a bound that good kernels reach; an assumption
LAUNCH_SECONDS = 2e-6  # from one kernel of a stream to the next; an assumption


@dataclass(frozen=True)
class GpuModel:
    """Peaks by data sheet: bytes/s, lane-instructions/s, and 10^12 operations/s of dense products."""

    name: str
    capability: int
    bandwidth: float
    instructions: float  # 4 warps a clock and SM
    peaks: dict[str, float]  # popc: xor and popcount of 32 bits count as 64 operations, 16 a clock and SM


GPUS = (
    GpuModel("A100", 80, 2.04e12, 108 * 128 * 1.41e9, {"popc": 156, "bf16": 312, "int8": 624, "b1": 4992}),
    GpuModel("H100", 90, 3.35e12, 132 * 128 * 1.83e9, {"popc": 247, "bf16": 989, "int8": 1979, "b1": 15800}),
    GpuModel("RTX 4090", 89, 1.01e12, 128 * 128 * 2.52e9, {"popc": 330, "bf16": 165, "int8": 661, "b1": 5300}),
)


@dataclass(frozen=True)
class Path:
    """How a kernel computes: on which unit, how many tokens it always pays for, what it does to each weight."""

    unit: str
    tokens: int  # M is rounded up to it
    planes: int = 1  # products per activation
    expansion: float = 0.0  # lane-instructions that make a sign out of its bit
    expanded_for: int = 1  # tokens that share an expansion


# By the beginning of a kernel's name. Instructions: a shift and a logical operation make a register of two 16-bit or
# four 8-bit signs, and 8-bit ones must be permuted as well.
PATHS = {
    "decode_int8": Path("int8", 8, expansion=0.75, expanded_for=8),
    "decode": Path("bf16", 8, expansion=1.0, expanded_for=8),
    "planes": Path("b1", 1, planes=8),
    "prefill_int8": Path("int8", 64, expansion=0.75, expanded_for=64),
    "prefill": Path("bf16", 64, expansion=1.0, expanded_for=64),
    "xnor_popc": Path("popc", 1),
    "xnor_tile": Path("b1", 128),
}


@dataclass(frozen=True)
class Estimate:
    """One call on one GPU."""

    kernel: str
    bytes_moved: int
    operations: int
    unit: str
    seconds: dict[str, float]  # memory, products, instructions
    launches: int

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def expected(self) -> float:
        return self.seconds[self.bound] / REACHED + self.launches * LAUNCH_SECONDS


def estimate(op: str, m: int, n: int, k: int, gpu: GpuModel) -> Estimate:
    """`op` of OPS, bf16 activations with column scales."""
    if op == "xnor_gemm":
        plan, read = plan_xnor_gemm(m, n, k, gpu.capability), (m + n) * n_words(k) * 4
    else:
        call = LinearCall(m, n, k, "bfloat16", op.split()[1])
        plan, read = plan_linear(call, gpu.capability), n * n_words(k) * 4 + m * k * 2 + k * 4
    kernel = plan.launches[-1].kernel
    path = next(path for start, path in PATHS.items() if kernel.startswith(start))
    products = 2 * ceil_div(m, path.tokens) * path.tokens * path.planes * n * k
    expansions = ceil_div(m, path.expanded_for) * n * k * path.expansion
    moved = read + bytes_of(plan)
    seconds = {
        "memory": moved / gpu.bandwidth,
        "products": products / (gpu.peaks[path.unit] * 1e12),
        "instructions": expansions / gpu.instructions,
    }
    return Estimate(kernel, moved, products, path.unit, seconds, len(plan.launches))


def bytes_of(plan: Plan) -> int:
    """Written once; temporaries are also read again."""
    sizes = {"bfloat16": 2, "int8": 1, "int32": 4, "float32": 4}
    total = 0
    for name, array in plan.arrays.items():
        elements = 1
        for size in array.shape:
            elements *= size
        total += elements * sizes[array.dtype] * (1 if name in ("y", "product") else 2)
    return total


def dense_seconds(m: int, n: int, k: int, gpu: GpuModel) -> float:
    """The bound of a bf16 matrix product, at the same parts of peak."""
    bound = max(2 * (n * k + m * k + m * n) / gpu.bandwidth, 2 * m * n * k / (gpu.peaks["bf16"] * 1e12))
    return bound / REACHED + LAUNCH_SECONDS


def table() -> list[str]:
    """Markdown, a line each."""
    lines = [
        "| op, N × K, M | kernel | MB | 10⁹ operations |" + "".join(f" {gpu.name} |" for gpu in GPUS),
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for op in OPS:
        for m in TOKENS:
            for n, k in SHAPES:
                estimates = [estimate(op, m, n, k, gpu) for gpu in GPUS]
                first = estimates[0]
                cells = [f"{op}, {n} × {k}, {m}", f"`{first.kernel}`", f"{first.bytes_moved / 1e6:.1f}"]
                cells.append(f"{first.operations / 1e9:.1f} {first.unit}")
                for gpu, found in zip(GPUS, estimates, strict=True):
                    ratio = dense_seconds(m, n, k, gpu) / found.expected
                    bound = found.seconds[found.bound]
                    cells.append(f"{bound * 1e6:.1f} {found.bound}; {found.expected * 1e6:.0f}; {ratio:.1f}×")
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    print("NOT MEASURED. On each GPU: bound in µs and what it is; expected µs; times faster than a bf16 product.")
    print(f"Expected: {REACHED:.0%} of the bound's peak, and {LAUNCH_SECONDS * 1e6:.0f} µs per launch.\n")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
