"""Experiment: do an agent's gradients drift over its life, and more than a classifier's? (paper: Figures 1 and 5)

    python -m experiments.drift figure1                     # an A2C agent on big_dense_long: a minute on a CPU core
    python -m experiments.drift figure5                     # a classifier of digits, drawn beside figure 1: seconds
    python -m experiments.drift figure1 --updates 2930 --num-envs 512 --learning-rate 3e-3   # the paper's size: 33 minutes

Histograms of log10(|g| + 1e-8) at the beginning, in the middle and at the end of training. A recorder before the optimizer
sees each gradient as the learner computes it, before it is clipped. A folder that holds histograms already is only drawn.
"""

import dataclasses
import gzip
import itertools
import json
import math
import pathlib
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro
from tqdm import tqdm

from harness import plots, runs, statistics, stops, tasks
from harness.plots import plt

PHASES = ("beginning", "middle", "end")
EDGES = np.linspace(-8, 2, 101)  # of the bins of log10(|g| + 1e-8); the ends take what lies outside


@dataclass(frozen=True)
class Config:
    figure: tyro.conf.Positional[Literal["figure1", "figure5"]] = "figure1"  # an agent's gradients, or a classifier's
    results: str | None = None  # folder of data and picture; None: results/FIGURE
    updates: int = 300  # in the life of the agent or classifier
    num_envs: int = 64  # figure 1: environments of the agent
    batch_size: int = 128  # figure 5: images in a batch
    learning_rate: float = 1e-3  # alpha of RMSProp
    network: Literal["dense", "conv"] = "dense"  # figure 5: of the classifier; conv, as the paper's
    clip: float = 1.0  # size to which each entry of a gradient is clipped; 0: not clipped, as the paper's classifier
    mnist: tuple[
        str, ...
    ] = ()  # figure 5: IMAGES LABELS (IDX files, also .gz) or one .npz; empty: scikit-learn's digits
    seeds: int = 5  # lives
    seed: int = 0  # of everything


def histogram(grads):
    """Counts [B] of log10(|g| + 1e-8) over all scalars of a tree."""
    logs = jnp.log10(jnp.abs(jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])) + 1e-8)
    bins = jnp.searchsorted(jnp.asarray(EDGES[1:-1], logs.dtype), logs, side="right")
    return jnp.zeros(len(EDGES) - 1, jnp.int32).at[bins].add(1)


def recorder():
    """An optax transformation that changes nothing; its state is the histogram of the last gradient."""

    def update(grads, state, params=None):
        return grads, histogram(grads)

    return optax.GradientTransformation(lambda params: histogram(params) * 0, update)


def recorded(config):
    """RMSProp behind the recorder and the clipping."""
    clip = optax.clip(config.clip) if config.clip else optax.identity()
    return optax.chain(recorder(), clip, optax.rmsprop(config.learning_rate))


def a2c_step(config):
    """(step: (state, key) -> (state, histogram [B]), init: key -> state) of an A2C agent, in the paper's setting."""
    learner = tasks.make("big_dense_long", config.num_envs).learner
    optimizer = recorded(config)

    @jax.jit
    def step(agent_state, key):
        agent_state, _ = learner.update(optimizer, agent_state, key)
        return agent_state, agent_state.opt_state[0]

    return step, lambda key: learner.init(key, optimizer)


