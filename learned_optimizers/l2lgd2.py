# SPDX-License-Identifier: MIT
"""L2LGD2: the first learned optimizer (Andrychowicz et al. 2016), with a GRU (paper: among the optimizers of Figure 3).

"Learning to learn by gradient descent by gradient descent". One tiny GRU is shared by every scalar parameter of an
agent; each scalar keeps its own hidden state. The GRU sees the logarithm of the gradient and decides how to scale it.

    x = (log(|g| + 1e-8) / p, sign g)   if log(|g| + 1e-8) / p >= -1
        (-1, e^p g)                     if not;  p = 10
    h = GRU(h, x)        o = Linear(h)
    delta = -alpha exp(o) g

| symbol | in code | shape |
|---|---|---|
| g | gradient of one leaf of the parameters | [*leaf] |
| x | what the GRU sees of it | [2, *leaf] |
| h | hidden state, hidden size H = 8 | [H, *leaf] |
| o | read-out | [*leaf] |
| theta | meta_params, 281 numbers | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule | [] |

Example:
    import jax, optax
    import l2lgd2  # in this repository: from learned_optimizers import l2lgd2
    meta_params = l2lgd2.init_meta_params(jax.random.key(0))
    optimizer = optax.chain(optax.clip(1.0), l2lgd2.l2lgd2(1e-3, meta_params))
    params = {"w": jax.numpy.ones((2, 3))}
    grads = {"w": jax.numpy.full((2, 3), 0.1)}
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)

Deviations: the read-out starts at zero, where the reference (github.com/sail-sg/optim4rl) draws it at random, so that
the untrained rule is exactly SGD.
Copy this file: needs jax >= 0.10, optax >= 0.2.5. Keeps 8 numbers of state for each parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

P = 10.0  # of the preprocessing below: gradients smaller than e^-P = 4.5e-5 are seen as they are, times e^P


class LearnedOptimizer(NamedTuple):
    """What every learned optimizer of this project offers."""

    init: Callable  # key -> meta_params
    make: Callable  # (learning_rate, meta_params) -> optax.GradientTransformation


class L2LGD2State(NamedTuple):
    count: jax.Array  # [] int32, updates so far: the argument of a schedule
    hidden: Any  # a tree like the parameters, [H, *leaf] for each leaf


def init_meta_params(key, hidden_size=8):
    """Meta-parameters of the untrained rule. The gates of the GRU are stacked in the order reset, update, candidate.

    Returns: {"input_kernel" [3H, 2], "input_bias" [3H], "recurrent_kernel" [3H, H], "candidate_bias" [H],
        "readout_kernel" [1, H], "readout_bias" [1]}
    """
    input_key, recurrent_key = jax.random.split(key)
    orthogonal = jax.vmap(lambda key: jax.nn.initializers.orthogonal()(key, (hidden_size, hidden_size)))
    return {
        "input_kernel": jax.nn.initializers.lecun_normal()(input_key, (2, 3 * hidden_size)).T,
        "input_bias": jnp.zeros(3 * hidden_size),
        "recurrent_kernel": orthogonal(jax.random.split(recurrent_key, 3)).reshape(3 * hidden_size, hidden_size),
        "candidate_bias": jnp.zeros(hidden_size),
        "readout_kernel": jnp.zeros((1, hidden_size)),
        "readout_bias": jnp.zeros(1),
    }


def from_reference(weights):
    """Meta-parameters from the reference's weights: flat {"rnn/ir/kernel": array, ...}, kernels [in, out]."""
    return {
        "input_kernel": jnp.concatenate([weights[f"rnn/i{gate}/kernel"].T for gate in "rzn"]),
        "input_bias": jnp.concatenate([weights[f"rnn/i{gate}/bias"] for gate in "rzn"]),
        "recurrent_kernel": jnp.concatenate([weights[f"rnn/h{gate}/kernel"].T for gate in "rzn"]),
        "candidate_bias": jnp.asarray(weights["rnn/hn/bias"]),
        "readout_kernel": jnp.asarray(weights["mlp/layers_0/kernel"]).T,
        "readout_bias": jnp.asarray(weights["mlp/layers_0/bias"]),
    }


