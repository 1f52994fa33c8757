# SPDX-License-Identifier: MIT
"""The tasks of meta-training: eight gridworlds and Catch, as pure functions of one environment (paper: appendix).

A gridworld has an agent and a few objects. Walking onto an object collects it: its reward is paid, it disappears, and
the episode may end. An absent object comes back with some probability in each step, on a random cell. GRIDWORLDS below is
the paper's table of them. Catch, another small game, stands at the end of the file.

| symbol | in code | shape |
|---|---|---|
| grid | height x width cells, numbered row by row: cell = row * width + column | |
| state | State: agent's cell, objects' cells (ABSENT where collected), step count | [], [O], [] |
| action | 0 stay; 1-8 the neighbours; a move off the grid (a diagonal one too) leaves the agent in place | [] |
| obs | a binary plane per object, then the agent's, padded by one empty cell on each side | [O+1, height+2, width+2] |

Order of a step: move; collect every object on the agent's cell; respawn; end at the horizon; restart if ended.

Example:
    import jax, gridworld
    env = gridworld.make("small_dense_long")
    reset_key, action_key, step_key = jax.random.split(jax.random.key(0), 3)
    states = jax.vmap(env.reset)(jax.random.split(reset_key, 512))                       # 512 worlds side by side
    actions = jax.random.randint(action_key, (512,), 0, env.num_actions)
    states, rewards, dones = jax.vmap(env.step)(jax.random.split(step_key, 512), states, actions)  # (512,) each
    obs = jax.vmap(env.observe)(states)                                                  # (512, 3, 8, 6)

NOTE: a respawning object may land on any cell, an occupied one too, as in the reference (github.com/sail-sg/optim4rl).
NOTE: no observation shows the step count, so an agent cannot see the horizon come. The horizon is a true end all the
same: `done` does not tell it from the end that a bad object makes, as in the reference.
Copy this file: needs jax >= 0.10.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

ABSENT = -1  # the cell of a collected object
MOVES = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))  # (rows, columns)


class Env(NamedTuple):
    """A bundle of pure functions of one environment."""

    reset: Callable  # key -> state
    step: Callable  # (key, state, action) -> (state, reward [], done [] bool); restarts by itself when done
    observe: Callable  # state -> obs, of shape obs_shape
    obs_shape: tuple
    num_actions: int
    name: str


class Object(NamedTuple):
    reward: float  # paid to who collects it
    end_prob: float  # probability that collecting it ends the episode
    respawn_prob: float  # probability, in each step, that it comes back where it is absent


class World(NamedTuple):
    """What defines a gridworld."""

    height: int
    width: int
    objects: tuple[Object, ...]
    horizon: int  # steps of the longest episode


class State(NamedTuple):
    agent: jax.Array  # [] int32 cell
    objects: jax.Array  # [O] int32 cells
    time: jax.Array  # [] int32 steps since the episode began


def _pairs(number, respawn_prob):
    """Good objects (reward 1, never the end of an episode) and as many bad ones (-1, the end with probability .5)."""
    return (Object(1.0, 0.0, respawn_prob),) * number + (Object(-1.0, 0.5, respawn_prob),) * number


GRIDWORLDS = {  # height, width, objects, horizon
    "small_sparse_short": World(3, 8, _pairs(1, 0.05), 50),
    "small_sparse_long": World(8, 3, _pairs(1, 0.05), 500),
    "small_dense_short": World(4, 6, _pairs(1, 0.5), 50),
    "small_dense_long": World(6, 4, _pairs(1, 0.5), 500),
    "big_sparse_short": World(10, 12, _pairs(2, 0.05), 50),
    "big_sparse_long": World(12, 10, _pairs(2, 0.05), 500),
    "big_dense_short": World(9, 13, _pairs(2, 0.5), 50),
    "big_dense_long": World(13, 9, _pairs(2, 0.5), 500),
}
NAMES = (*GRIDWORLDS, "catch")


def make(name, reward_scale=1.0, truncation=False):
    """The task of that name.

    Args:
        name: one of NAMES.
        reward_scale: factor on every reward (the paper scales rewards in meta-training only).
        truncation: step also returns whether the horizon alone ended the episode, as its fourth output. (Catch has none.)
    Returns: Env. Raises: ValueError: unknown name.
    """
    if name == "catch":
        return _make_catch(reward_scale)
    if name not in GRIDWORLDS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(NAMES)}")
    return make_gridworld(GRIDWORLDS[name], reward_scale, name, truncation)


def make_gridworld(world, reward_scale=1.0, name="gridworld", truncation=False):
    """Any World as an Env: for grids and objects of your own. ValueError if the world makes no sense."""
    _check(world)
    height, width, objects, horizon = world
    object_rewards, end_probs, respawn_probs = jnp.array(objects, float).T  # (O,) each
    reward_scale = jnp.asarray(reward_scale, object_rewards.dtype)
    num_objects, num_cells = len(objects), height * width
    obs_shape = (num_objects + 1, height + 2, width + 2)

    def reset(key):
        # Distinct cells: the i-th is drawn among the num_cells - i that are left, then counted past those taken.
        # jax.random.choice(replace=False) would shuffle all cells for a few, and draw other worlds from the same key.
        draws = jax.random.uniform(key, (num_objects + 1,))
        cells = []
        for i, draw in enumerate(draws):
            cell = (draw * (num_cells - i)).astype(jnp.int32)
            for taken in jnp.sort(jnp.array(cells, jnp.int32)):
                cell += cell >= taken
            cells.append(cell)
        return State(agent=cells[0], objects=jnp.stack(cells[1:]), time=jnp.zeros((), jnp.int32))

    def step(key, state, action):
        draw_key, reset_key = jax.random.split(key)
        end_draws, respawn_draws, cell_draws = jax.random.uniform(draw_key, (3, num_objects))
        agent = _move(state.agent, action, height, width)
        collected = state.objects == agent  # (O,)
        reward = reward_scale * jnp.sum(collected * object_rewards)
        ended = jnp.any(collected & (end_draws < end_probs))
        absent = collected | (state.objects == ABSENT)
        respawned = absent & (respawn_draws < respawn_probs)
        cells = (cell_draws * num_cells).astype(jnp.int32)
        cells = jnp.where(respawned, cells, jnp.where(absent, ABSENT, state.objects))
        time = state.time + 1
        done = ended | (time >= horizon)
        state = State(agent, cells, time)
        state = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(reset_key), state)
        return (state, reward, done, done & ~ended) if truncation else (state, reward, done)

    def observe(state):
        cells = jnp.concatenate([state.objects, state.agent[None]])  # (O + 1,)
        padded = (cells // width + 1) * (width + 2) + cells % width + 1  # the same cells, numbered on the padded grid
        padded = jnp.where(cells == ABSENT, ABSENT, padded)
        planes = padded[:, None] == jnp.arange(math.prod(obs_shape[1:]))  # an absent object is on no cell
        return planes.reshape(obs_shape).astype(jnp.float32)

    return Env(reset, step, observe, obs_shape, len(MOVES), name)


def _move(cell, action, height, width):
    """The cell after an action. A move off the grid stays: also a diagonal one that leaves it on one side only."""
    move = jnp.array(MOVES, cell.dtype)[action]
    row, column = cell // width + move[0], cell % width + move[1]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside, row * width + column, cell)


def _check(world):
    """Raises ValueError for a world that makes no sense."""
    height, width, objects, horizon = world
    if not objects:
        raise ValueError(f"objects is {objects!r}; a gridworld needs at least one object")
    if min(height, width) < 1 or height * width <= len(objects):
        raise ValueError(f"a {height} x {width} grid is too small for an agent and {len(objects)} object(s)")
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}; it must be at least 1")
    for i, object_ in enumerate(map(Object._make, objects)):
        if not math.isfinite(object_.reward):
            raise ValueError(f"reward of object {i} is {object_.reward}; it must be finite")
        for field in ("end_prob", "respawn_prob"):
            if not 0 <= getattr(object_, field) <= 1:
                raise ValueError(f"{field} of object {i} is {getattr(object_, field)}; it must lie between 0 and 1")


class CatchState(NamedTuple):
    ball_row: jax.Array  # [] int32
    ball_column: jax.Array  # [] int32
    paddle: jax.Array  # [] int32 column, always in the last row


def _make_catch(reward_scale):
    """Catch: 10 x 5 board; the ball falls one row per step; at the last row +1 if the paddle is under it, else -1."""
    rows, columns = 10, 5
    reward_scale = jnp.asarray(reward_scale, float)

    def reset(key):
        zero = jnp.zeros((), jnp.int32)
        return CatchState(zero, jax.random.randint(key, (), 0, columns, jnp.int32), zero + columns // 2)

    def step(key, state, action):
        # Actions 0, 1, 2 move the paddle by -1, 0, +1; the board's edge stops it.
        paddle = jnp.clip(state.paddle + action - 1, 0, columns - 1).astype(jnp.int32)
        state = CatchState(state.ball_row + 1, state.ball_column, paddle)
        done = state.ball_row == rows - 1
        reward = reward_scale * jnp.where(state.ball_column == paddle, 1.0, -1.0) * done
        state = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(key), state)
        return state, reward, done

    def observe(state):
        row, column = jnp.arange(rows)[:, None], jnp.arange(columns)
        ball = (row == state.ball_row) & (column == state.ball_column)
        paddle = (row == rows - 1) & (column == state.paddle)
        return (ball | paddle).astype(jnp.float32)

    return Env(reset, step, observe, (rows, columns), 3, "catch")
