"""VQGAN: a convolutional tokenizer, image -> grid of code ids -> image.

The tokenizer that LVM released (f16-8192, from open-muse); Esser et al. 2021, arXiv 2012.09841.

    image01 ─ encoder ─ quant_conv ─ z ─ nearest code ─ ids           [B, H/f * W/f], raster order
    ids ─ codebook ─ codes ─ post_quant_conv ─ decoder ─ image01      not clamped

    encoder: conv_in, then per level i: num_res_blocks x ResBlock [attention], Downsample unless
             last; mid: ResBlock [attention] ResBlock; norm, silu, conv_out
    decoder: conv_in, mid, then levels from the last to 0: (num_res_blocks + 1) x ResBlock
             [attention], Upsample unless level 0; norm, silu, conv_out

Pixels are float in [0, 1], [B, H, W, 3], without further normalisation. Any image whose sides are
multiples of the downsampling factor works; ids count rows first.

Released config: widths 128 256 256 512 768, no attention, 146,244,675 parameters = encoder
58,693,568 + decoder 87,018,499 + codebook 524,288 + 2 x 4,160.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from vlm_jax.nn import conv, functional
from vlm_jax.ops import attention


@dataclasses.dataclass(frozen=True)
class VqganConfig:
    """Sizes of a tokenizer. Field names follow the upstream config where it has one.

    Attributes:
      resolution: side in pixels that the network was made for; fixes which levels get attention.
      num_channels: of the image.
      hidden_channels: width of level 0, before its multiplier.
      channel_mult: width of level i is hidden_channels * channel_mult[i].
      num_res_blocks: per encoder level; decoder levels have one more.
      attn_resolutions: sides at which levels hold attention modules.
      mid_attn: attention in both middle blocks (upstream: not no_attn_mid_block).
      resample_with_conv: a convolution where the resolution changes; without it means of 2x2 pixels
        down and the nearest pixel up.
      z_channels: width of the encoder output.
      num_embeddings: codes in the codebook.
      quantized_width: width of a code (upstream: quantized_embed_dim).
      commitment_cost: factor in the quantizer loss, see `quantizer_loss`.
      norm_groups: groups of every GroupNorm; 32 upstream, fewer for narrow networks.
      dtype: of the convolutions. Norm statistics, distances and losses are float32.
      param_dtype: of the stored parameters.
    """

    resolution: int = 256
    num_channels: int = 3
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 6)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    mid_attn: bool = False
    resample_with_conv: bool = True
    z_channels: int = 64
    num_embeddings: int = 8192
    quantized_width: int = 64
    commitment_cost: float = 0.25
    norm_groups: int = 32
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        # JSON and ConfigDict give lists; a frozen config must hash.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult={self.channel_mult} must name a level, each from 1")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(
                    f"level width {width} (hidden_channels={self.hidden_channels}, "
                    f"channel_mult={self.channel_mult}) is not a multiple of "
                    f"norm_groups={self.norm_groups}"
                )
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution={self.resolution} is not a multiple of {self.downsampling}, the "
                f"downsampling of {len(self.channel_mult)} levels"
            )
        sides = [self.resolution >> level for level in range(len(self.channel_mult))]
        if unknown := set(self.attn_resolutions) - set(sides):
            raise ValueError(
                f"attn_resolutions={sorted(unknown)} match no level; the sides are {sides}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, full resolution first."""
        return tuple(self.hidden_channels * mult for mult in self.channel_mult)

    @property
    def downsampling(self) -> int:
        """Pixels per token along one axis."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def tokens_per_image(self) -> int:
        """Ids of a square image of side `resolution`."""
        return (self.resolution // self.downsampling) ** 2


PRESETS: Mapping[str, VqganConfig] = {
    # openMUSE/vqgan-f16-8192-laion, the tokenizer of the released LVM.
    "f16_8192": VqganConfig(),
    # ours: 64 px, 256 tokens; configs/vqgan_f16.py:tiny trains it and the package ships it.
    "tiny": VqganConfig(
        resolution=64,
        hidden_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        z_channels=32,
        num_embeddings=1024,
        quantized_width=8,
        norm_groups=4,
    ),
}

# Convolutions are split over their output channels; the rest is small and lives everywhere.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Three (an image) or z_channels wide: not worth splitting, often not divisible.
    (r"(^|/)(conv_out|quant_conv|post_quant_conv)/kernel$", PartitionSpec()),
    (
        r"(^|/)(conv|conv_in|conv1|conv2|nin_shortcut|q|k|v|proj_out)/kernel$",
        PartitionSpec(None, None, None, "fsdp"),
    ),
    (r"(^|/)quantize/embedding$", PartitionSpec()),
    (r"(^|/)(norm|norm1|norm2|norm_out)/scale$", PartitionSpec()),
    (r"/bias$", PartitionSpec()),
)


# Subtrees of the tokenizer; training may keep others beside them (discriminator, VGG16).
PARTS = ("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder")


class StraightThrough(NamedTuple):
    """What the quantizer gives to training.

    Attributes:
      codes_byxc: float32[B, h, w, C], the nearest codes; their gradient goes to z unchanged.
      ids_bt: int32[B, h*w].
      distances_bte: float32[B, h*w, codes], squared distances of z to every code.
      loss: scalar, see `quantizer_loss`.
    """

    codes_byxc: jax.Array
    ids_bt: jax.Array
    distances_bte: jax.Array
    loss: jax.Array


class Vqgan(nnx.Module):
    """The tokenizer. Parameter paths follow the upstream state dict.

    `self.quantize` is the module that owns the codebook: `quantize(z)` gives ids,
    `quantize.distances(z)` what they are the minimum of.
    """

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs)
        self.quant_conv = _conv(cfg, rngs, cfg.z_channels, cfg.quantized_width, 1)
        self.quantize = Codebook(cfg, rngs)
        self.post_quant_conv = _conv(cfg, rngs, cfg.quantized_width, cfg.z_channels, 1)
        self.decoder = Decoder(cfg, rngs)

    def encode_latents(self, image01_byxc):
        """float[B, H, W, 3] in [0, 1] -> z before quantisation, float32[B, H/f, W/f, C]."""
        factor = self.cfg.downsampling
        _, h, w, _ = image01_byxc.shape
        if h % factor or w % factor:
            raise ValueError(
                f"image of {h}x{w} pixels: both sides must be multiples of {factor}; resize it, "
                f"for example to {self.cfg.resolution}x{self.cfg.resolution}"
            )
        x_byxc = self.encoder(image01_byxc.astype(self.cfg.dtype))
        return self.quant_conv(x_byxc).astype(jnp.float32)

    def encode(self, image01_byxc):
        """float[B, H, W, 3] in [0, 1] -> int32[B, H/f * W/f], rows first."""
        return self.quantize(self.encode_latents(image01_byxc))

    def lookup(self, ids_bt):
        """int32[B, t] -> float32[B, side, side, C]; t must be a square."""
        b, t = ids_bt.shape
        side = math.isqrt(t)
        if side * side != t:
            raise ValueError(
                f"{t} ids per image are not a square grid; this tokenizer makes "
                f"{self.cfg.tokens_per_image} at {self.cfg.resolution} px"
            )
        return self.quantize.codes(ids_bt).reshape(b, side, side, -1)

    def decode_latents(self, codes_byxc):
        """float[B, h, w, C] -> image01 float32[B, f*h, f*w, 3], not clamped."""
        return self.last_conv(self.decode_features(codes_byxc))

    def decode_features(self, codes_byxc):
        """float[B, h, w, C] -> what the decoder's last convolution reads, [B, f*h, f*w, width]."""
        return self.decoder.features(self.post_quant_conv(codes_byxc.astype(self.cfg.dtype)))

    def last_conv(self, features_byxc, kernel=None):
        """`decode_features` -> image01 float32, not clamped; `kernel` stands in for its own."""
        layer = self.decoder.conv_out
        kernel = layer.kernel[...] if kernel is None else kernel
        return conv.conv2d(features_byxc, kernel, layer.bias[...]).astype(jnp.float32)

    def decode(self, ids_bt):
        """int32[B, t] -> image01 float32[B, f*sqrt(t), f*sqrt(t), 3], not clamped."""
        return self.decode_latents(self.lookup(ids_bt))

    def hidden_states(self, image01_byxc):
        """What leaves every part while an image is encoded and decoded again.

        Args:
          image01_byxc: float[B, H, W, 3] in [0, 1].

        Returns:
          Name -> float[B, H', W', C], in their order: "encoder/conv_in", "encoder/down/0", ...,
          "encoder/mid", "encoder/conv_out", "latents" (before quantisation), "codes" (behind it),
          "decoder/conv_in", "decoder/mid", "decoder/up/N", ..., "decoder/up/0", "decoder/norm_out",
          and "image01", not clamped.
        """
        states = dict(self.encoder.stages(image01_byxc.astype(self.cfg.dtype)))
        states = {f"encoder/{name}": x for name, x in states.items()}
        z_byxc = self.quant_conv(states["encoder/conv_out"]).astype(jnp.float32)
        codes_byxc = self.quantize.codes(self.quantize(z_byxc)).reshape(z_byxc.shape)
        x_byxc = self.post_quant_conv(codes_byxc.astype(self.cfg.dtype))
        decoded = {f"decoder/{name}": x for name, x in self.decoder.stages(x_byxc)}
        image01_byxc = self.last_conv(decoded["decoder/norm_out"])
        return (
            states | dict(latents=z_byxc, codes=codes_byxc) | decoded | dict(image01=image01_byxc)
        )

    def straight_through(self, z_byxc, *, factor_on="codebook", weight_b=None) -> StraightThrough:
        """Quantises z for training: the codes forward, the identity backward."""
        distances_bte = self.quantize.distances(z_byxc)
        ids_bt = jnp.argmin(distances_bte, axis=-1)
        codes_byxc = self.quantize.codes(ids_bt).reshape(z_byxc.shape)
        loss = quantizer_loss(
            z_byxc,
            codes_byxc,
            cost=self.cfg.commitment_cost,
            factor_on=factor_on,
            weight_b=weight_b,
        )
        passed_byxc = z_byxc + lax.stop_gradient(codes_byxc - z_byxc)
        return StraightThrough(passed_byxc, ids_bt, distances_bte, loss)

    def __call__(self, image01_byxc):
        """image01 -> (reconstruction through the straight-through codes, StraightThrough)."""
        quantized = self.straight_through(self.encode_latents(image01_byxc))
        return self.decode_latents(quantized.codes_byxc), quantized


