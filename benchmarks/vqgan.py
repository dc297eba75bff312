"""Tokenizer speed: images per second through the released f16-8192 network at 256 px.

    python benchmarks/vqgan.py                        # CPU: against the same network in torch
    python benchmarks/vqgan.py --batches 1 4
    python benchmarks/vqgan.py --batches 16 64 256    # GPU: bfloat16, ours alone

On a CPU both programs get the same random weights and inputs in one process and take turns; torch
runs channels-last under inference mode. Their outputs are compared before anything is timed. The
minimum over the rounds counts, the median stands beside it. On a machine that others use, pin one
core (`taskset -c 0`) and read the CPU seconds.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np

from vlm_jax.models import vqgan
from vlm_jax.nn import functional


class TorchVqgan:
    """The same network in plain torch calls; parameters by our paths, in torch's layout."""

    def __init__(self, cfg, params):
        import torch

        self.torch, self.F, self.cfg = torch, torch.nn.functional, cfg
        self.p = {}
        for path, leaf in functional.flatten(params).items():
            tensor = torch.from_numpy(np.array(leaf))
            if path.endswith("kernel"):
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            self.p[path] = tensor

    def conv(self, path, x, **fields):
        kernel = self.p[f"{path}/kernel"]
        fields.setdefault("padding", kernel.shape[-1] // 2)
        return self.F.conv2d(x, kernel, self.p[f"{path}/bias"], **fields)

    def norm_silu(self, path, x):
        scale, bias = self.p[f"{path}/scale"], self.p[f"{path}/bias"]
        return self.F.silu(self.F.group_norm(x, self.cfg.norm_groups, scale, bias, 1e-6))

    def block(self, path, x):
        h = self.conv(f"{path}/conv1", self.norm_silu(f"{path}/norm1", x))
        h = self.conv(f"{path}/conv2", self.norm_silu(f"{path}/norm2", h))
        if f"{path}/nin_shortcut/kernel" in self.p:
            x = self.conv(f"{path}/nin_shortcut", x)
        return x + h

    def mid(self, path, h):
        return self.block(f"{path}/block_2", self.block(f"{path}/block_1", h))

    def encode(self, image):
        """NHWC in [0, 1] -> (latents NHWC, ids)."""
        h = self.conv("encoder/conv_in", image.permute(0, 3, 1, 2))  # channels-last in memory
        for level in range(len(self.cfg.widths)):
            for i in range(self.cfg.num_res_blocks):
                h = self.block(f"encoder/down/{level}/block/{i}", h)
            if level + 1 < len(self.cfg.widths):
                h = self.F.pad(h, (0, 1, 0, 1))
                h = self.conv(f"encoder/down/{level}/downsample/conv", h, stride=2, padding=0)
        h = self.norm_silu("encoder/norm_out", self.mid("encoder/mid", h))
        z = self.conv("quant_conv", self.conv("encoder/conv_out", h)).permute(0, 2, 3, 1)
        e = self.p["quantize/embedding"]
        flat = z.reshape(-1, z.shape[-1])
        distances = flat.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * flat @ e.T
        return z, distances.argmin(1).reshape(len(z), -1)

    def decode(self, ids):
        """ids -> NHWC, not clamped."""
        side = round(ids.shape[1] ** 0.5)
        h = self.p["quantize/embedding"][ids].reshape(len(ids), side, side, -1)
        h = self.conv("decoder/conv_in", self.conv("post_quant_conv", h.permute(0, 3, 1, 2)))
        h = self.mid("decoder/mid", h)
        for level in reversed(range(len(self.cfg.widths))):
            for i in range(self.cfg.num_res_blocks + 1):
                h = self.block(f"decoder/up/{level}/block/{i}", h)
            if level:
                h = self.F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.conv(f"decoder/up/{level}/upsample/conv", h)
        h = self.conv("decoder/conv_out", self.norm_silu("decoder/norm_out", h))
        return h.permute(0, 2, 3, 1)


def take_turns(runs, rounds):
    """name -> [(wall_s, cpu_s), ...], one pair per round."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def compare(name, actual, expected):
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max()
    scale = np.abs(np.asarray(expected)).max()
    print(f"{name}: largest difference {error:.1e} of {scale:.2f}")
    assert error < 1e-3 * scale, "the two programs do not compute the same"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="f16_8192", choices=sorted(vqgan.PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"

    cfg = dataclasses.replace(vqgan.PRESETS[args.preset], dtype=dtype)
    fn = vqgan.make(cfg)
    params = dict(jax.jit(fn.init)(jax.random.key(0)))
    # The initial codes are nearly equal, which would make every arg-min a tie.
    shape = params["quantize"]["embedding"].shape
    params["quantize"] = {"embedding": jax.random.normal(jax.random.key(1), shape)}

    encode = jax.jit(lambda p, x: (lambda m: (m.encode_latents(x), m.encode(x)))(fn.bind(p)))
    decode = jax.jit(lambda p, ids: fn.bind(p).decode(ids))
    rows = []
    for batch in args.batches:
        rng = np.random.default_rng(0)
        side = cfg.resolution
        image01 = rng.random((batch, side, side, 3), dtype=np.float32)
        ids = rng.integers(0, cfg.num_embeddings, (batch, cfg.tokens_per_image), dtype=np.int32)
        x, i = jnp.asarray(image01), jnp.asarray(ids)
        ours = {"encode": lambda x=x: encode(params, x), "decode": lambda i=i: decode(params, i)}
        theirs = {}
        if on_cpu:
            import torch

            model = TorchVqgan(cfg, params)
            tx, ti = torch.from_numpy(image01), torch.from_numpy(ids).long()
            run = torch.inference_mode()(lambda f, *a: f(*a))
            theirs = {
                "encode": lambda run=run, model=model, tx=tx: run(model.encode, tx),
                "decode": lambda run=run, model=model, ti=ti: run(model.decode, ti),
            }
            z, found = theirs["encode"]()
            compare("latents", ours["encode"]()[0], z.numpy())
            equal = (np.asarray(ours["encode"]()[1]) == found.numpy()).mean()
            print(f"ids: {equal:.1%} equal")
            compare("images", ours["decode"](), theirs["decode"]().numpy())
        for what in ("encode", "decode"):
            runs = {f"vlm_jax {dtype}": ours[what]}
            if theirs:
                runs = {"torch channels-last float32": theirs[what], **runs}
            for f in runs.values():
                jax.block_until_ready(f())
            base = None
            for name, pairs in take_turns(runs, args.rounds).items():
                wall, cpu = (min(column) for column in zip(*pairs))
                base = base or (wall, cpu)
                rows.append(
                    {
                        "what": f"{what} batch {batch}",
                        "program": name,
                        "min s": f"{wall:.3f}",
                        "median s": f"{statistics.median(p[0] for p in pairs):.3f}",
                        "CPU s": f"{cpu:.3f}",
                        "images/s": f"{batch / wall:.2f}",
                        "ratio": f"{base[0] / wall:.2f}",
                        "CPU ratio": f"{base[1] / cpu:.2f}",
                    }
                )
    print(machine.describe())
    machine.print_table(rows)


if __name__ == "__main__":
    main()
