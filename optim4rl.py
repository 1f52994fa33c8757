# SPDX-License-Identifier: MIT
"""Optim4RL: the learned optimizer, as an optax.GradientTransformation (paper: Figure 2b).

One tiny recurrent network is shared by every scalar parameter of an agent; each scalar has its own hidden state.
It is shaped like an adaptive optimizer, m / sqrt(v), with both moments computed by a GRU:

    h1 = GRU1(h1, g)       o1 = Linear1(h1)      m = sign(g) exp(o1)
    h2 = GRU2(h2, g^2)     o2 = Linear2(h2)      v = exp(o2)
    delta = -alpha m / sqrt(v + eps)

The paper writes h1, x1 = GRU1(h1, g) and o1 = Linear1(x1). The output x1 of a GRU is its new hidden state, so one name is
enough.

| symbol | in code | shape |
|---|---|---|
| g | one leaf of grads | [...], any shape |
| h1, h2 | one leaf of state.m, state.v; hidden size H | [H, ...] |
| GRU1, Linear1; GRU2, Linear2 | meta_params["m"]; meta_params["v"]: 514 numbers for H = 8 | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule | [] |

The update always points against the gradient. Where o1 = o2 = 0 it is sign descent with step alpha.

Example:
    import jax, optax, optim4rl
    meta_params = optim4rl.init_meta_params(jax.random.key(0))     # or: optim4rl.load("weights/optim4rl.npz")[0]
    optimizer = optax.chain(optax.clip(1.0), optim4rl.optim4rl(learning_rate=1e-2, meta_params=meta_params))
    params = {"w": jax.numpy.ones(3)}
    opt_state = optimizer.init(params)
    grads = jax.grad(lambda params: (params["w"] ** 2).sum())(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

Which alpha to try: .003 to .1.
Cost: 16 floats of state per parameter (Adam: 2); on a CPU 40 to 50 times the time of Adam.

Deviations:
- The read-out weights start at zero, not LeCun-normal. So the untrained rule is exactly sign descent.
- The biases of the GRUs do not start at zero. With zeros, small gradients would leave the hidden state near zero. Ours
  make each hidden unit a clock: b_z = log(timescale - 1), after "Can recurrent neural networks warp time?" (Tallec and
  Ollivier 2018). A read-out of eight clocks can be a schedule.

Copy this file: needs jax >= 0.10, optax >= 0.2.5, numpy.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

TIMESCALES = (4.0, 400.0)  # updates: how fast the fastest and the slowest clock of an untrained rule are
PIECE = 2048  # scalars whose gates fit the cache of a CPU's core


class LearnedOptimizer(NamedTuple):
    """What every learned optimizer of this project offers."""

    init: Callable  # key -> meta_params
    make: Callable  # (learning_rate, meta_params) -> optax.GradientTransformation


class Optim4RLState(NamedTuple):
    count: jax.Array  # [] int32, updates so far: the argument of a learning-rate schedule
    m: Any  # a tree like the parameters: h1 of each leaf, [H, *leaf.shape]
    v: Any  # the same: h2


def init_meta_params(key, hidden_size=8):
    """Meta-parameters of an untrained rule. The gates of a GRU are stacked in the order reset, update, candidate.

    Returns: {"m": moment, "v": moment} with moment = {"input_kernel" [3H], "input_bias" [3H], "recurrent_kernel" [3H, H],
        "candidate_bias" [H], "readout_kernel" [H], "readout_bias" []}; float32, or float64 under jax_enable_x64.
    Raises: ValueError: hidden_size below 1.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}; it must be at least 1")

    def init_moment(key):
        input_key, recurrent_key, sign_key = jax.random.split(key, 3)
        # Clocks: without input a hidden unit moves from 0 towards tanh(b_n), .76 or -.76, by 1 / timescale of the way per update.
        b_z = jnp.log(jnp.geomspace(*TIMESCALES, hidden_size) - 1)
        b_n = jax.random.rademacher(sign_key, (hidden_size,), b_z.dtype)
        orthogonal = jax.vmap(lambda k: jax.nn.initializers.orthogonal()(k, (hidden_size, hidden_size)))
        return {
            "input_kernel": jax.nn.initializers.lecun_normal()(input_key, (1, 3 * hidden_size))[0],
            "input_bias": jnp.concatenate([jnp.zeros(hidden_size), b_z, b_n]),
            "recurrent_kernel": orthogonal(jax.random.split(recurrent_key, 3)).reshape(3 * hidden_size, hidden_size),
            "candidate_bias": jnp.zeros(hidden_size),
            "readout_kernel": jnp.zeros(hidden_size),
            "readout_bias": jnp.zeros(()),
        }

    m_key, v_key = jax.random.split(key)
    return {"m": init_moment(m_key), "v": init_moment(v_key)}


