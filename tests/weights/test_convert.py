"""The two-sided check: everything wrong is named, at once."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.weights import convert, errors


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


ABSTRACT = {"head": {"kernel": shape(2, 3)}, "layers": {"w": {"kernel": shape(2, 4, 5)}}}
RULES = (
    convert.Rule("head/kernel", "head.weight", lambda x, shape: x.T, lambda x: x.T),
    convert.Rule(r"layers/(\w)/kernel", r"h.{layer}.\1.weight"),
)


def upstream():
    return {
        "head.weight": np.arange(6.0, dtype=np.float32).reshape(3, 2),
        "h.0.w.weight": np.full((4, 5), 10, np.float32),
        "h.1.w.weight": np.full((4, 5), 11, np.float32),
    }


def test_names_layers_and_transforms():
    params = convert.convert(upstream(), RULES, ABSTRACT)
    np.testing.assert_array_equal(params["head"]["kernel"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(params["layers"]["w"]["kernel"][:, 0, 0], [10, 11])


def test_revert_gives_every_bit_back():
    params = convert.convert(upstream(), RULES, ABSTRACT)
    back = {name: load() for name, load in convert.revert(params, RULES).items()}
    assert back.keys() == upstream().keys()
    for name, array in upstream().items():
        np.testing.assert_array_equal(back[name], array)
    assert convert.reverted_shapes(ABSTRACT, RULES) == {k: v.shape for k, v in upstream().items()}


def test_one_missing_and_one_extra_are_both_named():
    tensors = upstream()
    tensors["h.1.v.weight"] = tensors.pop("h.1.w.weight")
    with pytest.raises(convert.ConversionError) as caught:
        convert.convert(tensors, RULES, ABSTRACT)
    assert caught.value.errors == (
        "h.1.v.weight: in the checkpoint, but no parameter takes it (nearest: h.1.w.weight)",
        "h.1.w.weight: missing from the checkpoint, layers/w/kernel needs it "
        "(nearest: h.1.v.weight)",
    )
    assert all(error in str(caught.value) for error in caught.value.errors)


def test_wrong_shapes_join_the_same_error():
    tensors = upstream()
    tensors["head.weight"] = tensors["head.weight"].T  # same size, so a reshape would pass
    tensors["h.0.w.weight"] = np.zeros((4, 6), np.float32)
    tensors["more"] = np.zeros(1)
    with pytest.raises(convert.ConversionError) as caught:
        convert.convert(tensors, RULES, ABSTRACT)
    assert caught.value.errors == (
        "more: in the checkpoint, but no parameter takes it",
        "head.weight: has shape (2, 3), but head/kernel needs (3, 2)",
        "h.0.w.weight: has shape (4, 6), but layers/w/kernel needs (4, 5)",
    )


def test_ignored_tensors_are_listed_and_whole_names_only():
    tensors = upstream() | {"rotary.inv_freq": np.zeros(3)}
    convert.convert(tensors, RULES, ABSTRACT, ignore=(r".*inv_freq",))
    assert convert.ignored(tensors, (r".*inv_freq",)) == ["rotary.inv_freq"]
    with pytest.raises(convert.ConversionError, match=r"rotary.inv_freq"):
        convert.convert(tensors, RULES, ABSTRACT, ignore=(r"inv_freq",))


def test_long_messages_are_cut_and_errors_are_not():
    tensors = {f"x{i}": np.zeros(1) for i in range(100)}
    with pytest.raises(convert.ConversionError, match=r"and 63 more") as caught:
        convert.convert(tensors, RULES, ABSTRACT)
    assert len(caught.value.errors) == 103


def test_parameter_without_a_rule():
    with pytest.raises(ValueError, match=r"no rule for the parameters \['bias'\]"):
        convert.convert({}, RULES, {"bias": shape(2)})


def test_dtype_is_that_of_the_tree_and_each_tensor_is_read_once():
    reads = []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    abstract = jax.tree.map(lambda x: shape(*x.shape, dtype="bfloat16"), ABSTRACT)
    params = convert.convert(Counting(upstream()), RULES, abstract)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert sorted(reads) == sorted(upstream())


@pytest.mark.parametrize("value, dtype, message", [
    (np.nan, "float32", "1 of 6 values are not finite, first nan at (1, 0)"),
    (-np.inf, "bfloat16", "1 of 6 values are not finite, first -inf at (1, 0)"),
    (1e5, "float16", "1 of 6 values are too large for float16, first 100000 at (1, 0)"),
    (3.4e38, "bfloat16", "1 of 6 values are too large for bfloat16, first 3.4e+38 at (1, 0)"),
])  # fmt: skip
def test_values_that_do_not_fit_are_named(value, dtype, message):
    tensors = upstream()
    tensors["head.weight"][1, 0] = value
    abstract = jax.tree.map(lambda x: shape(*x.shape, dtype=dtype), ABSTRACT)
    with pytest.raises(convert.ConversionError) as caught:
        convert.convert(tensors, RULES, abstract)
    assert caught.value.errors == (f"head.weight: {message}",)
    with pytest.raises(errors.WeightsError, match="^head.weight: 1 of 6 values"):
        convert.cast(tensors["head.weight"], dtype, "head.weight")


def test_whole_numbers_are_no_weights():
    tensors = upstream() | {"head.weight": np.ones((3, 2), np.int8)}
    with pytest.raises(convert.ConversionError, match="head.weight: holds int8.*is it quantised"):
        convert.convert(tensors, RULES, ABSTRACT)


def test_nothing_is_allocated_for_what_the_file_does_not_hold():
    huge = ABSTRACT | {"head": {"kernel": shape(2**20, 2**30)}}  # 4 PiB
    with pytest.raises(convert.ConversionError, match=r"has shape \(3, 2\), but head/kernel needs"):
        convert.convert(upstream(), RULES, huge)


def test_shardings_place_the_parameters():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    spec = {"head": PartitionSpec("data"), "layers": PartitionSpec(None, "data")}
    shardings = {
        "head": {"kernel": NamedSharding(mesh, spec["head"])},
        "layers": {"w": {"kernel": NamedSharding(mesh, spec["layers"])}},
    }
    placed = convert.convert(upstream(), RULES, ABSTRACT, shardings=shardings)
    plain = convert.convert(upstream(), RULES, ABSTRACT)
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(ours, theirs)
    assert placed["layers"]["w"]["kernel"].sharding == shardings["layers"]["w"]["kernel"]
    assert placed["layers"]["w"]["kernel"].addressable_shards[0].data.shape == (2, 2, 5)
