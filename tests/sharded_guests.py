"""A program for test_guests.py: prints, as JSON, what goes wrong with parameters that are spread over four devices."""

import json

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_guests import OPTIMIZERS, make

SHAPES = {"b": (8,), "w": (8, 12), "w2": (3, 8)}
SPECS = {"b": PartitionSpec("d"), "w": PartitionSpec("d", None), "w2": PartitionSpec(None, "d")}
VALUES = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def spread(mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in VALUES.items()}


def check(optimizer, params, expected):
    """Nothing of a leaf's shape may be gathered: neither state nor updates."""
    state = optimizer.init(params)
    check_state(state, "fresh")
    updates, state = jax.jit(optimizer.update)(params, state, params)
    check_state(state, "next")
    for name, x in updates.items():
        assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), f"update {name}: {x.sharding}"
        np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=1e-6)


def check_state(state, which):
    for path, x in jax.tree.leaves_with_path(state):
        if any(len(shape) > 0 and x.shape[-len(shape) :] == shape for shape in SHAPES.values()) or x.size > 100:
            assert not x.sharding.is_fully_replicated, f"{which} state {jax.tree_util.keystr(path)}: {x.sharding}"


def outcome(function, *args):
    try:
        function(*args)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
        return f"{type(error).__name__}: {error}"
    return ""


def main():
    results = {}
    for name in OPTIMIZERS:
        optimizer = make(name)
        expected, _ = jax.jit(optimizer.update)(VALUES, optimizer.init(VALUES), VALUES)
        fsdp = outcome(check, optimizer, spread(jax.make_mesh((4,), ("d",), (AxisType.Auto,))), expected)
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Explicit,))
        with jax.set_mesh(mesh):
            explicit = outcome(check, optimizer, spread(mesh), expected)
        results[name] = {"fsdp": fsdp, "explicit": explicit}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
