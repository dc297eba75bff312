import base64

import numpy as np
import pytest

from vlm_jax.data import records
from vlm_jax.systems.lvm import format as lvm_format


def make(**fields):
    return lvm_format.Formatter(
        **{"max_tokens": 8, "vocab_size": 70, "bos_id": 64, "eos_id": 65} | fields
    )


IDS = np.array([3, 1, 2], "<i4")


@pytest.mark.parametrize(
    "tokens", [IDS.tobytes(), base64.b64encode(IDS.tobytes()).decode(), IDS, [3, 1, 2]]
)
def test_reads_base64_bytes_and_lists(tokens):
    ids, weights = make().encode({"tokens": tokens, "extra": 1})
    assert ids.tolist() == [64, 3, 1, 2, 65] and weights.tolist() == [1] * 5
    assert ids.dtype == np.int32 and weights.dtype == np.float32


def test_defaults_are_the_released_ids():
    ids, _ = lvm_format.make_formatter().encode({"tokens": IDS})
    assert ids.tolist() == [8192, 3, 1, 2, 8193]


@pytest.mark.parametrize(
    ("fields", "ids", "weights"),
    [
        ("{tokens}", [3, 1, 2], [1, 1, 1]),
        ("[<|bos|>],{tokens},<|eos|>", [64, 3, 1, 2, 65], [0, 1, 1, 1, 1]),
        ("<|7|>,[{tokens}],{more}", [7, 3, 1, 2, 9], [1, 0, 0, 0, 1]),
    ],
)
def test_field_language(fields, ids, weights):
    found = make(fields=fields).encode({"tokens": IDS, "more": [9]})
    assert found[0].tolist() == ids and found[1].tolist() == weights


def test_weights_of_the_record_are_factors():
    record = {"tokens": IDS, "tokens_weights": np.array([0.5, 1, 0], np.float32), "more": IDS}
    _, weights = make(fields="{tokens},[{tokens}],{more}").encode(record)
    assert weights.tolist() == [0.5, 1, 0, 0, 0, 0, 1, 1, 1] and weights.dtype == np.float32
    for wrong in ([1, 1], [1, 1, -1], [1, 1, np.nan], "abc"):
        with pytest.raises(records.BadRecordError, match="'tokens_weights' is .* not 3 numbers"):
            make().encode({"tokens": IDS, "tokens_weights": wrong})


def test_bos_id_zero_is_an_id():
    assert make(bos_id=0).encode({"tokens": IDS})[0][0] == 0


@pytest.mark.parametrize("fields", [",{tokens},", "caption", "<|x|>", "[{tokens}", ""])
def test_fields_that_cannot_work(fields):
    with pytest.raises(ValueError, match="is not {name}, <|id|>"):
        make(fields=fields)


def test_bad_records():
    for record, message in [
        ({"token": "AAAA"}, r"no field 'tokens' among \['token'\]"),
        ({"tokens": "not base64!"}, "field 'tokens'"),
        ({"tokens": b"12345"}, "field 'tokens': buffer size"),
    ]:
        with pytest.raises(records.BadRecordError, match=message):
            make().encode(record)


ODD = [
    5, None, True, 1.5, {"a": 1}, [1.7], [1.0], [None], [True, 1], [float("inf")], [float("nan")],
    [1e300], [10**30], [2**31], [[1, 2]], [[]], ["1"], "\ud800", "AAAA\n", b"123", "AAA=", {},
    np.array([1.0]), np.array(3), np.array([True]), np.array([[1]]),
]  # fmt: skip


@pytest.mark.parametrize("tokens", ODD, ids=repr)
def test_ids_of_other_types_are_bad_records(tokens):
    with pytest.raises(records.BadRecordError, match="field 'tokens'"):
        make().encode({"tokens": tokens})


def test_no_ids_are_an_empty_sentence():
    for nothing in ([], "", b"", (), np.zeros(0, np.int64)):
        assert make().encode({"tokens": nothing})[0].tolist() == [64, 65]


def test_messages_about_huge_records_are_short():
    huge = {f"key{i}" * 1000: "x" for i in range(1000)} | {b"bytes": 1}
    for record in (huge, {"tokens": "!" * 10**6}, {"tokens": [[1] * 10**6]}):
        with pytest.raises(records.BadRecordError) as caught:
            make().encode(record)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("bad", "place"), [(70, 2), (-1, 1)])
def test_ids_out_of_range_are_fatal(bad, place):
    ids = [3, 1, 2]
    ids[place - 1] = bad
    with pytest.raises(records.DataError, match=rf"{bad} at place {place} .*\[0, 70\)") as caught:
        make().encode({"tokens": ids})
    assert not isinstance(caught.value, records.BadRecordError)


def test_one_sentence_per_row():
    row = make()({"tokens": IDS})
    assert row["tokens"].tolist() == [64, 3, 1, 2, 0, 0, 0, 0]
    assert row["targets"].tolist() == [3, 1, 2, 65, 0, 0, 0, 0]
    assert row["weights"].tolist() == row["segments"].tolist() == [1] * 4 + [0] * 4
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    cut = make(max_tokens=3)({"tokens": IDS})
    assert cut["tokens"].tolist() == [64, 3, 1] and cut["targets"].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "weights",
    [None, 1, [1, 1], [1, 1, -1], [1, 1, float("nan")], [1, 1, float("inf")], [1, 1, 1e300],
     [[1], [1, 2], 3], ["a", "b", "c"], [[1, 1, 1]], {}],
    ids=repr,
)  # fmt: skip
def test_weights_of_other_kinds_are_bad_records(weights):
    with pytest.raises(records.BadRecordError, match="field 'tokens_weights'"):
        make().encode({"tokens": IDS, "tokens_weights": weights})


def test_many_rows_are_those_one_by_one():
    formatter = make(fields="<|bos|>,[{tokens}],{more},<|eos|>")
    shared = np.array([0.5, 1, 0], np.float32)
    found = [
        {"tokens": IDS, "more": IDS, "more_weights": shared},
        None,
        {"tokens": IDS},
        {"tokens": np.arange(7), "more": IDS, "more_weights": shared},  # cut within a field
        {"tokens": np.arange(8), "more": [], "more_weights": []},  # cut before the last id
        {"tokens": [], "more": [1.5]},
    ]
    rows, errors = formatter.format_many(iter(found), len(found))
    assert sorted(errors) == [2, 5] and "no field 'more'" in str(errors[2])
    for number, record in enumerate(found):
        good = record is not None and number not in errors
        expected = formatter(record) if good else {}
        for key, values in rows.items():
            assert values.dtype == (np.float32 if key == "weights" else np.int32)
            np.testing.assert_array_equal(values[number], expected.get(key, np.zeros(8)))
    assert rows["weights"][0].tolist() == [0, 0, 0, 0.5, 1, 0, 1, 0]


@pytest.mark.parametrize("bad", [-1, 70])
def test_ids_that_are_cut_off_are_checked_too(bad):
    tokens = [*range(12), bad]
    for call in (make(), make().encode, lambda record: make().format_many([None, record], 2)):
        with pytest.raises(records.DataError, match=f"token id {bad} at place 13 is outside"):
            call({"tokens": tokens})
    with pytest.raises(records.DataError, match="token id 99 at place 9"):
        make(eos_id=99)({"tokens": list(range(8))})
