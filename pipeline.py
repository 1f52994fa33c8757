"""Pipeline training: the meta-training of a learned optimizer on many agents at every stage of life (paper: Figure 2a, Algorithm 1).

A training unit is a whole agent: parameters, optimizer hidden state, environments. n units live side by side. Each starts
afresh every m meta-steps, the resets staggered, so that at any time the units span all stages of learning and the
agent-gradients that the optimizer learns from are close to IID.

| symbol | here | shape |
|---|---|---|
| theta | meta_params, the learned optimizer's parameters | pytree |
| n, m, M | num_units, reset_interval (in meta-steps), inner_updates | |
| units | Unit, with a leading axis: an AgentState of a learner, or a Pair of them (pes, nres) | [U, ...] |
| meta-loss | the agent's loss on a fresh rollout after M updates | [U] |
| meta_grads | estimate of d meta-loss / d theta, a mean over units, then over tasks | like theta |

Any Learner (a2c.make, ppo.make) and any LearnedOptimizer (optim4rl.OPTIM4RL) fit. Units are sharded over the devices of a
one-axis mesh "units"; a result depends on the number of devices only through floating-point rounding, since each unit's
randomness is folded from its own index.

Example (a unit is one number w with loss w^2 / 2; the learned optimizer has one parameter, its log step size):
    import jax, jax.numpy as jnp, optax, pipeline
    from typing import NamedTuple
    class Unit(NamedTuple):
        params: jax.Array
        opt_state: tuple
    class Learner(NamedTuple):
        init = lambda key, optimizer: Unit(jax.random.normal(key), optimizer.init(0.0))
        def update(optimizer, unit, key):
            updates, opt_state = optimizer.update(unit.params, unit.opt_state)
            return Unit(unit.params + updates, opt_state), {}
        loss = lambda unit, key: (unit.params**2 / 2, (unit, {}))
    config = pipeline.Config(num_units=8, reset_interval=4)
    task = pipeline.make_task(Learner, lambda theta: optax.sgd(jnp.exp(theta)), config)
    meta_optimizer, key = optax.adam(0.1), jax.random.key(0)
    state = pipeline.init([task], meta_optimizer, jnp.log(0.01), key)
    for _ in range(100):
        state, metrics = pipeline.meta_step([task], meta_optimizer, state, key)
    print(jnp.exp(state.meta_params))                                # towards 1, the best step size

Copy this file: needs jax, optax.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Config:
    num_units: int = 512  # n, of each task
    reset_interval: int = 288  # m; 0: no resets, which is training without the pipeline
    inner_updates: int = 4  # M
    estimator: str = "gradient"  # of the meta-gradient, a name in ESTIMATORS; the paper's is "gradient"
    sigma: float = 0.03  # standard deviation of the perturbations of "pes" and "nres"
    units_at_once: int | None = None  # per device; None: one on a CPU, whose cache then suffices, all on an accelerator


class Task(NamedTuple):
    """Compiled functions of one task's units."""

    init: Callable  # (meta_params, key) -> units, which begin to live in the first step; compiles step
    step: Callable  # (meta_params, units, meta_step, key) -> (meta_grads, units, metrics)
    mesh: jax.sharding.Mesh


class Unit(NamedTuple):
    state: Any  # the estimator's
    healthy: jax.Array  # [] bool: it lives, and everything was finite in the last meta-step


class Estimator(NamedTuple):
    """How one unit estimates the meta-gradient."""

    init: Callable  # (meta_params, key) -> state
    step: Callable  # (meta_params, state, key) -> (meta_grads, state, metrics)


class MetaState(NamedTuple):
    step: jax.Array  # [] int32, meta-steps done
    meta_params: Any
    meta_opt_state: Any
    units: tuple  # of each task


