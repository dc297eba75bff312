"""The implementations of `ops.attention` compared, for the masks that our networks use.

    python benchmarks/attention.py                  # CPU: float32, small
    python benchmarks/attention.py --rounds 20      # GPU: bfloat16

Forward, and forward + backward, of one layer. Each result and gradient is compared with float32
before it is timed. TFLOP/s count every score of the square, masked or not, so that an
implementation which skips masked blocks shows more. A GPU also runs torch's fused attention.
"""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import machine
import numpy as np

from vlm_jax.ops import attention

CALLS = 10  # in a row: one call can be shorter than the time it takes to see its end


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's attention: b sequences of t tokens, n heads of width h."""

    name: str
    b: int
    t: int
    n: int
    h: int
    kind: str  # of mask, or "grid": of bias


CASES = (
    Case("LVM-1B, 4,096 tokens, causal", 4, 4096, 16, 128, "causal"),
    Case("LVM-1B, 4,096 tokens, packed documents", 4, 4096, 16, 128, "packed"),
    Case("LVM-3B, 4,096 tokens, heads of 100", 2, 4096, 32, 100, "causal"),
    Case("NXTP, 256 of the image + 64 of text", 32, 320, 32, 128, "prefix"),
    Case("CLIP L/14, 257 tokens", 32, 257, 16, 64, "all"),
    Case("CLIP L/14, 256 tokens", 32, 256, 16, 64, "all"),
    Case("SAM H, 64 x 64 tokens, rows and columns", 2, 4096, 16, 80, "grid"),
    Case("SAM H, windows of 14 x 14", 50, 196, 16, 80, "grid"),
)
SMALL = tuple(
    dataclasses.replace(case, b=1, t=max(64, case.t // 16) + case.t % 2, n=2) for case in CASES
)


def structure(case):
    """Arguments of `attend` besides q, k and v: (static, arrays)."""
    if case.kind == "packed":
        ends = np.sort(np.random.default_rng(0).integers(1, case.t, (case.b, 7)), axis=1)
        segments = (np.arange(case.t) >= ends[..., None]).sum(1).astype(np.int32) + 1
        return dict(causal=True), dict(q_segments_bt=segments, kv_segments_bs=segments)
    if case.kind == "grid":
        sizes = case.b, case.n, case.t, math.isqrt(case.t)
        terms = (jax.random.normal(jax.random.key(i), sizes) for i in (4, 5))
        return {}, dict(bias=attention.GridBias(*terms))
    if case.kind == "prefix":
        return dict(causal=True, prefix=case.t * 4 // 5), {}
    return dict(causal=case.kind == "causal"), {}


def ours(case, implementation):
    """(forward(qkv), forward and backward(qkv, target))."""
    static, arrays = structure(case)

    def forward(qkv):
        return attention.attend(*qkv, implementation=implementation, **static, **arrays)

    def loss(qkv, target):
        return (forward(qkv).astype(jnp.float32) * target).sum()

    return jax.jit(forward), jax.jit(jax.grad(loss))


def theirs(case):
    """The same with torch tensors on the GPU; only masks that torch's kernel knows."""
    import torch

    fused = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=case.kind == "causal"
    )

    def move(x):
        return torch.tensor(np.asarray(x, np.float32)).cuda()

    @functools.cache
    def tensors():
        qkv, target = inputs(case, jnp.bfloat16)
        heads = [move(x).bfloat16().transpose(1, 2).requires_grad_() for x in qkv]
        return heads, move(target).transpose(1, 2)

    def forward(_):
        with torch.no_grad():
            return fused(*tensors()[0]).transpose(1, 2)

    def both(_, __):
        heads, target = tensors()
        grads = torch.autograd.grad((fused(*heads).float() * target).sum(), heads)
        return [x.transpose(1, 2) for x in grads]

    return forward, both


def inputs(case, dtype):
    """(q, k, v), and the factors of the output in the loss."""
    shape = case.b, case.t, case.n, case.h
    *qkv, target = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    return [x.astype(dtype) for x in qkv], target


def error(found, expected):
    """Largest relative error among arrays, of either library, in the norm."""
    if not isinstance(found, (list, tuple)):
        found, expected = [found], [expected]

    def as_numpy(x):
        return np.asarray(x.float().cpu() if hasattr(x, "cpu") else x, np.float32)

    pairs = [(as_numpy(a), np.asarray(b)) for a, b in zip(found, expected)]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


def measure(case, names, rounds):
    low = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    qkv, target = inputs(case, low)
    exact = [x.astype(jnp.float32) for x in qkv]
    with jax.default_matmul_precision("float32"):
        whole = ours(case, "xla")
        expected = [whole[0](exact), whole[1](exact, target)]
    chosen = attention.choose(*qkv[:2], **structure(case)[0], **structure(case)[1])
    rows = []
    for name in names:
        if name == "torch" and case.kind not in ("causal", "all"):
            continue
        forward, both = theirs(case) if name == "torch" else ours(case, name)
        runs = {"forward": lambda f=forward: f(qkv), "with backward": lambda f=both: f(qkv, target)}
        row = {"case": case.name, "implementation": name + " (chosen)" * (name == chosen)}
        for (what, run), right in zip(runs.items(), expected):
            try:
                wrong = error(run(), right)
            except Exception as problem:  # a kernel that does not take the case
                row[f"{what} ms"] = f"{type(problem).__name__}: {str(problem)[:60]}"
                continue
            row[f"{what} error"] = f"{wrong:.1e}"
            if not wrong < 3e-2:
                continue

            def repeated(run=run):
                return [run() for _ in range(CALLS)]

            repeated = machine.on_torch(repeated) if name == "torch" else repeated
            wall = machine.take_turns({what: repeated}, rounds)[what].wall_s / CALLS
            flops = 4 * case.b * case.n * case.t**2 * case.h * (1 if what == "forward" else 3.5)
            row[f"{what} ms"] = f"{wall * 1e3:.3f}"
            row[f"{what} TFLOP/s"] = f"{flops / wall / 1e12:.1f}"
        rows.append(machine.note(row))
    return rows


def main():
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--implementations", nargs="+", default=["xla", "cudnn" if gpu else "blocks"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="the shapes of a CPU")
    args = parser.parse_args()
    names = [*args.implementations, *["torch"] * machine.has_cuda_torch()]
    rows = []
    for case in CASES if gpu and not args.small else SMALL:
        rows += measure(case, names, args.rounds)
    machine.print_table(rows)
    print(machine.describe())
    errors = [float(x) for row in rows for name, x in row.items() if name.endswith("error")]
    if not max(errors) < 3e-2:
        raise SystemExit("wrong results, which were not timed: see the errors above")


if __name__ == "__main__":
    main()
