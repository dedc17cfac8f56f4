"""How fast the CPU kernels are, compared with torch and with the peaks of this machine.

    python -m fbitrain.kernels.bench [--preset 7b] [--tokens 1 512] [--threads 2] [--rounds 15] [--help]

All contenders of a shape run in turns, in ever another order, so that a busy machine slows them alike; times are
medians. Decode (few tokens) makes several calls in a row, each with the next weight of a pool larger than the caches,
as a model's layers do; torch does so too. `roofline` is the time that cannot be beaten divided by the time taken.
That time is the longer of two: reading the bits at the measured bandwidth, and executing the kernel's innermost
instructions at their measured peak; both are measured in the same turns. `vs peer` compares xnor with torch on packed
ints, and the mixtures of 4 scales and the weights with 5 % salient int8 entries with the binary_linear of their mode.
With --threads 1 all times are CPU time, so that what other programs take of the core is not counted: the way to read
`roofline` on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fbitrain.kernels import cpu, ops, reference
from fbitrain.kernels.cpu_build import FLAGS, SOURCES, find_compiler
from fbitrain.kernels.dispatch import Call, select_backend
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

# (N, K) of a preset's Linears: attention, gate and up, down.
SHAPES = {
    "130m": [(768, 768), (2048, 768), (768, 2048)],
    "1.3b": [(2048, 2048), (5632, 2048), (2048, 5632)],
    "7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
POOL_BYTES = 96 * 2**20  # of weights that decode goes through
DECODE_TOKENS = 8  # up to here a weight is read from memory, not from the cache
BURST = 8  # calls of one contender in a row, as a model calls one layer after the other, each with another weight
BANDWIDTH_BYTES = 128 * 2**20
N_EXPERTS, SALIENT_SHARE = 4, 0.05
TILE_TOKENS = 8  # from this many tokens on AMX multiplies int8 (csrc/amx.cpp)
# The peak of AVX2's lookups is measured as that of int8 with so many tokens. Any number from 3 on would do: with fewer,
# bench_peaks.cpp measures the loop of multiplications instead.
LOOKED_UP_TOKENS = 60
DIGITS = 3  # int8 lookups that one float in fixed point takes (csrc/kernels.h)
ENTRY_BYTES = 3  # of a salient weight: its column and its int8 value
Contender = Callable[[], object]


class Peaks:
    """Measured limits of this machine, as contenders that run in turns with the kernels."""

    def __init__(self, level: str, threads: int) -> None:
        self.level, self.threads = level, threads
        self.memory = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "peaks.so"
            source = str(SOURCES / "bench_peaks.cpp")
            defines = ["-DFBITRAIN_AMX"] if level == "amx" else []
            subprocess.run(
                [*find_compiler(), *FLAGS, *defines, "-fvisibility=default", "-shared", source, "-o", library],
                check=True,
            )
            self.loaded = ctypes.CDLL(str(library))
        self.loaded.fbitrain_peak.argtypes = [ctypes.c_char_p]
        self.loaded.fbitrain_peak.restype = ctypes.c_double
        self.loaded.fbitrain_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.loaded.fbitrain_read_bandwidth.restype = ctypes.c_double

    def bandwidth(self) -> float:
        """Bytes per second, all threads together."""
        return float(self.loaded.fbitrain_read_bandwidth(self.memory.data_ptr(), BANDWIDTH_BYTES, self.threads))

    def instructions(self, kernel: str, tokens: int) -> float:
        """Weights times tokens per second, all threads together; 0 where no loop is known (portable)."""
        on_tiles = self.level == "amx" and kernel == "int8" and tokens >= TILE_TOKENS
        level = "avx512" if self.level == "amx" and not on_tiles else self.level
        name = f"{level} {kernel}" + (" 1" if tokens < 3 else "")
        return float(self.loaded.fbitrain_peak(name.encode())) * self.threads


class Layer:
    """A random weight of each kind, its packed words taken from a pool that no cache holds if `tokens` are few."""

    def __init__(self, n: int, k: int, tokens: int, level: str) -> None:
        generator, self.level = torch.Generator().manual_seed(0), level
        self.k, self.weight = k, torch.randn(n, k, generator=generator)
        words = ops.pack_signs(self.weight)
        self._pool_bytes = POOL_BYTES if tokens <= DECODE_TOKENS else 0
        self._pool, self._turn = self._copies(words), 0
        self._interleaved = [cpu.interleave(level, words, k) for words in self._pool]
        self.interleaves = self._interleaved[0] is not None
        self.alpha, self.beta, self.row_alpha = torch.rand(1, k), torch.rand(1, k), torch.rand(n, 1)
        self.gates = torch.randn(tokens, N_EXPERTS, generator=generator).softmax(1)
        self.experts = torch.rand(N_EXPERTS, k), torch.rand(N_EXPERTS, n)
        salient = torch.rand(n, k, generator=generator) < SALIENT_SHARE
        self.row_starts = torch.cat([torch.zeros(1, dtype=torch.int64), salient.sum(1).cumsum(0)]).int()
        self.columns = salient.nonzero()[:, 1].to(torch.uint16)
        self.values = torch.randint(-127, 128, self.columns.shape, generator=generator).to(torch.int8)

    def _copies(self, weight: Tensor) -> list[Tensor]:
        """Of one weight as many as fill the pool, itself included."""
        return [weight, *(weight.clone() for _ in range(self._pool_bytes // weight.nbytes))]

    def words(self) -> Tensor:
        self._turn = (self._turn + 1) % len(self._pool)
        return self._pool[self._turn]

    def binary_weight(self) -> BinaryWeight:
        return BinaryWeight(self.words(), self.alpha, self.beta, "column", self.k)

    def binary(self, x: Tensor, mode: str) -> Contender:
        run = cpu.kernel("binary_linear", self.level)
        return lambda: run(x, self.binary_weight(), mode)

    def ordered(self, x: Tensor, mode: str) -> Contender:
        """As a decoder multiplies: with a copy of the bits in the order of lookups, where the level has one."""
        run = cpu.kernel("binary_linear", self.level)
        return lambda: run(x, self.binary_weight(), mode, self._interleaved[self._turn])

    def mixture(self, x: Tensor, mode: str) -> Contender:
        run = cpu.kernel("mixture_linear", self.level)
        return lambda: run(x, MixtureWeight(self.words(), self.gates, *self.experts, self.k), mode)

    def partial(self, x: Tensor, mode: str) -> Contender:
        run, entries = cpu.kernel("partial_linear", self.level), (self.row_starts, self.columns, self.values)
        row_alpha = self.row_alpha  # of the signs and of the int8 values
        return lambda: run(x, PartialWeight(self.words(), row_alpha, "row", *entries, row_alpha, self.k), mode)

    def xnor(self, x_words: Tensor) -> Contender:
        run = cpu.kernel("xnor_gemm", self.level)
        return lambda: run(x_words, self.words(), self.k)

    def dense(self, x: Tensor) -> Contender:
        weights = itertools.cycle(self._copies(self.weight.to(x.dtype)))
        return lambda: F.linear(x, next(weights))


def contenders(layer: Layer, m: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """What is compared at a shape, by name; and for some of our kernels the peer that `vs peer` is about."""
    x = torch.randn(m, layer.k, generator=torch.Generator().manual_seed(1))
    x_words, narrow = ops.pack_signs(x), x.bfloat16()
    runs = {
        "torch fp32": layer.dense(x),
        "torch bf16": layer.dense(narrow),
        "torch packed": lambda: reference.xnor_gemm(x_words, layer.words(), layer.k),
        "int8 (bf16)": layer.binary(narrow, "int8"),
        "float (bf16)": layer.binary(narrow, "float"),
        "ordered (int8)": layer.ordered(x, "int8"),
        "digits (float)": layer.ordered(x, "float"),
        "int8 (fp32)": layer.binary(x, "int8"),
        "float (fp32)": layer.binary(x, "float"),
        "xnor": layer.xnor(x_words),
    }
    peers = {"xnor": "torch packed"}
    for mode in ("int8", "float"):
        runs[f"{mode} mixture"], runs[f"{mode} partial"] = layer.mixture(x, mode), layer.partial(x, mode)
        peers[f"{mode} mixture"] = peers[f"{mode} partial"] = f"{mode} (fp32)"
    return runs, peers


def in_turns(
    runs: dict[str, Contender], rounds: int, burst: int = 1, aside: Contender = lambda: None
) -> dict[str, float]:
    """Median seconds of a call of each, `burst` calls in a row; `aside` is called once a round. The first round warms
    up, and is all there is of one that takes over a second."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        aside()
        for name, run in order:
            if number and times[name][0] > 1:
                continue
            start = clock()
            for _ in range(burst):
                run()
            times[name].append((clock() - start) / burst)
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def bench_shape(n: int, k: int, m: int, peaks: Peaks, rounds: int) -> None:
    """Prints the table of one shape."""
    layer = Layer(n, k, m, peaks.level)
    runs, peers = contenders(layer, m)
    limits: dict[str, list[float]] = {"bandwidth": [], "int8": [], "ordered": [], "digits": [], "float": [], "xnor": []}

    def measure_limits() -> None:
        limits["bandwidth"].append(peaks.bandwidth())
        for kernel in ("int8", "float", "xnor"):
            limits[kernel].append(peaks.instructions(kernel, m))
        limits["ordered"].append(
            peaks.instructions("int8", LOOKED_UP_TOKENS) if layer.interleaves else limits["int8"][-1]
        )
        limits["digits"].append(limits["ordered"][-1] / DIGITS if layer.interleaves else limits["float"][-1])

    median = in_turns(runs, rounds, BURST if m <= DECODE_TOKENS else 1, aside=measure_limits)
    limit = {name: statistics.median(values) for name, values in limits.items()}
    print(f"\nN={n} K={k} M={m}: memory {limit['bandwidth'] / 1e9:.1f} GB/s, peaks of the innermost loops in 10^9")
    print("weights·tokens/s: " + ", ".join(f"{name} {limit[name] / 1e9:.0f}" for name in ("int8", "float", "xnor")))
    print(f"{'':14}{'median':>10}{'10^9/s':>9}{'GB/s':>7}{'vs fp32':>9}{'vs bf16':>9}{'vs peer':>10}{'roofline':>10}")
    for name in runs:
        seconds, kernel = median[name], name.split()[0]
        line = f"{name:14}{seconds * 1e6:>8.0f}µs{n * k * m / seconds / 1e9:>9.1f}"
        if kernel not in limit:
            print(line)
            continue
        instructions = n * k * m / limit[kernel] if limit[kernel] else 0.0
        read = n * k / 8 + ENTRY_BYTES * layer.columns.numel() * name.endswith("partial")
        bound = max(read / limit["bandwidth"], instructions)
        line += f"{read / seconds / 1e9:>7.1f}"
        dense = ("torch fp32", "torch bf16") if name != "xnor" else ()
        line += "".join(f"{median[peer] / seconds:>8.1f}x" for peer in dense) or " " * 18
        line += f"{median[peers[name]] / seconds:>9.2f}x" if name in peers else " " * 10
        print(f"{line}{bound / seconds:>9.0%}")