def meta_step(tasks, meta_optimizer, state, key, task_grad_norm=None):
    """One meta-step of Algorithm 1.

    Args:
        tasks: Tasks of make_task.
        meta_optimizer: optax optimizer of meta_params; the paper's is Adam, its gradient clipped.
        state: MetaState of init.
        key: the run's key, the same in every step.
        task_grad_norm: if given, each task's meta-gradient is rescaled to this norm (paper's six-task run: 0.5).
    Returns:
        (MetaState, list of each task's metrics: those of make_task's Task, and skipped, whether its meta-gradient was not finite)
    """
    # Reset the due units; M inner updates of every unit; meta-loss; its gradient, a mean over units.
    results = [
        task.step(state.meta_params, units, state.step, jax.random.fold_in(key, i))
        for i, (task, units) in enumerate(zip(tasks, state.units))
    ]
    all_meta_grads, all_units, all_metrics = zip(*results)
    meta_params, meta_opt_state, skipped = update_meta_params(
        meta_optimizer, task_grad_norm, all_meta_grads, state.meta_opt_state, state.meta_params
    )
    all_metrics = [metrics | {"skipped": skipped[i]} for i, metrics in enumerate(all_metrics)]
    return MetaState(state.step + 1, meta_params, meta_opt_state, all_units), all_metrics


@partial(jax.jit, static_argnums=(0, 1))
def update_meta_params(meta_optimizer, task_grad_norm, all_meta_grads, meta_opt_state, meta_params):
    """The meta-optimizer's step along the mean of the tasks' meta-gradients; one that is not finite is skipped.

    Returns: (meta_params, meta_opt_state, skipped: a bool of each task).
    """
    finite = [all_finite(grads) for grads in all_meta_grads]
    if task_grad_norm is not None:
        all_meta_grads = [rescale(grads, task_grad_norm) for grads in all_meta_grads]
    mean = lambda *xs: sum(jnp.where(ok, x, 0) for ok, x in zip(finite, xs)) / jnp.maximum(sum(finite), 1)
    updates, meta_opt_state = meta_optimizer.update(jax.tree.map(mean, *all_meta_grads), meta_opt_state, meta_params)
    return optax.apply_updates(meta_params, updates), meta_opt_state, [~ok for ok in finite]


def init(tasks, meta_optimizer, meta_params, key):
    """The MetaState before the first meta-step, in which all units will start afresh. Compiles all tasks, side by side."""
    shared = (jnp.zeros((), jnp.int32), meta_params, meta_optimizer.init(meta_params))
    shared = jax.device_put(shared, NamedSharding(tasks[0].mesh, PartitionSpec()))  # the same on every device
    with ThreadPoolExecutor() as pool:
        units = pool.map(lambda i: tasks[i].init(shared[1], jax.random.fold_in(key, i)), range(len(tasks)))
        return MetaState(*shared, tuple(units))


def reset_due(meta_step, unit, num_units, reset_interval):
    """Whether a unit starts afresh at a meta-step: meta_step mod m == floor(linspace(0, m - 1, n))[unit].

    Args: meta_step, unit: integers or integer arrays that broadcast; num_units n; reset_interval m, 0 for never.
    Returns: bool array.
    """
    if reset_interval == 0:
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(meta_step), jnp.shape(unit)), bool)
    offset = unit * (reset_interval - 1) // max(num_units - 1, 1)
    return meta_step % reset_interval == offset


def unroll(learner, optimizer, inner_updates, agent, key):
    """M inner updates of an agent: (agent, metrics [M] each)."""
    return jax.lax.scan(lambda a, k: learner.update(optimizer, a, k), agent, jax.random.split(key, inner_updates))


def meta_gradient(learner, make_optimizer, inner_updates, meta_params, agent, key):
    """The paper's estimate: M inner updates, then the agent's loss on a fresh rollout, differentiated by jax.grad.

    The agent's state at the start counts as given, however it came about: the gradient is truncated to these M updates.

    Args:
        learner: Learner.
        make_optimizer: meta_params -> optax.GradientTransformation.
        inner_updates: M.
        meta_params: pytree.
        agent: AgentState.
        key: jax PRNG key.
    Returns:
        (meta_grads like meta_params, agent after the updates, metrics: those of the learner, averaged over the rollouts
        of the updates and of the meta-loss, and meta_loss)
    """
    unroll_key, loss_key = jax.random.split(key)

    def meta_loss(meta_params):
        updated, metrics = unroll(learner, make_optimizer(meta_params), inner_updates, agent, unroll_key)
        loss, (updated, last) = learner.loss(updated, loss_key)
        metrics = jax.tree.map(lambda xs, x: (xs.sum() + x) / (inner_updates + 1), metrics, last)
        return loss, (updated, metrics | {"meta_loss": loss})

    meta_grads, (agent, metrics) = jax.grad(meta_loss, has_aux=True)(meta_params)
    return meta_grads, agent, metrics


