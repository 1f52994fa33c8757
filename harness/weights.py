"""Weight files: nested dicts of arrays as .npz, written whole or not at all, and read strictly.

| entry | holds |
|---|---|
| header | JSON: version, kind (whose weights these are), metadata |
| a/b/c | the array at tree["a"]["b"]["c"] |
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from harness import runs

FORMAT_VERSION = 1


def write_arrays(path, arrays, compressed=False):
    """Writes {name: array} as an .npz file, which takes the place of what was at the path only when it is complete."""
    with runs.whole_file(path, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def read_arrays(path):
    """{name: array} of an .npz file. Raises many kinds of errors where it is damaged."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def save(path, tree, metadata=None, kind="optim4rl"):
    """Writes a nested dict of arrays. kind: whose weights these are; metadata: anything JSON can hold: command, results."""
    header = json.dumps({"version": FORMAT_VERSION, "kind": kind, "metadata": metadata or {}})
    write_arrays(path, {"header": np.array(header)} | _named(tree))


def load(path, kind="optim4rl", like=None):
    """Reads what save wrote.

    Args:
        path: file to read.
        kind: whose weights are expected.
        like: nested dict whose names and shapes the file must have; None: any.
    Returns:
        (nested dict of float32 arrays, or float64 under jax_enable_x64; metadata)
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, of another kind or other shapes, or with numbers that are not finite.
    """
    try:
        arrays = read_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        version, found, metadata = header["version"], header["kind"], header["metadata"]
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes its reader raise
        raise ValueError(f"{path} is not a weight file of this project, or is damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}")
    if found != kind:
        raise ValueError(f"{path} holds weights of {found!r}, not of {kind!r}")
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{path} does not fit: {name} holds {array.dtype}, expected floating-point numbers")
        if not np.abs(array).max(initial=0) <= np.finfo(np.float32).max:  # also NaN
            raise ValueError(f"{path} is of no use: {name} has numbers that are not finite in float32")
    if like is not None:
        shapes = [{name: np.shape(x) for name, x in named.items()} for named in (arrays, _named(like))]
        for name in sorted(shapes[0] | shapes[1]):
            stored, expected = (of.get(name, "absent") for of in shapes)
            if stored != expected:
                raise ValueError(f"{path} does not fit: {name} is {stored}, expected {expected}")
    return _nested(arrays), metadata


def _named(tree):
    """{"a": {"b": array}} as {"a/b": array}."""
    return {"/".join(k.key for k in keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


def _nested(arrays):
    """{"a/b": array} as {"a": {"b": array}}."""
    tree = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        functools.reduce(lambda place, folder: place.setdefault(folder, {}), folders, tree)[last] = jnp.asarray(array)
    return tree
