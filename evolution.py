# SPDX-License-Identifier: MIT
"""Evolution strategies: estimators of the meta-gradient over whole lives, for pipeline.py (not in the paper).

The paper's meta-gradient looks M updates ahead, and over so few updates smaller steps look better than they are. These
estimators judge an optimizer by the return of a whole life, in forward passes only. Each unit holds two agents that draw
the same random numbers. They differ only in their optimizers: one lives with theta + epsilon, the other with theta - epsilon.

| symbol | in code | shape |
|---|---|---|
| theta | meta_params: parameters of the learned optimizer | any pytree |
| epsilon | perturbation, each entry from N(0, sigma^2) | like meta_params |
| xi | Pair.xi: the sum of a life's epsilons so far | like meta_params |
| L | loss: minus the mean return so far of the running episodes | [2], one per agent |

    meta_grads = xi (L(theta + epsilon) - L(theta - epsilon)) / (2 sigma^2)

- nres, noise-reuse evolution strategies (Li, Harrison, Sohl-Dickstein, Smith and Metz 2023): epsilon is drawn once per life,
  so xi = epsilon.
- pes, persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021): a new epsilon is drawn in each meta-step. The
  difference of the losses is due to all epsilons of a life so far, so xi is their sum. Where the losses of different meta-steps
  are independent, the variance of meta_grads grows with a unit's age.

In the mean over lives, both give the gradient with respect to theta of the mean loss over a whole life, smoothed by the
perturbations. For that they need units of all ages, or whole cycles of resets, so they fit the pipeline.

In the pipeline: pipeline.make_task(learner, make_optimizer, config, estimator=evolution.nres(sigma=0.1)).

Example (an agent is one number w that grows by exp(theta) per update, and pays -w^2):
    import jax, jax.numpy as jnp, optax, evolution
    from types import SimpleNamespace
    def init(key, optimizer):
        return jnp.zeros(()), optimizer.init(0.0)
    def update(optimizer, agent, key):
        w, opt_state = agent
        updates, opt_state = optimizer.update(-jnp.ones(()), opt_state)
        return (w + updates, opt_state), {"reward": -((w + updates) ** 2)}
    learner = SimpleNamespace(init=init, update=update)
    init, step = evolution.nres(sigma=0.1)(learner, lambda theta: optax.sgd(jnp.exp(theta)), inner_updates=4)
    theta, key = jnp.log(0.1), jax.random.key(0)
    pair = init(theta, key)
    for key in jax.random.split(key, 5):
        meta_grads, pair, metrics = step(theta, pair, key)
    print(meta_grads)                                                    # positive: smaller steps would pay more

Copy this file: needs jax >= 0.10, optax >= 0.2.5.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Pair(NamedTuple):
    agents: Any  # AgentState, each leaf [2, ...]: of theta + epsilon and of theta - epsilon
    xi: Any  # like meta_params: the sum of the epsilons since the noise began (nres: the only one)
    age: jax.Array  # [] int32, meta-steps since the unit's reset


def nres(sigma, noise_interval=0):
    """Noise-reuse evolution strategies: an estimator for pipeline.make_task.

    Args:
        sigma: standard deviation of the perturbations, > 0.
        noise_interval: meta-steps after which a unit's noise begins again; 0: with its life, which is unbiased. Units that
            are never reset need one.
    """
    return partial(evolution, sigma, noise_interval, True)


def pes(sigma, noise_interval=0):
    """Persistent evolution strategies: an estimator for pipeline.make_task. Arguments: those of nres."""
    return partial(evolution, sigma, noise_interval, False)


def evolution(sigma, noise_interval, reuse_noise, learner, make_optimizer, inner_updates):
    """What nres (reuse_noise) and pes estimate with. A unit's state is a Pair.

    The loss is what an agent is for, which its own loss is not: minus the metric "objective" of a learner that has it, else
    minus the mean reward. (The mean reward is blind to falling where each step that an agent survives pays the same.)

    Returns: init: (meta_params, key) -> Pair of a new unit; step: (meta_params, Pair, key) -> (meta_grads, Pair, metrics).
    """

    def draw(key, meta_params):
        return optax.tree.scale(sigma, optax.tree.random_like(key, meta_params))

    def init(meta_params, key):
        agent_key, epsilon_key = jax.random.split(key)
        agent, epsilon = learner.init(agent_key, make_optimizer(meta_params)), draw(epsilon_key, meta_params)
        xi = epsilon if reuse_noise else optax.tree.zeros_like(epsilon)
        return Pair(jax.tree.map(lambda x: jnp.stack([x, x]), agent), xi, jnp.zeros((), jnp.int32))

    def perturb(meta_params, pair, key):
        """The epsilon and the xi of this meta-step."""
        begins_again = (pair.age > 0) & (pair.age % noise_interval == 0) if noise_interval else False
        new = draw(key, meta_params)
        if reuse_noise:
            xi = optax.tree.where(begins_again, new, pair.xi)
            return xi, xi
        return new, jax.tree.map(lambda x, e: jnp.where(begins_again, 0, x) + e, pair.xi, new)

    def step(meta_params, pair, key):
        epsilon_key, unroll_key = jax.random.split(key)
        epsilon, xi = perturb(meta_params, pair, epsilon_key)

        def live(sign, agent):
            optimizer = make_optimizer(optax.tree.add_scale(meta_params, sign, epsilon))
            update = lambda a, k: learner.update(optimizer, a, k)
            return jax.lax.scan(update, agent, jax.random.split(unroll_key, inner_updates))

        at_once = None if jax.default_backend() == "cpu" else 2  # None: one after the other, whose state fits a cache
        signs = jnp.array([1.0, -1.0])
        agents, metrics = jax.lax.map(lambda x: live(*x), (signs, pair.agents), batch_size=at_once)
        losses = -metrics.get("objective", metrics["reward"]).mean(1)  # (2,)
        # meta_grads = xi (L(theta + epsilon) - L(theta - epsilon)) / (2 sigma^2)
        meta_grads = jax.tree.map(lambda x: x * (losses[0] - losses[1]) / (2 * sigma**2), xi)
        metrics = jax.tree.map(jnp.mean, metrics) | {"meta_loss": losses.mean()}
        return meta_grads, Pair(agents, xi, pair.age + 1), metrics

    return init, step
