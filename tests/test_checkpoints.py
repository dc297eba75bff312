"""Checkpoints are complete and unchanged, or not used; errors reach the training loop."""

import errno
import json
import os
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vlm_jax import checkpoints
from vlm_jax.checkpoints import commit_marker

P = jax.sharding.PartitionSpec


def _mesh(*shape):
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, ("data", "fsdp")[: len(shape)], axis_types=axis_types)


def _state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((width, 16)).astype(np.float32)
    return {
        "step": jnp.int32(seed),
        "params": {
            "layers": {"0": {"kernel": jnp.asarray(kernel)}, "1": {"scale": jnp.ones(3)}},
            "table": jnp.asarray(kernel, jnp.bfloat16),
        },
        "opt_state": ({"mu": jnp.asarray(2 * kernel)}, (), jnp.int32(7)),
    }


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _save(workdir, *steps, **options):
    with checkpoints.Checkpointer(workdir, **options) as saver:
        for step in steps:
            assert saver.save(step, _state(step), {"data": {"step": step}})
    return workdir / "checkpoints"


def _data_file(folder):
    """The largest file that holds arrays."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_round_trip_is_bit_for_bit(tmp_path):
    folder = _save(tmp_path, 10, 20)
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 20
        for step in (10, 20):
            state, meta = saver.restore(step, jax.eval_shape(lambda: _state(0)))
            _equal(state, _state(step))
            assert meta == {"data": {"step": step}}
    marker = json.loads((folder / "20" / "COMMIT.json").read_text())
    assert "meta.json" in marker["files"] and any("state/" in name for name in marker["files"])


def test_what_is_saved_is_the_state_of_the_call(tmp_path):
    # The loop goes on, and donates these buffers, while orbax still writes.
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)  # 16 MiB
    state = {"params": {"w": jnp.array(noise)}}
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(1, state, {})
        for _ in range(20):
            state = update(state)
        assert np.abs(state["params"]["w"] - noise).min() > 19
    saved = checkpoints.load_params(tmp_path)["w"]
    np.testing.assert_array_equal(saved, noise)


def test_restores_onto_another_mesh(tmp_path):
    def place(tree, mesh, spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

    kernel = {"params": {"kernel": _state(3)["params"]["layers"]["0"]["kernel"]}}
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(3, place(kernel, _mesh(8, 1), P("data")), {})
    target = jax.sharding.NamedSharding(_mesh(2, 4), P("fsdp", "data"))
    abstract = {"params": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=target)}}
    with checkpoints.Checkpointer(tmp_path) as saver:
        state, _ = saver.restore(3, abstract)
    _equal(state, kernel)
    assert state["params"]["kernel"].sharding == target


def _truncate(folder):
    file = _data_file(folder)
    os.truncate(file, file.stat().st_size - 1)


def _flip_a_bit(folder):
    file = _data_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _lose_a_file(folder):
    _data_file(folder).unlink()


def _lose_the_marker(folder):
    (folder / "COMMIT.json").unlink()


def _break_the_marker(folder):
    (folder / "COMMIT.json").write_text('{"files": {"a":')


def _empty(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (_truncate, "bytes of .*cut off"),
        (_flip_a_bit, "digest differs"),
        (_lose_a_file, "is missing"),
        (_lose_the_marker, "no COMMIT.json"),
        (_break_the_marker, "cannot be read"),
        (_empty, "is empty"),
    ],
)
def test_a_damaged_step_is_passed_over_with_one_line(tmp_path, capfd, damage, reason):
    folder = _save(tmp_path, 10, 20)
    damage(folder / "20")
    capfd.readouterr()
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
        said = capfd.readouterr().err.strip()
        assert said.startswith("checkpoints: checkpoint of step 20 is not used: ")
        assert "\n" not in said
        assert re.search(reason, said), said
        with pytest.raises(checkpoints.CheckpointError, match=reason):
            saver.restore(20, jax.eval_shape(lambda: _state(0)))
        # The run continues, and step 20 is saved again beside what was rejected.
        state, _ = saver.restore(10, jax.eval_shape(lambda: _state(0)))
        _equal(state, _state(10))
        assert saver.save(20, _state(20), {})
    assert checkpoints.Checkpointer(tmp_path).latest_good() == 20
    assert (folder / "rejected-20-0").is_dir()


def test_no_checkpoint_at_all(tmp_path, capfd):
    assert checkpoints.Checkpointer(tmp_path).latest_good() is None
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "7").write_text("a file")
    assert checkpoints.Checkpointer(tmp_path).latest_good() is None
    assert capfd.readouterr().err == ""
    with pytest.raises(checkpoints.CheckpointError, match="no good checkpoint"):
        checkpoints.load_params(tmp_path)


def test_odd_neighbours_are_left_alone(tmp_path, capfd):
    folder = _save(tmp_path, 10)
    for name in ("²", "٣", "007", "1_0", "-5", "1e3", "notes"):
        (folder / name).mkdir()
    for name in ("12", "٤"):
        (folder / name).write_text("a file")
    (folder / "14").symlink_to(tmp_path / "nowhere")
    names = {path.name for path in folder.iterdir()}
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
        assert checkpoints.find(tmp_path).number == 10
        assert capfd.readouterr().err == ""
        for step in (12, 14):  # what stands in the way of a save is kept beside it
            saver.save(step, _state(step), {})
    assert (folder / "rejected-12-0").read_text() == "a file"
    assert (folder / "rejected-14-0").is_symlink()
    assert names <= {path.name for path in folder.iterdir()}
    assert checkpoints.find(tmp_path).number == 14


def test_a_renamed_step_is_not_continued(tmp_path, capfd):
    folder = _save(tmp_path, 10, 20)
    (folder / "20").rename(folder / "30")
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
    assert "says in its meta.json that it is step 20" in capfd.readouterr().err
    with pytest.raises(checkpoints.CheckpointError, match="is step 20; it was renamed"):
        checkpoints.load_params(folder / "30")
    (folder / "30").rename(tmp_path / "best")  # a name that is no number says nothing
    _equal(checkpoints.load_params(tmp_path / "best"), _state(20)["params"])


def test_values_that_are_not_finite_are_passed_over(tmp_path, capfd):
    bad = _state(20)
    bad["params"]["layers"]["1"]["scale"] = jnp.array([1.0, jnp.nan, 1.0])
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(10, _state(10), {})
        saver.save(20, bad, {})
        with pytest.raises(checkpoints.NotFiniteError, match="step 30 .*1 of 6.*layers/1/scale"):
            saver.save(30, bad, {}, must_be_finite=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "20"]
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
    assert "not finite, in params/layers/1/scale" in capfd.readouterr().err
    _equal(checkpoints.load_params(tmp_path), _state(10)["params"])
    with pytest.raises(checkpoints.CheckpointError, match="not finite"):
        checkpoints.load_params(tmp_path / "checkpoints" / "20")


def _without_record(folder):
    """As a checkpoint was saved before non-finite values were noted."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["nonfinite"]
    (folder / "meta.json").write_text(json.dumps(meta))
    commit_marker.commit(epath.Path(folder))


