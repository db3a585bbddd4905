"""What ``ddp_reg`` leaves to each rank of two expensive penalties on the weights of a ViT-B.

Under ``ddp_reg`` each rank computes a penalty for its share of the weights, and DDP's own
reduction sums the shares; under plain ``ddp`` every rank computes the whole. Printed are, for each
number of ranks, the matrices and FLOPs of the rank that has most to do, which are exact, and the
longest CPU and wall time of a rank. Where other processes want the cores as well, wall times say
little: look at the CPU times.

    python examples/benchmarks/sharded_penalties.py [--blocks 12] [--repeat 3] [--ranks 1 2 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_reg import OrthogonalRegularizer
from lightning_reg.engine.communicator import Communicator
from lightning_reg.mechanisms.weight_penalty import WeightPenalty
from lightning_reg.testing import RankPair

# Query, key and value in one; attention output; the two layers of the perceptron.
BLOCK = ((2304, 768), (768, 768), (3072, 768), (768, 3072))


class NuclearNorm(WeightPenalty):
    """The sum of singular values, whose gradient is ``U V^T``: one SVD a weight."""

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The nuclear norm of each."""
        return torch.stack([torch.linalg.svdvals(m).sum() for m in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Norms and gradients."""
        found = [torch.linalg.svd(m, full_matrices=False) for m in matrices]
        return torch.stack([s.sum() for _, s, _ in found]), [u @ vh for u, _, vh in found]

    def cost(self, weight: Tensor) -> float:
        """FLOPs of a thin SVD with both factors (Golub and Van Loan), and of the product."""
        n, m = sorted((weight.shape[0], weight[0].numel()))
        return float(6 * m * n**2 + 20 * n**3 + 2 * m * n**2)


def penalty(kind: str) -> tuple[WeightPenalty, float]:
    """A penalty, and the FLOPs that one unit of its cost stands for."""
    if kind == "svd":
        return NuclearNorm(1e-4), 1.0
    # Two products of as many multiplications and additions.
    return OrthogonalRegularizer(1e-4, form="full"), 4.0


def work(kind: str, blocks: int, repeat: int) -> dict[str, float]:
    """What this rank has to do, and the median time that it takes."""
    technique, flops = penalty(kind)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in BLOCK * blocks]
    costs = [technique.cost(weight) for weight in weights]
    comm = Communicator(dist.get_rank(), dist.get_world_size())
    share = comm.shard(costs)
    mine = [weights[i] for i in share]
    wall, cpu = [], []
    with torch.no_grad():
        for _ in range(repeat):
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            technique.closed_form(mine)
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
    return {
        "matrices": len(share),
        "flops": flops * sum(costs[i] for i in share),
        "cpu": statistics.median(cpu),
        "wall": statistics.median(wall),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the median")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    options = parser.parse_args()
    print(f"{'penalty':<14} ranks  matrices  GFLOP/rank  share  CPU s/rank  wall s/rank")
    whole: dict[str, float] = {}
    for ranks in options.ranks:
        with RankPair(ranks, timeout=1800) as group:
            for kind in ("orthogonal", "svd"):
                found = group.run(work, kind, options.blocks, options.repeat)
                busiest = max(found, key=lambda rank: rank["flops"])
                total = whole.setdefault(kind, sum(rank["flops"] for rank in found))
                cpu, wall = (max(rank[clock] for rank in found) for clock in ("cpu", "wall"))
                print(
                    f"{kind:<14} {ranks:>5}  {busiest['matrices']:>8}  "
                    f"{busiest['flops'] / 1e9:>10.1f}  {busiest['flops'] / total:>5.3f}  "
                    f"{cpu:>10.2f}  {wall:>11.2f}"
                )


if __name__ == "__main__":
    main()
