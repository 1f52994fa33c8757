"""Experiment: do an agent's gradients drift over its life, and more than a classifier's? (paper: Figures 1 and 5)

    python -m experiments.drift figure1                     # an A2C agent on big_dense_long: a minute on a CPU core
    python -m experiments.drift figure5                     # a classifier of digits: seconds
    python -m experiments.full_size --only figure1 figure5  # the paper's size: 25 minutes of 2 CPU cores

Histograms of log10(|g| + 1e-8) at the beginning, in the middle and at the end of training. A recorder before the optimizer
sees each gradient as the learner computes it, before it is clipped. The folder receives config.json, histograms.npz (counts
[S, 3, B], edges [B + 1]) and drift.png.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro
from tqdm import tqdm

from experiments import arms, contents
from harness import plots, runs, statistics, stops, tasks, weights
from harness.plots import plt

PHASES = ("beginning", "middle", "end")
EDGES = np.linspace(-8, 2, 101)  # of the bins of log10(|g| + 1e-8); the ends take what lies outside


@dataclass(frozen=True)
class Config:
    figure: tyro.conf.Positional[Literal["figure1", "figure5"]] = "figure1"  # an agent's gradients, or a classifier's
    updates: int = 300  # in the life of the agent or classifier
    num_envs: int = 64  # figure 1: environments of the agent
    batch_size: int = 128  # figure 5: images in a batch
    learning_rate: float = 1e-3  # alpha of RMSProp
    network: Literal["dense", "conv"] = "dense"  # figure 5: of the classifier; conv, as the paper's
    clip: float = 1.0  # size to which each entry of a gradient is clipped; 0: not clipped, as the paper's classifier
    mnist: str | None = None  # figure 5: FILE.npz with x_train and y_train; None: scikit-learn's digits
    seeds: int = 5  # lives
    seed: int = 0  # of everything
    out: str | None = None  # folder of this run; None: a new one under runs/
    resume: str | None = None  # folder of a stopped run to continue; its config is taken from there


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
    images, labels = map(jnp.asarray, load_mnist(config.mnist) if config.mnist else load_digits())
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
        raise runs.UsageError("no scikit-learn; pip install scikit-learn, or give --mnist FILE.npz") from None
    images, labels = datasets.load_digits(return_X_y=True)
    return np.float32(images / 16), np.int32(labels)


def load_mnist(path):
    """(images [N, D] in [0, 1], labels [N]) from an .npz with x_train, uint8 [N, ...], and y_train [N]; or a UsageError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["x_train"], file["y_train"]
        images = np.float32(images.reshape(len(labels), -1) / 255)
    except Exception as error:  # whatever a broken file makes its reader raise
        raise runs.UsageError(f"--mnist {path} is no .npz of images x_train and labels y_train ({error})") from None
    return images, np.int32(labels)


def collect(config, folder):
    """A figure's data: counts [S, 3, B] of histograms.npz. Each finished life is kept on the way."""
    if (folder / "histograms.npz").exists():
        return weights.read_arrays(folder / "histograms.npz")["counts"]
    step, init = (a2c_step if config.figure == "figure1" else supervised_step)(config)
    lives = [folder / f"life_{i}.npy" for i in range(config.seeds)]
    for life, key in zip(lives, jax.random.split(jax.random.key(config.seed), config.seeds)):
        if not life.exists():
            counts = phase_histograms(step, init, key, config)
            with runs.whole_file(life, "wb") as file:
                np.save(file, counts)
    counts = np.stack([np.load(life) for life in lives])
    weights.write_arrays(folder / "histograms.npz", {"counts": counts, "edges": EDGES}, compressed=True)
    for life in lives:
        life.unlink()
    return counts


def phase_histograms(step, init, key, config):
    """Sums of the histograms in each phase of one life: [3, B]."""
    length = max(1, config.updates // 30)  # updates of a phase: enough to see its whole distribution
    starts = np.linspace(0, config.updates - length, len(PHASES)).astype(int)
    counts = np.zeros((len(PHASES), len(EDGES) - 1), int)
    init_key, updates_key = jax.random.split(key)
    state = init(init_key)
    keys = tqdm(jax.random.split(updates_key, config.updates), desc=config.figure, unit="update")
    for t, step_key in enumerate(keys):
        stops.end_if_received()
        state, counted = step(state, step_key)
        inside = (starts <= t) & (t < starts + length)
        if inside.any():
            counts[inside] += np.asarray(counted)
    return counts


def drift(counts, edges=EDGES):
    """Mean Wasserstein distance of log10|g| between pairs of phases, in decades: counts [3, B], edges [B + 1]."""
    return float(np.mean([distance(a, b, edges) for a, b in itertools.combinations(counts, 2)]))


def distance(a, b, edges=EDGES):
    """Wasserstein distance of log10|g| between two histograms [B], in decades."""
    centers = (edges[:-1] + edges[1:]) / 2
    return scipy.stats.wasserstein_distance(centers, centers, a, b)


def draw(path, counts, title):
    """The three phases of all seeds together."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for phase, count in zip(PHASES, counts.sum(0)):
        axis.stairs(count / count.sum(), EDGES, label=phase, linewidth=1.5)
    axis.set(title=title, xlabel="log10(|g| + 1e-8)", ylabel="share of all scalars", ylim=(0, None))
    axis.legend(frameon=False)
    return plots.save(figure, path)


def make(config, folder):
    """Collects a figure's data, draws it and prints its drift: [S] drift of each life."""
    counts = collect(config, folder)
    drifts = [drift(life) for life in counts]
    title = "A2C on big_dense_long" if config.figure == "figure1" else "supervised, digits"
    print(f"{title}: drift {contents.interval(drifts)} decades, the mean distance between {', '.join(PHASES)}.")
    path = draw(folder / "drift.png", counts, f"{title}\ndrift {contents.interval(drifts)} decades")
    print(f"{statistics.caption(len(counts))} Picture: {path}")
    return drifts


def main(argv=None):
    config = runs.parse(Config, {}, __doc__, argv)
    runs.check_seed(config.seed)
    runs.check_positive(config, ("updates", "num_envs", "batch_size", "learning_rate", "seeds"))
    arms.run("drift", config, runs.use_devices(1), lambda folder: make(config, folder))


def kept_drift(figure):
    """The drift of a kept histograms.npz."""
    with np.load(contents.RESULTS / figure / "histograms.npz") as file:
        return contents.interval([drift(life, file["edges"]) for life in file["counts"]])


CONTENTS = {
    "drift_a2c": lambda: kept_drift("full_size/figure1"),
    "drift_supervised": lambda: kept_drift("full_size/figure5"),
    "drift_a2c_small": lambda: kept_drift("figure1"),
    "drift_supervised_small": lambda: kept_drift("figure5"),
}


if __name__ == "__main__":
    runs.run(main)