def test_older_checkpoints_are_looked_at_when_they_are_read(tmp_path, capfd):
    bad = _state(20)
    bad["params"]["table"] = bad["params"]["table"].at[0, 0].set(jnp.inf)
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(10, _state(10), {})
        saver.save(20, bad, {})
    for step in (10, 20):
        _without_record(tmp_path / "checkpoints" / str(step))
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
    assert "not finite, in params/table" in capfd.readouterr().err
    assert checkpoints.find(tmp_path).number == 10


@pytest.mark.parametrize("name", ["COMMIT.json", "meta.json"])
def test_json_of_any_kind_is_passed_over(tmp_path, name, capfd):
    folder = _save(tmp_path, 10, 20)
    for content in ("[" * 100_000, "null", "[1]", '{"files": {"../10/meta.json": 1}}', "{}"):
        (folder / "20" / name).write_text(content)
        if name == "meta.json":
            (folder / "20" / "COMMIT.json").unlink()
            commit_marker.commit(epath.Path(folder / "20"))
        assert checkpoints.Checkpointer(tmp_path).latest_good() == 10, content
        said = capfd.readouterr().err
        assert said.startswith("checkpoints: checkpoint of step 20 is not used") and len(said) < 600


def test_the_average_is_what_is_loaded(tmp_path):
    state = _state(1)
    scale = {"layers/1/scale": 5 * jnp.ones(3)}  # one parameter that learns
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(1, {**state, "ema": scale}, {})
    averaged = checkpoints.load_params(tmp_path)
    np.testing.assert_array_equal(averaged["layers"]["1"]["scale"], 5)
    np.testing.assert_array_equal(averaged["table"], state["params"]["table"])
    abstract = jax.eval_shape(lambda: state["params"])
    _equal(checkpoints.load_params(tmp_path, abstract), averaged)
    _equal(checkpoints.load_params(tmp_path, averaged=False), state["params"])


