"""Optim4RL: the learned optimizer, as an optax.GradientTransformation (paper: Figure 2b).

One tiny recurrent network is shared by every scalar parameter of an agent; each scalar keeps its own hidden state.
It is shaped like an adaptive optimizer, m / sqrt(v), with both moments computed by a GRU:

    h1 = GRU1(h1, g)       o1 = Linear1(h1)      m = sign(g) exp(o1)
    h2 = GRU2(h2, g^2)     o2 = Linear2(h2)      v = exp(o2)
    delta = -alpha m / sqrt(v + eps)

| symbol | here | shape |
|---|---|---|
| g | one gradient, flattened and cut into K pieces of C scalars | [K, C] |
| h1, h2 | hidden["m"], hidden["v"]: hidden size H, hidden axis before the scalars | [K, H, C] |
| theta | meta_params: {"m": moment, "v": moment}, 514 numbers for H = 8 | see init_meta_params |
| alpha | learning_rate: a number, a traced array or an optax schedule | [] |

The update always has the sign of the gradient. Where o1 = o2 = 0 it is sign descent with step alpha.

Example:
    import jax, optax, optim4rl
    meta_params = optim4rl.init_meta_params(jax.random.key(0))     # or: optim4rl.load("weights/optim4rl.npz")[0]
    optimizer = optax.chain(optax.clip(1.0), optim4rl.optim4rl(meta_params, learning_rate=1e-3))
    params = {"w": jax.numpy.ones(3)}
    updates, opt_state = optimizer.update(params, optimizer.init(params))

Deviations: the read-out weights start at zero, not LeCun-normal, so that the untrained rule is exactly sign descent. The
biases of the GRUs do not start at zero, which would leave a hidden state that sees only an agent's small gradients near zero for
ever: they make it a clock (after Tallec and Ollivier 2018), and what reads eight clocks can learn a schedule.
Copy this file: needs jax, optax, numpy.
"""

import json
import os
import zipfile
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

FORMAT_VERSION = 1
TIMESCALES = (4.0, 400.0)  # updates: how fast the fastest and the slowest hidden state of an untrained rule move
PIECE = 2048  # scalars updated at a time: their gates then fit a core's cache, which halves the time on a CPU


class LearnedOptimizer(NamedTuple):
    """The common form of all learned optimizers."""

    init: Callable  # key -> meta_params
    make: Callable  # (meta_params, learning_rate) -> optax.GradientTransformation


class Optim4RLState(NamedTuple):
    count: jax.Array  # [] int32, updates so far: the argument of a learning-rate schedule
    hidden: dict  # {"m": [K, H, C], "v": [K, H, C]}


def init_meta_params(key, hidden_size=8):
    """Meta-parameters of an untrained rule. The gates of a GRU are stacked in the order reset, update, candidate.

    Args:
        key: jax PRNG key.
        hidden_size: H >= 1.
    Returns:
        {"m": moment, "v": moment} with moment = {"input_kernel" [3H], "input_bias" [3H], "recurrent_kernel" [3H, H],
        "candidate_bias" [H], "readout_kernel" [H], "readout_bias" []}; float32, or float64 under jax_enable_x64.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}; it must be at least 1")

    def init_moment(key):
        input_key, recurrent_key, sign_key = jax.random.split(key, 3)
        # Clocks: a hidden state that sees nothing leaves 0 for 1 or -1, at the pace of its update gate, s(b_z) = 1 - 1 / timescale.
        b_z = jnp.log(jnp.geomspace(*TIMESCALES, hidden_size) - 1)
        b_n = jax.random.rademacher(sign_key, (hidden_size,), b_z.dtype)
        lecun_normal = jax.nn.initializers.lecun_normal()
        orthogonal = jax.vmap(lambda k: jax.nn.initializers.orthogonal()(k, (hidden_size, hidden_size)))
        return {
            "input_kernel": lecun_normal(input_key, (1, 3 * hidden_size))[0],  # fan-in 1: the gradient
            "input_bias": jnp.concatenate([jnp.zeros(hidden_size), b_z, b_n]),
            "recurrent_kernel": orthogonal(jax.random.split(recurrent_key, 3)).reshape(3 * hidden_size, hidden_size),
            "candidate_bias": jnp.zeros(hidden_size),
            "readout_kernel": jnp.zeros(hidden_size),
            "readout_bias": jnp.zeros(()),
        }

    m_key, v_key = jax.random.split(key)
    return {"m": init_moment(m_key), "v": init_moment(v_key)}


def gru(cell, h, x):
    """One step of the GRU (PAPER notation s = sigmoid); only the candidate has a recurrent bias.

    Args: cell: one moment of meta_params; h: hidden states [H, C]; x: inputs [C].
    Returns: the next hidden states [H, C].
    """
    W, b, U = (jnp.split(cell[name], 3) for name in ("input_kernel", "input_bias", "recurrent_kernel"))
    # r = s(W_r x + b_r + U_r h), z = s(W_z x + b_z + U_z h), n = tanh(W_n x + b_n + r (U_n h + c_n))
    from_input = [kernel[:, None] * x + bias[:, None] for kernel, bias in zip(W, b)]  # 3 of (H, C)
    r = _sigmoid(from_input[0] + U[0] @ h)
    z = _sigmoid(from_input[1] + U[1] @ h)
    n = jnp.tanh(from_input[2] + r * (U[2] @ h + cell["candidate_bias"][:, None]))
    # h' = (1 - z) n + z h
    return n + z * (h - n)


def _sigmoid(x):
    """1 / (1 + exp(-x)) by way of tanh, which is faster on a CPU."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def read_out(cell, h):
    """o = Linear(h): [H, C] -> [C]."""
    return cell["readout_kernel"] @ h + cell["readout_bias"]