def supervised_step(config):
    """The same of a classifier: cross-entropy of a random batch. Dense 32 ReLU, as the small agents' body, before it perhaps
    a 3 x 3 convolution with 16 features, ReLU and the mean of 2 x 2."""
    images, labels = load_mnist(config.mnist) if config.mnist else load_digits()
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    optimizer = recorded(config)

    def init(key):
        w_key, v_key = jax.random.split(key)
        uniform = jax.nn.initializers.lecun_uniform()
        params = {"v": uniform(v_key, (32, 10)), "c": jnp.zeros(10), "b": jnp.zeros(32)}
        if config.network == "conv":
            params |= {"k": uniform(jax.random.fold_in(key, 2), (3, 3, 1, 16)), "d": jnp.zeros(16)}
        params["w"] = uniform(w_key, (jax.eval_shape(body, params, images[:1]).shape[1], 32))
        return params, optimizer.init(params)

    def body(params, x):  # [B, D] -> features [B, F]
        if config.network == "dense":
            return x
        side = math.isqrt(x.shape[1])
        x = x.reshape(len(x), side, side, 1)
        x = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params["d"])
        return x.reshape(len(x), side // 2, 2, side // 2, 2, 16).mean((2, 4)).reshape(len(x), -1)

    def loss(params, rows):
        logits = jax.nn.relu(body(params, images[rows]) @ params["w"] + params["b"]) @ params["v"] + params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    @jax.jit
    def step(state, key):
        params, opt_state = state
        grads = jax.grad(loss)(params, jax.random.randint(key, (config.batch_size,), 0, len(images)))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), opt_state[0]

    return step, init


def load_digits():
    """scikit-learn's 1,797 digits: (images [N, 64] in [0, 1], labels [N])."""
    try:
        from sklearn import datasets
    except ImportError:
        remedy = "pip install scikit-learn, or give files of MNIST: --mnist IMAGES LABELS"
        raise runs.UsageError(f"no scikit-learn; {remedy}") from None
    images, labels = datasets.load_digits(return_X_y=True)
    return np.float32(images / 16), np.int32(labels)


def load_mnist(files):
    """(images [N, D] in [0, 1], labels [N]) from IMAGES and LABELS, or one .npz; or a UsageError."""
    shown = " ".join(files)
    if len(files) > 2 or (len(files) == 1 and not files[0].endswith(".npz")):
        raise runs.UsageError(
            f"--mnist is {shown}; give IMAGES LABELS (IDX files) or one .npz with x_train and y_train"
        )
    try:
        if len(files) == 2:
            images, labels = map(read_idx, files)
        else:
            with np.load(files[0], allow_pickle=False) as file:
                images, labels = file["x_train"], file["y_train"]
        numbers = images.dtype.kind in "uif" and labels.dtype.kind in "ui"
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        AttributeError,
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise runs.UsageError(f"cannot read --mnist {shown} ({error})") from None
    fits = numbers and images.ndim > 1 and labels.ndim == 1 and len(images) == len(labels) > 0
    if not fits or labels.min() < 0 or labels.max() > 9:
        what = f"{images.dtype} {images.shape} as images and {labels.dtype} {labels.shape} as labels"
        raise runs.UsageError(f"--mnist {shown}: {what} are no images [N, ...] with digits 0 to 9 [N]")
    return np.float32(images.reshape(len(images), -1) / 255), np.int32(labels)


def read_idx(path):
    """An array of bytes from an IDX file, also a gzipped one: 0, 0, type 8, number of axes; sizes, big-endian; data."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def make_histograms(config, folder):
    """Collects a figure's data: histograms.npz with counts [S, 3, B], edges [B + 1]. Each finished life is kept on the way."""
    step, init = (a2c_step if config.figure == "figure1" else supervised_step)(config)
    if (folder / "config.json").exists():
        check_kept(config, folder)
    else:
        runs.new_folder(folder, config.figure, dataclasses.replace(config, results=None))
    lives = [folder / f"life_{i}.npy" for i in range(config.seeds)]
    for life, key in zip(lives, jax.random.split(jax.random.key(config.seed), config.seeds)):
        if not life.exists():
            counts = phase_histograms(step, init, key, config)
            with runs.whole_file(life, "wb") as file:
                np.save(file, counts)
    with runs.whole_file(folder / "histograms.npz", "wb") as file:
        np.savez_compressed(file, counts=np.stack([np.load(life) for life in lives]), edges=EDGES)
    for life in lives:
        life.unlink()


