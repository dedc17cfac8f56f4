"""Time and memory of the chunked distillation loss beside its naive form, and how near it is to its matrix products.

    python -m fbitrain.benches.distill_loss [--tokens 2048] [--vocab 49152] [--width 576] [--dtype float32] [--help]

Each form runs forward and backward in a process of its own, which yields its peak of memory; then all run in turns in
one process, so that a busy machine slows them alike. `matrix products` is what no implementation can avoid: two heads
and two gradients, without any loss. Memory is the resident set on a CPU, and the allocator's peak on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fbitrain.distill import distill_loss

MIB = 2**20
Form = Callable[[argparse.Namespace, dict[str, Tensor]], None]


def chunked(args: argparse.Namespace, inputs: dict[str, Tensor]) -> None:
    loss, _ = distill_loss(*inputs.values(), chunk_tokens=args.chunk_tokens)
    torch.autograd.backward(loss)


def naive(args: argparse.Namespace, inputs: dict[str, Tensor]) -> None:
    """All logits at once, differentiated by autograd; without the metrics that the chunked form also yields."""
    with torch.no_grad():
        teacher_MV = torch.softmax((inputs["teacher_hidden_MD"] @ inputs["teacher_head_VD"].t()).float(), dim=-1)
    student_MV = (inputs["hidden_MD"] @ inputs["head_VD"].t()).float()
    torch.autograd.backward(F.cross_entropy(student_MV, teacher_MV))


def matrix_products(args: argparse.Namespace, inputs: dict[str, Tensor]) -> None:
    hidden_MD, head_VD = inputs["hidden_MD"].detach(), inputs["head_VD"].detach()
    logits_CV = head_VD.new_empty(args.chunk_tokens, len(head_VD))
    grad_head_VD = torch.zeros_like(head_VD)
    for start in range(0, len(hidden_MD), args.chunk_tokens):
        rows = slice(start, start + args.chunk_tokens)
        out_CV = logits_CV[: len(hidden_MD[rows])]
        torch.mm(inputs["teacher_hidden_MD"][rows], inputs["teacher_head_VD"].t(), out=out_CV)
        torch.mm(hidden_MD[rows], head_VD.t(), out=out_CV)
        torch.mm(out_CV, head_VD)
        grad_head_VD.addmm_(out_CV.t(), hidden_MD[rows])


FORMS: dict[str, Form] = {"chunked": chunked, "naive": naive, "matrix products": matrix_products}


def make_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape) * scale).to(args.device, getattr(torch, args.dtype))

    return {
        "hidden_MD": normal(args.tokens, args.width, scale=1.0).requires_grad_(),
        "head_VD": normal(args.vocab, args.width, scale=0.05).requires_grad_(),
        "labels_M": torch.randint(0, args.vocab, (args.tokens,)).to(args.device),
        "teacher_hidden_MD": normal(args.tokens, args.teacher_width, scale=1.0),
        "teacher_head_VD": normal(args.vocab, args.teacher_width, scale=0.1),
    }


def peak_bytes(args: argparse.Namespace, name: str) -> int:
    """Memory at the peak of one run beyond the inputs; called in a fresh process, whose highest mark is this run's."""
    inputs = make_inputs(args)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        FORMS[name](args, inputs)
        return torch.cuda.max_memory_allocated() - before
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    FORMS[name](args, inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def seconds_in_turns(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per form. The forms take turns; the first turn warms up and does not count."""
    inputs = make_inputs(args)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(args.repeats + 1):
        for name, form in FORMS.items():
            inputs["hidden_MD"].grad = inputs["head_VD"].grad = None
            start = time.perf_counter()
            form(args, inputs)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def lacks_native_bf16(args: argparse.Namespace) -> bool:
    if args.device != "cpu" or args.dtype != "bfloat16":
        return False
    flags = Path("/proc/cpuinfo").read_text()
    return not any(flag in flags for flag in ("amx_bf16", "avx512_bf16", " bf16"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="M")
    parser.add_argument("--vocab", type=int, default=49152, help="V")
    parser.add_argument("--width", type=int, default=576, help="D, of the student")
    parser.add_argument("--teacher-width", type=int, default=576, help="Dt")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="distill.chunk_tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median is taken")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak_bytes, (args, name)) for name in FORMS}
    seconds = seconds_in_turns(args)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} thread(s)"
    shape = f"M={args.tokens} V={args.vocab} D={args.width} Dt={args.teacher_width} chunk={args.chunk_tokens}"
    print(f"{shape} {args.dtype}, {device}, torch {torch.__version__}")
    if lacks_native_bf16(args):
        print("This CPU has no bf16 instructions: its bf16 products are many times slower than fp32, for every form.")
    print(f"{'':16} {'median s':>9} {'vs naive':>9} {'peak MiB':>9} {'vs naive':>9}   (n={args.repeats})")
    for name in FORMS:
        time_ratio, peak_ratio = seconds[name] / seconds["naive"], peaks[name] / peaks["naive"]
        print(f"{name:16} {seconds[name]:9.3f} {time_ratio:9.2f} {peaks[name] / MIB:9.0f} {peak_ratio:9.2f}")


if __name__ == "__main__":
    main()