def test_what_a_killed_save_left_makes_way(tmp_path, capfd):
    folder = _save(tmp_path, 10)
    for step in (20, 25):
        (folder / str(step) / "state.orbax-checkpoint-tmp-0").mkdir(parents=True)
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.latest_good() == 10
        assert capfd.readouterr().err.count("its save did not finish") == 2
        saver.save(20, _state(20), {})
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_keeps_the_last_and_the_milestones(tmp_path):
    folder = _save(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_last=2, milestone_every=3)
    assert sorted(os.listdir(folder)) == ["3", "6", "7"]


def test_rejected_steps_do_not_push_out_good_ones(tmp_path):
    folder = _save(tmp_path, 10, 20, 30)
    _flip_a_bit(folder / "20")
    _flip_a_bit(folder / "30")
    with checkpoints.Checkpointer(tmp_path, keep_last=2) as saver:
        assert saver.latest_good() == 10
        saver.save(25, _state(25), {})
    assert {"10", "25"} <= set(os.listdir(folder))


def test_saving_a_step_twice(tmp_path):
    with checkpoints.Checkpointer(tmp_path) as saver:
        assert saver.save(5, _state(5), {}) is True
        assert saver.save(5, _state(6), {}) is False
    with checkpoints.Checkpointer(tmp_path) as saver:
        with pytest.raises(checkpoints.CheckpointError, match="step 5 is already saved"):
            saver.save(5, _state(6), {})
        assert saver.latest_good() == 5
        assert saver.save(5, _state(6), {}) is False
        _equal(saver.restore(5, jax.eval_shape(lambda: _state(0)))[0], _state(5))


def test_a_checkpoint_of_another_model_is_named_leaf_by_leaf(tmp_path):
    _save(tmp_path, 1)
    other = _state(0, width=4)
    other["params"]["lora"] = jnp.zeros((2, 2))
    other["opt_state"] = ({"mu": jnp.zeros((8, 16), jnp.bfloat16)}, (), jnp.int32(0))
    with checkpoints.Checkpointer(tmp_path) as saver:
        with pytest.raises(checkpoints.CheckpointError) as caught:
            saver.restore(1, other)
    message = str(caught.value)
    assert "4 of 7 leaves differ" in message
    assert "params/layers/0/kernel: checkpoint float32[8, 16], model float32[4, 16]\n" in message
    assert "params/lora: checkpoint absent, model float32[2, 2]\n" in message
    assert "opt_state/0/mu: checkpoint float32[8, 16], model bfloat16[8, 16]\n" in message


