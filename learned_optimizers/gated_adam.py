# SPDX-License-Identifier: MIT
"""GatedAdam: Adam whose step and momentum are gated by 14 learned numbers (our own optimizer, not in the paper).

Optim4RL's networks see the raw gradient g and g^2. An agent's gradients are often so small, 1e-6 to 1e-1, that the
networks see next to nothing of them (figure 1 of the paper shows the sizes). Here the moments are Adam's, and two
linear gates, the same for every scalar, see only ratios of moments and the agent's age:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        both bias-corrected; b1, b2 learned
    x = (log of m^2 / v, log of v / mean v, exp(-t / 10), exp(-t / 100), exp(-t / 1000))
    o1, o2 = Linear(x)
    delta = -alpha exp(o1) ((1 - s) g + s m) / sqrt(v + eps),  s = sigmoid(o2)

| symbol | in code | shape |
|---|---|---|
| g | gradient of one leaf of the parameters | [*leaf] |
| m, v | Adam's moments, zero at first; mean v is over all scalars of the agent | [*leaf] each |
| x | signal to noise, relative size of the gradient, age: see gates | 5 numbers for each scalar |
| t | count: updates so far, with this one; x stops counting at 252 | [] |
| theta | meta_params, 14 numbers | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule | [] |

With m^2 / v the gate o1 can turn Adam into sign descent, with v / mean v into plain gradient descent. With its clocks
it can make a schedule. Neither the scale of the gradients nor the layout of the parameters matters, and opposite gradients
give opposite updates. The untrained rule is halfway between Adam and RMSProp.

Example:
    import jax, optax
    import gated_adam  # in this repository: from learned_optimizers import gated_adam
    optimizer = gated_adam.gated_adam(2e-2)  # instead of optax.adam(2e-2)
    params = {"w": jax.numpy.ones((2, 3))}
    grads = {"w": jax.numpy.full((2, 3), 0.1)}
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)

Copy this file: needs jax >= 0.10, optax >= 0.2.5. Keeps 2 numbers of state for each parameter, as Adam does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

TIMESCALES = (10.0, 100.0, 1000.0)  # updates
MAX_AGE = 252  # updates, the age of the oldest agents in meta-training: the gates never saw an older one

# The mean of what ten meta-runs on gridworlds learned: weights/gated_adam.npz. NumPy arrays: importing this file touches no device.
WEIGHTS = {
    "kernel": np.array(
        [
            [0.77371466, -1.1577616, -1.534457, 1.4302733, -0.8182438],
            [0.62483186, 0.61771256, -0.86289215, -0.52043885, -0.085501984],
        ],
        np.float32,
    ),
    "bias": np.array([-0.12863708, -0.6125984], np.float32),
    "decay_logits": np.array([2.7012856, 4.9054265], np.float32),
}


class LearnedOptimizer(NamedTuple):
    """What every learned optimizer of this project offers."""

    init: Callable  # key -> meta_params
    make: Callable  # (learning_rate, meta_params) -> optax.GradientTransformation


class GatedAdamState(NamedTuple):
    count: jax.Array  # [] int32, updates so far
    m: Any  # trees like the parameters, before bias correction
    v: Any


def init_meta_params(key):
    """Meta-parameters of the untrained rule, the same for every key.

    Returns: {"kernel" [2, 5], "bias" [2], "decay_logits" [2]: b1 and b2 before the logistic function}
    """
    del key
    decay_logits = jax.scipy.special.logit(jnp.array([0.9, 0.99]))
    return {"kernel": jnp.zeros((2, 5)), "bias": jnp.zeros(2), "decay_logits": decay_logits}


def gates(meta_params, m, v, mean_v, count):
    """The two gates of one leaf.

    Args:
        m: m / sqrt(v + eps), [*leaf].
        v: second moment, bias-corrected as m is, [*leaf].
        mean_v: mean of v over all leaves plus eps, [].
        count: t, [].
    Returns: o1, o2: [*leaf] each.
    """
    # 1e-4, 1e-8 and 1e30 keep the logarithms of what is almost zero or overflows in range, 1/5 and 1/10 near 1.
    signal = jnp.log(m**2 + 1e-4) / 5
    size = jnp.log(jnp.minimum(v / mean_v, 1e30) + 1e-8) / 10
    ages = jnp.exp(-jnp.minimum(count, MAX_AGE) / jnp.array(TIMESCALES, v.dtype))
    # o = W x + b, where the ages are the same for all scalars
    kernel = meta_params["kernel"]
    shared = jnp.dot(kernel[:, 2:], ages, precision="highest") + meta_params["bias"]  # (2,)
    return [k[0] * signal + k[1] * size + o for k, o in zip(kernel, shared, strict=True)]


def update_rule(meta_params, g, m, v, mean_v, count, eps):
    """GatedAdam with alpha = 1 for one leaf: g, bias-corrected m, v [*leaf]; the rest as in gates -> delta [*leaf]."""
    root = jnp.sqrt(v + eps)
    # Divided before they are squared or multiplied, since those may overflow where the quotients do not.
    g, m = g / root, m / root
    o1, o2 = gates(meta_params, m, v, mean_v + eps, count)
    s = jax.nn.sigmoid(o2)
    # delta / alpha = -exp(o1) ((1 - s) g + s m) / sqrt(v + eps)
    return -jnp.exp(o1) * ((1 - s) * g + s * m)


def mean_over_scalars(tree):
    """Mean over all finite scalars of a tree: one broken scalar must not change the steps of the others."""
    leaves = jax.tree.leaves(tree)
    count = jnp.maximum(sum(jnp.sum(jnp.isfinite(x)).astype(jnp.float32) for x in leaves), 1)
    # Divided before it is summed, since a sum of large squares overflows.
    return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) / count) for x in leaves)


def gated_adam(learning_rate, meta_params=WEIGHTS, eps=1e-16):
    """GatedAdam as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args:
        learning_rate: alpha > 0, or an optax schedule: count -> alpha. Try .02 to .05 for A2C, .001 to .003 for PPO. Clipping the
            gradients beforehand is optional: their scale does not matter, and sqrt(v) limits a large one as in Adam.
        meta_params: see init_meta_params; by default what was learned.
        eps: keeps the quotients finite; far below any squared gradient that matters.
    Returns: optax.GradientTransformationExtraArgs with GatedAdamState. Moments are float32 at least; updates have the dtype
        of gradient + parameter. A scalar whose g^2 overflows stops for good, as in Adam, and no other is touched.
    Raises: TypeError: a leaf is neither real numbers nor None; the message names it.
    """

    def init_fn(params):
        zeros = lambda path, leaf: jnp.zeros_like(leaf, dtype=state_dtype(path, leaf))
        m, v = (jax.tree.map_with_path(zeros, params) for _ in range(2))
        return GatedAdamState(jnp.zeros((), jnp.int32), m, v)

    def update_fn(updates, state, params=None):
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        b1, b2 = jax.nn.sigmoid(meta_params["decay_logits"])

        def real(path, g, m):
            if g is None:  # no gradient, no update: equinox marks leaves that are not trained so
                return None
            state_dtype(path, g)  # TypeError for what holds no real numbers
            # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
            return jax.lax.stop_gradient(jnp.asarray(g, m.dtype))

        def step(_, g, m, v, original, p):
            if g is None:
                return None
            delta = update_rule(meta_params, g, m / (1 - b1**count), v, mean_v, count, eps)
            return (alpha * delta).astype(jnp.result_type(original, p, float))

        grads = map_grads(real, updates, state.m)
        # m = b1 m + (1 - b1) g
        m = map_grads(lambda _, g, m: m if g is None else (b1 * m + (1 - b1) * g).astype(m.dtype), grads, state.m)
        # v = b2 v + (1 - b2) g^2
        v = map_grads(lambda _, g, v: v if g is None else (b2 * v + (1 - b2) * g**2).astype(v.dtype), grads, state.v)
        corrected_v = map_grads(lambda _, g, v: None if g is None else v / (1 - b2**count), grads, v)
        mean_v = mean_over_scalars(corrected_v)
        updates = map_grads(step, grads, m, corrected_v, updates, updates if params is None else params)
        return updates, GatedAdamState(count, m, v)

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


GATED_ADAM = LearnedOptimizer(init=init_meta_params, make=gated_adam)


def map_grads(function, grads, *trees):
    """jax.tree.map_with_path for gradients that may be None."""
    return jax.tree.map_with_path(function, grads, *trees, is_leaf=lambda g: g is None)


def state_dtype(path, leaf):
    """float32, or float64 for leaves of it: the square of a small gradient would vanish in half precision."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"GatedAdam updates real numbers; leaf {jax.tree_util.keystr(path) or 'itself'} is {dtype}")
    return jax.dtypes.canonicalize_dtype(np.float64 if dtype == np.float64 else np.float32)
