"""The MLP of a transformer's block."""

from __future__ import annotations

from flax import nnx

from vlm_jax.nn import activations, linear, lora, norms
from vlm_jax.ops import partition


class Mlp(nnx.Module):
    """down(f(up(x))), or with a gate down(f(gate(x)) * up(x)); f is the activation.

    Args:
      rngs: of the start values, drawn for gate, up, down.
      width: of input and output.
      hidden: between them.
      activation: a name of `activations`.
      gated: has a gate (Shazeer, arXiv 2002.05202).
      bias: all matrices have one.
      norm_eps: a LayerNorm with this eps before `down` (EVA-02); None is none.
      stack, scale, param_dtype: as in `linear.Linear`; out_scale: of `down`, None is `scale`.
      lora: which matrices have an addition.

    Raises:
      ValueError: no such activation.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        hidden: int,
        activation: str,
        *,
        gated: bool = False,
        bias: bool = False,
        norm_eps: float | None = None,
        stack: tuple[int, ...] = (),
        scale: float = 0.02,
        out_scale: float | None = None,
        param_dtype: str = "float32",
        lora: lora.Lora = lora.NONE,
    ):
        activations.check(activation)
        self.activation = activation

        def make(name, sizes, scale):
            fields = dict(stack=stack, scale=scale, param_dtype=param_dtype, **lora.of(name))
            return linear.Linear(rngs, sizes, sizes[1:] if bias else (), **fields)

        self.gate = make("gate", (width, hidden), scale) if gated else None
        self.up = make("up", (width, hidden), scale)
        self.down = make("down", (hidden, width), scale if out_scale is None else out_scale)
        if norm_eps is not None and stack:
            raise ValueError("norm_eps is for layers that are not stacked")
        has_norm = norm_eps is not None
        self.norm = norms.LayerNorm(hidden, norm_eps, param_dtype) if has_norm else None

    def __call__(self, x):
        """[B, ..., width] -> the same shape and dtype."""
        axes = "abc"[: x.ndim - 1]
        into, out_of = f"{axes}d,df->{axes}f", f"{axes}f,fd->{axes}d"
        activate = activations.BY_NAME[self.activation]
        if self.gate is None:
            hidden = activate(self.up(into, x))
        else:
            hidden = activate(self.gate(into, x)) * self.up(into, x)
        inner = (None,) * (x.ndim - 2)
        hidden = partition.constrain(hidden, partition.BATCH, *inner, "tensor")
        return self.down(out_of, hidden if self.norm is None else self.norm(hidden))
