# SPDX-License-Identifier: MIT
"""VeLO (Metz et al. 2022, arXiv 2211.09760): a learned optimizer that writes a small network for each tensor.

A hypernetwork is a network whose output is the weights of another one. Here an LSTM looks at each tensor as a whole, once
per update, and answers with P numbers. They mix P stored copies of a tiny network, the bank, into the one that this tensor
needs now, which turns 30 features of each scalar into its step. The large network is paid for per tensor, not per scalar.

    x     = (progress, f: how the loss moves, shape, log moments of m and r)     one vector per tensor
    h, c  = LSTM(Linear2(x) + max over all tensors of relu(Linear1(x)), h, c)    tensors hear of each other by the maximum
    w, a  = Linear(h)                                                            mixing weights, rate of this tensor
    W     = 100 mean_j w_j bank_j                                                weights of this tensor's network
    o     = MLP_W(features of a scalar, each divided by its root mean square over the tensor)
    delta = -0.001 a o_0 exp(0.001 o_1) sqrt(mean p^2)

| symbol | in code | shape |
|---|---|---|
| p, g | one of n tensors; its gradient, clipped to [-1000, 1000] | S |
| m, r | averages of g (decays .9 .99 .999) and of g^2 (.999) | [*S, 3], [*S, 1] |
| v | row, col: averages of g^2 over the largest axis, d0, and the second largest, d1 | S without that axis, 3 |
| f, x | see put_loss, tensor_inputs | [9], [n, 30] |
| h, c; w, a | hypernetwork, with H = 512, P = 256 | [n, H]; [n, P], [n] |
| N; theta | num_steps of the whole training; meta_params: 2,304,513 numbers | []; see init_meta_params |

Example:
    import jax, optax
    import velo  # in this repository: from learned_optimizers import velo
    meta_params = velo.init_meta_params(jax.random.key(0), hidden_size=16, bank_size=8)  # or: velo.load("params")[0]
    optimizer = velo.velo(num_steps=1000, meta_params=meta_params)
    params = {"w": jax.numpy.ones((2, 3))}
    loss, grads = jax.value_and_grad(lambda params: (params["w"] ** 2).sum())(params)
    updates, opt_state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, value=loss)

Deviations from google/learned_optimization (HyperV2), which we follow where the paper's text differs: an update is the
step, not new minus old parameters; the layer `linear`, which nothing reads, is left out; equal axes are in the order of a
stable sort; tensors without scalars or gradient are left alone, and not heard by others.
Copy this file: needs jax >= 0.10, optax >= 0.2.5; load also msgpack. Keeps 4 (vectors: 7) numbers of state for each parameter.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS, R_DECAY = np.array([0.9, 0.99, 0.999], np.float32), np.float32(0.999)  # of m, row, col; of r
MILESTONES = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1], np.float32)  # fractions of the training
LAYERS = dict(mix="linear_1", input="linear_2", gates="rnn/linear", control="rnn_to_controls", rate="step_size")
COPY = ("mix_layer2", "final_mix_layer", "lstm.linear", "rnn_to_controls", "step_size")  # the same in a copy in PyTorch
SOURCES = (
    "VeLO's weights: params of https://storage.googleapis.com/gresearch/learned_optimization/pretrained_lopts/aug12_continue_on"
    "_bigger_2xbs_200kstep_bigproblem_v2_5620/ or of huggingface.co/amoudgl/velo-4000, or model.safetensors of both "
    "huggingface.co/Pauljanson002/VeLO_RNN and VeLO_MLP"
)


class LearnedOptimizer(NamedTuple):
    init: Callable  # key -> meta_params
    make: Callable  # (learning_rate, meta_params) -> optax.GradientTransformation


class TensorState(NamedTuple):  # of a tensor, or of trees like the parameters
    m: Any  # [*S, 3]; the axis of the decays is the last
    r: Any  # [*S, 1]
    row: Any  # [*S without d0, 3]; of scalars and vectors v itself, [*S, 3]
    col: Any  # [*S without d1, 3]; of scalars and vectors None
    h: Any  # [H]
    c: Any  # [H]


class VeLOState(NamedTuple):
    count: jax.Array  # [] int32, updates so far
    losses: tuple  # of put_loss: mean [10] of the loss, low [10] the lowest of each, count [] int32
    tensors: TensorState


def init_meta_params(key, hidden_size=512, bank_size=256):
    """Meta-parameters of the untrained rule: weights truncated normal with 1 / sqrt(fan-in), biases and first state zero.

    Returns: {"lstm": {"h0" [1, H], "c0" [1, H], and of five layers NAME_kernel [in, out], NAME_bias [out]},
    "bank": {"w0" [P, 30, 4], "b0" [P, 4], "w1" [P, 4, 4], "b1" [P, 4], "w2" [P, 4, 3], "b2" [P, 3]}}
    """
    h, p, keys = hidden_size, bank_size, iter(jax.random.split(key, 8))  # one for each kernel
    layers = dict(mix=(30, h), input=(30, h), gates=(2 * h, 4 * h), control=(h, p), rate=(h, 1))
    lstm = {f"{name}_kernel": shape for name, shape in layers.items()} | {"h0": (1, h), "c0": (1, h)}
    lstm |= {f"{name}_bias": shape[1:] for name, shape in layers.items()}
    bank = dict(w0=(p, 30, 4), b0=(p, 4), w1=(p, 4, 4), b1=(p, 4), w2=(p, 4, 3), b2=(p, 3))
    kernel = lambda shape: jax.random.truncated_normal(next(keys), -2, 2, shape) / shape[-2] ** 0.5
    leaf = lambda name, shape: kernel(shape) if name.endswith(("kernel", "w0", "w1", "w2")) else jnp.zeros(shape)
    return {"lstm": {x: leaf(x, lstm[x]) for x in lstm}, "bank": {x: leaf(x, bank[x]) for x in bank}}


def put_loss(mean, low, count, decays, loss):
    """One more loss []: -> ((mean, low, count), f [9] in [-1, 1]: how far each average is above its lowest, by the next)."""
    # The exponent is one more than a bias correction needs. VeLO was trained with it.
    correction = 1 - decays ** (count + 1).astype(np.float32)
    top = jnp.where(count == 0, loss, jnp.max(mean / correction))
    loss = jnp.minimum(2 * jnp.abs(top), loss)  # at most twice the largest average counts
    # mean_i = d_i mean_i + (1 - d_i) loss
    mean, count = decays * mean + (1 - decays) * loss, count + 1
    low = jnp.minimum(low, mean / correction)
    # f_i = clip((c_i - low_i) / max(1e-8, c_{i+1} - low_i) - 1, -1, 1), c = mean corrected; 0 at the first two losses
    c = mean / (1 - decays ** count.astype(np.float32))
    f = (c[:-1] - low[:-1]) / jnp.maximum(1e-8, c[1:] - low[:-1]) - 1
    return (mean, low, count), jnp.where(count > 2, jnp.clip(f, -1, 1), 0)


def tensor_inputs(p, m, r, fraction, f):
    """What the LSTM sees of one tensor: x [30]. Its gradient comes by way of m [*S, 3] and r [*S, 1], an update later."""
    # x = (tanh(10 (count / N - milestones)), f, C(mean R), one-hot of the number of axes, C(var M), C(mean (R - mean M)^2)),
    # M = m / rms(p), R = r / rms(p), C(y) = clip(log |10 y|, -5, 5) / 2
    compress = lambda y: 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * y)), -5, 5)
    axes, s = tuple(range(p.ndim)), jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(p**2)))
    m, r = s * m, s * r
    # The mean of M in both, not of R: a slip of the original that VeLO was trained with.
    var_m, var_r = jnp.var(m, axes), jnp.mean((r - jnp.mean(m, axes)) ** 2, axes)
    rank = jax.nn.one_hot(sum(size > 1 for size in p.shape), 5, dtype=p.dtype)
    progress = jnp.tanh(10 * (fraction - MILESTONES))
    return jnp.concatenate([progress, f, compress(jnp.mean(r))[None], rank, compress(var_m), compress(var_r)])


def hypernetwork(theta, x, h, c):
    """What the tensors' LSTM answers to x [n, 30]: -> (h, c [n, H], mixing weights w [n, P], rates a [n], of any sign)."""
    linear = lambda name, x: x @ theta[f"{name}_kernel"] + theta[f"{name}_bias"]
    # u = Linear2(x) + max over tensors of relu(Linear1(x))
    u = linear("input", x) + jnp.max(jax.nn.relu(linear("mix", x)), axis=0)
    i, q, f, o = jnp.split(linear("gates", jnp.concatenate([u, h], axis=1)), 4, axis=1)
    # c = sigmoid(f + 1) c + sigmoid(i) tanh(q),  h = sigmoid(o) tanh(c)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(q)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h, c, linear("control", h), linear("rate", h)[:, 0]