def quantizer_loss(z_byxc, codes_byxc, *, cost, factor_on="codebook", weight_b=None):
    """mean((sg[e] - z)^2) and mean((e - sg[z])^2), one of them times `cost`.

    The first pulls the encoder to its code (commitment), the second the code to the encoder.

    Args:
      z_byxc: float32, latents before quantisation.
      codes_byxc: float32, their nearest codes, differentiable in the codebook.
      cost: the factor, 0.25 in the released config.
      factor_on: "codebook" as the released code does (upstream: VectorQuantizer.forward, the
        "legacy" order of taming), "commitment" as the VQ-VAE paper has it (eq. 3).
      weight_b: float32[B] of each example in the means; None counts all alike.

    Returns:
      Scalar.
    """
    commitment = weighted_mean(jnp.square(lax.stop_gradient(codes_byxc) - z_byxc), weight_b)
    codebook = weighted_mean(jnp.square(codes_byxc - lax.stop_gradient(z_byxc)), weight_b)
    if factor_on == "codebook":
        return commitment + cost * codebook
    if factor_on == "commitment":
        return codebook + cost * commitment
    raise ValueError(f"factor_on={factor_on!r}; use 'codebook' or 'commitment'")


def entropy_penalty(distances_bte, *, temperature, weight_b=None):
    """MaskGIT's penalty: decided tokens, evenly used codes.

    With p = softmax(-distance / temperature) per token, the mean entropy of p minus the entropy of
    the mean p: low when every token is sure of its code and the batch uses all codes. Keeps small
    codebooks from collapsing.

    Args:
      distances_bte: float32[B, t, codes].
      temperature: MaskGIT uses 0.01 on its own latent scale.
      weight_b: float32[B] of each example in the means; None counts all alike.

    Returns:
      Scalar in [-log(codes), 0], up to rounding.
    """
    logp_bte = jax.nn.log_softmax(-distances_bte / temperature, axis=-1)
    p_bte = jnp.exp(logp_bte)
    mean_p_e = weighted_mean(p_bte.mean(1), weight_b, axis=0)
    token_entropy = weighted_mean(-jnp.sum(p_bte * logp_bte, axis=-1), weight_b)
    code_entropy = -jnp.sum(mean_p_e * jnp.log(mean_p_e + 1e-8))
    return token_entropy - code_entropy


