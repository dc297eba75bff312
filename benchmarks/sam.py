"""SAM's image encoder: seconds per image, against transformers' on torch.

    python benchmarks/sam.py                              # CPU: ViT-B, float32
    python benchmarks/sam.py --preset vit_h --batches 4   # GPU: bfloat16

Both programs get the same random weights and image in one process and take turns; outputs are
compared before anything is timed. The parts are timed by themselves, on random maps: a block
with windows, a block that reads the whole image, the neck, and the mask decoder for one prompt.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import machine
import numpy as np

from vlm_jax.models import sam
from vlm_jax.weights import sam as weights


def random_params(cfg):
    """Normal numbers, norms near one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = 0.03 * rng.standard_normal(leaf.shape, np.float32)
        return x + 1 if path[-1].key == "scale" else x

    return jax.tree_util.tree_map_with_path(draw, sam.make(cfg).abstract())


def of_torch(cfg, params, image):
    """() -> the encoding by transformers' network, channels last."""
    import torch
    import transformers

    config = transformers.SamVisionConfig(
        hidden_size=cfg.width, output_channels=cfg.prompt_width, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.num_heads, image_size=cfg.image_size, window_size=cfg.window,
        patch_size=cfg.patch_size, mlp_dim=cfg.hidden, global_attn_indexes=list(cfg.global_blocks),
    )  # fmt: skip
    model = transformers.SamVisionModel(config).eval()
    names = model.state_dict()
    state = {name: load for name, load in weights.to_hf(params, cfg).items() if name in names}
    model.load_state_dict({name: torch.tensor(load()) for name, load in state.items()})
    device = "cuda" if machine.has_cuda_torch() else "cpu"
    model = model.to(device, getattr(torch, cfg.dtype))
    pixels = torch.tensor(np.moveaxis(image, 3, 1)).to(device, getattr(torch, cfg.dtype))

    @machine.on_torch
    def run():
        with torch.inference_mode():
            return model(pixels).last_hidden_state

    return run


def parts(cfg, module, batch):
    """Name -> (how often an image needs it, function)."""
    rng = np.random.default_rng(1)

    def random(*sizes):
        return jnp.asarray(rng.standard_normal(sizes, np.float32)).astype(cfg.dtype)

    grid, encoder = cfg.grid, module.image_encoder
    x_byxd = random(batch, grid, grid, cfg.width)
    encoding = random(batch, grid, grid, cfg.prompt_width)
    prompts = random(batch, 1, 6, cfg.prompt_width)
    count = len(cfg.global_blocks)
    found = {
        "block of windows": (cfg.depth - count, encoder.blocks[0], (x_byxd,)),
        "block of the image": (count, encoder.blocks[cfg.global_blocks[0]], (x_byxd,)),
        "neck": (1, encoder.neck, (x_byxd,)),
        "mask decoder": (1, module.masks, (encoding, prompts)),
    }
    return {
        name: (times, jax.jit(lambda *xs, call=call: call(*xs)), arguments)
        for name, (times, call, arguments) in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="vit_b", choices=sorted(sam.PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip_torch", action="store_true")
    args = parser.parse_args()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = dataclasses.replace(sam.PRESETS[args.preset], dtype=dtype)
    params, rows = random_params(cfg), []
    module = sam.make(cfg).bind(jax.device_put(params))
    encode = jax.jit(lambda params, image: sam.make(cfg).bind(params).encode(image))
    on_device = jax.device_put(params)
    for batch in args.batches:
        side = cfg.image_size
        image = np.random.default_rng(2).standard_normal((batch, side, side, 3), np.float32)
        pixels = jnp.asarray(image)
        runs = {"encode": lambda pixels=pixels: encode(on_device, pixels)}
        found = np.asarray(runs["encode"](), np.float32)
        if not args.skip_torch:
            runs["torch"] = of_torch(cfg, params, image)
            expected = np.moveaxis(runs["torch"]().float().cpu().numpy(), 1, 3)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            print(f"batch {batch}: within {error:.1e} of torch's", flush=True)
            assert error < (1e-3 if dtype == "float32" else 0.05), "the two programs differ"
        pieces = parts(cfg, module, batch)
        for name, (_, call, arguments) in pieces.items():
            jax.block_until_ready(call(*arguments))
            runs[name] = lambda call=call, arguments=arguments: call(*arguments)
        times = machine.take_turns(runs, args.rounds)
        whole = times["encode"].wall_s
        for name in runs:
            count = pieces[name][0] if name in pieces else 1
            seconds = count * times[name].wall_s / batch
            row = {"batch": batch, "what": name, "times": count, "s per image": f"{seconds:.3f}"}
            row["of encode"] = f"{seconds * batch / whole:.2f}"
            if name == "encode":
                row["TFLOP/s"] = f"{batch * cfg.encode_flops / whole / 1e12:.3f}"
            rows.append(machine.note(row))
    print(f"\nSAM {args.preset}, {cfg.image_size} pixels, {dtype}\n")
    machine.print_table(rows)
    print(f"\n{machine.describe()}")


if __name__ == "__main__":
    main()