def update_rule(meta_params, hidden, g, eps):
    """The paper's rule with alpha = 1, for C scalars: hidden {"m": [H, C], "v": [H, C]}, g [C] -> (hidden, delta [C])."""
    h1 = gru(meta_params["m"], hidden["m"], g)
    h2 = gru(meta_params["v"], hidden["v"], g**2)
    m = jnp.sign(g) * jnp.exp(read_out(meta_params["m"], h1))
    v = jnp.exp(read_out(meta_params["v"], h2))
    delta = -m / jnp.sqrt(v + eps)
    return {"m": h1, "v": h2}, delta


def optim4rl(meta_params, learning_rate, eps=1e-8):
    """Optim4RL as an optax transformation of any pytree of arrays, differentiable with respect to meta_params.

    The paper clips each gradient to [-1, 1] beforehand (not on catch): optax.chain(optax.clip(1.0), optim4rl(...)).

    Args:
        meta_params: see init_meta_params; the rule is computed in their dtype.
        learning_rate: alpha > 0, or an optax schedule: count -> alpha.
        eps: the paper's eps, under the square root.
    Returns:
        optax.GradientTransformation with Optim4RLState.
    """
    hidden_size, dtype = meta_params["m"]["candidate_bias"].shape[0], meta_params["m"]["candidate_bias"].dtype

    def init_fn(params):
        num_pieces, piece = _pieces(params)
        zeros = jnp.zeros((num_pieces, hidden_size, piece), dtype)
        return Optim4RLState(count=jnp.zeros((), jnp.int32), hidden={"m": zeros, "v": zeros})

    def update_fn(updates, state, params=None):
        del params
        # No derivative flows through the gradients: the meta-gradient is first-order in the agent's loss.
        g = jax.lax.stop_gradient(_to_pieces(updates, dtype))  # (K, C)
        hidden, delta = _update_pieces((meta_params, eps), state.hidden, g)
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates = _from_pieces(alpha * delta, updates)
        return updates, Optim4RLState(optax.safe_increment(state.count), hidden)

    return optax.GradientTransformation(init_fn, update_fn)


OPTIM4RL = LearnedOptimizer(init=init_meta_params, make=optim4rl)


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


@jax.custom_vjp
def _update_pieces(constants, hidden, g):
    """update_rule piece by piece: (meta_params, eps), hidden of Optim4RLState, g [K, C] -> (hidden, delta [K, C])."""
    meta_params, eps = constants
    return _replace_pieces(lambda hidden, g: update_rule(meta_params, hidden, g, eps), hidden, g)


def _update_pieces_forward(*inputs):
    return _update_pieces(*inputs), inputs