def weighted_mean(x, weight_b=None, axis=None):
    """Mean of x[B, ...] over all axes (or `axis` 0 alone), examples weighted; 0 without weight."""
    if weight_b is None:
        return jnp.mean(x, axis=axis)
    weight = weight_b.reshape(-1, *(1,) * (x.ndim - 1)) / jnp.maximum(weight_b.sum(), 1e-9)
    per_example = x if axis == 0 else x.mean(tuple(range(1, x.ndim)), keepdims=True)
    return jnp.sum(weight * per_example, axis=axis)


class Codebook(nnx.Module):
    """num_embeddings vectors; a latent becomes the id of the nearest, the lowest id on ties."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs):
        bound = 1.0 / cfg.num_embeddings  # upstream: VectorQuantizer.__init__
        shape = (cfg.num_embeddings, cfg.quantized_width)
        self.embedding = nnx.Param(
            jax.random.uniform(
                rngs.params(), shape, jnp.dtype(cfg.param_dtype), minval=-bound, maxval=bound
            )
        )

    def distances(self, z_byxc):
        """Squared L2 distances, float32[B, h*w, codes]."""
        b, h, w, c = z_byxc.shape
        z_btc = z_byxc.astype(jnp.float32).reshape(b, h * w, c)
        e_ec = self.embedding[...].astype(jnp.float32)
        # Full precision: accelerators would round the products, and the arg-min with them.
        dot_bte = jnp.einsum("btc,ec->bte", z_btc, e_ec, precision=lax.Precision.HIGHEST)
        z2_bt1 = jnp.sum(jnp.square(z_btc), axis=-1, keepdims=True)
        return z2_bt1 + jnp.sum(jnp.square(e_ec), axis=-1) - 2.0 * dot_bte

    def __call__(self, z_byxc):
        """float[B, h, w, C] -> int32[B, h*w], rows first."""
        return jnp.argmin(self.distances(z_byxc), axis=-1)

    def codes(self, ids_bt):
        """int32[B, t] -> float32[B, t, C]."""
        return self.embedding[...].astype(jnp.float32)[ids_bt]

    def soft_codes(self, z_byxc, *, temperature=1.0):
        """Probabilities of every code, float32[B, h*w, codes]; the hard code is their arg-max."""
        return jax.nn.softmax(-self.distances(z_byxc) / temperature, axis=-1)


class Encoder(nnx.Module):
    """Image to latents of width z_channels."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs):
        last = len(cfg.widths) - 1
        self.conv_in = _conv(cfg, rngs, cfg.num_channels, cfg.hidden_channels, 3)
        self.down = nnx.List([])
        width_in = cfg.hidden_channels
        for level, width in enumerate(cfg.widths):
            self.down.append(
                Level(
                    cfg,
                    rngs,
                    width_in,
                    width,
                    blocks=cfg.num_res_blocks,
                    side=cfg.resolution >> level,
                    downsample=level != last,
                )
            )
            width_in = width
        self.mid = Mid(cfg, rngs, width_in)
        self.norm_out = _norm(cfg, width_in)
        self.conv_out = _conv(cfg, rngs, width_in, cfg.z_channels, 3)

    def __call__(self, x_byxc):
        """float[B, H, W, 3] -> float[B, H/f, W/f, z_channels]."""
        *_, (_, z_byxc) = self.stages(x_byxc)
        return z_byxc

    def stages(self, x_byxc):
        """(name, what leaves it) of every part, in their order."""
        h_byxc = self.conv_in(x_byxc)
        yield "conv_in", h_byxc
        for i, level in enumerate(self.down):
            h_byxc = level(h_byxc)
            yield f"down/{i}", h_byxc
        h_byxc = self.mid(h_byxc)
        yield "mid", h_byxc
        yield "conv_out", self.conv_out(jax.nn.silu(self.norm_out(h_byxc)))


