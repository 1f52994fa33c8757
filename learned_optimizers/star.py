# SPDX-License-Identifier: MIT
"""STAR: a nominal Adam with a small learned correction (Harrison et al. 2022; paper: among the optimizers of Figure 3).

"A closer look at learned optimization: stability, robustness, and inductive biases". One small MLP, shared by every
scalar parameter, sees 28 features f of each scalar, each divided by its root mean square over the tensor, 11 of time:

    f = x / sqrt(1e-5 + mean x^2)        time = tanh(t / timescale - 1)
    direction, magnitude = MLP(f, time)
    delta = -alpha direction exp(0.001 magnitude) - nominal_stepsize exp(0.001) mean_j m_j / sqrt(rms + 1e-6)

0.001 in the exponent keeps exp(0.001 magnitude) near 1 at the beginning of meta-training. exp(0.001) is that factor for
the nominal step, at magnitude 1.

| symbol | in code | shape |
|---|---|---|
| g, p | gradient and parameters, one leaf | [*leaf] |
| m_j | averages of g, decays .9 .99 .999 | [3, *leaf] |
| rms | average of g^2, decay .999 | [*leaf] |
| row, col | Adafactor's averages of g^2 over largest, second largest axis (of vectors: over none) | [3, *leaf] |
| | decays .9 .99 .999 | averaged axis 1 |
| x, f | features of a leaf | [28, *leaf] |
| t | count, updates so far | [] |
| theta | meta_params, 207 numbers | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule; the reference calls it step_mult | [] |

Example:
    import jax, optax
    import star  # in this repository: from learned_optimizers import star
    meta_params = star.init_meta_params(jax.random.key(0))
    optimizer = optax.chain(optax.clip(1.0), star.star(1e-3, meta_params))
    params = {"w": jax.numpy.ones((2, 3))}
    grads = {"w": jax.numpy.full((2, 3), 0.1)}
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)  # STAR sees the parameters too

Deviations: the read-out starts at zero, where the reference (github.com/sail-sg/optim4rl) draws it at random, so that
the untrained rule is exactly its nominal Adam.
Copy this file: needs jax >= 0.10, optax >= 0.2.5. Keeps 4 numbers of state for a parameter in a matrix, 10 in a vector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAYS = (0.999,)
ADAFACTOR_DECAYS = (0.9, 0.99, 0.999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # updates
NUM_FEATURES = 28  # of a scalar, without time


class LearnedOptimizer(NamedTuple):
    """What every learned optimizer of this project offers."""

    init: Callable  # key -> meta_params
    make: Callable  # (learning_rate, meta_params) -> optax.GradientTransformation


class StarState(NamedTuple):
    """Each field but count is a tree like the parameters. The four arrays of one leaf are called its averages."""

    count: jax.Array  # [] int32, updates so far
    m: Any  # [3, *leaf]
    rms: Any  # [*leaf]
    row: Any  # [3, *leaf], the largest axis 1
    col: Any  # [3, *leaf], the second largest axis 1


def init_meta_params(key, hidden_size=4):
    """Meta-parameters of the untrained rule.

    Returns: {"w0" [39, H], "b0" [H], "w1" [H, H], "b1" [H], "w2" [H, 4], "b2" [4] (the last two outputs are not used),
        "momentum_decays" [3], "rms_decays" [1], "adafactor_decays" [3]: offsets, see learned_decay}
    """
    keys = jax.random.split(key)
    num_inputs = NUM_FEATURES + len(TIMESCALES)
    return {
        "w0": jax.random.truncated_normal(keys[0], -2, 2, (num_inputs, hidden_size)) / num_inputs**0.5,
        "b0": jnp.zeros(hidden_size),
        "w1": jax.random.truncated_normal(keys[1], -2, 2, (hidden_size, hidden_size)) / hidden_size**0.5,
        "b1": jnp.zeros(hidden_size),
        "w2": jnp.zeros((hidden_size, 4)),
        "b2": jnp.zeros(4),
        "momentum_decays": jnp.zeros(len(MOMENTUM_DECAYS)),
        "rms_decays": jnp.zeros(len(RMS_DECAYS)),
        "adafactor_decays": jnp.zeros(len(ADAFACTOR_DECAYS)),
    }


def from_reference(weights):
    """Meta-parameters from the reference's weights: flat {"nn/~/w0": array, ..., "momentum_decays": array, ...}."""
    return {name.removeprefix("nn/~/"): jnp.asarray(value) for name, value in weights.items()}


