"""What an entry of a mixture says beside its source: form and weight."""

import json
import pickle

import numpy as np
import pytest

from vlm_jax.data import pipeline, records, sources


class Formatter:
    """Number of the record, and which form it came in."""

    forms = ("", "caption", "rec")

    def __call__(self, record, rng):
        form = self.forms.index(record.get("form", ""))
        return {"n": np.int32(record["n"]), "form": np.int32(form)}


def memory(count, start=0, **fields):
    return dict(type="memory", records=[{"n": start + i} for i in range(count)], **fields)


def dealt(mixture, steps, batch_size, **fields):
    config = pipeline.DataConfig(mixture=mixture, num_threads=0, **fields)
    with pipeline.make_batches(config, Formatter(), batch_size=batch_size, seed=0) as batches:
        found = [next(batches).arrays for _ in range(steps)]
    return {key: np.concatenate([x[key] for x in found]) for key in found[0]}


def test_a_corpus_in_two_forms():
    corpus = [{"n": i} for i in range(6)]
    mixture = {
        "rec": dict(type="memory", records=corpus, form="rec"),
        "caption": dict(type="memory", records=corpus, form="caption", weight=2.0),
        "plain": dict(type="memory", records=corpus),
    }
    found = dealt(mixture, 6, 4)
    counts = {form: (found["form"] == i).sum() for i, form in enumerate(Formatter.forms)}
    assert counts == {"": 6, "caption": 12, "rec": 6}
    assert sorted(found["n"][found["form"] == 2]) == list(range(6))
    assert "form" not in corpus[0]  # records are not changed in place


def test_by_size_every_record_comes_as_often():
    mixture = {
        "small": memory(3, weight="records"),
        "large": memory(21, start=100, weight="records"),
    }
    found = dealt(mixture, 9, 8)
    values, counts = np.unique(found["n"], return_counts=True)
    assert len(values) == 24 and (counts == 3).all()


def test_files_in_a_form(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": i}) + "\n" for i in range(4)))
    plain = sources.make_source("jsonl", path=str(path))
    formed = pickle.loads(pickle.dumps(sources.make_source("jsonl", path=str(path), form="rec")))
    assert len(formed) == 4 and formed[2] == {"n": 2, "form": "rec"}
    assert formed.record_id(2) == plain.record_id(2) and list(formed.skipped) == []
    assert formed.fingerprint() != plain.fingerprint()  # lengths may depend on the form
    assert hasattr(formed, "read_many") == hasattr(plain, "read_many")


def make_source(form="none", count=2):
    """A corpus that gives other records in another form."""
    return sources.Memory([{"n": i, "told": form} for i in range(count if form == "rec" else 9)])


class Bulk(sources.Memory):
    """Reads many at once; the second record is bad."""

    def read_many(self, indices):
        return [records.BadRecordError("bad") if i == 1 else self[i] for i in indices]


def test_a_corpus_may_ask_for_its_form():
    formed = sources.make_source("tests.data.test_mixture_entries", form="rec")
    assert len(formed) == 2 and formed[0] == {"n": 0, "told": "rec", "form": "rec"}
    assert len(sources.make_source("tests.data.test_mixture_entries")) == 9


def test_records_read_many_at_a_time_have_it_too():
    good, bad = sources._Formed(Bulk([{"n": 0}, {"n": 1}]), "rec").read_many(np.array([0, 1]))
    assert good == {"n": 0, "form": "rec"} and isinstance(bad, records.BadRecordError)


@pytest.mark.parametrize(
    "entries, message",
    [
        (dict(a=memory(1, weight="sizes")), "mixture.a.weight='sizes' must be a positive number"),
        (dict(a=memory(1, weight=True)), "mixture.a.weight=True must be"),
        (dict(a=memory(1, weight=-1)), "mixture.a.weight=-1 must be"),
        (dict(a=memory(1, form=3)), "mixture.a.form=3 is not a name"),
        (dict(a=memory(1, form="")), "mixture.a.form='' is not a name"),
        (dict(a=memory(1, weight="records"), b=memory(1, weight=2)), "mixture.b has a weight in"),
        (dict(a=memory(1, weight="records"), b=memory(1)), "mixture.b has a weight in numbers"),
    ],
)
def test_nonsense_is_refused_by_name(entries, message):
    with pytest.raises(ValueError, match=message):
        pipeline.DataConfig(mixture=entries)


def test_shares_that_are_too_small_are_named():
    mixture = dict(a=memory(2), b=memory(2, weight=1e-8))
    with pytest.raises(records.DataError, match="data.mixture: 'b' has a share of 1e-08"):
        dealt(mixture, 1, 2)