def _update_pieces_backward(inputs, cotangents):
    # The gates of a piece are 20 times its hidden state: they are not kept but computed again, piece by piece.
    constants, hidden, g = inputs

    def pull_back(hidden_cotangent, hidden, g, delta_cotangent):
        rule = lambda constants, hidden: update_rule(constants[0], hidden, g, constants[1])
        of_constants, of_hidden = jax.vjp(rule, constants, hidden)[1]((hidden_cotangent, delta_cotangent))
        return of_hidden, of_constants

    hidden_cotangents, delta_cotangents = cotangents
    of_hidden, of_constants = _replace_pieces(pull_back, hidden_cotangents, hidden, g, delta_cotangents)
    return jax.tree.map(lambda x: x.sum(0), of_constants), of_hidden, jnp.zeros_like(g)  # g is a constant


_update_pieces.defvjp(_update_pieces_forward, _update_pieces_backward)


def _replace_pieces(function, state, *xs):
    """Maps (piece of state, *pieces of xs) -> (new piece of state, y), where a piece is an index of the leading axis: (state, ys).

    Not to be differentiated.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)(state, *xs)  # an accelerator takes all at once
    # The loop carries the state and overwrites each piece where it lies: new ones stacked by jax.lax.map would cost three
    # more passes over the memory. A piece is written before the next one is read, or else XLA copies the whole state
    # for each; and the next one is read an iteration ahead, or else XLA fuses the reading with the arithmetic, and
    # computes that one scalar at a time.
    read = lambda trees, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), trees)

    def step(carry, i):
        state, piece = carry
        new, y = function(*piece)
        state = jax.tree.map(lambda x, n: jax.lax.dynamic_update_index_in_dim(x, n, i, axis=0), state, new)
        return (state, read((state, *xs), i + 1)), y  # beyond the last piece: the last again, which nobody uses

    num_pieces = len(jax.tree.leaves(state)[0])
    (state, _), ys = jax.lax.scan(step, (state, read((state, *xs), 0)), jnp.arange(num_pieces))
    return state, ys


def _from_pieces(pieces, tree):
    """The inverse of _to_pieces: shapes and dtypes as in tree."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves], dtype=int)
    flat = jnp.split(pieces.reshape(-1), ends)[: len(leaves)]
    leaves = [new.reshape(leaf.shape).astype(leaf.dtype) for new, leaf in zip(flat, leaves)]
    return jax.tree.unflatten(treedef, leaves)


def save(path, meta_params, metadata=None, kind="optim4rl"):
    """Writes meta-parameters to an .npz file: one array each, named like "m/input_kernel", and a JSON header.

    Args:
        path: file to write. It is replaced only when the new one is complete.
        meta_params: nested dict of arrays.
        metadata: anything JSON can hold: command, seed, results.
        kind: which learned optimizer these belong to.
    """
    named = {"/".join(k.key for k in keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(meta_params)}
    header = json.dumps({"version": FORMAT_VERSION, "kind": kind, "metadata": metadata or {}})
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        np.savez(file, header=np.array(header), **named)
    os.replace(partial, path)


def load(path, kind="optim4rl", like=None):
    """Reads what save wrote.

    Args:
        path: file to read.
        kind: the learned optimizer expected.
        like: meta_params whose names and shapes the file must have; by default those of Optim4RL with hidden size 8.
    Returns:
        (meta_params, metadata)
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, of another optimizer, or of other shapes.
    """
    like = init_meta_params(jax.random.key(0)) if like is None else like
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        version, found, metadata = header["version"], header["kind"], header["metadata"]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a weight file of this project, or is damaged ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}")
    if found != kind:
        raise ValueError(f"{path} holds weights of {found!r}, not of {kind!r}")
    keyed, treedef = jax.tree.flatten_with_path(like)
    shapes = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in keyed}
    for name in shapes.keys() | arrays.keys():
        stored = arrays[name].shape if name in arrays and arrays[name].dtype.kind == "f" else "absent"
        if stored != shapes.get(name, "absent"):
            raise ValueError(f"{path} does not fit: {name} is {stored}, expected {shapes.get(name, 'absent')}")
    return jax.tree.unflatten(treedef, [jnp.asarray(arrays[name]) for name in shapes]), metadata


def from_reference(weights):
    """Meta-parameters from the reference implementation's weights: flat {"rnn1/ir/kernel": array, ...}, kernels [in, out]."""

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