def init_like_rmsprop(hidden_size=8):
    """Meta-parameters with which the untrained rule is nearly RMSProp, where it is fed x = g / RMS(g) (not in the paper).

    RMSProp's update is -alpha x, so o1 = 0 and o2 = -log x^2. Half of GRU2's hidden units encode x^2. They have no memory: their
    update gate z is nearly 0, so h2 = tanh(w x^2), with w from .03 to 100. Their read-out is fitted to -log x^2 by least squares. All
    other units are clocks that see no input; their read-out is zero.

    Args: hidden_size: H. Returns: see init_meta_params. Raises: ValueError: hidden_size below 2.
    """
    if hidden_size < 2:
        raise ValueError(f"hidden_size is {hidden_size}; it must be at least 2")
    magnitudes = hidden_size // 2

    def moment(w):  # input weights of the units that encode x^2: [magnitudes] in GRU2, [0] in GRU1
        clocks = hidden_size - len(w)
        b_z = jnp.concatenate([jnp.full(len(w), -6.0), jnp.log(jnp.geomspace(*TIMESCALES, clocks) - 1)])
        b_n = jnp.concatenate([jnp.zeros(len(w)), (-1.0) ** jnp.arange(clocks)])
        x2 = jnp.geomspace(0.02, 10.0, 64) ** 2
        seen = jnp.concatenate([jnp.tanh(x2[:, None] * w), jnp.ones((64, 1))], axis=1)
        fit = jnp.linalg.lstsq(seen, -jnp.log(x2 + 1e-3))[0] if len(w) else jnp.zeros(1)
        return {
            "input_kernel": jnp.concatenate([jnp.zeros(2 * hidden_size), w, jnp.zeros(clocks)]),
            "input_bias": jnp.concatenate([jnp.zeros(hidden_size), b_z, b_n]),
            "recurrent_kernel": jnp.zeros((3 * hidden_size, hidden_size)),
            "candidate_bias": jnp.zeros(hidden_size),
            "readout_kernel": jnp.zeros(hidden_size).at[: len(w)].set(fit[:-1]),
            "readout_bias": fit[-1],
        }

    return {"m": moment(jnp.zeros(0)), "v": moment(jnp.geomspace(100.0, 0.03, magnitudes))}


def gru(cell, h, x):
    """One step of a GRU (s: sigmoid). Only the candidate gate has a recurrent bias.

    Args: cell: meta_params["m"] or ["v"]; h: hidden state [H, ...]; x: inputs [...].
    Returns: the next hidden state [H, ...].
    """
    W, b, U = (jnp.split(cell[name], 3) for name in ("input_kernel", "input_bias", "recurrent_kernel"))
    column = lambda w: w.reshape(-1, *[1] * x.ndim)  # one number per hidden unit, the same for all scalars
    from_input = [column(W_i) * x + column(b_i) for W_i, b_i in zip(W, b)]
    from_state = [jnp.tensordot(U_i, h, 1) for U_i in U]
    # r = s(W_r x + b_r + U_r h), z = s(W_z x + b_z + U_z h), n = tanh(W_n x + b_n + r (U_n h + c_n))
    r = _sigmoid(from_input[0] + from_state[0])
    z = _sigmoid(from_input[1] + from_state[1])
    n = jnp.tanh(from_input[2] + r * (from_state[2] + column(cell["candidate_bias"])))
    # h' = (1 - z) n + z h
    return n + z * (h - n)


