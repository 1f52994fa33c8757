# SPDX-License-Identifier: MIT
"""Pipeline training: meta-trains a learned optimizer on agents of all ages at once (paper: Figure 2a, Algorithm 1).

A training unit is a whole agent: parameters, optimizer state, environments. n units live side by side. Each is reset every
m meta-steps, and the resets are staggered. So at any time the units span all stages of training, and the gradients that the
optimizer learns from are close to independent and identically distributed. One meta-step of Algorithm 1:

    (1) reset every unit that is due                                              reset_due, make_task
    (2) each unit: M inner updates                                                unroll
    (3) each unit: a fresh rollout gives the meta-loss                            meta_gradient
    (4) its gradient with respect to meta_params, a mean over units and tasks     meta_gradient, update_meta_params
    (5) the meta-optimizer (Adam) updates meta_params                             update_meta_params

| symbol | in code | shape |
|---|---|---|
| theta | meta_params: parameters of the learned optimizer | any pytree |
| n, m, M | num_units, reset_interval (in meta-steps), inner_updates | |
| unit | Unit; units have a leading axis | [U, ...] |
| meta-loss | the agent's own loss on a fresh rollout after M updates | [U] |
| meta-gradient | meta_grads | like meta_params |

An inner update is what a learner calls one: a single optimizer step in A2C, a whole iteration of many steps in PPO. Any
Learner (a2c.make, ppo.make) fits, and any LearnedOptimizer (optim4rl.OPTIM4RL). Units are sharded over the devices of a mesh
with the one axis "units". Each unit's randomness is folded from its own index, so a result depends on the number of devices
by rounding only.

Example (a unit is one number w with loss w^2 / 2; the learned optimizer has one parameter, the log of its step size):
    import jax, jax.numpy as jnp, optax, pipeline
    from types import SimpleNamespace
    def init(key, optimizer):
        return jax.random.normal(key), optimizer.init(0.0)
    def update(optimizer, agent, key):
        w, opt_state = agent
        updates, opt_state = optimizer.update(w, opt_state)                       # the gradient of w^2 / 2 is w
        return (w + updates, opt_state), {}
    def loss(agent, key):
        return agent[0] ** 2 / 2, (agent, {})
    learner, config = SimpleNamespace(init=init, update=update, loss=loss), pipeline.Config(num_units=8, reset_interval=4)
    task = pipeline.make_task(learner, lambda log_step: optax.sgd(jnp.exp(log_step)), config)
    meta_optimizer, key = optax.adam(0.1), jax.random.key(0)
    state = pipeline.init([task], meta_optimizer, jnp.log(0.01), key)
    for _ in range(100):
        state, metrics = pipeline.meta_step([task], meta_optimizer, state, key)
    print(jnp.exp(state.meta_params))                                             # towards 1, the best step size

Deviations: a unit that is no longer finite is left out of the mean and reset in the next meta-step. A meta-step without any
finite meta-gradient changes nothing. (The reference, github.com/sail-sg/optim4rl, does neither.)
Copy this file: needs jax >= 0.10, optax >= 0.2.5.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

RESETS = ("staggered", "synchronised", "none")


@dataclass(frozen=True)
class Config:
    num_units: int = 512  # n, of each task
    reset_interval: int = 288  # m, meta-steps between two resets of a unit; 0: never
    inner_updates: int = 4  # M
    resets: Literal[*RESETS] = "staggered"
    units_at_once: int | None = None  # per device; None: one on a CPU, whose cache then suffices, all on an accelerator


class Task(NamedTuple):
    """Compiled functions of one task's units."""

    init: Callable  # (meta_params, key) -> units; their first life begins in the first step; compiles step
    step: Callable  # (meta_params, units, meta_step, key) -> (meta_grads, units, metrics): (1) to (4) for all units
    mesh: jax.sharding.Mesh


class Unit(NamedTuple):
    state: Any  # the estimator's, for example an AgentState
    healthy: jax.Array  # [] bool: it has begun, and its meta-gradient and metrics were finite in the last meta-step


