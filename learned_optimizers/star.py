"""The other learned optimizers of the paper, in the form of optim4rl.py: LinearOptim, L2LGD2, STAR (VeLO: velo.py).

LinearOptim takes Optim4RL's structure away; L2LGD2 (Andrychowicz et al. 2016) is the first learned optimizer. Both are one
GRU with read-out o, shared by every scalar parameter of an agent, each scalar with its own hidden state:

    LinearOptim   h = GRU(h, g)    delta = -alpha (exp(o1) g + exp(o2) o3)
    L2LGD2        h = GRU(h, x)    delta = -alpha exp(o1) g
                  x = (log(|g| + 1e-8) / p, sign g) where that is at least -1, else (-1, e^p g); p = 10

STAR (Harrison et al. 2022) corrects a nominal Adam by a small network, which sees 28 features f of each scalar, each divided
by its root mean square over the tensor, and 11 of time, tanh(t / timescale - 1):

    direction, magnitude = MLP(f, time)
    delta = -alpha direction exp(0.001 magnitude) - nominal_stepsize exp(0.001) mean_j m_j / sqrt(rms + 1e-6)

| symbol | here | shape |
|---|---|---|
| g, x | gradients, flattened and cut into K pieces of C scalars; D inputs of each, 1 or 2 | [K, C], [D, C] |
| h, o | hidden, hidden axis before the scalars; outputs, O = 3 or 1 | [K, H, C], [O, C] |
| m_j, rms | STAR: averages of g (decays .9 .99 .999) and of g^2 (.999) | [3, *shape], [1, *shape] |
| row, col | STAR: Adafactor's averages of g^2 (.9 .99 .999) over the largest and over the second largest axis | [3, ...] each |
| theta | meta_params: 275 numbers (LinearOptim), 281 (L2LGD2), 207 (STAR) | see init_recurrent, init_star |
| alpha | learning_rate: a number, a traced array or an optax schedule; STAR's step_mult | [] |

Example:
    import jax, optax, baselines
    meta_params = baselines.STAR.init(jax.random.key(0))
    optimizer = optax.chain(optax.clip(1.0), baselines.STAR.make(meta_params, learning_rate=1e-3))
    params = {"w": jax.numpy.ones((2, 3))}
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)      # STAR sees the parameters too

Deviations: the read-outs start at zero, STAR's too, so that the untrained LinearOptim and L2LGD2 are exactly SGD, and the
untrained STAR is its nominal Adam.
Copy this file: needs jax, optax, numpy.
"""

from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PIECE = 2048  # scalars updated at a time: their gates then fit a core's cache, which halves the time on a CPU
L2LGD2_P = 10.0
DECAYS = {"momentum_decays": (0.9, 0.99, 0.999), "rms_decays": (0.999,), "adafactor_decays": (0.9, 0.99, 0.999)}
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # updates
STAR_FEATURES = 28


class LearnedOptimizer(NamedTuple):
    """The common form of all learned optimizers."""

    init: Callable  # key -> meta_params
    make: Callable  # (meta_params, learning_rate) -> optax.GradientTransformation


class RecurrentState(NamedTuple):
    count: jax.Array  # [] int32, updates so far
    hidden: jax.Array  # [K, H, C]


class StarState(NamedTuple):
    count: jax.Array  # [] int32, updates so far
    averages: Any  # of each tensor, in the order of jax.tree.leaves: (m, rms, row, col)


def init_recurrent(key, num_inputs, num_outputs, hidden_size=8):
    """Meta-parameters of an untrained LinearOptim (1 input, 3 outputs) or L2LGD2 (2 inputs, 1 output).

    Returns:
        {"input_kernel" [3H, D], "input_bias" [3H], "recurrent_kernel" [3H, H], "candidate_bias" [H],
        "readout_kernel" [O, H], "readout_bias" [O]}, gates stacked in the order reset, update, candidate.
    """
    input_key, recurrent_key = jax.random.split(key)
    orthogonal = jax.vmap(lambda k: jax.nn.initializers.orthogonal()(k, (hidden_size, hidden_size)))
    return {
        "input_kernel": jax.nn.initializers.lecun_normal()(input_key, (num_inputs, 3 * hidden_size)).T,
        "input_bias": jnp.zeros(3 * hidden_size),
        "recurrent_kernel": orthogonal(jax.random.split(recurrent_key, 3)).reshape(3 * hidden_size, hidden_size),
        "candidate_bias": jnp.zeros(hidden_size),
        "readout_kernel": jnp.zeros((num_outputs, hidden_size)),
        "readout_bias": jnp.zeros(num_outputs),
    }