def gradient(learner, make_optimizer, config):
    """The paper's Estimator; its state is an AgentState."""

    def init(meta_params, key):
        return learner.init(key, make_optimizer(meta_params))

    return Estimator(init, partial(meta_gradient, learner, make_optimizer, config.inner_updates))


class Pair(NamedTuple):
    agents: Any  # AgentState, each leaf [2, ...]: one lives with theta + epsilon, one with theta - epsilon
    perturbation: Any  # like theta: the sum of the first agent's epsilons since the unit's reset (nres: the only one)


def evolution(reuse_noise, learner, make_optimizer, config):
    """Evolution strategies over whole lives in short windows: Estimators without the truncation's bias, forward passes only.

    Two agents of equal randomness differ only in the optimizer: theta + epsilon and theta - epsilon, epsilon ~ N(0, sigma^2).
    pes, persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021), draws epsilon anew in each meta-step. The
    difference of their losses is due to all epsilons of their life, not only to the last one:

        meta_grads = (epsilon_1 + ... + epsilon_t) (L(theta + epsilon) - L(theta - epsilon)) / (2 sigma^2)

    is, in the mean over lives, the gradient of the mean loss over a whole life, for a Gaussian-smoothed theta. nres, noise-reuse
    evolution strategies (Li, Harrison, Sohl-Dickstein, Smith and Metz 2023), draws epsilon once in a life and puts it in the
    place of the sum: the same in the mean, but for how theta is smoothed. Where the losses of different meta-steps are
    independent, the variance of pes is t times as large at age t.

    The loss is what an agent is for, which its own loss is not: minus the metric "objective" of a learner that has it, or else
    minus the mean reward, which is blind to falling where each step that an agent survives pays the same.
    """

    def draw(key, meta_params):
        return jax.tree.map(lambda e: config.sigma * e, optax.tree.random_like(key, meta_params))

    def init(meta_params, key):
        agent_key, epsilon_key = jax.random.split(key)
        agent, epsilon = learner.init(agent_key, make_optimizer(meta_params)), draw(epsilon_key, meta_params)
        perturbation = epsilon if reuse_noise else jax.tree.map(jnp.zeros_like, epsilon)
        return Pair(jax.tree.map(lambda x: jnp.stack([x, x]), agent), perturbation)

    def step(meta_params, pair, key):
        epsilon_key, unroll_key = jax.random.split(key)
        epsilon = pair.perturbation if reuse_noise else draw(epsilon_key, meta_params)
        total = epsilon if reuse_noise else jax.tree.map(jnp.add, pair.perturbation, epsilon)

        def live(sign, agent):
            optimizer = make_optimizer(jax.tree.map(lambda t, e: t + sign * e, meta_params, epsilon))
            return unroll(learner, optimizer, config.inner_updates, agent, unroll_key)

        at_once = None if jax.default_backend() == "cpu" else 2  # None: one after the other
        signs = jnp.array([1.0, -1.0])
        agents, metrics = jax.lax.map(lambda x: live(*x), (signs, pair.agents), batch_size=at_once)
        losses = -metrics.get("objective", metrics["reward"]).mean(1)  # (2,)
        meta_grads = jax.tree.map(lambda x: x * (losses[0] - losses[1]) / (2 * config.sigma**2), total)
        return meta_grads, Pair(agents, total), jax.tree.map(jnp.mean, metrics) | {"meta_loss": losses.mean()}

    return Estimator(init, step)


ESTIMATORS = {"gradient": gradient, "pes": partial(evolution, False), "nres": partial(evolution, True)}


