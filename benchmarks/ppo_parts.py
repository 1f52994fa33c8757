"""Program: where the time of a PPO iteration goes, and what Optim4RL adds to it.

    python benchmarks/ppo_parts.py                                            # the small settings of two robots
    python benchmarks/ppo_parts.py --tasks inverted_double_pendulum --ppo paper --repeats 2
    taskset -c 0 python benchmarks/ppo_parts.py                               # on one core

| part | measured as |
|---|---|
| physics | the environments alone, under random actions |
| acting | collecting the trajectories, less physics: the policy, its noise, episode statistics, normalising |
| gathering | picking the minibatches of all epochs |
| learning | the whole iteration under SGD, less the parts above: networks forward and back, advantages |
| Adam, Optim4RL | the whole iteration under each, less that under SGD |

All are called in turn, and the least time of each counts: on a CPU the seconds of the cores that work, so that other processes
count for little.
"""

import pathlib
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import optax

import brax_env
import cli
import compare
import ppo
import suite


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = cli.flag(("inverted_pendulum", "ant"), "comma-separated robots")
    ppo: str = cli.flag("small", "PPO's settings: paper, or small ones of our own")
    repeats: int = cli.flag(10, "calls of each part after one that compiles")


def parts(name, ppo_settings):
    """{part: (jitted function, its arguments)} and the agent's number of scalars."""
    config, env = ppo.Config(**suite.ppo_knobs(name, ppo_settings)[1]), brax_env.make(name)
    learner, key = ppo.make(env, config), jax.random.key(0)
    num_steps = config.batch_size * config.num_minibatches * config.rollout_length // config.num_envs

    def physics(states, key):
        def step(states, key):
            action_key, env_key = jax.random.split(key)
            actions = jax.random.uniform(action_key, (config.num_envs, env.action_size), minval=-1, maxval=1)
            return jax.vmap(env.step)(jax.random.split(env_key, config.num_envs), states, actions)[0], None

        return jax.lax.scan(step, states, jax.random.split(key, num_steps))[0]

    def gather(data, key):
        def pick(total, key):
            order = jax.random.permutation(key, config.batch_size * config.num_minibatches)
            one = lambda total, chosen: (jax.tree.map(lambda t, x: t + x[:, chosen], total, data), None)
            return jax.lax.scan(one, total, order.reshape(config.num_minibatches, -1))[0], None

        total = jax.tree.map(lambda x: jnp.zeros_like(x[:, : config.batch_size], dtype=jnp.float32), data)
        return jax.lax.scan(pick, total, jax.random.split(key, config.num_epochs))[0]

    functions = {}
    meta_params = compare.LEARNED["optim4rl"].init(key)
    for optimizer in ("sgd", "adam", "optim4rl"):
        rule = optax.sgd(1e-4) if optimizer == "sgd" else compare.OPTIMIZERS[optimizer](meta_params, 1e-4)
        rule = suite.clipped(name, rule)
        agent = jax.jit(lambda key, rule=rule: learner.init(key, rule))(key)
        functions[optimizer] = (jax.jit(lambda agent, key, rule=rule: learner.update(rule, agent, key)), (agent, key))
    collect = jax.jit(lambda agent, key: ppo.collect(env, config, agent, key)[:2])
    functions["collect"] = (collect, (agent, key))
    functions["physics"] = (jax.jit(physics), (agent.env_state, key))
    functions["gather"] = (jax.jit(gather), (collect(agent, key)[1], key))
    return functions, num_steps * config.num_envs, sum(x.size for x in jax.tree.leaves(agent.params))


def least_seconds(functions, repeats):
    """{name: seconds} of jitted functions called in turn."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, (function, arguments) in functions.items():
            start = clock()
            jax.block_until_ready(function(*arguments))
            times[name].append(clock() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def main(argv=None):
    config = cli.parse(Config, {"default": {}}, __doc__, argv)
    cli.check_positive(config, ("repeats",))
    cli.use_devices(1)
    for name in config.tasks:
        functions, steps, num_scalars = parts(name, config.ppo)
        s = least_seconds(functions, config.repeats)
        shares = {
            "physics": s["physics"],
            "acting": s["collect"] - s["physics"],
            "gathering": s["gather"],
            "learning": s["sgd"] - s["collect"] - s["gather"],
            "Adam": s["adam"] - s["sgd"],
        }
        print(f"{name}, {config.ppo} settings, {num_scalars} scalars: {steps / s['adam']:.0f} steps/s under Adam")
        print("  " + ", ".join(f"{part} {100 * seconds / s['adam']:.1f}%" for part, seconds in shares.items()))
        ratio, hidden = s["optim4rl"] / s["adam"], 64 * num_scalars / 2**20  # 16 float32 numbers a scalar
        print(f"  Optim4RL takes {ratio:.3f} times as long, with {hidden:.1f} MiB of hidden state", flush=True)


if __name__ == "__main__":
    cli.run(main)