def gru(cell, h, x):
    """One step of the GRU; only the candidate has a recurrent bias. h [H, C], x [D, C] -> next h [H, C]."""
    # r = s(W_r x + b_r + U_r h), z = s(W_z x + b_z + U_z h), n = tanh(W_n x + b_n + r (U_n h + c_n))
    x_r, x_z, x_n = jnp.split(cell["input_kernel"] @ x + cell["input_bias"][:, None], 3)
    h_r, h_z, h_n = jnp.split(cell["recurrent_kernel"] @ h, 3)
    r = jax.nn.sigmoid(x_r + h_r)
    z = jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * (h_n + cell["candidate_bias"][:, None]))
    # h' = (1 - z) n + z h
    return (1 - z) * n + z * h


def linear_rule(meta_params, h, g):
    """LinearOptim with alpha = 1, for C scalars: h [H, C], g [C] -> (next h, delta [C])."""
    h = gru(meta_params, h, g[None])
    o1, o2, o3 = meta_params["readout_kernel"] @ h + meta_params["readout_bias"][:, None]
    return h, -(jnp.exp(o1) * g + jnp.exp(o2) * o3)


def l2lgd2_rule(meta_params, h, g):
    """L2LGD2 with alpha = 1, for C scalars: h [H, C], g [C] -> (next h, delta [C])."""
    # Gradients span many magnitudes: the logarithm keeps their order; below e^-p, mere noise, g itself.
    log = jnp.log(jnp.abs(g) + 1e-8) / L2LGD2_P
    large = jnp.stack([log, jnp.sign(g)])
    small = jnp.stack([-jnp.ones_like(g), jnp.exp(L2LGD2_P) * g])
    h = gru(meta_params, h, jnp.where(log >= -1, large, small))
    (o1,) = meta_params["readout_kernel"] @ h + meta_params["readout_bias"][:, None]
    return h, -jnp.exp(o1) * g


def recurrent_optimizer(update_rule, meta_params, learning_rate):
    """linear_rule or l2lgd2_rule as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args: meta_params: see init_recurrent, the rule is computed in their dtype; learning_rate: alpha or a schedule of it.
    Returns: optax.GradientTransformation with RecurrentState.
    """
    hidden_size, dtype = meta_params["candidate_bias"].shape[0], meta_params["candidate_bias"].dtype

    def init_fn(params):
        num_pieces, piece = _pieces(params)
        return RecurrentState(jnp.zeros((), jnp.int32), jnp.zeros((num_pieces, hidden_size, piece), dtype))

    def update_fn(updates, state, params=None):
        del params
        # The backward pass needs a piece's gates, many times its hidden state: recompute them there, piece by piece.
        rule = jax.checkpoint(lambda h, g: update_rule(meta_params, h, g))
        # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
        g = jax.lax.stop_gradient(_to_pieces(updates, dtype))  # (K, C)
        hidden, delta = _map_pieces(rule, state.hidden, g)
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates = _from_pieces(alpha * delta, updates)
        return updates, RecurrentState(optax.safe_increment(state.count), hidden)

    return optax.GradientTransformation(init_fn, update_fn)


def init_star(key, hidden_size=4):
    """Meta-parameters of an untrained STAR, as in the reference, but for its read-out.

    Returns:
        {"w0" [39, H], "b0" [H], "w1" [H, H], "b1" [H], "w2" [H, 4], "b2" [4] (the last two outputs are not used),
        "momentum_decays" [3], "rms_decays" [1], "adafactor_decays" [3]: offsets d of the decays}.
    """
    sizes = (STAR_FEATURES + len(TIMESCALES), hidden_size, hidden_size, 4)
    meta_params = {"w2": jnp.zeros(sizes[2:])}
    for i, layer_key in enumerate(jax.random.split(key)):
        meta_params[f"w{i}"] = jax.random.truncated_normal(layer_key, -2, 2, sizes[i : i + 2]) / sizes[i] ** 0.5
    meta_params |= {f"b{i}": jnp.zeros(size) for i, size in enumerate(sizes[1:])}
    return meta_params | {name: jnp.zeros(len(values)) for name, values in DECAYS.items()}