class Decoder(nnx.Module):
    """Latents of width z_channels to an image. `up["0"]` is full resolution and runs last."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs):
        last = len(cfg.widths) - 1
        self.conv_in = _conv(cfg, rngs, cfg.z_channels, cfg.widths[-1], 3)
        self.mid = Mid(cfg, rngs, cfg.widths[-1])
        self.up = nnx.List([])
        for level, width in enumerate(cfg.widths):
            self.up.append(
                Level(
                    cfg,
                    rngs,
                    cfg.widths[min(level + 1, last)],
                    width,
                    blocks=cfg.num_res_blocks + 1,
                    side=cfg.resolution >> level,
                    upsample=level != 0,
                )
            )
        self.norm_out = _norm(cfg, cfg.widths[0])
        self.conv_out = _conv(cfg, rngs, cfg.widths[0], cfg.num_channels, 3)

    def __call__(self, x_byxc):
        """float[B, h, w, z_channels] -> float[B, f*h, f*w, 3]."""
        return self.conv_out(self.features(x_byxc))

    def features(self, x_byxc):
        """float[B, h, w, z_channels] -> float[B, f*h, f*w, width of level 0]."""
        *_, (_, h_byxc) = self.stages(x_byxc)
        return h_byxc

    def stages(self, x_byxc):
        """(name, what leaves it) of every part up to the last convolution, in their order."""
        h_byxc = self.conv_in(x_byxc)
        yield "conv_in", h_byxc
        h_byxc = self.mid(h_byxc)
        yield "mid", h_byxc
        for i in reversed(range(len(self.up))):
            h_byxc = self.up[i](h_byxc)
            yield f"up/{i}", h_byxc
        yield "norm_out", jax.nn.silu(self.norm_out(h_byxc))


class Level(nnx.Module):
    """Residual blocks of one resolution, optional attention after each, optional resampling."""

    def __init__(
        self,
        cfg: VqganConfig,
        rngs: nnx.Rngs,
        width_in: int,
        width: int,
        *,
        blocks: int,
        side: int,
        downsample: bool = False,
        upsample: bool = False,
    ):
        self.block = nnx.List(
            [ResBlock(cfg, rngs, width if i else width_in, width) for i in range(blocks)]
        )
        attentions = blocks if side in cfg.attn_resolutions else 0
        self.attn = nnx.List([Attention(cfg, rngs, width) for _ in range(attentions)])
        if downsample:
            self.downsample = Downsample(cfg, rngs, width)
        if upsample:
            self.upsample = Upsample(cfg, rngs, width)

    def __call__(self, h_byxc):
        """float[B, H, W, C_in] -> float[B, H', W', C]; H' is H, H/2 or 2*H."""
        for i, block in enumerate(self.block):
            h_byxc = block(h_byxc)
            # Upstream creates attention for every block but applies it only when the level holds
            # more than one. A single one is dead weight there; using it would change the ids.
            if len(self.attn) > 1:
                h_byxc = self.attn[i](h_byxc)
        if hasattr(self, "downsample"):
            h_byxc = self.downsample(h_byxc)
        if hasattr(self, "upsample"):
            h_byxc = self.upsample(h_byxc)
        return h_byxc