def factored_axes(shape):
    """(d1, d0): the second largest and the largest axis of a tensor, the later of equal ones; None for scalars, vectors."""
    return tuple(int(axis) for axis in np.argsort(shape, kind="stable")[-2:]) if len(shape) > 1 else None


def init_tensor(theta, p):
    """TensorState of a tensor p: zeros, sharded as it is, and copies of the LSTM's first state [1, H], which may be donated."""
    zeros = jnp.zeros_like(p)[..., None]
    m, h, c = jnp.broadcast_to(zeros, (*p.shape, 3)), *(jnp.array(x[0], p.dtype) for x in (theta["h0"], theta["c0"]))
    if axes := factored_axes(p.shape):
        return TensorState(m, zeros, jnp.sum(m, axes[1]), jnp.sum(m, axes[0]), h, c)
    return TensorState(m, zeros, jnp.zeros_like(m), None, h, c)


def accumulate(m, r, row, col, g):
    """The averages of one tensor with one more gradient g [*S], none corrected for its start at 0: -> (m, r, row, col)."""
    g, axes = g[..., None], factored_axes(g.shape)
    average = lambda old, new: DECAYS * old + (1 - DECAYS) * new
    # m = D m + (1 - D) g,  r = .999 r + .001 g^2
    m, r = average(m, g), R_DECAY * r + (1 - R_DECAY) * g**2
    q = g**2 + 1e-30  # keeps the roots of what sees no gradient finite
    if axes is None:
        return m, r, average(row, q), col
    return m, r, average(row, jnp.mean(q, axes[1])), average(col, jnp.mean(q, axes[0]))


