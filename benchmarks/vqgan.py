"""Tokenizer speed: images per second through the released f16-8192 network at 256 px.

    python benchmarks/vqgan.py                        # CPU: float32
    python benchmarks/vqgan.py --batches 16 64        # GPU: bfloat16

Against the same network in torch, channels-last under inference mode; both programs get the same
random weights and inputs in one process and take turns. Their outputs are compared before anything
is timed. The minimum over the rounds counts, the median stands beside it. On a machine that others
use, pin one core (`taskset -c 0`) and read the CPU seconds.
"""

import argparse
import dataclasses
import functools
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

    def __init__(self, cfg, params, device):
        import torch

        self.F, self.cfg = torch.nn.functional, cfg
        self.p = {}
        for path, leaf in functional.flatten(params).items():
            dtype = torch.float32 if path == "quantize/embedding" else getattr(torch, cfg.dtype)
            tensor = torch.from_numpy(np.array(leaf)).to(device, dtype)
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
        image = image.to(self.p["encoder/conv_in/kernel"].dtype)
        h = self.conv("encoder/conv_in", image.permute(0, 3, 1, 2))  # channels-last in memory
        for level in range(len(self.cfg.widths)):
            for i in range(self.cfg.num_res_blocks):
                h = self.block(f"encoder/down/{level}/block/{i}", h)
            if level + 1 < len(self.cfg.widths):
                h = self.F.pad(h, (0, 1, 0, 1))
                h = self.conv(f"encoder/down/{level}/downsample/conv", h, stride=2, padding=0)
        h = self.norm_silu("encoder/norm_out", self.mid("encoder/mid", h))
        z = self.conv("quant_conv", self.conv("encoder/conv_out", h)).permute(0, 2, 3, 1).float()
        e = self.p["quantize/embedding"]
        flat = z.reshape(-1, z.shape[-1])
        distances = flat.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * flat @ e.T
        return z, distances.argmin(1).reshape(len(z), -1)

    def decode(self, ids):
        """ids -> NHWC, not clamped."""
        side = round(ids.shape[1] ** 0.5)
        h = self.p["quantize/embedding"][ids].reshape(len(ids), side, side, -1)
        h = h.permute(0, 3, 1, 2).to(self.p["post_quant_conv/kernel"].dtype)
        h = self.conv("decoder/conv_in", self.conv("post_quant_conv", h))
        h = self.mid("decoder/mid", h)
        for level in reversed(range(len(self.cfg.widths))):
            for i in range(self.cfg.num_res_blocks + 1):
                h = self.block(f"decoder/up/{level}/block/{i}", h)
            if level:
                h = self.F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.conv(f"decoder/up/{level}/upsample/conv", h)
        h = self.conv("decoder/conv_out", self.norm_silu("decoder/norm_out", h))
        return h.permute(0, 2, 3, 1).float()


def take_turns(runs, rounds):
    """name -> [(wall_s, cpu_s), ...], one pair per round."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def compare(name, actual, expected, dtype):
    error = np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)
    print(f"{name}: within {error:.1e} of torch's", flush=True)
    assert error < (1e-3 if dtype == "float32" else 0.1), "the two programs differ"


def ours(cfg):
    """(params, encode(params, image01) -> (latents, ids), decode(params, ids))."""
    fn = vqgan.make(cfg)
    params = dict(jax.jit(fn.init)(jax.random.key(0)))
    # The initial codes are nearly equal, which would make every arg-min a tie.
    shape = params["quantize"]["embedding"].shape
    params["quantize"] = {"embedding": jax.random.normal(jax.random.key(1), shape)}

    @jax.jit
    def encode(params, image01_byxc):
        network = fn.bind(params)
        z_byxc = network.encode_latents(image01_byxc)
        return z_byxc, network.quantize(z_byxc)

    return params, encode, jax.jit(lambda params, ids_bt: fn.bind(params).decode(ids_bt))


def theirs(cfg, params, device):
    """(encode(image01), decode(ids)) of numpy arrays that were moved to the device before."""
    import torch

    torch.backends.cudnn.benchmark = True
    model = TorchVqgan(cfg, params, device)

    def move(x):
        return torch.from_numpy(x).to(device)

    programs = (
        machine.on_torch(torch.inference_mode()(run)) for run in (model.encode, model.decode)
    )
    return move, *programs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="f16_8192", choices=sorted(vqgan.PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="without torch")
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"

    cfg = dataclasses.replace(vqgan.PRESETS[args.preset], dtype=dtype)
    params, encode, decode = ours(cfg)
    rival = None
    if not args.alone and (on_cpu or machine.has_cuda_torch()):
        move, *rival = theirs(cfg, params, "cpu" if on_cpu else "cuda")
    rows = []
    for batch in args.batches:
        rng = np.random.default_rng(0)
        side = cfg.resolution
        image01 = rng.random((batch, side, side, 3), dtype=np.float32)
        ids = rng.integers(0, cfg.num_embeddings, (batch, cfg.tokens_per_image))
        programs = {
            f"vlm_jax {dtype}": (
                functools.partial(encode, params, jnp.asarray(image01)),
                functools.partial(decode, params, jnp.asarray(ids, jnp.int32)),
            )
        }
        if rival:
            runs = (functools.partial(f, move(x)) for f, x in zip(rival, (image01, ids)))
            programs = {f"torch channels-last {dtype}": tuple(runs), **programs}
        check(programs, dtype)
        for kind, what in enumerate(("encode", "decode")):
            runs = {name: program[kind] for name, program in programs.items()}
            rows += measure(runs, f"{what} batch {batch}", batch, args.rounds)
    machine.print_table(rows)
    print(machine.describe())


def check(programs, dtype):
    """Runs everything once, so that it is compiled, and compares with torch if it is there."""
    found = [[run() for run in program] for program in programs.values()]
    if len(found) == 2:
        ((z, ids), images), ((own_z, own_ids), own_images) = found
        compare("latents", own_z, z.cpu().numpy(), dtype)
        print(f"ids: {(np.asarray(own_ids) == ids.cpu().numpy()).mean():.1%} equal")
        compare("images", own_images, images.cpu().numpy(), dtype)


def measure(runs, what, batch, rounds):
    rows, base = [], None
    for name, pairs in take_turns(runs, rounds).items():
        wall, cpu = (min(column) for column in zip(*pairs))
        base = base or (wall, cpu)
        row = {
            "what": what,
            "program": name,
            "min s": f"{wall:.4f}",
            "median s": f"{statistics.median(p[0] for p in pairs):.4f}",
            "CPU s": f"{cpu:.4f}",
            "images/s": f"{batch / wall:.2f}",
            "ratio": f"{base[0] / wall:.2f}",
            "CPU ratio": f"{base[1] / cpu:.2f}",
        }
        rows.append(machine.note(row))
    return rows


if __name__ == "__main__":
    main()
