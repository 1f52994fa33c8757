"""What figures 1 and 5 look at: the gradients of an agent and of a classifier, as histograms of log10(|g| + 1e-8).

A recorder in front of the optimizer sees every gradient as the learner computes it, before it is clipped.
"""

import gzip
import struct
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import a2c
import cli
import gridworld

EDGES = np.linspace(-8, 2, 101)  # of the bins of log10(|g| + 1e-8); the ends take what lies outside


def histogram(grads):
    """Counts [B] of log10(|g| + 1e-8) over all scalars of a tree."""
    logs = jnp.log10(jnp.abs(jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])) + 1e-8)
    bins = jnp.searchsorted(jnp.asarray(EDGES[1:-1], logs.dtype), logs, side="right")
    return jnp.zeros(len(EDGES) - 1, jnp.int32).at[bins].add(1)


def recorder():
    """An optax transformation that changes nothing; its state is the histogram of the last gradient."""
    return optax.GradientTransformation(
        lambda params: histogram(params) * 0, lambda g, _, params=None: (g, histogram(g))
    )


def a2c_step(config):
    """(step: (state, key) -> (state, histogram [B]), state, key) of an A2C agent, in the paper's setting."""
    learner = a2c.make(gridworld.make("big_dense_long"), a2c.Config(num_envs=config.num_envs))
    optimizer = optax.chain(recorder(), optax.clip(1.0), optax.rmsprop(config.learning_rate))
    init_key, key = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def step(agent_state, key):
        agent_state, _ = learner.update(optimizer, agent_state, key)
        return agent_state, agent_state.opt_state[0]

    return step, learner.init(init_key, optimizer), key


def supervised_step(config):
    """The same of a classifier: Dense 32 ReLU, as the small agents' body; cross-entropy of a random batch."""
    images, labels = load_mnist(config.mnist) if config.mnist else load_digits()
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    w_key, v_key, key = jax.random.split(jax.random.key(config.seed), 3)
    uniform = jax.nn.initializers.lecun_uniform()
    params = {"w": uniform(w_key, (images.shape[1], 32)), "b": jnp.zeros(32)}
    params |= {"v": uniform(v_key, (32, 10)), "c": jnp.zeros(10)}
    optimizer = optax.chain(recorder(), optax.clip(1.0), optax.rmsprop(config.learning_rate))

    def loss(params, rows):
        logits = jax.nn.relu(images[rows] @ params["w"] + params["b"]) @ params["v"] + params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    @jax.jit
    def step(state, key):
        params, opt_state = state
        grads = jax.grad(loss)(params, jax.random.randint(key, (config.batch_size,), 0, len(images)))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), opt_state[0]

    return step, (params, optimizer.init(params)), key


def load_digits():
    """scikit-learn's 1,797 digits: (images [N, 64] in [0, 1], labels [N])."""
    try:
        from sklearn import datasets
    except ImportError:
        raise cli.UsageError(
            "no scikit-learn; pip install scikit-learn, or give files of MNIST: --mnist IMAGES,LABELS"
        ) from None
    images, labels = datasets.load_digits(return_X_y=True)
    return np.float32(images / 16), np.int32(labels)


def load_mnist(files):
    """(images [N, D] in [0, 1], labels [N]) from "IMAGES,LABELS", or one .npz; or a UsageError."""
    paths = files.split(",")
    if len(paths) > 2 or (len(paths) == 1 and not files.endswith(".npz")):
        raise cli.UsageError(
            f"--mnist is {files!r}; give IMAGES,LABELS (IDX files) or one .npz with x_train and y_train"
        )
    try:
        if len(paths) == 2:
            images, labels = map(read_idx, paths)
        else:
            with np.load(files, allow_pickle=False) as file:
                images, labels = file["x_train"], file["y_train"]
    except (OSError, EOFError, KeyError, ValueError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise cli.UsageError(f"cannot read --mnist {files} ({error})") from None
    if len(images) != len(labels) or labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise cli.UsageError(
            f"--mnist {files}: {images.shape} images do not fit {labels.shape} labels of digits 0 to 9"
        )
    return np.float32(images.reshape(len(images), -1) / 255), np.int32(labels)


def read_idx(path):
    """An array of bytes from an IDX file, also a gzipped one: 0, 0, type 8, number of axes; sizes, big-endian; data."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