def star(meta_params, learning_rate, nominal_stepsize=1e-3):
    """STAR as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args:
        meta_params: see init_star; the rule is computed in their dtype.
        learning_rate: alpha > 0 (step_mult), the scale of the network's step, or an optax schedule: count -> alpha.
        nominal_stepsize: step size of the nominal Adam.
    Returns:
        optax.GradientTransformation with StarState; update raises ValueError where it gets no params.
    """
    dtype = meta_params["w0"].dtype

    def init_fn(params):
        return StarState(jnp.zeros((), jnp.int32), [_init_averages(p.shape, dtype) for p in jax.tree.leaves(params)])

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("STAR sees the parameters: call update(grads, opt_state, params)")
        grads, treedef = jax.tree.flatten(updates)
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new_updates, averages = [], []
        # The backward pass recomputes a tensor's features, 39 times its size: a tensor is a piece here.
        rule = jax.checkpoint(star_rule)
        for g, p, average in zip(grads, jax.tree.leaves(params), state.averages):
            # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
            gradient = jax.lax.stop_gradient(jnp.asarray(g, dtype))
            average, step, nominal = rule(meta_params, average, gradient, jnp.asarray(p, dtype), state.count)
            new_updates.append((-alpha * step - nominal_stepsize * nominal).astype(g.dtype))
            averages.append(average)
        return jax.tree.unflatten(treedef, new_updates), StarState(optax.safe_increment(state.count), averages)

    return optax.GradientTransformation(init_fn, update_fn)


def star_rule(meta_params, averages, g, p, count):
    """STAR for one tensor of any shape: -> (next averages, step / -alpha, nominal step / -nominal_stepsize)."""
    # decay = 1 - exp(10 (log(1 - initial decay) / 10 + d))
    decays = {name: 1 - (1 - jnp.array(b, g.dtype)) * jnp.exp(10 * meta_params[name]) for name, b in DECAYS.items()}
    b1, b2, b3 = (_axis_first(decays[name], g) for name in DECAYS)
    b2, b3 = jnp.maximum(b2, 0), jnp.maximum(b3, 0)  # squares stay positive
    m, rms, row, col = averages
    m, rms = b1 * m + (1 - b1) * g, b2 * rms + (1 - b2) * g**2
    rsqrt = jax.lax.rsqrt(rms + 1e-6)
    row, col, factors = _factored(row, col, b3, g)  # g / sqrt of the factored second moments, m the same
    adam = m * rsqrt  # (3, *shape)
    rows, cols = jnp.broadcast_to(row, m.shape), jnp.broadcast_to(col, m.shape)
    features = [g[None], p[None], m, rms, adam, rsqrt, factors[0] * g, rows, cols]
    features += [jax.lax.rsqrt(rows + 1e-8), jax.lax.rsqrt(cols + 1e-8), factors[1] * m]
    x = jnp.concatenate(features)  # (28, *shape)
    # Second-moment normalisation: x / sqrt(1e-5 + mean x^2) over the tensor
    x = x * jax.lax.rsqrt(1e-5 + jnp.mean(x**2, axis=range(1, x.ndim), keepdims=True))
    time = jnp.tanh(count / jnp.array(TIMESCALES, x.dtype) - 1)  # (11,), the same for every scalar
    w0, bias = meta_params["w0"], meta_params["b0"] + time @ meta_params["w0"][STAR_FEATURES:]
    x = jax.nn.relu(jnp.tensordot(w0[:STAR_FEATURES].T, x, 1) + _axis_first(bias, g))
    x = jax.nn.relu(jnp.tensordot(meta_params["w1"].T, x, 1) + _axis_first(meta_params["b1"], g))
    direction, magnitude, _, _ = jnp.tensordot(meta_params["w2"].T, x, 1) + _axis_first(meta_params["b2"], g)
    return (m, rms, row, col), direction * jnp.exp(0.001 * magnitude), jnp.exp(0.001) * jnp.mean(adam, axis=0)


def _axis_first(x, tensor):
    """x [n] in a shape that broadcasts to [n, *tensor.shape]."""
    return x.reshape(-1, *[1] * tensor.ndim)


def _factored_axes(shape):
    """(second largest, largest) axis, as Adafactor factors a tensor; None for scalars, vectors, empty tensors."""
    if len(shape) < 2 or 0 in shape:
        return None
    return tuple(int(axis) for axis in np.argsort(shape, kind="stable")[-2:])


def _init_averages(shape, dtype):
    """Zeros (m, rms, row, col) for one tensor. An axis that a factor averages over has length 1."""
    row, col = list(shape), list(shape)
    if axes := _factored_axes(shape):
        col[axes[0]], row[axes[1]] = 1, 1
    return tuple(jnp.zeros((n, *s), dtype) for n, s in ((3, shape), (1, shape), (3, row), (3, col)))


