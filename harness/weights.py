"""Weight files: nested dicts of arrays as .npz, written whole or not at all, and read strictly.

| entry | holds |
|---|---|
| header | JSON: version, kind (whose weights these are), metadata |
| a/b/c | the array at tree["a"]["b"]["c"] |
"""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from harness import runs

FORMAT_VERSION = 1
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zipfile.zlib.error)


def save(path, tree, metadata=None, kind="optim4rl"):
    """Writes a nested dict of arrays.

    Args:
        path: file to write. It is replaced only when the new one is complete.
        tree: nested dict of arrays, its keys strings.
        metadata: anything JSON can hold: command, seed, results.
        kind: whose weights these are.
    """
    named = {"/".join(k.key for k in keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(tree)}
    header = json.dumps({"version": FORMAT_VERSION, "kind": kind, "metadata": metadata or {}})
    with runs.whole_file(path, "wb") as file:
        np.savez(file, header=np.array(header), **named)


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
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        version, found, metadata = header["version"], header["kind"], header["metadata"]
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a weight file of this project, or is damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}")
    if found != kind:
        raise ValueError(f"{path} holds weights of {found!r}, not of {kind!r}")
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{path} does not fit: {name} holds {array.dtype}, expected floating-point numbers")
        if not np.isfinite(array).all() or np.abs(array).max(initial=0) > np.finfo(np.float32).max:
            raise ValueError(f"{path} is of no use: {name} has numbers that are not finite in float32")
    if like is not None:
        _check_shapes(path, arrays, like)
    return _nested(arrays), metadata


def _check_shapes(path, arrays, like):
    shapes = {"/".join(k.key for k in keys): np.shape(leaf) for keys, leaf in jax.tree.leaves_with_path(like)}
    for name in sorted(shapes.keys() | arrays.keys()):
        stored = arrays[name].shape if name in arrays else "absent"
        if stored != shapes.get(name, "absent"):
            raise ValueError(f"{path} does not fit: {name} is {stored}, expected {shapes.get(name, 'absent')}")


def _nested(arrays):
    """{"a/b": array} as {"a": {"b": array}}."""
    tree = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = jnp.asarray(array)
    return tree
