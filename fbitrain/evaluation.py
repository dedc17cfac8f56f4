"""What the loop looks at between steps: held-out perplexity, sample texts, histograms of the scales."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tqdm import tqdm

from fbitrain.checkpoint_files import TrainerState
from fbitrain.inference.evaluate import bits_per_byte, perplexity_of
from fbitrain.phases import set_share
from fbitrain.ranks import say
from fbitrain.tracking import gather_scales

if TYPE_CHECKING:
    from fbitrain.build import HeldoutWindows, Parts


@torch.no_grad()
def evaluate(parts: Parts, state: TrainerState) -> None:
    """Held-out perplexity, sample texts, histograms of the scales. Every rank takes part."""
    config, engine = parts.config, parts.engine
    parts.interval.pause("evaluating")
    set_share(engine, config.binarize, state.step)
    engine.train(False)
    if parts.heldout is not None:
        nll, count = heldout_nll(parts, parts.heldout)
        scalars = {
            "heldout/nll": nll / count,
            "heldout/perplexity": perplexity_of(nll / count),
            "heldout/bits_per_byte": bits_per_byte(nll, parts.heldout.n_bytes),
        }
        parts.writer.scalars(state.step, state.tokens, scalars)
        perplexity, bits = scalars["heldout/perplexity"], scalars["heldout/bits_per_byte"]
        say(f"step {state.step} | held-out perplexity {perplexity:.1f} | {bits:.3f} bits/byte")
    samples = {}
    for i, prompt in enumerate(config.eval.prompts if config.eval.sample_tokens else ()):
        start = [parts.tokenizer.bos_id] if config.data.add_bos else []
        ids = torch.tensor([[*start, *parts.tokenizer.encode(prompt)]], device=engine.device)
        samples[f"sample/{i}"] = parts.tokenizer.decode(
            engine.student.greedy(ids, config.eval.sample_tokens, engine)[0].tolist()
        )
    parts.writer.texts(state.step, samples)
    parts.writer.histograms(state.step, gather_scales(engine))
    engine.train()
    parts.interval.run()


def heldout_nll(parts: Parts, heldout: HeldoutWindows) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) and predicted tokens over all ranks' shares of the windows."""
    engine, size = parts.engine, parts.config.train.micro_batch_size
    mine = heldout.windows[parts.rank :: engine.world_size]
    n_batches = math.ceil(math.ceil(len(heldout.windows) / engine.world_size) / size)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for i in tqdm(
        range(n_batches), desc="held-out", unit="batch", leave=False, disable=None if parts.rank == 0 else True
    ):
        windows = mine[i * size : (i + 1) * size]
        # A rank without windows left still takes part: under ZeRO-3 a forward gathers weights from every rank.
        _, metrics = engine((windows if len(windows) else heldout.windows[:1]).to(engine.device))
        if len(windows):
            sums += torch.stack([metrics.label_ce.double(), metrics.tokens.double()])
    dist.all_reduce(sums)
    return sums[0].item(), int(sums[1].item())