def linear(kernel, bias, x):
    """kernel [k, n], bias [n], x [k, *leaf] -> [n, *leaf]. "highest": TF32 would keep 3 digits of a feature."""
    return jnp.tensordot(kernel.T, x, 1, precision="highest") + bias.reshape(-1, *[1] * (x.ndim - 1))


def learned_decay(initial, offset, leaf):
    """Decays [n, 1, ...], for [n, *leaf], from their initial values and the learned offsets d."""
    # decay = 1 - exp(10 (log(1 - initial) / 10 + d)). By the 10, small meta-steps in d move log(1 - decay) fast enough.
    decay = 1 - (1 - jnp.array(initial, leaf.dtype)) * jnp.exp(10 * offset)
    return decay.reshape(-1, *[1] * leaf.ndim)


def factored_axes(shape):
    """Axes that (row, col) average over, as in Adafactor: none for scalars, vectors and empty leaves."""
    if len(shape) < 2 or 0 in shape:
        return (), ()
    *_, second, largest = np.argsort(shape, kind="stable")
    return (int(largest),), (int(second),)


def update_averages(meta_params, averages, g):
    """The averages (m, rms, row, col) of one leaf with one more gradient g [*leaf]."""
    m, rms, row, col = averages
    b1 = learned_decay(MOMENTUM_DECAYS, meta_params["momentum_decays"], g)
    # An offset can make a decay negative: averages of squares must stay positive.
    b2 = jnp.maximum(learned_decay(RMS_DECAYS, meta_params["rms_decays"], g)[0], 0)
    b3 = jnp.maximum(learned_decay(ADAFACTOR_DECAYS, meta_params["adafactor_decays"], g), 0)
    row_axes, col_axes = factored_axes(g.shape)
    g2 = g**2 + 1e-30  # Adafactor's: no row of zeros
    m = b1 * m + (1 - b1) * g
    rms = b2 * rms + (1 - b2) * g**2
    row = b3 * row + (1 - b3) * jnp.mean(g2, axis=row_axes, keepdims=True)
    col = b3 * col + (1 - b3) * jnp.mean(g2, axis=col_axes, keepdims=True)
    return m, rms, row, col


def preconditioners(row, col, shape):
    """What Adafactor multiplies (g, m) by: 1 / sqrt of the second moments that row and col stand for, [3, *leaf]."""
    safe_rsqrt = lambda x: jax.lax.rsqrt(jnp.maximum(x, 1e-9))  # 1e-9, below 1e-6: the reference's guards against 1 / 0
    row_axes, col_axes = factored_axes(shape)
    if not row_axes:  # row is the whole second moment
        return safe_rsqrt(row + 1e-9), (row + 1e-6) ** -0.5
    # 1 / sqrt(row col / mean row)
    mean_row = jnp.mean(row, axis=col_axes[0] + 1, keepdims=True)
    factor = safe_rsqrt(row / (mean_row + 1e-9)) * safe_rsqrt(col)
    return factor, factor


def scalar_features(averages, g, p):
    """What the network sees of each scalar but time: f [28, *leaf]; and m_j / sqrt(rms + 1e-6) [3, *leaf]."""
    m, rms, row, col = averages
    rsqrt = jax.lax.rsqrt(rms + 1e-6)
    adam = m * rsqrt  # (3, *leaf)
    for_g, for_m = preconditioners(row, col, g.shape)
    rows, cols = row + jnp.zeros_like(m), col + jnp.zeros_like(m)  # the full shape; broadcast_to would lose a sharding
    features = [g[None], p[None], m, rms[None], adam, rsqrt[None], for_g * g, rows, cols]
    features += [jax.lax.rsqrt(rows + 1e-8), jax.lax.rsqrt(cols + 1e-8), for_m * m]
    x = jnp.concatenate(features)
    # f = x / sqrt(1e-5 + mean x^2), the mean over the tensor
    return x * jax.lax.rsqrt(1e-5 + jnp.mean(x**2, axis=range(1, x.ndim), keepdims=True)), adam


