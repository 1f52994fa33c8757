"""Weight files: what was saved comes back, and everything else is refused in a line that names the file."""

import json

import jax
import numpy as np
import pytest

import optim4rl
from harness import weights

META_PARAMS = optim4rl.init_meta_params(jax.random.key(0))


def test_what_was_saved_comes_back_with_its_metadata(tmp_path):
    weights.save(tmp_path / "a.npz", META_PARAMS, {"seed": 3})
    loaded, metadata = weights.load(tmp_path / "a.npz", like=META_PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, META_PARAMS)
    assert metadata == {"seed": 3}
    jax.tree.map(np.testing.assert_array_equal, optim4rl.load(tmp_path / "a.npz")[0], META_PARAMS)


def test_a_failed_write_leaves_the_file_before_whole(tmp_path):
    weights.save(tmp_path / "a.npz", META_PARAMS)
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(TypeError):
        weights.save(tmp_path / "a.npz", META_PARAMS, {"not": object()})
    assert (tmp_path / "a.npz").read_bytes() == before


def change(array, value):
    array = np.array(array)
    array.flat[0] = value
    return array


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m: {"kind": "star"}, "holds weights of 'star', not of 'optim4rl'"),
        (lambda m: {"version": 9}, "has format version 9; this code reads version 1"),
        (lambda m: {"m/readout_bias": None}, "m/readout_bias is absent, expected ()"),
        (lambda m: {"extra": np.zeros(2)}, "extra is (2,), expected absent"),
        (lambda m: {"m/candidate_bias": np.zeros(4)}, "m/candidate_bias is (4,), expected (8,)"),
        (lambda m: {"m/candidate_bias": np.zeros(8, int)}, "m/candidate_bias holds int64"),
        (lambda m: {"m/candidate_bias": change(m, np.nan)}, "m/candidate_bias has numbers that are not finite"),
        (
            lambda m: {"m/candidate_bias": np.full(8, 1e200)},
            "m/candidate_bias has numbers that are not finite in float32",
        ),
    ],
)
def test_weights_that_are_not_what_they_should_be_are_refused(tmp_path, damage, message):
    changes = damage(META_PARAMS["m"]["candidate_bias"])
    header = {"version": 1, "kind": "optim4rl", "metadata": {}}
    header |= {name: changes.pop(name) for name in ("kind", "version") if name in changes}
    named = {"/".join(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(META_PARAMS)} | changes
    arrays = {name: leaf for name, leaf in named.items() if leaf is not None}
    np.savez(tmp_path / "a.npz", header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(ValueError) as error:
        weights.load(tmp_path / "a.npz", like=META_PARAMS)
    assert message in str(error.value) and str(tmp_path / "a.npz") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "edited", "text", "empty", "no header", "compressed and edited"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "a.npz"
    weights.save(path, META_PARAMS)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "edited":
        content[content.find(np.asarray(META_PARAMS["v"]["recurrent_kernel"]).tobytes()) + 100] ^= 0x10
        path.write_bytes(content)
    elif damage == "compressed and edited":
        np.savez_compressed(path, header=np.array("{}"), big=np.random.default_rng(0).normal(size=1000))
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
        path.write_bytes(content)
    elif damage == "no header":
        np.savez(path, a=np.zeros(3))
    else:
        path.write_text("weights" if damage == "text" else "")
    with pytest.raises(ValueError, match="is not a weight file of this project, or is damaged"):
        weights.load(path)
