"""Memory of a predictor beside the parameters: an evaluation must hold no second copy of them.

    python benchmarks/evaluation_memory.py                          # LVM 300M, bfloat16 compute
    python benchmarks/evaluation_memory.py --preset=lvm_1b --rows=16

Compiles predict["continue"] on shapes alone and prints what the compiler reserves, in MiB: the
parameters that are handed in, what it needs besides (temporary), and both by the layout that the
parameters have.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import machine

from vlm_jax.models import llama
from vlm_jax.systems import lvm


def reserved(task, params, rows):
    """(parameters, temporary) in MiB of the compiled predictor."""
    length = task.lead_tokens + (task.context_images + 1) * task.tokens_per_image - 1
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": ids, "targets": ids}
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = jax.jit(task.predict["continue"]).lower(params, batch, key).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return size / 2**20, found.temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="lvm_300m", choices=llama.PRESETS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1, help="images")
    args = parser.parse_args()
    cfg = dataclasses.replace(llama.PRESETS[args.preset], dtype="bfloat16")
    task = lvm.LvmTask(cfg, context_images=args.context)
    params = jax.eval_shape(task.init, jax.random.key(0))
    rows = [("training", *reserved(task, params, args.rows))]
    if hasattr(task, "inference_params"):
        made = jax.eval_shape(task.inference_params, params)
        rows.append(("decode", *reserved(task, made, args.rows)))
    print(f"{args.preset}, {args.rows} rows, {args.context} context images, MiB")
    print("| layout | parameters | temporary |")
    print("|---|---|---|")
    for name, size, temporary in rows:
        print(f"| {name} | {size:,.0f} | {temporary:,.0f} |")
    print(machine.describe())


if __name__ == "__main__":
    main()