def network(meta_params, f, t):
    """Two hidden layers: f [28, *leaf], t [] -> (direction, magnitude), [*leaf] each."""
    # time = tanh(t / timescale - 1), the same for every scalar: a part of the bias
    time = jnp.tanh(t / jnp.array(TIMESCALES, f.dtype) - 1)
    w0, w_time = meta_params["w0"][:NUM_FEATURES], meta_params["w0"][NUM_FEATURES:]
    x = jax.nn.relu(linear(w0, meta_params["b0"] + time @ w_time, f))
    x = jax.nn.relu(linear(meta_params["w1"], meta_params["b1"], x))
    direction, magnitude, _, _ = linear(meta_params["w2"], meta_params["b2"], x)
    return direction, magnitude


def update_rule(meta_params, averages, g, p, t):
    """STAR for one leaf: -> (next averages, the learned step / -alpha, the nominal step / -nominal_stepsize)."""
    averages = update_averages(meta_params, averages, g)
    f, adam = scalar_features(averages, g, p)
    direction, magnitude = network(meta_params, f, t)
    # -delta = alpha direction exp(0.001 magnitude) + nominal_stepsize exp(0.001) mean_j m_j / sqrt(rms + 1e-6)
    return averages, direction * jnp.exp(0.001 * magnitude), jnp.exp(0.001) * jnp.mean(adam, axis=0)


def star(learning_rate, meta_params, nominal_stepsize=1e-3):
    """STAR as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args:
        learning_rate: alpha > 0, the scale of the network's step, or an optax schedule: count -> alpha.
        meta_params: see init_meta_params.
        nominal_stepsize: step size of the nominal Adam.
    Returns: optax.GradientTransformationExtraArgs with StarState. Updates have the dtype of gradient + parameter.
    Raises: TypeError: a leaf is neither real numbers nor None; the message names it.
        ValueError: from update, where it gets no params.
    """

    def init_fn(params):
        averages = jax.tree.map_with_path(init_averages, params)
        fields = (jax.tree.map(lambda _, a: a[i], params, averages) for i in range(4))
        return StarState(jnp.zeros((), jnp.int32), *fields)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("STAR sees the parameters: call update(grads, opt_state, params)")
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rule = jax.checkpoint(update_rule)  # the backward pass computes the features, 39 times a leaf's size, again

        def step(path, g, p, *averages):
            if g is None:  # no gradient, no update: equinox marks leaves that are not trained so
                return None, *averages
            state_dtype(path, g)  # TypeError for what holds no real numbers
            dtype = averages[0].dtype
            # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
            gradient = jax.lax.stop_gradient(jnp.asarray(g, dtype))
            new, learned, nominal = rule(meta_params, averages, gradient, jnp.asarray(p, dtype), state.count)
            update = -alpha * learned - nominal_stepsize * nominal
            return update.astype(jnp.result_type(g, p, float)), *(x.astype(dtype) for x in new)

        is_none = lambda x: x is None
        results = jax.tree.map_with_path(step, updates, params, *state[1:], is_leaf=is_none)
        updates, *averages = (jax.tree.map(lambda _, r: r[i], updates, results, is_leaf=is_none) for i in range(5))
        return updates, StarState(optax.safe_increment(state.count), *averages)

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


STAR = LearnedOptimizer(init=init_meta_params, make=star)


def init_averages(path, leaf):
    """(m, rms, row, col) of zeros, sharded as the leaf is."""
    zeros = jnp.zeros_like(leaf, dtype=state_dtype(path, leaf))

    def three(axes):
        mean = jnp.mean(zeros, axes, keepdims=True)
        return jnp.broadcast_to(mean, (3, *mean.shape))

    row_axes, col_axes = factored_axes(zeros.shape)
    return three(()), zeros, three(row_axes), three(col_axes)


def state_dtype(path, leaf):
    """float32, or float64 for leaves of it. Half precision would lose small squares."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"STAR updates real numbers; leaf {jax.tree_util.keystr(path) or 'itself'} is {dtype}")
    return jax.dtypes.canonicalize_dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