class Mid(nnx.Module):
    """ResBlock, optional attention, ResBlock at the lowest resolution."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs, width: int):
        self.block_1 = ResBlock(cfg, rngs, width, width)
        if cfg.mid_attn:
            self.attn_1 = Attention(cfg, rngs, width)
        self.block_2 = ResBlock(cfg, rngs, width, width)

    def __call__(self, h_byxc):
        """float[B, H, W, C] -> the same shape."""
        h_byxc = self.block_1(h_byxc)
        if hasattr(self, "attn_1"):
            h_byxc = self.attn_1(h_byxc)
        return self.block_2(h_byxc)


class ResBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), a 1x1 convolution on x when the width changes."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs, width_in: int, width: int):
        self.norm1 = _norm(cfg, width_in)
        self.conv1 = _conv(cfg, rngs, width_in, width, 3)
        self.norm2 = _norm(cfg, width)
        self.conv2 = _conv(cfg, rngs, width, width, 3)
        if width_in != width:
            self.nin_shortcut = _conv(cfg, rngs, width_in, width, 1)

    def __call__(self, x_byxc):
        """float[B, H, W, C_in] -> float[B, H, W, C]."""
        h_byxc = self.conv1(jax.nn.silu(self.norm1(x_byxc)))
        h_byxc = self.conv2(jax.nn.silu(self.norm2(h_byxc)))
        if hasattr(self, "nin_shortcut"):
            x_byxc = self.nin_shortcut(x_byxc)
        return x_byxc + h_byxc


class Attention(nnx.Module):
    """Single-head attention over all positions of the grid, residual."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs, width: int):
        self.norm = _norm(cfg, width)
        self.q = _conv(cfg, rngs, width, width, 1)
        self.k = _conv(cfg, rngs, width, width, 1)
        self.v = _conv(cfg, rngs, width, width, 1)
        self.proj_out = _conv(cfg, rngs, width, width, 1)

    def __call__(self, x_byxc):
        """float[B, H, W, C] -> the same shape."""
        b, h, w, c = x_byxc.shape
        normed_byxc = self.norm(x_byxc)
        q_btnh = self.q(normed_byxc).reshape(b, h * w, 1, c)
        k_bsnh = self.k(normed_byxc).reshape(b, h * w, 1, c)
        v_bsnh = self.v(normed_byxc).reshape(b, h * w, 1, c)
        o_btnh = attention.attend(q_btnh, k_bsnh, v_bsnh)
        return x_byxc + self.proj_out(o_btnh.reshape(b, h, w, c))


