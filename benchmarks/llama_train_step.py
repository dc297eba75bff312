"""One training step of LLaMA: forward and backward, and with the AdamW update.

    python benchmarks/llama_train_step.py                        # CPU: against transformers + torch
    python benchmarks/llama_train_step.py --preset lvm_3b --tokens 4096 --batch 4   # GPU: MFU

CPU: float32 on both sides, and torch with bfloat16 autocast, whose matrix products the processor
does natively and XLA does not; same weights, same loss, in turns, in one process. GPU: bfloat16
compute, float32 parameters and moments, donated; model FLOP utilisation of the stated peak with
both ways of counting attention (all scores, or the half that a causal mask leaves; recomputed
FLOPs never count). On a machine that others use, pin one core and read the CPU seconds.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax

from vlm_jax import hardware
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses


def make_loss(cfg, chunk):
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))

    def loss(params, tokens, targets):
        module = fn.bind(params)
        hidden, _ = module.transform(module.embed(tokens))
        weights = jnp.ones(targets.shape)
        if chunk:
            head = module.head_matrix()
            return losses.chunked_cross_entropy(hidden, head, targets, weights, chunk=chunk)[0]
        return losses.cross_entropy(module.logits(hidden), targets, weights)[0]

    return fn, loss


def adamw():
    return optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.1)


def ours(cfg, params, tokens, targets, chunk):
    if not cfg.scan_layers:
        layers = params["layers"]
        split = {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.depth)}
        params = {**params, "layers": split}
    _, loss = make_loss(cfg, chunk)
    gradient = jax.jit(jax.value_and_grad(loss))
    optimizer = adamw()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, targets):
        value, grads = jax.value_and_grad(loss)(params, tokens, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = None

    def step():
        nonlocal params, state
        if state is None:
            state = jax.jit(optimizer.init)(params)
        params, state, value = update(params, state, tokens, targets)
        return value

    return lambda: gradient(params, tokens, targets)[0], step


def theirs(cfg, params, tokens, targets, autocast):
    import torch
    from llama_decode import torch_model

    model = torch_model(cfg, params, train=True)
    tokens, targets = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (tokens, targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)

    def forward_backward():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.item()

    def step():
        value = forward_backward()
        optimizer.step()
        return value

    return forward_backward, step


def on_cpu(cfg, args, params, tokens, targets):
    variants = {
        "torch float32": functools.partial(theirs, cfg, autocast=False),
        "torch bf16 autocast": functools.partial(theirs, cfg, autocast=True),
        "vlm_jax float32": functools.partial(ours, cfg, chunk=args.chunk),
    }
    variants["vlm_jax float32, unrolled"] = functools.partial(
        ours, dataclasses.replace(cfg, scan_layers=False), chunk=args.chunk
    )
    if args.jax_bfloat16:
        low = dataclasses.replace(cfg, dtype="bfloat16")
        variants["vlm_jax bfloat16"] = functools.partial(ours, low, chunk=args.chunk)
    for kind, name in ((0, "forward + backward"), (1, "with AdamW")):
        if kind and args.skip_update:
            continue
        copies = {n: jax.tree.map(jnp.copy, params) if kind else params for n in variants}
        programs = {
            n: make(params=copies.pop(n), tokens=tokens, targets=targets)
            for n, make in variants.items()
        }
        runs = {n: program[kind] for n, program in programs.items()}
        first = {n: float(run()) for n, run in runs.items()}
        times = machine.take_turns(runs, args.rounds)
        base = times["torch float32"]
        print(f"\n{args.preset}, {args.batch} x {args.tokens} tokens, {name}")
        machine.print_table(
            [
                {
                    "program": n,
                    "loss": f"{first[n]:.5f}",
                    "s": f"{t.wall_s:.2f}",
                    "ratio": f"{base.wall_s / t.wall_s:.2f}",
                    "CPU s": f"{t.cpu_s:.2f}",
                    "CPU ratio": f"{base.cpu_s / t.cpu_s:.2f}",
                    "tokens/s": f"{args.batch * args.tokens / t.wall_s:.0f}",
                }
                for n, t in times.items()
            ]
        )


def on_accelerator(cfg, args, params, tokens, targets):
    peak = hardware.peak_flops(jax.devices()[0])
    both = ours(cfg, params, tokens, targets, args.chunk)
    rows = []
    for run, name in zip(both, ("forward + backward", "with AdamW")):
        if name == "with AdamW" and args.skip_update:
            continue
        jax.block_until_ready(run())
        t = machine.take_turns({name: run}, args.rounds)[name]
        row = {"step": name, "s": f"{t.wall_s:.3f}"}
        count = args.batch * args.tokens
        row["tokens/s"] = f"{count / t.wall_s:.0f}"
        for half, label in ((True, "causal-half"), (False, "full")):
            rate = llama.flops_per_token(cfg, args.tokens, half) * count / t.wall_s
            row[f"TFLOP/s {label}"] = f"{rate / 1e12:.0f}"
            row[f"MFU {label}"] = f"{rate / peak:.1%}" if peak else "peak unknown"
        rows.append(row)
    print(f"\n{args.preset}, {args.batch} x {args.tokens} tokens, remat {args.remat}")
    machine.print_table(rows)
    stats = jax.devices()[0].memory_stats() or {}
    print(f"peak memory {stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB")


def main():
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lvm_300m" if cpu else "lvm_1b")
    parser.add_argument("--tokens", type=int, default=1024 if cpu else 4096)
    parser.add_argument("--batch", type=int, default=1 if cpu else 4)
    parser.add_argument("--rounds", type=int, default=3 if cpu else 10)
    parser.add_argument("--remat", default="none" if cpu else "dots")
    parser.add_argument("--chunk", type=int, default=0 if cpu else 512, help="0: plain loss")
    parser.add_argument("--unrolled", action="store_true", help="GPU: layers in a loop, no scan")
    parser.add_argument("--skip_update", action="store_true", help="forward + backward only")
    parser.add_argument("--jax_bfloat16", action="store_true", help="CPU: also our own bfloat16")
    args = parser.parse_args()

    cfg = dataclasses.replace(
        llama.PRESETS[args.preset],
        remat=args.remat,
        dtype="float32" if cpu else "bfloat16",
    )
    fn, _ = make_loss(cfg, args.chunk)
    params = jax.block_until_ready(jax.jit(fn.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    stream = jnp.asarray(rng.integers(0, cfg.vocab_size, (args.batch, args.tokens + 1)))
    if args.unrolled:
        cfg = dataclasses.replace(cfg, scan_layers=False)
    (on_cpu if cpu else on_accelerator)(cfg, args, params, stream[:, :-1], stream[:, 1:])
    print(machine.describe())


if __name__ == "__main__":
    main()