def scalar_features(m, r, row, col, g, p):
    """What the network sees of each scalar: 30 features in blocks [15, *S], four [3, ...] of size 1 in an axis, [3, *S]."""
    m, r, row = (jnp.moveaxis(x, -1, 0) for x in (m, r, row))  # decays first: whole planes of scalars
    g, p, t = g[None], p[None], jax.lax.rsqrt(r + 1e-6)
    floor = lambda y: jax.lax.rsqrt(jnp.maximum(y, 1e-9))
    if axes := factored_axes(g.shape[1:]):
        d1, d0 = axes[0] + 1, axes[1] + 1
        row, col = jnp.expand_dims(row, d0), jnp.expand_dims(jnp.moveaxis(col, -1, 0), d1)
        # 1 / sqrt(v), v = row col / mean row
        of_g = of_m = floor(row / (jnp.mean(row, d1, keepdims=True) + 1e-9)) * floor(col)
    else:
        col, of_g, of_m = row, floor(row + 1e-9), jax.lax.rsqrt(row)
    own = jnp.concatenate([g, jnp.clip(g, -0.1, 0.1), p, m, r, m * t, t, g * of_g, g * t])
    return own, row, col, jax.lax.rsqrt(row + 1e-8), jax.lax.rsqrt(col + 1e-8), m * of_m


