"""Checkpoints against what was saved, bit by bit, and against damage done to each of their files."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness import checkpoints, runs


def state_on(num_devices):
    """Arrays of several types, one of them shared among devices as units are."""
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:num_devices], ("units",))
    place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    values = np.random.default_rng(0).normal(size=(8, 1000)).astype(np.float32)
    return {
        "healthy": place(np.arange(8) % 3 == 0, "units"),
        "step": place(np.int32(7)),
        "units": place(values, "units"),
    }


def saved(folder, steps, state):
    with checkpoints.manager(folder) as manager:
        for step in steps:
            checkpoints.save(manager, step, state | {"step": state["step"] + step})


def restored(folder, like):
    with checkpoints.manager(folder) as manager:
        return checkpoints.restore(manager, like)


def test_the_newest_state_comes_back_to_the_bit_on_any_number_of_devices(tmp_path):
    saved(tmp_path, [1, 2], state_on(2))
    for num_devices in (1, 2, 4):
        like = state_on(num_devices)
        state = restored(tmp_path, jax.tree.map(jnp.zeros_like, like))
        jax.tree.map(np.testing.assert_array_equal, state, like | {"step": np.int32(9)})
        assert state["units"].sharding == like["units"].sharding


def test_a_run_begins_at_its_start_where_nothing_was_saved(tmp_path):
    start = state_on(1)
    assert restored(tmp_path, start) is start


def test_only_the_last_checkpoints_are_kept(tmp_path):
    saved(tmp_path, range(6), state_on(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5"]


@pytest.mark.parametrize("num_devices", [1, 4])
def test_fingerprint_is_the_sum_in_its_docstring(num_devices):
    state = state_on(num_devices)
    bits = [np.asarray(x).view(f"u{x.dtype.itemsize}").astype(object).reshape(-1) for x in jax.tree.leaves(state)]
    expected = [sum(int(b) * (2 * i + 1) for i, b in enumerate(x)) % 2**32 for x in bits]
    assert checkpoints.fingerprint(state).tolist() == expected


def test_every_bit_of_a_64_bit_number_changes_the_fingerprint():
    with jax.enable_x64(True):
        for number in (np.float64(1.5), np.int64(3)):
            bits = np.uint64(np.asarray(number).view(np.uint64))
            before = checkpoints.fingerprint({"x": jnp.full(3, number)})
            for i in range(64):
                changed = (bits ^ np.uint64(1 << i)).view(number.dtype)
                assert checkpoints.fingerprint({"x": jnp.full(3, number).at[1].set(changed)}) != before


@pytest.mark.parametrize("damage", ["truncated", "edited", "removed"])
def test_no_damaged_file_goes_unnoticed(tmp_path, damage):
    """Each file of the newest checkpoint in turn: refused, or what it held did not matter and the state is the saved one."""
    saved(tmp_path / "sound", [1, 2], state_on(2))
    like, refused = state_on(2), 0
    for file in [path for path in (tmp_path / "sound" / "2").rglob("*") if path.is_file() and path.stat().st_size]:
        folder = tmp_path / "broken"
        shutil.copytree(tmp_path / "sound", folder)
        broken, size = folder / file.relative_to(tmp_path / "sound"), file.stat().st_size
        if damage == "truncated":
            os.truncate(broken, size // 2)
        elif damage == "edited":
            content = bytearray(file.read_bytes())
            content[size // 2] ^= 0x10
            broken.write_bytes(content)
        else:
            broken.unlink()
        try:
            jax.tree.map(np.testing.assert_array_equal, restored(folder, like), like | {"step": np.int32(9)})
        except runs.UsageError as error:
            assert f"damaged: {folder / '2'} (" in str(error)
            assert f"remove it to go on from {folder / '1'}, which is whole" in str(error)
            refused += 1
        shutil.rmtree(folder)
    assert refused >= 3  # the arrays, their index, the fingerprint


def test_without_a_whole_checkpoint_the_run_cannot_go_on(tmp_path):
    saved(tmp_path, [1, 2], state_on(1))
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "state")
    with pytest.raises(runs.UsageError, match="no checkpoint is whole"):
        restored(tmp_path, state_on(1))