def test_parameters_alone(tmp_path):
    folder = _save(tmp_path / "run", 1, 2)
    _flip_a_bit(folder / "2")
    params = checkpoints.load_params(folder.parent)
    _equal(params, _state(1)["params"])
    _equal(checkpoints.load_params(folder / "1"), _state(1)["params"])
    folder.parent.rename(tmp_path / "2026")  # a workdir may have the name of a step
    _equal(checkpoints.load_params(tmp_path / "2026"), _state(1)["params"])
    (tmp_path / "2026").rename(folder.parent)
    with pytest.raises(checkpoints.CheckpointError, match="digest differs"):
        checkpoints.load_params(folder / "2")
    with pytest.raises(checkpoints.CheckpointError, match="holds no 'ema'"):
        checkpoints.load_params(folder.parent, item="ema")

    abstract = jax.eval_shape(lambda: _state(0)["params"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
    cast = checkpoints.load_params(folder.parent, half)
    _equal(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    del abstract["table"]
    with pytest.raises(checkpoints.CheckpointError, match="params/table: .*model absent"):
        checkpoints.load_params(folder.parent, abstract)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    folder = _save(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "_free_bytes", lambda folder: 1000)
    with checkpoints.Checkpointer(tmp_path) as saver:
        with pytest.raises(checkpoints.CheckpointError) as caught:
            saver.save(2, _state(2), {})
        assert saver.latest_good() == 1
    message = str(caught.value)
    # 128 + 3 + 128 float32, 128 bfloat16, 2 int32, and 1 MiB spare
    assert f"{folder / '2'} needs {4 * (128 + 3 + 128) + 2 * 128 + 8 + 2**20:,} bytes" in message
    assert "1,000 bytes are free" in message
    assert os.listdir(folder) == ["1"]


@pytest.mark.parametrize("surfaces_in", ["wait", "check", "save", "close"])
def test_a_disk_that_fills_up_while_saving_reaches_the_loop(tmp_path, monkeypatch, surfaces_in):
    folder = _save(tmp_path, 1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(folder):
        raise full

    saver = checkpoints.Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(commit_marker, "commit", fail)
        saver.save(2, _state(2), {})
        while saver._thread.is_alive():
            time.sleep(0.01)
    act = {
        "wait": saver.wait,
        "check": saver.check,
        "save": lambda: saver.save(3, _state(3), {}),
        "close": saver.close,
    }
    with pytest.raises(checkpoints.CheckpointError, match="the disk is full.*bytes are free"):
        act[surfaces_in]()
    assert os.listdir(folder) == ["1"]
    if surfaces_in != "close":  # with room again, the same run saves
        saver.save(3, _state(3), {})
        saver.close()
        assert checkpoints.Checkpointer(tmp_path).latest_good() == 3


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "config.json")
    commit_marker.write_durably(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*config.json'"):
        commit_marker.write_durably(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("looks_roomy", [False, True])
def test_a_really_full_disk(small_disk, monkeypatch, capfd, looks_roomy):
    noise = np.random.default_rng(0).standard_normal(3 << 18).astype(np.float32)  # 3 MiB
    state = {"params": {"noise": jnp.asarray(noise)}}
    saver = checkpoints.Checkpointer(small_disk)
    saver.save(1, state, {})
    saver.wait()
    if looks_roomy:  # others may fill the disk between the check and the write
        answers, free_bytes = [1 << 40], checkpoints._free_bytes
        monkeypatch.setattr(
            checkpoints, "_free_bytes", lambda f: answers.pop() if answers else free_bytes(f)
        )
    with pytest.raises(checkpoints.CheckpointError, match="the disk is full: .*bytes are free"):
        saver.save(2, state, {})
        saver.wait()
    saver.close()
    assert capfd.readouterr().err == ""  # the error tells it all
    with checkpoints.Checkpointer(small_disk) as again:
        assert again.latest_good() == 1
        _equal(again.restore(1, state)[0], state)
    assert os.listdir(small_disk / "checkpoints") == ["1"]


def test_an_interrupt_while_waiting_loses_nothing(tmp_path, monkeypatch):
    go_on = threading.Event()
    commit = commit_marker.commit

    def slow(folder):
        go_on.wait()
        commit(folder)

    monkeypatch.setattr(commit_marker, "commit", slow)
    saver = checkpoints.Checkpointer(tmp_path)
    saver.save(1, _state(1), {})
    thread = saver._thread

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    go_on.set()
    saver.close()
    saver.close()
    assert checkpoints.Checkpointer(tmp_path).latest_good() == 1


def test_leaving_with_an_error_still_commits(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with checkpoints.Checkpointer(tmp_path) as saver:
            saver.save(1, _state(1), {})
            raise ZeroDivisionError
    assert checkpoints.Checkpointer(tmp_path).latest_good() == 1


def test_impossible_settings(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        checkpoints.Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.Checkpointer(tmp_path).save(1, _state(1), {"a": object()})


@pytest.mark.parametrize(
    "name",
    ["a**b", "run[1]", "what?", "a\\b", "gs:/x", "last:", b"\xff".decode(errors="surrogateescape")],
)
def test_names_that_the_library_takes_for_something_else(tmp_path, name):
    """It fails at the first save, or writes what cannot be read."""
    with pytest.raises(checkpoints.CheckpointError, match="cannot hold checkpoints"):
        checkpoints.Checkpointer(f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["{a,b}", "späß ☕", "a=b #1 %41", "'a' & b", "{workdir}", "x:y"])
def test_other_odd_names_do(tmp_path, name):
    state = {"x": jnp.arange(3.0)}
    with checkpoints.Checkpointer(tmp_path / name) as saver:
        saver.save(1, state, {})
        saver.wait()
    with checkpoints.Checkpointer(tmp_path / name) as saver:
        assert saver.latest_good() == 1
        assert saver.restore(1, state)[0]["x"].tolist() == [0, 1, 2]