def phase_histograms(step, init, key, config):
    """Sums of the histograms in each phase of one life: [3, B]."""
    length = max(1, config.updates // 30)  # updates of a phase: enough to see its whole distribution
    starts = np.linspace(0, config.updates - length, len(PHASES)).astype(int)
    counts = np.zeros((len(PHASES), len(EDGES) - 1), int)
    init_key, updates_key = jax.random.split(key)
    state = init(init_key)
    keys = tqdm(jax.random.split(updates_key, config.updates), desc=config.figure, unit="update")
    for t, step_key in enumerate(keys):
        if stops.received():
            raise SystemExit(128 + stops.received()[0])
        state, counted = step(state, step_key)
        inside = (starts <= t) & (t < starts + length)
        if inside.any():
            counts[inside] += np.asarray(counted)
    return counts


def read_histograms(folder):
    """(counts [S, 3, B], edges [B + 1])."""
    try:
        with np.load(folder / "histograms.npz", allow_pickle=False) as file:
            return file["counts"], file["edges"]
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise runs.UsageError(f"{folder}/histograms.npz is damaged ({error}); delete it and run again") from None


def drift(counts, edges):
    """Mean Wasserstein distance of log10|g| between pairs of phases, in decades: counts [3, B], edges [B + 1]."""
    centers = (edges[:-1] + edges[1:]) / 2
    pairs = itertools.combinations(counts, 2)
    return float(np.mean([scipy.stats.wasserstein_distance(centers, centers, a, b) for a, b in pairs]))


def draw(path, panels):
    """panels: {title: (counts, edges)}, one panel each on one scale, of all seeds together; prints each one's drift."""
    size = (1 + 4.5 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, (counts, edges)) in zip(axes[0], panels.items()):
        for phase, count in zip(PHASES, counts.sum(0)):
            axis.stairs(count / count.sum(), edges, label=phase, linewidth=1.5)
        mean, low, high = statistics.interval([drift(life, edges) for life in counts])
        axis.set(title=f"{title}\ndrift {mean:.2f} [{low:.2f}, {high:.2f}] decades", xlabel="log10(|g| + 1e-8)")
        what = f"Wasserstein distance between {', '.join(PHASES)}, mean of the pairs"
        print(f"{title}: drift {mean:.3f} [{low:.3f}, {high:.3f}] decades ({what}). {statistics.caption(len(counts))}")
    axes[0, 0].set(ylabel="share of all scalars", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    return plots.save(figure, path)


def check_kept(config, folder):
    """Raises UsageError where the folder's data were made with other values than those asked for."""
    kept = json.loads((folder / "config.json").read_text())["config"]
    for name in ("updates", "num_envs", "batch_size", "learning_rate", "network", "clip", "seeds", "seed"):
        if name in kept and getattr(config, name) not in (kept[name], getattr(Config, name)):
            value = f"{runs.flag_of(name)} {kept[name]}, not {getattr(config, name)}"
            raise runs.UsageError(f"{folder} holds data of {value}; choose another --results")


def run(config):
    """Makes a figure's data, where they are not there, and the picture."""
    folder = pathlib.Path(config.results or f"results/{config.figure}")
    if (folder / "histograms.npz").exists():
        check_kept(config, folder)
    else:
        make_histograms(config, folder)
    panels, agents_folder = {}, folder.parent / "figure1"
    if config.figure == "figure5" and (agents_folder / "histograms.npz").exists():
        panels["A2C on big_dense_long"] = read_histograms(agents_folder)
    data = "MNIST" if config.mnist else "scikit-learn's digits"
    title = "A2C on big_dense_long" if config.figure == "figure1" else f"supervised, {data}"
    print(draw(folder / f"{config.figure}.png", panels | {title: read_histograms(folder)}))


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_seed(config.seed)
    runs.check_positive(config, ("updates", "num_envs", "batch_size", "learning_rate", "seeds"))
    run(config)


if __name__ == "__main__":
    runs.run(main)
