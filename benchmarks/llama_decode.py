"""Decoding speed: greedy tokens per second at batch 1, and the share of memory bandwidth.

    python benchmarks/llama_decode.py                       # CPU: against transformers + torch
    python benchmarks/llama_decode.py --preset lvm_3b       # GPU: against the bandwidth ceiling

At batch 1 every token reads every matrix once, so memory bandwidth is the ceiling. Both programs
get the same random weights in the same process, take turns, and must give equal tokens. Decoding
time is the difference between generating --new tokens and one; the minimum over the rounds counts.
On a machine that others use, pin one core (`taskset -c 0`) and read the CPU seconds.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np

from vlm_jax import hardware
from vlm_jax.decoding import generate
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.weights import llama as weights


def ours(cfg, params):
    """(generate(prompt, num_new), bytes of matrices that one token reads)."""
    params, cfg = llama.decode_form(params, cfg)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))

    @functools.cache
    def compiled(num_new):
        make_cache = functools.partial(llama.make_cache, cfg)
        return generate.compile(fn.bind, make_cache, num_new)

    def run(prompt, num_new):
        tokens = compiled(num_new)(params, jnp.asarray(prompt), jax.random.key(0))
        return np.asarray(tokens[:, 0])

    read = {path: x for path, x in functional.flatten(params).items() if path != "embed/table"}
    if cfg.tie_embeddings:
        read = functional.flatten(params)
    return run, sum(x.nbytes for x in read.values())


def torch_model(cfg, params, train=False):
    """transformers' LlamaForCausalLM with these parameters, float32."""
    import torch
    import transformers

    fields = {**weights.config_to_hf(cfg), "bos_token_id": None, "eos_token_id": None}
    names = set(transformers.LlamaConfig().to_dict())
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k in names})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float()
    state = {k: torch.tensor(np.asarray(f())) for k, f in weights.to_hf(params, cfg).items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    # Buffers do not come from the state: rebuild the table of rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.train(train)


def theirs(cfg, params):
    import torch

    model = torch_model(cfg, params)

    @torch.inference_mode()
    def run(prompt, num_new):
        prompt = torch.as_tensor(prompt)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens[:, prompt.shape[1] :].numpy()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lvm_300m", choices=sorted(llama.PRESETS))
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"

    cfg = dataclasses.replace(llama.PRESETS[args.preset], dtype=dtype, param_dtype=dtype)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))
    params = jax.block_until_ready(jax.jit(fn.init)(jax.random.key(0)))
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, args.prompt))

    generate_ours, bytes_read = ours(cfg, params)
    programs = {f"vlm_jax {dtype}": generate_ours}
    if on_cpu:
        programs = {"transformers + torch float32": theirs(cfg, params), **programs}
    del params
    tokens = {name: run(prompt, args.new) for name, run in programs.items()}
    for name, run in programs.items():
        run(prompt, 1)
        first = next(iter(tokens.values()))
        print(
            f"{name}: {(tokens[name] == first).mean():.1%} of the tokens equal the first program's"
        )

    times = machine.take_turns(
        {
            (name, num_new): functools.partial(run, prompt, num_new)
            for name, run in programs.items()
            for num_new in (1, args.new)
        },
        args.rounds,
    )
    cache_bytes = 2 * cfg.depth * cfg.kv_heads * cfg.head_size * jnp.dtype(dtype).itemsize
    bytes_read += cache_bytes * (args.prompt + args.new)  # all slots, free ones too
    measured = machine.read_bandwidth()
    rows, baseline = [], None
    for name in programs:
        wall, cpu = (
            getattr(times[name, args.new], kind) - getattr(times[name, 1], kind)
            for kind in ("wall_s", "cpu_s")
        )
        steps = args.new - 1
        baseline = baseline or (wall, cpu)
        rate = bytes_read * steps / wall
        row = {
            "program": name,
            "tokens/s": f"{steps / wall:.2f}",
            "ratio": f"{baseline[0] / wall:.2f}",
            "CPU s/token": f"{cpu / steps:.3f}",
            "CPU ratio": f"{baseline[1] / cpu:.2f}",
            "whole call s": f"{times[name, args.new].wall_s:.2f}",
            "GB/s": f"{rate / 1e9:.1f}",
            "of measured read": f"{rate / measured:.0%}",
        }
        ceiling = hardware.memory_bandwidth(jax.devices()[0])
        if ceiling:
            row["of stated bandwidth"] = f"{rate / ceiling:.0%}"
        rows.append(row)
    print(f"\n{args.preset}, batch 1, prompt {args.prompt}, {args.new} new tokens, greedy")
    machine.print_table(rows)
    print(f"measured read bandwidth {measured / 1e9:.1f} GB/s")
    print(machine.describe())


if __name__ == "__main__":
    main()