def make_task(learner, make_optimizer, config=Config(), mesh=None):
    """What meta_step needs of a task, each function compiled once, its units sharded over a mesh's axis "units".

    Args:
        learner: Learner.
        make_optimizer: meta_params -> optax.GradientTransformation, e.g.
            lambda meta_params: optax.chain(optax.clip(1.0), optim4rl.optim4rl(meta_params, alpha)).
        config: Config.
        mesh: jax.sharding.Mesh with the one axis "units"; default: one device.
    Returns:
        Task. A unit whose metrics or meta-gradient are not finite is left out of every mean and starts afresh in the
        next step. metrics: the means of meta_gradient's, and diverged, the number of such units.
    Raises:
        ValueError: sizes below one, or units that the devices cannot share equally.
    """
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("units",)) if mesh is None else mesh
    num_devices = mesh.devices.size
    check(config, num_devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    units_at_once = config.units_at_once or (1 if on_cpu else config.num_units // num_devices)
    # A batch of one is a plain loop, in which a reset that is not due costs nothing.
    each = lambda f, *xs: jax.lax.map(lambda x: f(*x), xs, batch_size=None if units_at_once == 1 else units_at_once)
    local_units = config.num_units // num_devices

    estimator = ESTIMATORS[config.estimator](learner, make_optimizer, config)

    def live(meta_params, unit, id, meta_step, key):
        """One meta-step in the life of one unit."""
        reset_key, unroll_key = unit_keys(key, id, meta_step)
        due = reset_due(meta_step, id, config.num_units, config.reset_interval) | ~unit.healthy
        state = jax.lax.cond(due, lambda: estimator.init(meta_params, reset_key), lambda: unit.state)
        meta_grads, state, metrics = estimator.step(meta_params, state, unroll_key)
        return meta_grads, Unit(state, all_finite((meta_grads, metrics))), metrics

    def local_ids():  # of this device's units, among all units of the task
        return jax.lax.axis_index("units") * local_units + jnp.arange(local_units)

    def step_local(meta_params, units, meta_step, key):
        step_unit = lambda unit, id: live(meta_params, unit, id, meta_step, key)
        meta_grads, units, metrics = each(step_unit, units, local_ids())
        num_healthy = jax.lax.psum(units.healthy.sum(), "units")

        def mean(x):  # over the healthy units of all devices; NaN, which meta_step skips, where there are none
            healthy = units.healthy.reshape(-1, *[1] * (x.ndim - 1))
            return jax.lax.psum(jnp.where(healthy, x, 0).sum(0), "units") / num_healthy

        meta_grads, metrics = jax.tree.map(mean, (meta_grads, metrics))
        return meta_grads, units, metrics | {"diverged": config.num_units - num_healthy}

    one, many = PartitionSpec(), PartitionSpec("units")
    # The replication checker cannot follow a gradient that is averaged by hand: psum makes the outputs equal everywhere.
    shard = lambda f, ins, outs: jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    # LLVM's higher levels make the compilation a quarter longer, and the program no faster.
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    step_sharded = shard(step_local, (one, many, one, one), (one, many, one))
    step_all = jax.jit(step_sharded, donate_argnums=1, compiler_options=options)

    def init(meta_params, key):
        # Nothing but zeros, and not healthy: the first meta-step gives every unit its first life. To do so here would take
        # a program of its own, a third of all compilation.
        shapes = jax.eval_shape(lambda: Unit(estimator.init(meta_params, key), jnp.array(False)))
        blank = lambda: jax.tree.map(lambda x: jnp.zeros((config.num_units, *x.shape), x.dtype), shapes)
        units = jax.jit(blank, out_shardings=NamedSharding(mesh, many))()
        meta_step = jax.device_put(jnp.int32(0), NamedSharding(mesh, one))
        step_all.lower(meta_params, units, meta_step, key).compile()  # the first call of step will find it compiled
        return units

    def step(meta_params, units, meta_step, key):
        results = step_all(meta_params, units, meta_step, key)
        # On CPU devices, which share one thread pool, two programs that both wait for a sum can block each other for ever.
        return jax.block_until_ready(results) if on_cpu else results

    return Task(init, step, mesh)


def check(config, num_devices):
    """Raises ValueError for sizes that make no sense."""
    for name, least in (("num_units", 1), ("reset_interval", 0), ("inner_updates", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.num_units % num_devices:
        near = config.num_units // num_devices * num_devices
        choices = " or ".join(str(n) for n in (near, near + num_devices) if n)
        raise ValueError(f"num_units is {config.num_units}; {num_devices} devices can share {choices} equally")


def all_finite(tree):
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def unit_keys(key, id, meta_step):
    """(reset_key, unroll_key) of a unit at a meta-step."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, id), meta_step))


def rescale(grads, norm):
    """Gradients of that global norm; zero gradients stay zero."""
    scale = norm / jnp.maximum(optax.tree.norm(grads), 1e-12)
    return jax.tree.map(lambda g: scale * g, grads)