def linear(kernel, bias, x):
    """kernel [n, k], bias [n], x [k, *leaf] -> [n, *leaf]. "highest": TF32 would keep 3 digits of a hidden state."""
    return jnp.tensordot(kernel, x, 1, precision="highest") + bias.reshape(-1, *[1] * (x.ndim - 1))


def gru(cell, h, x):
    """One step of the GRU: h [H, *leaf], x [2, *leaf] -> next h."""
    x_r, x_z, x_n = jnp.split(linear(cell["input_kernel"], cell["input_bias"], x), 3)
    recurrent_bias = jnp.pad(cell["candidate_bias"], (2 * len(h), 0))  # of the candidate only
    h_r, h_z, h_n = jnp.split(linear(cell["recurrent_kernel"], recurrent_bias, h), 3)
    # r = s(W_r x + b_r + U_r h), z = s(W_z x + b_z + U_z h), n = tanh(W_n x + b_n + r (U_n h + c_n))
    r = jax.nn.sigmoid(x_r + h_r)
    z = jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    # h' = (1 - z) n + z h
    return (1 - z) * n + z * h


def preprocess(g):
    """The magnitude and the sign of gradients that span many magnitudes: g [*leaf] -> x [2, *leaf]."""
    # x = (log(|g| + 1e-8) / p, sign g); 1e-8 keeps the logarithm of zero finite
    log = jnp.log(jnp.abs(g) + 1e-8) / P
    large = jnp.stack([log, jnp.sign(g)])
    # x = (-1, e^p g): near zero the sign is mere noise, and must not jump
    small = jnp.stack([-jnp.ones_like(g), jnp.exp(P) * g])
    return jnp.where(log >= -1, large, small)


def update_rule(meta_params, h, g):
    """L2LGD2 with alpha = 1 for one leaf: h [H, *leaf], g [*leaf] -> (next h, delta [*leaf])."""
    h = gru(meta_params, h, preprocess(g))
    # o = Linear(h)
    (o,) = linear(meta_params["readout_kernel"], meta_params["readout_bias"], h)
    # delta / alpha = -exp(o) g
    return h, -jnp.exp(o) * g


def l2lgd2(learning_rate, meta_params):
    """L2LGD2 as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args:
        learning_rate: alpha > 0, or an optax schedule: count -> alpha.
        meta_params: see init_meta_params.
    Returns: optax.GradientTransformationExtraArgs with L2LGD2State. Updates have the dtype of gradient + parameter.
    Raises: TypeError: a leaf is neither real numbers nor None; the message names it.
    """
    hidden_size = len(meta_params["candidate_bias"])
    # The gates are 10 times the hidden state: the backward pass does not keep them but computes them again.
    rule = jax.checkpoint(update_rule)

    def init_fn(params):
        def zeros(path, leaf):
            like = jnp.zeros_like(leaf, dtype=state_dtype(path, leaf))  # sharded as the leaf is
            return jnp.broadcast_to(like, (hidden_size, *like.shape))

        return L2LGD2State(jnp.zeros((), jnp.int32), jax.tree.map_with_path(zeros, params))

    def update_fn(updates, state, params=None):
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(path, g, h, p):
            if g is None:  # no gradient, no update: equinox marks leaves that are not trained so
                return None, h
            state_dtype(path, g)  # TypeError for what holds no real numbers
            # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
            new_h, delta = rule(meta_params, h, jax.lax.stop_gradient(jnp.asarray(g, h.dtype)))
            return (alpha * delta).astype(jnp.result_type(g, p, float)), new_h.astype(h.dtype)

        is_none = lambda x: x is None
        like = updates if params is None else params
        pairs = jax.tree.map_with_path(step, updates, state.hidden, like, is_leaf=is_none)
        updates, hidden = (jax.tree.map(lambda _, pair: pair[i], updates, pairs, is_leaf=is_none) for i in range(2))
        return updates, L2LGD2State(optax.safe_increment(state.count), hidden)

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


L2LGD2 = LearnedOptimizer(init=init_meta_params, make=l2lgd2)


def state_dtype(path, leaf):
    """float32, or float64 for leaves of it. In half precision a hidden state would not move by small gradients."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"L2LGD2 updates real numbers; leaf {jax.tree_util.keystr(path) or 'itself'} is {dtype}")
    return jax.dtypes.canonicalize_dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