def _factored(row, col, decay, g):
    """Adafactor's averages of g^2: -> (row, col, [what g is multiplied by, what m is multiplied by])."""
    safe_rsqrt, g2 = lambda x: jax.lax.rsqrt(jnp.maximum(x, 1e-9)), g**2 + 1e-30
    if (axes := _factored_axes(g.shape)) is None:  # the whole second moment, which stands for both
        v = decay * row + (1 - decay) * g2
        return v, v, [safe_rsqrt(v + 1e-9), (v + 1e-6) ** -0.5]
    row = decay * row + (1 - decay) * jnp.mean(g2, axis=axes[1], keepdims=True)
    col = decay * col + (1 - decay) * jnp.mean(g2, axis=axes[0], keepdims=True)
    # 1 / sqrt(row col / mean row)
    mean_row = jnp.mean(row, axis=axes[0] + 1, keepdims=True)
    factor = safe_rsqrt(row / (mean_row + 1e-9)) * safe_rsqrt(col)
    return row, col, [factor, factor]


def _pieces(tree):
    """(K, C): the number of equal pieces, and the scalars in each, that hold all scalars of a tree."""
    num_scalars = sum(leaf.size for leaf in jax.tree.leaves(tree))
    num_pieces = max(1, -(-num_scalars // PIECE))
    piece = -(-num_scalars // num_pieces)
    return num_pieces, -(-piece // 16) * 16  # whole vector registers


def _to_pieces(tree, dtype):
    """All scalars of a tree, in order, zero-padded: [K, C]."""
    num_pieces, piece = _pieces(tree)
    flat = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    padding = num_pieces * piece - sum(leaf.size for leaf in flat)
    return jnp.concatenate([*flat, jnp.zeros(padding, dtype)]).reshape(num_pieces, piece)


def _map_pieces(rule, *xs):
    """jax.lax.map(lambda piece: rule(*piece), xs), 2 to 5 times faster on a CPU."""
    if jax.default_backend() != "cpu":
        return jax.vmap(rule)(*xs)  # an accelerator takes all at once
    # A loop carries each piece into the next iteration. Were it cut out where it is used, XLA would fuse the cutting with
    # the rule's arithmetic, and compute that one scalar at a time.
    first = jax.tree.map(lambda x: x[0], xs)
    following = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), xs)
    return jax.lax.scan(lambda piece, next_piece: (next_piece, rule(*piece)), first, following)[1]


def _from_pieces(pieces, tree):
    """The inverse of _to_pieces: shapes and dtypes as in tree."""
    leaves, treedef = jax.tree.flatten(tree)
    flat = jnp.split(pieces.reshape(-1), np.cumsum([leaf.size for leaf in leaves], dtype=int))[: len(leaves)]
    leaves = [new.reshape(leaf.shape).astype(leaf.dtype) for new, leaf in zip(flat, leaves)]
    return jax.tree.unflatten(treedef, leaves)


_sizes = lambda inputs, outputs: partial(init_recurrent, num_inputs=inputs, num_outputs=outputs)
LINEAR_OPTIM = LearnedOptimizer(_sizes(1, 3), partial(recurrent_optimizer, linear_rule))
L2LGD2 = LearnedOptimizer(_sizes(2, 1), partial(recurrent_optimizer, l2lgd2_rule))
STAR = LearnedOptimizer(init_star, star)


def from_reference(name, weights):
    """Meta-parameters from the reference implementation's weights.

    Args: name: "LinearOptim", "L2LGD2" or "STAR", else ValueError; weights: flat {"rnn/ir/kernel": array, ...}, or
        STAR's {"nn/~/w0": array, ...}; kernels [in, out].
    """
    if name == "STAR":
        return {key.removeprefix("nn/~/"): jnp.asarray(value) for key, value in weights.items()}
    if name not in ("LinearOptim", "L2LGD2"):
        raise ValueError(f"unknown optimizer {name!r}; known: LinearOptim, L2LGD2, STAR")
    return {
        "input_kernel": jnp.concatenate([weights[f"rnn/i{gate}/kernel"].T for gate in "rzn"]),
        "input_bias": jnp.concatenate([weights[f"rnn/i{gate}/bias"] for gate in "rzn"]),
        "recurrent_kernel": jnp.concatenate([weights[f"rnn/h{gate}/kernel"].T for gate in "rzn"]),
        "candidate_bias": jnp.asarray(weights["rnn/hn/bias"]),
        "readout_kernel": jnp.asarray(weights["mlp/layers_0/kernel"]).T,
        "readout_bias": jnp.asarray(weights["mlp/layers_0/bias"]),
    }
