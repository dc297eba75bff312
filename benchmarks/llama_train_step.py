"""One training step of LLaMA: forward and backward, and with the AdamW update.

    python benchmarks/llama_train_step.py                     # against transformers + torch
    python benchmarks/llama_train_step.py --preset lvm_1b --attention cudnn xla --alone    # GPU

CPU: float32 on both sides, and torch with bfloat16 autocast, whose matrix products the processor
does natively and XLA does not; same weights, same loss, in turns, in one process. GPU: bfloat16
compute (torch: autocast, fused attention, not compiled), float32 parameters and moments, donated;
model FLOP utilisation of the stated peak with both ways of counting attention (all scores, or the
half that a causal mask leaves; recomputed FLOPs never count). On a machine that others use, pin one
core and read the CPU seconds.
"""

import argparse
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax

from vlm_jax.machines import hardware
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import attention, losses


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


def theirs(cfg, params, tokens, targets, autocast, device="cpu"):
    import torch
    from llama_decode import torch_model

    model = torch_model(cfg, params, train=True, device=device)
    tokens, targets = (
        torch.tensor(np.asarray(x), dtype=torch.long, device=device) for x in (tokens, targets)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)

    def forward_backward():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.item()

    def step():
        value = forward_backward()
        optimizer.step()
        return value

    return machine.on_torch(forward_backward), machine.on_torch(step)


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


@contextlib.contextmanager
def attention_is(implementation):
    """Every call of `attention.attend` that is traced inside uses this one; None lets it choose."""
    genuine = attention.choose
    if implementation:
        attention.choose = lambda *args, **kwargs: implementation
    try:
        yield
    finally:
        attention.choose = genuine


def on_accelerator(cfg, args, params, tokens, targets):
    reached = machine.product_rate()
    print(f"a bfloat16 product runs at {reached / 1e12:.0f} TFLOP/s", flush=True)
    own = functools.partial(ours, cfg, chunk=args.chunk)
    programs = {f"vlm_jax, {name} attention": (name, own) for name in args.attention}
    programs = programs or {"vlm_jax": (None, own)}
    if not args.alone and machine.has_cuda_torch():
        rival = functools.partial(theirs, cfg, autocast=True, device="cuda")
        programs["torch autocast, fused attention"] = None, rival
    rows, expected = [], None
    for name, (implementation, make) in programs.items():
        both = make(params=jax.tree.map(jnp.copy, params), tokens=tokens, targets=targets)
        for run, step in zip(both, ("forward + backward", "with AdamW")):
            if step == "with AdamW" and args.skip_update:
                continue
            with attention_is(implementation):
                loss = float(run())
            expected = expected or loss
            assert abs(loss / expected - 1) < 5e-3, f"{name}: loss {loss:.5f}, not {expected:.5f}"
            wall = machine.take_turns({step: run}, args.rounds)[step].wall_s
            row = {"program": name, "step": step, "loss": f"{loss:.5f}"}
            rows.append(machine.note({**row, **utilisation(cfg, args, wall, reached)}))
        del both, run  # parameters and moments, before the next program needs its own
    print(f"\n{args.preset}, {args.batch} x {args.tokens} tokens, remat {args.remat}")
    machine.print_table(rows)
    stats = jax.devices()[0].memory_stats() or {}
    print(f"peak memory of jax {stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB")


def utilisation(cfg, args, wall, reached):
    """Speed of a step that takes `wall` seconds, as a share of the stated and the reached peak."""
    count = args.batch * args.tokens
    row = {"s": f"{wall:.4f}", "tokens/s": f"{count / wall:.0f}"}
    peak = hardware.peak_flops(jax.devices()[0])
    for half, label in ((True, "causal-half"), (False, "full")):
        rate = llama.flops_per_token(cfg, args.tokens, half) * count / wall
        row[f"TFLOP/s {label}"] = f"{rate / 1e12:.0f}"
        row[f"MFU {label}"] = f"{rate / peak:.1%}" if peak else "peak unknown"
        row[f"of a product, {label}"] = f"{rate / reached:.1%}"
    return row


def main():
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lvm_300m", choices=sorted(llama.PRESETS))
    parser.add_argument("--tokens", type=int, default=1024 if cpu else 4096)
    parser.add_argument("--batch", type=int, default=1 if cpu else 4)
    parser.add_argument("--rounds", type=int, default=3 if cpu else 10)
    parser.add_argument("--remat", default="none" if cpu else "dots")
    parser.add_argument("--chunk", type=int, default=0 if cpu else 512, help="0: plain loss")
    parser.add_argument("--unrolled", action="store_true", help="GPU: layers in a loop, no scan")
    parser.add_argument("--skip_update", action="store_true", help="forward + backward only")
    parser.add_argument("--jax_bfloat16", action="store_true", help="CPU: also our own bfloat16")
    parser.add_argument("--alone", action="store_true", help="GPU: without torch")
    parser.add_argument("--attention", nargs="*", default=[], help="GPU: compare implementations")
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