def _sigmoid(x):
    """1 / (1 + exp(-x)) by way of tanh, which is faster on a CPU."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def read_out(cell, h):
    """o = Linear(h): [H, ...] -> [...]."""
    return jnp.tensordot(cell["readout_kernel"], h, 1) + cell["readout_bias"]


def update_rule(meta_params, eps, h1, h2, g):
    """The paper's rule with alpha = 1, for any number of scalars: h1, h2 [H, ...], g [...] -> (h1, h2, delta [...])."""
    h1 = gru(meta_params["m"], h1, g)
    h2 = gru(meta_params["v"], h2, g**2)
    m = jnp.sign(g) * jnp.exp(read_out(meta_params["m"], h1))
    v = jnp.exp(read_out(meta_params["v"], h2))
    delta = -m / jnp.sqrt(v + eps)
    return h1, h2, delta


def optim4rl(learning_rate, meta_params, eps=1e-8):
    """Optim4RL as an optax transformation of any pytree of arrays, differentiable with respect to meta_params.

    The paper clips each gradient to [-1, 1] beforehand (not on catch): optax.chain(optax.clip(1.0), optim4rl(...)).

    Args:
        learning_rate: alpha > 0, or an optax schedule: count -> alpha.
        meta_params: see init_meta_params; the rule is computed in their dtype.
        eps: the paper's eps, under the square root.
    Returns: optax.GradientTransformationExtraArgs with Optim4RLState. Updates have the dtype of gradient + parameter.
    Raises: TypeError: a leaf is neither real numbers nor None; the message names it.
    """
    hidden_size, dtype = meta_params["m"]["candidate_bias"].shape[0], meta_params["m"]["candidate_bias"].dtype

    def init_fn(params):
        def zeros(path, p):
            check_leaf(path, p)
            # Broadcast zeros_like, unlike zeros of that shape, is sharded like the parameter.
            return jnp.broadcast_to(jnp.zeros_like(p, dtype), (hidden_size, *jnp.shape(p)))

        hidden = partial(jax.tree.map_with_path, zeros, params)
        return Optim4RLState(jnp.zeros((), jnp.int32), hidden(), hidden())  # two arrays: they can be donated

    def update_fn(grads, state, params=None):
        jax.tree.map_with_path(check_leaf, grads)
        updates, treedef = jax.tree.flatten(grads, is_leaf=lambda g: g is None)
        m, v, params = map(treedef.flatten_up_to, (state.m, state.v, grads if params is None else params))
        chosen = [i for i, g in enumerate(updates) if g is not None]  # without gradient a leaf keeps its hidden state
        # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
        leaves = [(m[i], v[i], jax.lax.stop_gradient(jnp.asarray(updates[i], dtype))) for i in chosen]
        # The gates are 20 times the hidden state: the backward pass does not keep them but computes them again.
        rule = jax.checkpoint(partial(update_rule, meta_params, eps), prevent_cse=False)
        leaves = _in_pieces(rule, leaves) if _on_one_cpu(leaves) else [rule(*leaf) for leaf in leaves]
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        for i, (h1, h2, delta) in zip(chosen, leaves):
            m[i], v[i] = h1, h2
            updates[i] = (alpha * delta).astype(jnp.result_type(updates[i], params[i], float))
        m, v, updates = map(treedef.unflatten, (m, v, updates))
        return updates, Optim4RLState(optax.safe_increment(state.count), m, v)

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


OPTIM4RL = LearnedOptimizer(init=init_meta_params, make=optim4rl)


def check_leaf(path, leaf):
    """Raises TypeError for a leaf that holds no real numbers, and names it."""
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"Optim4RL updates real numbers; leaf {jax.tree_util.keystr(path) or 'itself'} is {dtype}")


