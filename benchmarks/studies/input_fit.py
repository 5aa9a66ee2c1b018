"""What the fits of static weights cost at the widths of large models, and what they miss, on made-up inputs.

    python benchmarks/studies/input_fit.py [--widths 4096 8192 14336] [--tokens 16384] [--directions 128 256 512]

Compared are the fit from `A x` ("core"), from all of x ("input"), and from A x beside a few hundred leading directions
of x, which a sketch finds in a first pass over the data. The inputs are sums of a mean for each task, a mean for each
kind of token, and noise whose variance falls with the direction; the features are those of a 4 x 8 adapter, a token
router and a prior that knows the task. Missed is a share of the energy, of tokens that no fit has seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from peft_trex.deploy.moments import RIDGE, Moments, ridge

R_A, R_B, TASKS, KINDS, BLOCK = 4, 8, 64, 512, 1024


class Inputs:
    """Blocks of tokens: inputs x (N, D_in) of mean square 1, and the mixed features m (N, r_b)."""

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.width = width
        self.tasks, self.kinds = normal(TASKS, width), normal(KINDS, width)
        self.often = 1 / torch.arange(1.0, KINDS + 1)
        falling = 1 / torch.arange(1.0, width + 1).sqrt()
        self.spread = falling / falling.square().mean().sqrt()
        self.A, self.router = normal(R_A, width) / width**0.5, normal(R_A * R_B, width) / width**0.5
        self.scores = 0.3 * normal(TASKS, R_A * R_B)

    def blocks(self, tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(0, tokens, BLOCK):
            task = torch.randint(TASKS, (BLOCK,), generator=generator)
            kind = torch.multinomial(self.often, BLOCK, replacement=True, generator=generator)
            noise = torch.randn(BLOCK, self.width, generator=generator) * self.spread
            x = 0.4 * self.tasks[task] + 0.7 * self.kinds[kind] + 0.6 * noise
            weights = 16 * torch.softmax(x @ self.router.T, -1) + 2 * self.scores[task]
            yield x, torch.einsum("ni,nij->nj", x @ self.A.T, weights.view(-1, R_A, R_B))


def leading(inputs: Inputs, tokens: int, directions: int) -> Tensor:
    """An orthonormal basis (n, D_in) of A's rows and of about the leading directions of x.

    Every token is added to a random row of a sketch, with a random sign, which keeps the sum of x x^T on average.
    """
    sketch = torch.zeros(2 * directions, inputs.width)
    generator = torch.Generator().manual_seed(0)
    for x, _ in inputs.blocks(tokens, seed=1):
        rows = torch.randint(len(sketch), (len(x),), generator=generator)
        signs = 2.0 * torch.randint(2, (len(x), 1), generator=generator) - 1
        sketch.index_add_(0, rows, signs * x)
    values, vectors = torch.linalg.eigh(sketch @ sketch.T)
    found = vectors[:, -directions:].T @ sketch / values[-directions:].clamp(min=1e-12).sqrt()[:, None]
    return torch.linalg.qr(torch.cat([inputs.A, found]).T)[0].T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192, 14336])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--directions", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--skip-input-above", type=int, default=1 << 30, help="leaves the fit from x out where wider")
    arguments = parser.parse_args()
    print("| D_in | fit | MB of moments | CPU seconds | missed, seen | missed, unseen |\n|---|---|---|---|---|---|")
    for width in arguments.widths:
        inputs = Inputs(width, seed=0)
        start = time.process_time()
        for _ in inputs.blocks(arguments.tokens, seed=1):
            pass
        drawing = time.process_time() - start
        fits = ["core", *arguments.directions, *(["input"] if width <= arguments.skip_input_above else [])]
        for fit in fits:
            start, passes = time.process_time(), 1
            basis = inputs.A if fit == "core" else None
            if isinstance(fit, int):
                basis, passes = leading(inputs, arguments.tokens, fit), 2
            n = width if basis is None else len(basis)
            moments = Moments.zeros(1, n, R_B, torch.device("cpu"))
            for x, m in inputs.blocks(arguments.tokens, seed=1):
                z = x if basis is None else x @ basis.T
                moments.add(z, m, torch.zeros(len(x), dtype=torch.long))
            total = moments.of()
            share = RIDGE["core" if fit == "core" else "input"]
            U = total.solve(torch.zeros(R_B, n, dtype=torch.float64), ridge(total.zz, share))
            took = time.process_time() - start - passes * drawing
            seen = total.missed(U, torch.eye(R_B, dtype=torch.float64)) / total.mm.trace().item()
            missed = energy = 0.0
            for x, m in inputs.blocks(4096, seed=2):
                z = x if basis is None else x @ basis.T
                missed += (m - z @ U.float().T).square().sum().item()
                energy += m.square().sum().item()
            name = f"{fit} directions" if isinstance(fit, int) else fit
            size = n * n * 8 / 1e6 + (2 * fit * width * 4 / 1e6 if isinstance(fit, int) else 0)
            print(f"| {width} | {name} | {size:.1f} | {took:.1f} | {seen:.1%} | {missed / energy:.1%} |", flush=True)


if __name__ == "__main__":
    main()