def bench_overhead(rounds: int) -> None:
    """Prints what a call costs beyond the kernel: a weight of one word."""
    x, words = torch.randn(1, 32), torch.ones(1, 1, dtype=torch.int32)
    weight = BinaryWeight(words, torch.ones(1, 32), None, "column", 32)
    calls = 1000

    def many() -> None:
        with torch.no_grad():
            for _ in range(calls):
                ops.binary_linear(x, weight)

    print(f"\noverhead of a call: {in_turns({'calls': many}, rounds)['calls'] / calls * 1e6:.1f} µs (N=1, K=32, M=1)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CPU kernels beside torch and the machine's limits.")
    parser.add_argument("--preset", choices=SHAPES, default="7b", help="whose layers (default 7b)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], metavar="M", help="default 1 and 512")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's number")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default 15)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(select_backend(Call("binary_linear", "cpu", torch.bfloat16)))
    level = select_backend(Call("binary_linear", "cpu", torch.bfloat16)).backend
    if level not in cpu.LEVELS:
        raise SystemExit(
            f"the compiled kernels do not run here ({cpu.levels()['portable']}); there is nothing to measure"
        )
    peaks = Peaks(level, args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads")
    for m in args.tokens:
        for n, k in SHAPES[args.preset]:
            bench_shape(n, k, m, peaks, args.rounds)
    bench_overhead(args.rounds)


if __name__ == "__main__":
    main()