class MetaState(NamedTuple):
    step: jax.Array  # [] int32, meta-steps done
    meta_params: Any
    meta_opt_state: Any
    units: tuple  # of each task


def meta_step(tasks, meta_optimizer, state, key, task_grad_norm=None):
    """One meta-step of Algorithm 1.

    Args:
        tasks: Tasks of make_task.
        meta_optimizer: optax optimizer of meta_params; the paper's is Adam behind a clip.
        state: MetaState of init.
        key: the run's key, the same in every step.
        task_grad_norm: if given, each task's meta-gradient is rescaled to this norm (an option of the paper's six-task run: 0.5).
    Returns: (MetaState, a dict of metrics per task: those of make_task, and skipped, whether its meta-gradient
        had no effect, because it or the whole step was not finite).
    """
    # (1) to (4): in every task, reset the units that are due, let all of them learn, and average their meta-gradients.
    results = [
        task.step(state.meta_params, units, state.step, jax.random.fold_in(key, i))
        for i, (task, units) in enumerate(zip(tasks, state.units))
    ]
    all_meta_grads, all_units, all_metrics = zip(*results)
    # (4) and (5): the mean over tasks, and the meta-optimizer's step along it.
    meta_params, meta_opt_state, skipped = update_meta_params(
        meta_optimizer, task_grad_norm, all_meta_grads, state.meta_opt_state, state.meta_params
    )
    all_metrics = [metrics | {"skipped": skipped[i]} for i, metrics in enumerate(all_metrics)]
    return MetaState(state.step + 1, meta_params, meta_opt_state, all_units), all_metrics


def reset_due(meta_step, unit, num_units, reset_interval, resets="staggered"):
    """(1) Whether a unit is reset at a meta-step.

    Args: meta_step, unit: integers, or integer arrays that broadcast; num_units: n; reset_interval: m, 0 for never;
        resets: one of RESETS.
    Returns: bool array.
    """
    if resets == "none" or reset_interval == 0:
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(meta_step), jnp.shape(unit)), bool)
    if resets == "synchronised":
        unit = 0 * unit  # every unit when the first one is
    # meta_step mod m == floor(linspace(0, m - 1, n))[unit]
    return meta_step % reset_interval == unit * (reset_interval - 1) // max(num_units - 1, 1)


def unroll(learner, optimizer, inner_updates, agent, key):
    """(2) M inner updates of an agent: (agent, metrics, each [M])."""
    return jax.lax.scan(lambda a, k: learner.update(optimizer, a, k), agent, jax.random.split(key, inner_updates))


def meta_gradient(learner, make_optimizer, inner_updates, meta_params, agent, key):
    """(2) to (4) for one unit: M inner updates, then the agent's loss on a fresh rollout, differentiated by jax.grad.

    The agent's state at the start counts as given, however it came about: the gradient is truncated to these M updates.

    Args: agent: AgentState; the others as in make_task.
    Returns: (meta_grads like meta_params, agent after the updates, metrics: meta_loss, and those of the learner, averaged
        over the rollouts of the updates and of the meta-loss)
    """
    unroll_key, loss_key = jax.random.split(key)

    def meta_loss(meta_params):
        updated, metrics = unroll(learner, make_optimizer(meta_params), inner_updates, agent, unroll_key)
        loss, (updated, last) = learner.loss(updated, loss_key)
        metrics = jax.tree.map(lambda xs, x: (xs.sum() + x) / (inner_updates + 1), metrics, last)
        return loss, (updated, metrics | {"meta_loss": loss})

    meta_grads, (agent, metrics) = jax.grad(meta_loss, has_aux=True)(meta_params)
    return meta_grads, agent, metrics


def gradient(learner, make_optimizer, inner_updates):
    """The paper's estimator for make_task; a unit's state is an AgentState."""
    init = lambda meta_params, key: learner.init(key, make_optimizer(meta_params))
    return init, partial(meta_gradient, learner, make_optimizer, inner_updates)


