"""Training's products with the signs of a latent fp32 weight: from bits, beside torch's dense product.

    python -m fbitrain.benches.sign_matmul [--threads 1] [--rounds 9] [--help]

Both ways make the signs anew, as training does, and run in turns; figures are medians, of CPU time with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from fbitrain.kernels import training

SHAPES = [(768, 768), (2048, 768), (2048, 2048), (5632, 2048)]  # N, K
TOKENS = [64, 256, 1024]


def compare(products: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """How many times faster each product is from bits than in torch."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for from_bits in (True, False):
            with mock.patch.object(training, "pays", lambda *sizes, from_bits=from_bits: from_bits):
                for name, product in products.items():
                    start = clock()
                    product()
                    seconds[name, from_bits].append(clock() - start)
    median = {key: statistics.median(taken) for key, taken in seconds.items()}
    return {name: median[name, False] / median[name, True] for name in products}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time products with signs from bits beside torch.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each way (default 9)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads: times torch fp32")
    print(f"{'N x K':>12}{'M':>6}{'forward':>9}{'gradient':>10}")
    for n, k in SHAPES:
        for m in TOKENS:
            weight = torch.randn(n, k, generator=generator)
            z, dy = torch.randn(m, k, generator=generator), torch.randn(m, n, generator=generator)
            products: dict[str, Callable[[], object]] = {
                "forward": partial(training.sign_matmul, z, weight),
                "gradient": partial(training.sign_matmul_of_gradient, dy, weight),
            }
            ratios = compare(products, args.rounds)
            print(f"{f'{n} x {k}':>12}{m:>6}{ratios['forward']:>8.2f}x{ratios['gradient']:>9.2f}x")


if __name__ == "__main__":
    main()