def mlp(weights, features):
    """One tensor's network for all its scalars: the blocks of scalar_features -> o [3, *S]."""
    # o = W2 relu(W1 relu(W0 y + b0) + b1) + b2, y = x / sqrt(1e-5 + mean x^2) for each of the 30 features x
    column = lambda b: b.reshape(-1, *[1] * (features[0].ndim - 1))
    dense = lambda w, x: jnp.tensordot(w.T, x, 1)
    hidden = column(weights["b0"])
    for w0, x in zip(jnp.split(weights["w0"], (15, 18, 21, 24, 27)), features):
        # The division is done to the weights, 30 x 4 numbers, and not to the features.
        scale = jax.lax.rsqrt(1e-5 + jnp.mean(x**2, tuple(range(1, x.ndim))))
        hidden = hidden + dense(scale[:, None] * w0, x)
    hidden = jax.nn.relu(dense(weights["w1"], jax.nn.relu(hidden)) + column(weights["b1"]))
    return dense(weights["w2"], hidden) + column(weights["b2"])


def tensor_step(bank, w, a, averages, g, p):
    """One tensor's update: averages (m, r, row, col), w [P], a [] -> (the next averages, delta [*S])."""
    averages = accumulate(*averages, g)
    # W = 100 mean_j w_j bank_j
    weights = {name: 100 / len(w) * jnp.tensordot(w, stored, 1) for name, stored in bank.items()}
    o = mlp(weights, scalar_features(*averages, g, p))
    # delta = -0.001 a o_0 exp(0.001 o_1) sqrt(mean p^2)
    return averages, -0.001 * a * o[0] * jnp.exp(0.001 * o[1]) * jnp.sqrt(jnp.mean(p**2) + 1e-9)


def update_rule(meta_params, decays, num_steps, state, grads, params, loss):
    """VeLO in one dtype, for trees of gradients (or None) and parameters: -> (tree of deltas, next VeLOState)."""
    # The backward pass computes a tensor's inputs and features again: kept, they would be 10 times the training's memory.
    see, step = jax.checkpoint(tensor_inputs), jax.checkpoint(tensor_step)
    treedef = jax.tree.structure(state.tensors.m)
    tensors = [TensorState(*x) for x in zip(*map(treedef.flatten_up_to, state.tensors))]
    deltas, params = treedef.flatten_up_to(grads), treedef.flatten_up_to(params)
    (losses, f), fraction = put_loss(*state.losses, decays, loss), state.count.astype(np.float32) / num_steps
    if seen := [k for k, g in enumerate(deltas) if g is not None and g.size]:
        x = jnp.stack([see(params[k], tensors[k].m, tensors[k].r, fraction, f) for k in seen])
        h, c = jnp.stack([tensors[k].h for k in seen]), jnp.stack([tensors[k].c for k in seen])
        h, c, w, a = hypernetwork(meta_params["lstm"], x, h, c)
        for i, k in enumerate(seen):
            g = jnp.clip(deltas[k], -1000, 1000)  # the original's guard against an exploding gradient
            averages, deltas[k] = step(meta_params["bank"], w[i], a[i], tensors[k][:4], g, params[k])
            tensors[k] = TensorState(*averages, h[i], c[i])
    return treedef.unflatten(deltas), VeLOState(optax.safe_increment(state.count), losses, as_trees(treedef, tensors))


def as_trees(treedef, tensors):  # of a list of TensorStates
    return TensorState(*(treedef.unflatten([tensor[i] for tensor in tensors]) for i in range(6)))