@partial(jax.jit, static_argnums=(0, 1))
def update_meta_params(meta_optimizer, task_grad_norm, all_meta_grads, meta_opt_state, meta_params):
    """(4), (5) The mean of the tasks' meta-gradients, without those that are not finite, and the meta-optimizer's step along it.

    Where none is finite, or the step itself is not, nothing changes: neither meta_params nor meta_opt_state, whose momentum
    and schedule would otherwise move on along a direction that failed.

    Returns: (meta_params, meta_opt_state, skipped: [tasks] bool, the same as in meta_step).
    """
    finite = jnp.stack([all_finite(grads) for grads in all_meta_grads])
    if task_grad_norm is not None:
        all_meta_grads = [rescale(grads, task_grad_norm) for grads in all_meta_grads]
    mean = lambda *xs: sum(jnp.where(ok, x, 0) for ok, x in zip(finite, xs)) / jnp.maximum(finite.sum(), 1)
    updates, new_opt_state = meta_optimizer.update(jax.tree.map(mean, *all_meta_grads), meta_opt_state, meta_params)
    new_params = optax.apply_updates(meta_params, updates)
    usable = finite.any() & all_finite((new_params, new_opt_state))
    keep = partial(optax.tree.where, usable)
    return keep(new_params, meta_params), keep(new_opt_state, meta_opt_state), ~(finite & usable)


def init(tasks, meta_optimizer, meta_params, key):
    """The MetaState before the first meta-step, which resets all units. Compiles all tasks, side by side."""
    shared = (jnp.zeros((), jnp.int32), meta_params, meta_optimizer.init(meta_params))
    shared = jax.device_put(shared, NamedSharding(tasks[0].mesh, PartitionSpec()))  # the same on every device
    with ThreadPoolExecutor() as pool:
        units = pool.map(lambda i: tasks[i].init(shared[1], jax.random.fold_in(key, i)), range(len(tasks)))
        return MetaState(*shared, tuple(units))


