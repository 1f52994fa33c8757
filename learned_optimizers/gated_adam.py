"""GatedAdam: a learned optimizer of our own, Adam whose step and momentum are gated by 20 learned numbers (not in the paper).

Optim4RL's networks see the raw gradient g and g^2. An agent's gradients are small, 1e-6 to 1e-1, so the networks see next to
nothing of them and learn a step size, at best a schedule. Here the moments are Adam's, and the gates, the same for
every scalar as in Optim4RL, see only ratios of them, the shape of the tensor that the scalar is part of, and the agent's age:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        both bias-corrected; b1, b2 learned
    x = (log of m^2 / v, log of v / mean v, 1 in vectors and 0 in matrices, log of fan-in, log of fan-out,
         exp(-t / 10), exp(-t / 100), exp(-t / 1000))
    o1, o2 = Linear(x)
    delta = -alpha exp(o1) ((1 - s) g + s m) / sqrt(v + eps),  s = sigmoid(o2)

| symbol | here | shape |
|---|---|---|
| g | gradient | like the agent's parameters |
| m, v | Adam's moments; mean v is over all scalars of the agent | like g, zero at first |
| x | signal to noise, relative size of the gradient, shape of the tensor, age | 8 numbers for each scalar |
| fan-out, fan-in | the last axis of a tensor, and the product of all others | [] |
| t | updates so far, with this one; x stops counting at 500 | [] |
| theta | meta_params, 20 numbers | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule | [] |

The gate o1 reaches from sign descent (by m^2 / v) over RMSProp and Adam towards plain gradient descent (by v / mean v), with any
schedule that its clocks can make, and with another step for biases (vectors), wide layers (fan-in) and heads (fan-out).
The rule does not depend on the scale of the gradients, is odd in them, and leaves alone what has none. Untrained it is
halfway between Adam and RMSProp.

Example:
    import jax, optax, gated_adam
    meta_params = gated_adam.init_meta_params(jax.random.key(0))
    optimizer = optax.chain(optax.clip(1.0), gated_adam.gated_adam(meta_params, learning_rate=1e-2))
    params = {"w": jax.numpy.ones(3)}
    updates, opt_state = optimizer.update(params, optimizer.init(params))

Copy this file: needs jax, optax.
"""

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

TIMESCALES = (10.0, 100.0, 1000.0)  # updates
MAX_AGE = 500  # updates: the age of the oldest agents of meta-training; of an older one the gates have learned nothing
NUM_INPUTS = 5 + len(TIMESCALES)


class LearnedOptimizer(NamedTuple):
    """The common form of all learned optimizers."""

    init: Callable  # key -> meta_params
    make: Callable  # (meta_params, learning_rate) -> optax.GradientTransformation


class GatedAdamState(NamedTuple):
    count: jax.Array  # [] int32, updates so far
    m: Any  # like the agent's parameters
    v: Any


def init_meta_params(key):
    """Meta-parameters of the untrained rule, the same for every key.

    Returns:
        {"kernel" [2, 8], "bias" [2], "decay_logits" [2]: b1 and b2 before the logistic function}.
    """
    del key
    decay_logits = jax.scipy.special.logit(jnp.array([0.9, 0.99]))
    return {"kernel": jnp.zeros((2, NUM_INPUTS)), "bias": jnp.zeros(2), "decay_logits": decay_logits}


def shape_inputs(shape):
    """What the gates see of a tensor of that shape: 1 in vectors (scalars too), and its fans, near 0 where they are common."""
    *ins, fan_out = shape or (1,)
    fan_in = math.prod(ins) if ins else 64  # a vector has none: it counts as a common one
    return len(shape) < 2, math.log(max(fan_in, 1) / 64) / 2, math.log(max(fan_out, 1) / 8) / 2


def gates(meta_params, m, v, mean_v, count, eps):
    """(o1, o2) for a tensor's bias-corrected moments m, v, of any shape."""
    signal = jnp.log(m**2 / (v + eps) + 1e-4) / 5  # 1e-4, 1e-8: logarithms of what is almost zero stay in range
    size = jnp.log(v / (mean_v + eps) + 1e-8) / 10
    tensor = jnp.array(shape_inputs(m.shape), v.dtype)
    ages = jnp.exp(-jnp.minimum(count, MAX_AGE) / jnp.array(TIMESCALES, v.dtype))
    kernel = meta_params["kernel"]
    shared = kernel[:, 2:] @ jnp.concatenate([tensor, ages]) + meta_params["bias"]  # (2,), the same in all of a tensor
    return [k[0] * signal + k[1] * size + o for k, o in zip(kernel, shared)]


def gated_adam(meta_params, learning_rate, eps=1e-16):
    """GatedAdam as an optax transformation of any pytree of arrays, differentiable with respect to meta_params.

    Args:
        meta_params: see init_meta_params.
        learning_rate: alpha > 0, or an optax schedule: count -> alpha.
        eps: keeps the quotients finite; far below any squared gradient that matters.
    Returns:
        optax.GradientTransformation with GatedAdamState.
    """

    def init_fn(params):
        return GatedAdamState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
        grads = jax.lax.stop_gradient(updates)
        b1, b2 = jax.nn.sigmoid(meta_params["decay_logits"])
        m = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(g.dtype), state.m, grads)
        v = jax.tree.map(lambda v, g: (b2 * v + (1 - b2) * g**2).astype(g.dtype), state.v, grads)
        mean_v = optax.tree.sum(v) / max(optax.tree.size(v), 1) / (1 - b2**count)
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(g, m, v):
            m, v = m / (1 - b1**count), v / (1 - b2**count)
            o1, o2 = gates(meta_params, m, v, mean_v, count, eps)
            s = jax.nn.sigmoid(o2)
            # delta = -alpha exp(o1) ((1 - s) g + s m) / sqrt(v + eps)
            return (-alpha * jnp.exp(o1) * ((1 - s) * g + s * m) / jnp.sqrt(v + eps)).astype(g.dtype)

        return jax.tree.map(step, grads, m, v), GatedAdamState(count, m, v)

    return optax.GradientTransformation(init_fn, update_fn)


GATED_ADAM = LearnedOptimizer(init=init_meta_params, make=gated_adam)