class Downsample(nnx.Module):
    """Halves the resolution. Zeros at the bottom and the right only, as upstream pads."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs, width: int):
        if cfg.resample_with_conv:
            self.conv = _conv(cfg, rngs, width, width, 3, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x_byxc):
        """float[B, H, W, C] -> float[B, H/2, W/2, C]."""
        if hasattr(self, "conv"):
            return self.conv(x_byxc)
        return nnx.avg_pool(x_byxc, (2, 2), (2, 2))


class Upsample(nnx.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, cfg: VqganConfig, rngs: nnx.Rngs, width: int):
        if cfg.resample_with_conv:
            self.conv = _conv(cfg, rngs, width, width, 3)

    def __call__(self, x_byxc):
        """float[B, H, W, C] -> float[B, 2*H, 2*W, C]."""
        if not hasattr(self, "conv"):
            return jnp.repeat(jnp.repeat(x_byxc, 2, axis=1), 2, axis=2)
        return conv.upsample_conv2d(x_byxc, self.conv.kernel[...], self.conv.bias[...])


def make(cfg: VqganConfig) -> functional.Functional:
    """The network behind the functional boundary: `.init(rng)`, `.abstract()`, `.bind(params)`."""
    return functional.Functional(lambda rngs: Vqgan(cfg, rngs))


def tokenizer_part(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the tokenizer alone, out of those of a training run."""
    return {name: params[name] for name in PARTS}


def num_params(cfg: VqganConfig) -> dict[str, int]:
    """Parameters by part ("encoder", "decoder", "quantize", ...) and "total", from shapes."""
    counts: dict[str, Any] = {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for part, tree in make(cfg).abstract().items()
    }
    return {**counts, "total": sum(counts.values())}


def _conv(cfg, rngs, width_in, width_out, size, **fields):
    return conv.Conv(rngs, width_in, width_out, size, param_dtype=cfg.param_dtype, **fields)


def _norm(cfg, width):
    return conv.GroupNorm(width, groups=cfg.norm_groups, eps=1e-6, param_dtype=cfg.param_dtype)