def velo(num_steps, meta_params, weight_decay=0.0, learning_rate=1.0, max_steps=150_000):
    """VeLO as an optax transformation of any pytree, differentiable with respect to meta_params.

    Args:
        num_steps: N, the planned number of calls. VeLO lowers its steps towards the end of it.
        weight_decay: adds weight_decay * sum p^2 to the loss, and weight_decay * p (sic) to the gradients.
        learning_rate: a factor of the update, a number, array or optax schedule. VeLO itself has none: 1.
        max_steps: of a larger N, gradients and losses are averaged over A = ceil(N / max_steps) calls.
    Returns: optax.GradientTransformationExtraArgs with VeLOState: update(grads, opt_state, params, value=loss).
    Raises: ValueError: num_steps or max_steps below 1; params or value missing. TypeError: a leaf of no real numbers.
    """
    traced = isinstance(num_steps, jax.Array)  # by optax.inject_hyperparams
    if max_steps < 1 or (not traced and num_steps < 1):
        raise ValueError(f"num_steps is {num_steps}, max_steps {max_steps}; both must be at least 1")
    if not traced and (every := -(-int(num_steps) // max_steps)) > 1:
        inner = velo(int(num_steps) // every, meta_params, weight_decay, learning_rate)
        return _averaged(optax.MultiSteps(inner, every), every)
    # d_i = exp(-1 / tau_i), tau log-spaced from 10 to N updates
    xp = jnp if traced else np
    decays = xp.exp(-1 / xp.logspace(1, xp.log10(num_steps), 10)).astype(np.float32)

    def init_fn(params):
        params, theta = as_floats(params, meta_params["lstm"])
        tensors = as_trees(jax.tree.structure(params), [init_tensor(theta, p) for p in jax.tree.leaves(params)])
        count, mean, low = jnp.zeros((), np.int32), jnp.zeros(10, np.float32), jnp.full(10, 1e12, np.float32)
        return VeLOState(count, (mean, low, jnp.zeros_like(count)), tensors)

    def update_fn(updates, state, params=None, *, value=None, **_):
        if missing := [name for name, x in {"params": params, "value": value}.items() if x is None]:
            raise ValueError(f"VeLO needs {' and '.join(missing)}: call update(grads, opt_state, params, value=loss)")
        (grads,), (ps, theta), is_none = as_floats(updates), as_floats(params, meta_params), lambda x: x is None
        decay = lambda g, p: None if g is None else g.astype(p.dtype) + weight_decay * p
        grads = jax.tree.map(decay, grads, ps, is_leaf=is_none)
        loss = jnp.reshape(value, ()) + weight_decay * sum(jnp.sum(p**2) for p in jax.tree.leaves(ps))
        # No derivative flows through gradients and loss: the meta-gradient is first-order in the agent's loss.
        grads, loss = jax.lax.stop_gradient((grads, jnp.asarray(loss, np.float32)))
        with jax.default_matmul_precision("highest"):  # TF32 would keep 3 digits
            deltas, new_state = update_rule(theta, decays, num_steps, state, grads, ps, loss)
        alpha = learning_rate(state.count) if callable(learning_rate) else learning_rate
        cast = lambda g, p, delta: None if g is None else (alpha * delta).astype(jnp.result_type(g, p, float))
        return jax.tree.map(cast, updates, params, deltas, is_leaf=is_none), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(multi, every):  # optax.MultiSteps that averages losses, too
    def update_fn(updates, state, params=None, *, value=None, **_):
        mean = None if value is None else state[0] + value / every
        updates, new = multi.update(updates, state[1], params, value=mean)
        return updates, (jnp.where(new.mini_step == 0, 0, mean), new)

    return optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), multi.init(params)), update_fn)


def make(learning_rate, meta_params, num_steps=1000):
    return velo(num_steps, meta_params, learning_rate=learning_rate)


VELO = LearnedOptimizer(init=init_meta_params, make=make)


