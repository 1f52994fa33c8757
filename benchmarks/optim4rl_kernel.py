"""Optim4RL's rule as one GPU kernel, and its backward pass as another (Pallas, Triton). Not timed on a GPU yet.

`update_rule` computes what optim4rl.update_rule computes, and can take its place:

    optim4rl.update_rule = optim4rl_kernel.update_rule    # before anything is compiled

Plain JAX writes the gates of every scalar to memory between two operations. Here a program of the GPU takes BLOCK scalars
through the whole rule in registers: it reads hidden states and gradient once, and writes hidden states and update once. The
backward kernel is jax.vjp of the same lines. It sums the 514 derivatives over its scalars; the sum over programs is left to XLA.

Triton multiplies matrices of 16 rows or more. So both GRUs become one of 2H = 16 hidden units, whose recurrent kernels are
block-diagonal:

    h = [ h1 ]    U = [ U1  0 ]    x = [ g   ]
        [ h2 ]        [ 0  U2 ]        [ g^2 ]

On a CPU the kernels are interpreted: right, but slow. `python -m benchmarks.bench --only kernels` times them on a GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # scalars that a program has in its registers
BLOCKS = 16  # one after another, in a program of the backward kernel: fewer partial sums
NUM_WARPS = 4


def update_rule(meta_params, eps, h1, h2, g):
    """optim4rl.update_rule: h1, h2 [H, ...], g [...] -> (h1, h2, delta [...]). No derivative flows through g.

    Raises: ValueError: H is not 8, 16, 32, ...
    """
    hidden_size = len(h1)
    if hidden_size < 8 or hidden_size & (hidden_size - 1):
        raise ValueError(f"the hidden size is {hidden_size}; the kernel takes a power of two from 8 on")
    flat = lambda h: h.reshape(hidden_size, -1)
    new_h1, new_h2, delta = _rule(_packed(meta_params), eps, flat(h1), flat(h2), g.reshape(-1))
    return new_h1.reshape(h1.shape), new_h2.reshape(h2.shape), delta.reshape(g.shape)


def _packed(meta_params):
    """Both moments as one GRU: recurrent kernels [3, 2H, 2H], eight columns [8, 2H], biases of the read-outs [2]."""

    def of_moment(cell):
        gates = lambda name: cell[name].reshape(3, len(cell["candidate_bias"]), *cell[name].shape[1:])
        columns = [
            gates("input_kernel"),
            gates("input_bias"),
            cell["candidate_bias"][None],
            cell["readout_kernel"][None],
        ]
        return gates("recurrent_kernel"), jnp.concatenate(columns), cell["readout_bias"]

    U, columns, o_biases = zip(of_moment(meta_params["m"]), of_moment(meta_params["v"]))
    return jax.vmap(jax.scipy.linalg.block_diag)(*U), jnp.concatenate(columns, axis=1), jnp.stack(o_biases)


def _formula(eps, U, columns, o_biases, h, g):
    """optim4rl.update_rule for B scalars: tuples of U [2H, 2H], columns [2H] and o_biases [], h [2H, B], g [B] -> h, delta [B]."""
    w_r, w_z, w_n, b_r, b_z, b_n, c_n, w_o = (column[:, None] for column in columns)
    is_m = jax.lax.broadcasted_iota(jnp.int32, (len(h), 1), 0) < len(h) // 2  # the rows of h1
    x = jnp.where(is_m, g, g**2)
    product = lambda kernel: jnp.dot(kernel, h, precision=jax.lax.Precision.HIGHEST)
    r = jax.nn.sigmoid(w_r * x + b_r + product(U[0]))
    z = jax.nn.sigmoid(w_z * x + b_z + product(U[1]))
    n = jnp.tanh(w_n * x + b_n + r * (product(U[2]) + c_n))
    h = n + z * (h - n)
    o1, o2 = (jnp.where(mine, w_o * h, 0).sum(0) + bias for mine, bias in zip((is_m, ~is_m), o_biases))
    return h, -jnp.sign(g) * jnp.exp(o1) / jnp.sqrt(jnp.exp(o2) + eps)


def _weights(refs):
    """What _formula needs of the packed weights, whose references these are."""
    U, columns, o_biases = refs
    return tuple(U[i] for i in range(3)), tuple(columns[i] for i in range(8)), tuple(o_biases[i] for i in range(2))


class _Block:
    """BLOCK scalars from `start` on, of arrays [H, N] of both moments and [N]. Beyond N one reads 0 and writes nothing."""

    def __init__(self, start, h1_ref):
        hidden_size, num_scalars = h1_ref.shape
        row = jax.lax.broadcasted_iota(jnp.int32, (2 * hidden_size, 1), 0)
        scalar = start + jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1)
        # Where the mask is false the index is N, since interpreted kernels write old values back there.
        at = lambda mask, *index: (mask, (*index, jnp.where(mask, scalar, num_scalars)))
        self.of_m = at((row < hidden_size) & (scalar < num_scalars), row % hidden_size)
        self.of_v = at((row >= hidden_size) & (scalar < num_scalars), row % hidden_size)
        self.scalars = jax.tree.map(lambda x: x[0], at(scalar < num_scalars))

    def read(self, m_ref, v_ref):
        """[2H, B] of two [H, N]."""
        return _read(m_ref, *self.of_m) + _read(v_ref, *self.of_v)

    def write(self, m_ref, v_ref, h):
        _write(m_ref, *self.of_m, h)
        _write(v_ref, *self.of_v, h)


def _read(ref, mask, index):
    return triton.load(ref.at[index], mask=mask, other=0.0)


def _write(ref, mask, index, values):
    triton.store(ref.at[index], values, mask=mask)


def _forward_kernel(eps, *refs):
    weights, (h1, h2, g, new_h1, new_h2, delta) = _weights(refs[:3]), refs[3:]
    block = _Block(pl.program_id(0) * BLOCK, h1)
    new_h, update = _formula(eps, *weights, block.read(h1, h2), _read(g, *block.scalars))
    block.write(new_h1, new_h2, new_h)
    _write(delta, *block.scalars, update)


def _backward_kernel(eps, *refs):
    weights, (h1, h2, g, d_new_h1, d_new_h2, d_delta, *d_weights, d_h1, d_h2) = _weights(refs[:3]), refs[3:]

    first = pl.program_id(0) * BLOCKS

    def add(i, sums):
        block = _Block((first + i) * BLOCK, h1)
        scalars = _read(g, *block.scalars)
        _, pull_back = jax.vjp(lambda weights, h: _formula(eps, *weights, h, scalars), weights, block.read(h1, h2))
        of_weights, of_h = pull_back((block.read(d_new_h1, d_new_h2), _read(d_delta, *block.scalars)))
        block.write(d_h1, d_h2, of_h)
        return jax.tree.map(jnp.add, sums, of_weights)

    sums = jax.lax.fori_loop(0, BLOCKS, add, jax.tree.map(jnp.zeros_like, weights))
    for ref, values in zip(d_weights, sums):
        for i, value in enumerate(values):
            ref[0, i] = value


def _call(kernel, eps, inputs, out_shapes, out_specs, programs):
    return pl.pallas_call(
        partial(kernel, eps),
        out_shape=[jax.ShapeDtypeStruct(shape, inputs[0].dtype) for shape in out_shapes],
        out_specs=out_specs,
        grid=(programs,),
        interpret=jax.default_backend() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS),
    )(*inputs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rule(weights, eps, h1, h2, g):
    """update_rule for flat arrays."""
    whole = [pl.BlockSpec()] * 3
    return _call(
        _forward_kernel, eps, (*weights, h1, h2, g), (h1.shape, h2.shape, g.shape), whole, pl.cdiv(g.size, BLOCK)
    )


def _rule_forward(weights, eps, h1, h2, g):
    return _rule(weights, eps, h1, h2, g), (weights, h1, h2, g)


def _rule_backward(eps, inputs, cotangents):
    weights, h1, h2, g = inputs
    programs = pl.cdiv(g.size, BLOCK * BLOCKS)
    part = lambda x: pl.BlockSpec((1, *x.shape), lambda i: (i, *[0] * x.ndim))
    shapes = [(programs, *x.shape) for x in weights] + [h1.shape, h2.shape]
    specs = [*map(part, weights), pl.BlockSpec(), pl.BlockSpec()]
    *parts, d_h1, d_h2 = _call(_backward_kernel, eps, (*weights, h1, h2, g, *cotangents), shapes, specs, programs)
    return tuple(x.sum(0) for x in parts), d_h1, d_h2, jnp.zeros_like(g)


_rule.defvjp(_rule_forward, _rule_backward)
