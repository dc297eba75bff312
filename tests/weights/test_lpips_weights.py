"""LPIPS weights: the published package, files of the user, and pickles that want more."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_jax.models import vgg
from vlm_jax.nn import functional
from vlm_jax.weights import convert, errors, lpips


def torchvision_tensors(stages=5, seed=0):
    rng = np.random.default_rng(seed)
    tensors, width_in, index = {}, 3, 0
    for count, width in vgg.STAGES[:stages]:
        for _ in range(count):
            shape = (width, width_in, 3, 3)
            tensors[f"features.{index}.weight"] = rng.normal(size=shape).astype(np.float32)
            tensors[f"features.{index}.bias"] = rng.normal(size=width).astype(np.float32)
            width_in, index = width, index + 2
        index += 1
    return tensors


def head_tensors():
    rng = np.random.default_rng(1)
    return {
        f"lin{i}.model.1.weight": rng.uniform(size=(1, width, 1, 1)).astype(np.float32)
        for i, (_, width) in enumerate(vgg.STAGES)
    }


def test_files_of_the_user(tmp_path):
    tensors, heads = torchvision_tensors(), head_tensors()
    extra = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors | extra, tmp_path / "vgg16.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    paths = str(tmp_path / "vgg16.safetensors"), str(tmp_path / "heads.safetensors")
    params = lpips.load(*paths)
    flat = functional.flatten(params)
    # torchvision's features.28 is the thirteenth convolution.
    np.testing.assert_array_equal(
        flat["vgg/conv/12/kernel"], tensors["features.28.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(flat["heads/4/weight"], heads["lin4.model.1.weight"].reshape(512))
    assert sum(x.size for x in flat.values()) == 14_714_688 + 64 + 128 + 256 + 512 + 512
    few = functional.flatten(lpips.load(*paths, stages=3))
    assert sum(x.size for x in few.values()) == 1_735_488 + 64 + 128 + 256
    tensors["features.7.weight"] = tensors["features.7.weight"][:, :3].copy()
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(convert.ConversionError, match=r"features\.7\.weight"):
        lpips.load(str(tmp_path / "other.safetensors"), paths[1])


class Shell:
    def __reduce__(self):
        return print, ("this ran",)


class Fake:
    def __reduce__(self):
        return np.ndarray, ((2, 2),)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": Shell()}),
        pickle.dumps({"a": Fake()}),
        pickle.dumps({"a": np.array([print], object)}),
        pickle.dumps({"a": 3}),
        pickle.dumps({"a": np.zeros(3, np.float32)})[:-20],
        b"cos\nsystem\n(S'echo this ran'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
    ],
    ids=["call", "ndarray", "objects", "number", "cut off", "system", "eval"],
)
def test_other_pickles_are_refused(content, capfd):
    with pytest.raises(errors.WeightsError, match="evil.ckpt"):
        lpips.read_pickled_arrays(content, "evil.ckpt")
    assert "this ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_of_arrays_are_read(protocol):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.array(0.5, ">f8")}
    read = lpips.read_pickled_arrays(pickle.dumps({"a": arrays}, protocol=protocol), "file")
    np.testing.assert_array_equal(read["a"]["b"], arrays["b"])
    assert read["a"]["c"] == 0.5