def make_task(learner, make_optimizer, config=Config(), mesh=None, estimator=gradient):
    """What meta_step needs of a task, each function compiled once, its units sharded over a mesh's axis "units".

    Args:
        learner: Learner.
        make_optimizer: meta_params -> optax.GradientTransformation, for example
            lambda meta_params: optax.chain(optax.clip(1.0), optim4rl.optim4rl(alpha, meta_params)).
        mesh: jax.sharding.Mesh with the one axis "units"; default: one device.
        estimator: how one unit estimates the meta-gradient: (learner, make_optimizer, inner_updates) -> (init, step) with
            init: (meta_params, key) -> state of a new unit; step: (meta_params, state, key) -> (meta_grads, state, metrics).
            Others than gradient: evolution.pes(sigma), evolution.nres(sigma).
    Returns: Task. Its metrics are means over the healthy units, and diverged, the number of the others: units whose metrics or
        meta-gradient were not finite, which are reset in the next step.
    Raises: ValueError: sizes below one, or units that the devices cannot share equally.
    """
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("units",)) if mesh is None else mesh
    num_devices = mesh.devices.size
    check(config, num_devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    local_units = config.num_units // num_devices
    units_at_once = config.units_at_once or (1 if on_cpu else local_units)
    # None: a plain loop, in which a reset that is not due costs nothing.
    batch_size = None if units_at_once == 1 else units_at_once
    init_unit, step_unit = estimator(learner, make_optimizer, config.inner_updates)

    def live(meta_params, unit, unit_id, meta_step, key):
        """(1) to (4) for one unit."""
        reset_key, step_key = unit_keys(key, unit_id, meta_step)
        due = reset_due(meta_step, unit_id, config.num_units, config.reset_interval, config.resets) | ~unit.healthy
        state = jax.lax.cond(due, lambda: init_unit(meta_params, reset_key), lambda: unit.state)
        meta_grads, state, metrics = step_unit(meta_params, state, step_key)
        return meta_grads, Unit(state, all_finite((meta_grads, metrics))), metrics

    def step_local(meta_params, units, meta_step, key):
        """(1) to (4) for the units of one device; the means are over those of all devices."""
        unit_ids = jax.lax.axis_index("units") * local_units + jnp.arange(local_units)
        live_now = lambda unit_and_id: live(meta_params, *unit_and_id, meta_step, key)
        meta_grads, units, metrics = jax.lax.map(live_now, (units, unit_ids), batch_size=batch_size)
        num_healthy = jax.lax.psum(units.healthy.sum(), "units")

        def mean(x):  # NaN, which meta_step skips, where no unit is healthy
            healthy = units.healthy.reshape(-1, *[1] * (x.ndim - 1))
            return jax.lax.psum(jnp.where(healthy, x, 0).sum(0), "units") / num_healthy

        meta_grads, metrics = jax.tree.map(mean, (meta_grads, metrics))
        return meta_grads, units, metrics | {"diverged": config.num_units - num_healthy}

    init_task, step_task = compile_on(mesh, step_local, init_unit, config.num_units, on_cpu)
    return Task(init_task, step_task, mesh)


def compile_on(mesh, step_local, init_unit, num_units, on_cpu):
    """Task's init and step: step_local on every device of the mesh, compiled by init."""
    one, many = PartitionSpec(), PartitionSpec("units")
    # check_vma=False: the checker cannot follow a mean taken by hand; psum makes the outputs equal on all devices.
    specs = dict(in_specs=(one, many, one, one), out_specs=(one, many, one), check_vma=False)
    # LLVM's higher levels make the compilation a quarter longer, and the program no faster. A level in XLA_FLAGS comes first.
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    options = {"xla_backend_optimization_level": 1} if on_cpu and not chosen else None
    step_all = jax.jit(jax.shard_map(step_local, mesh=mesh, **specs), donate_argnums=1, compiler_options=options)

    def init(meta_params, key):
        # Zeros, and not healthy: the first meta-step resets every unit. A program that did it here would be a third of
        # all compilation.
        shapes = jax.eval_shape(lambda: Unit(init_unit(meta_params, key), jnp.array(False)))
        blank = lambda: jax.tree.map(lambda x: jnp.zeros((num_units, *x.shape), x.dtype), shapes)
        units = jax.jit(blank, out_shardings=NamedSharding(mesh, many))()
        meta_step = jax.device_put(jnp.int32(0), NamedSharding(mesh, one))
        step_all.lower(meta_params, units, meta_step, key).compile()  # the first call of step finds it compiled
        return units

    def step(meta_params, units, meta_step, key):
        results = step_all(meta_params, units, meta_step, key)
        # CPU devices share one thread pool: two programs that both wait for a sum could block each other.
        return jax.block_until_ready(results) if on_cpu else results

    return init, step


def check(config, num_devices):
    """Raises ValueError for sizes that make no sense."""
    for name, least in (("num_units", 1), ("reset_interval", 0), ("inner_updates", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.resets not in RESETS:
        raise ValueError(f"resets is {config.resets!r}; known: {', '.join(RESETS)}")
    if config.num_units % num_devices:
        near = config.num_units // num_devices * num_devices
        choices = " or ".join(str(n) for n in (near, near + num_devices) if n)
        raise ValueError(f"num_units is {config.num_units}; {num_devices} devices can share {choices} equally")


def all_finite(tree):
    """Whether every number of a tree is finite: [] bool."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def unit_keys(key, unit_id, meta_step):
    """(reset_key, step_key) of a unit at a meta-step."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, unit_id), meta_step))


def rescale(grads, norm):
    """Gradients of that global norm; zero gradients stay zero."""
    scale = norm / jnp.maximum(optax.tree.norm(grads), 1e-12)
    return optax.tree.scale(scale, grads)