def as_floats(*trees):
    """Trees as arrays of float32, or float64 where one leaf has it. TypeError names a leaf that holds no real numbers."""
    dtypes = [np.float32]
    for path, x in jax.tree.leaves_with_path(trees):
        dtype = getattr(x, "dtype", type(x))
        if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"VeLO updates real numbers; leaf {jax.tree_util.keystr(path[1:]) or 'itself'} is {dtype}")
        dtypes += [jax.dtypes.canonicalize_dtype(dtype)] if dtype == np.float64 else []
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(*dtypes)), trees)


def from_reference(theta):
    """Meta-parameters from those of google/learned_optimization: {"lstm_init_state", "rnn_params", "ff_mod_stack"}."""
    rnn, bank, state = theta["rnn_params"], theta["ff_mod_stack"]["~"], theta["lstm_init_state"]
    lstm = {"h0": state["hidden"], "c0": state["cell"]}
    for ours, theirs in LAYERS.items():
        lstm |= {f"{ours}_kernel": rnn[theirs]["w"], f"{ours}_bias": rnn[theirs]["b"]}
    w0 = np.concatenate([bank[f"w0__{i}"] for i in range(len(bank) - 5)], axis=1)  # kept in 14 groups of features
    found = {"lstm": lstm, "bank": {"w0": w0} | {name: bank[name] for name in ("b0", "w1", "b1", "w2", "b2")}}
    like = jax.eval_shape(lambda key: init_meta_params(key, lstm["h0"].shape[1], len(bank["b0"])), jax.random.key(0))
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(like)):
        if x.shape != y.shape or x.dtype != np.float32 or not np.isfinite(x).all():
            raise ValueError(f"{'/'.join(k.key for k in path)} is {x.dtype}{x.shape}, expected finite float32{y.shape}")
    return jax.tree.map(jnp.asarray, found)


def load(path):
    """Reads VeLO's published weights, which are not part of this project and could not be fetched for it.

    Args: path: the file params or theta.state (flax msgpack) of SOURCES, or a folder with params or both safetensors files.
    Returns: (meta_params, of any H and P; {"gen_id": str, "step": int} where the file has them). ValueError: no such weights.
    """
    path = pathlib.Path(path)
    copies = sorted(path.rglob("*.safetensors"))
    files = copies if len(copies) == 2 else [path / "params" if path.is_dir() else path]
    try:
        if len(files) == 2:
            return from_reference(_read_copy(*files)), {}
        import msgpack  # written by flax.serialization: theta, or {"params": theta, "gen_id", "step"}

        tree = msgpack.unpackb(files[0].read_bytes(), ext_hook=lambda code, data: np.ndarray(*msgpack.unpackb(data)))
        theta, metadata = (tree.pop("params"), tree) if "params" in tree else (tree, {})
        return from_reference(theta), metadata
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {files[0]}; {SOURCES}") from None
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not VeLO's weights, or damaged ({type(error).__name__} {error})"[:400]) from None


def _read_copy(*paths):
    """Of the two files of a copy in PyTorch, each: length of the header, 8 bytes; header, JSON; float32 arrays [out, in]."""
    x = {}
    for data in (path.read_bytes() for path in paths):
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                shape, dtype, (begin, _) = entry["shape"], {"F32": "<f4"}[entry["dtype"]], entry["data_offsets"]
                x[name] = np.ndarray(shape, dtype, data, start + begin)
    rnn = {name: {"w": x[f"{copy}.weight"].T, "b": x[f"{copy}.bias"]} for name, copy in zip(LAYERS.values(), COPY)}
    w = {"w0__0": "input_weights_", "w1": "hidden_weights_.0", "w2": "output_weights_"}
    b = {"b0": "input_bias_", "b1": "hidden_bias_.0", "b2": "output_bias_"}
    bank = {name: x[w[name]].swapaxes(1, 2) for name in w} | {name: x[b[name]] for name in b}
    state = {"hidden": x["lstm_init_state.0"], "cell": x["lstm_init_state.1"]}
    return {"rnn_params": rnn, "ff_mod_stack": {"~": bank}, "lstm_init_state": state}