def _in_pieces(rule, leaves):
    """[rule(*leaf) for leaf in leaves], but 1.5 times as fast on a CPU: in pieces that fit its cache, one at a time.

    leaves   b b   w w w w w w w w w   c c c          w: a large leaf; b, c: small ones, such as biases
    pieces   [w w w] [w w w] [w w w] [b b c c c]      each scalar has its own hidden state: the cuts change nothing
    """
    flat = [[x.reshape(*x.shape[: x.ndim - leaf[2].ndim], leaf[2].size) for x in leaf] for leaf in leaves]
    sizes, new = [leaf[2].size for leaf in leaves], {}
    for i, size in enumerate(sizes):
        if size >= PIECE:
            piece = max((d for d in range(PIECE // 8, PIECE + 1) if size % d == 0), default=size)
            # h1, h2: [pieces, H, piece]; g: [pieces, piece]
            pieces = [jnp.moveaxis(x.reshape(*x.shape[:-1], -1, piece), -2, 0) for x in flat[i]]
            new[i] = [jnp.moveaxis(x, 0, -2) for x in jax.lax.map(lambda leaf: rule(*leaf), pieces)]
    small = [i for i, size in enumerate(sizes) if size < PIECE]
    if small:
        joined = rule(*(jnp.concatenate(xs, axis=-1) for xs in zip(*(flat[i] for i in small))))
        cuts = np.cumsum([sizes[i] for i in small])[:-1]
        new |= zip(small, zip(*(jnp.split(x, cuts, axis=-1) for x in joined)))
    return [[y.reshape(x.shape) for x, y in zip(leaf, new[i])] for i, leaf in enumerate(leaves)]


def _on_one_cpu(leaves):
    """Whether to cut leaves. An accelerator takes a whole leaf at once; a leaf that devices share would be gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    in_shard_map = mesh.are_all_axes_manual and not mesh.empty
    is_sharded = any(axis is not None for _, _, g in leaves for axis in jax.typeof(g).sharding.spec)  # explicit mesh
    return jax.default_backend() == "cpu" and (jax.device_count() == 1 or in_shard_map) and not is_sharded


def load(path):
    """Reads a weight file: an .npz with one array per name, like "m/input_kernel", and a JSON header.

    Returns: (meta_params, of any hidden size; metadata: dict).
    Raises: FileNotFoundError; ValueError: damaged, of another optimizer, shapes that do not fit, not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(str(arrays.pop("header")))
        version, kind, metadata = header["version"], header["kind"], header["metadata"]
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is not a weight file of this project, or is damaged ({error!r})") from None
    if (version, kind) != (1, "optim4rl"):
        raise ValueError(f"{path} holds {kind!r} of version {version}; expected 'optim4rl' of version 1")
    finite = {name: x.dtype.kind == "f" and np.isfinite(x).all() for name, x in arrays.items()}
    found = {name: x.shape if finite[name] else "not finite" for name, x in arrays.items()}
    hidden_size = max(1, np.size(arrays.get("m/candidate_bias", 0)))
    like = jax.eval_shape(partial(init_meta_params, hidden_size=hidden_size), jax.random.key(0))
    expected = {"/".join(k.key for k in keys): x.shape for keys, x in jax.tree.leaves_with_path(like)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{path} does not fit: {name} is {found.get(name)}, expected {expected.get(name)}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected]), metadata


def from_reference(weights):
    """Meta-parameters from weights of github.com/sail-sg/optim4rl: flat {"rnn1/ir/kernel": array, ...}, [in, out]."""

    def moment(rnn, mlp):
        return {
            "input_kernel": jnp.concatenate([weights[f"{rnn}/i{gate}/kernel"][0] for gate in "rzn"]),
            "input_bias": jnp.concatenate([weights[f"{rnn}/i{gate}/bias"] for gate in "rzn"]),
            "recurrent_kernel": jnp.concatenate([weights[f"{rnn}/h{gate}/kernel"].T for gate in "rzn"]),
            "candidate_bias": jnp.asarray(weights[f"{rnn}/hn/bias"]),
            "readout_kernel": jnp.asarray(weights[f"{mlp}/layers_0/kernel"])[:, 0],
            "readout_bias": jnp.asarray(weights[f"{mlp}/layers_0/bias"])[0],
        }

    return {"m": moment("rnn1", "mlp1"), "v": moment("rnn2", "mlp2")}
