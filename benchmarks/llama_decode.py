"""Decoding speed: greedy tokens per second, and the share of memory bandwidth.

    python benchmarks/llama_decode.py                               # against transformers + torch
    python benchmarks/llama_decode.py --preset lvm_3b --batches 1 32 --alone

At batch 1 every token reads every matrix once, so memory bandwidth is the ceiling. Both programs
get the same random weights in the same process and take turns. CPU: float32, and the tokens must be
equal. GPU: bfloat16, where near ties round either way, so the logits behind the prompt are compared
and the share of equal tokens is printed. Decoding time is the difference between generating --new
tokens and one; the minimum over the rounds counts. On a machine that others use, pin one core
(`taskset -c 0`) and read the CPU seconds.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np

from vlm_jax.decoding import generate
from vlm_jax.machines import hardware
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.weights import llama as weights


def ours(cfg, params):
    """(generate(prompt, num_new), logits(prompt), bytes of matrices that one token reads)."""
    params, cfg = llama.decode_form(params, cfg)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))

    @functools.cache
    def compiled(num_new):
        return generate.compile(fn.bind, num_new)

    def run(prompt, num_new):
        made = compiled(num_new)(params, jnp.asarray(prompt), jax.random.key(0))
        return np.asarray(made.tokens_bst[:, 0])

    @jax.jit
    def logits(params, prompt):
        network = fn.bind(params)
        return network.step(network.embed(prompt), network.make_cache(*prompt.shape)).logits

    read = {path: x for path, x in functional.flatten(params).items() if path != "embed/table"}
    if cfg.tie_embeddings:
        read = functional.flatten(params)
    return run, functools.partial(logits, params), sum(x.nbytes for x in read.values())


def torch_model(cfg, params, train=False, device="cpu"):
    """transformers' LlamaForCausalLM with these parameters and their dtype, fused attention."""
    import torch
    import transformers

    fields = {**weights.config_to_hf(cfg), "bos_token_id": None, "eos_token_id": None}
    names = set(transformers.LlamaConfig().to_dict())
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k in names})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    dtype = getattr(torch, cfg.param_dtype)

    def tensor(x):
        return torch.tensor(np.asarray(x, np.float32)).to(device, dtype)

    state = {name: tensor(make()) for name, make in weights.to_hf(params, cfg).items()}
    model = model.to_empty(device=device)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    # Buffers do not come from the state: rebuild the table of rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.train(train)


def theirs(cfg, params, device):
    """(generate(prompt, num_new), logits(prompt))."""
    import torch

    model = torch_model(cfg, params, device=device)

    @torch.inference_mode()
    def logits(prompt):
        return model(torch.as_tensor(prompt, device=device)).logits[:, -1].float().cpu().numpy()

    @torch.inference_mode()
    def run(prompt, num_new):
        prompt = torch.as_tensor(prompt, device=device)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens[:, prompt.shape[1] :].cpu().numpy()

    return run, logits


def check(programs, prompt, num_new, dtype):
    """Compiles; compares tokens and logits with those of the first program."""
    names = list(programs)
    logits = {name: np.asarray(programs[name][1](prompt), np.float64) for name in names}
    tokens = {name: programs[name][0](prompt, num_new) for name in names}
    for name in names:
        programs[name][0](prompt, 1)
        equal = (tokens[name] == tokens[names[0]]).mean()
        error = np.linalg.norm(logits[name] - logits[names[0]]) / np.linalg.norm(logits[names[0]])
        print(
            f"{name}: {equal:.1%} of the tokens equal the first program's, its logits within "
            f"{error:.1e}",
            flush=True,
        )
        assert error < (1e-4 if dtype == "float32" else 0.1), "not the same network"
        assert dtype != "float32" or equal == 1, "not the same tokens"


def measure(args, programs, batch, matrix_bytes, cfg):
    """Rows of the table for one batch size."""
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, args.prompt))
    check(programs, prompt, args.new, cfg.dtype)
    times = machine.take_turns(
        {
            (name, num_new): functools.partial(run, prompt, num_new)
            for name, (run, _) in programs.items()
            for num_new in (1, args.new)
        },
        args.rounds,
    )
    slots = args.prompt + args.new  # all of them, free ones too
    slot_bytes = 2 * cfg.depth * cfg.kv_heads * cfg.head_size * jnp.dtype(cfg.dtype).itemsize
    read_bytes = matrix_bytes + batch * slots * slot_bytes
    measured, stated = machine.read_bandwidth(), hardware.memory_bandwidth(jax.devices()[0])
    rows, baseline = [], None
    for name in programs:
        wall, cpu = (
            getattr(times[name, args.new], kind) - getattr(times[name, 1], kind)
            for kind in ("wall_s", "cpu_s")
        )
        if wall <= 0:
            print(f"batch {batch}, {name}: too short to time, raise --new", flush=True)
            continue
        steps = args.new - 1
        baseline = baseline or (wall, cpu)
        rate = read_bytes * steps / wall
        row = {
            "batch": batch,
            "program": name,
            "tokens/s": f"{batch * steps / wall:.2f}",
            "ratio": f"{baseline[0] / wall:.2f}",
            "CPU s/step": f"{cpu / steps:.4f}",
            "CPU ratio": f"{baseline[1] / cpu:.2f}",
            "whole call s": f"{times[name, args.new].wall_s:.3f}",
            "GB/s": f"{rate / 1e9:.1f}",
            "of measured read": f"{rate / measured:.0%}",
        }
        if stated:
            row["of stated bandwidth"] = f"{rate / stated:.0%}"
        rows.append(machine.note(row))
    print(f"measured read bandwidth {measured / 1e9:.1f} GB/s", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lvm_300m", choices=sorted(llama.PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"

    cfg = dataclasses.replace(llama.PRESETS[args.preset], dtype=dtype, param_dtype=dtype)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))
    params = jax.block_until_ready(jax.jit(fn.init)(jax.random.key(0)))

    *own, matrix_bytes = ours(cfg, params)
    programs = {f"vlm_jax {dtype}": own}
    if not args.alone and (on_cpu or machine.has_cuda_torch()):
        rival = theirs(cfg, params, "cpu" if on_cpu else "cuda")
        programs = {f"transformers + torch {dtype}": rival, **programs}
    del params
    rows = []
    for batch in args.batches:
        rows += measure(args, programs, batch, matrix_bytes, cfg)
    print(f"\n{args.preset}, prompt {args.prompt}, {args.new} new tokens, greedy")
    machine.print_table(rows)
    print(machine.describe())


if __name__ == "__main__":
    main()
