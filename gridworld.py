"""The tasks of meta-training: eight gridworlds and Catch, as pure functions of one environment (paper: appendix).

A gridworld is a walled grid with an agent and a few objects. Walking onto an object collects it: its reward is paid, it
disappears, and the episode may end. Absent objects come back, each with its own probability a step, on a random cell.

| symbol | here | shape |
|---|---|---|
| grid | height x width cells inside the wall, numbered row by row: cell = row * width + column | |
| state | State: agent's cell, objects' cells (ABSENT where collected), step count | [], [O], [] |
| action | 0 stay; 1-8 the neighbours; a move into the wall (a diagonal one too) leaves the agent in place | [] |
| obs | one binary plane per object, then the agent's, wall included | [O + 1, height + 2, width + 2] |

Order of a step: move; collect every object on the agent's cell; respawn; end the episode at the horizon; restart if ended.

Example:
    import jax, gridworld
    env = gridworld.make("small_dense_long")
    keys = jax.random.split(jax.random.key(0), 512)
    states = jax.vmap(env.reset)(keys)                                           # 512 worlds side by side
    actions = jax.random.randint(keys[0], (512,), 0, env.num_actions)
    states, rewards, dones = jax.vmap(env.step)(keys, states, actions)           # (512,) each
    obs = jax.vmap(env.observe)(states)                                          # (512, 3, 8, 6)

NOTE: as in the reference implementation, a respawning object may land on any cell inside the wall, an occupied one too.
Copy this file: needs jax.
"""

import math
from typing import Callable, NamedTuple

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


class World(NamedTuple):
    """What defines a gridworld. An object is (reward, probability to end the episode, respawn probability per step)."""

    height: int
    width: int
    objects: tuple
    horizon: int


class State(NamedTuple):
    agent: jax.Array  # [] int32 cell
    objects: jax.Array  # [O] int32 cells
    time: jax.Array  # [] int32 steps since the episode began


SPARSE, DENSE = 0.05, 0.5  # respawn probabilities


def _objects(pairs, respawn):
    return ((1.0, 0.0, respawn),) * pairs + ((-1.0, 0.5, respawn),) * pairs


GRIDWORLDS = {
    "small_sparse_short": World(3, 8, _objects(1, SPARSE), 50),
    "small_sparse_long": World(8, 3, _objects(1, SPARSE), 500),
    "small_dense_short": World(4, 6, _objects(1, DENSE), 50),
    "small_dense_long": World(6, 4, _objects(1, DENSE), 500),
    "big_sparse_short": World(10, 12, _objects(2, SPARSE), 50),
    "big_sparse_long": World(12, 10, _objects(2, SPARSE), 500),
    "big_dense_short": World(9, 13, _objects(2, DENSE), 50),
    "big_dense_long": World(13, 9, _objects(2, DENSE), 500),
}
NAMES = (*GRIDWORLDS, "catch")


def make(name, reward_scale=1.0):
    """The task of that name.

    Args:
        name: one of NAMES.
        reward_scale: factor on every reward (the paper scales rewards in meta-training only).
    Returns:
        Env
    Raises:
        ValueError: unknown name.
    """
    if name == "catch":
        return _make_catch(reward_scale)
    if name not in GRIDWORLDS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(NAMES)}")
    return make_gridworld(GRIDWORLDS[name], reward_scale, name)


def make_gridworld(world, reward_scale=1.0, name="gridworld"):
    """Any World as an Env: for grids and objects of your own."""
    height, width, objects, horizon = world
    object_rewards, end_probs, respawn_probs = map(jnp.array, zip(*objects))  # (O,) each
    num_objects, num_cells = len(objects), height * width
    obs_shape = (num_objects + 1, height + 2, width + 2)
    if num_cells <= num_objects:
        raise ValueError(f"a {height} x {width} grid is too small for an agent and {num_objects} objects")

    def reset(key):
        # Distinct cells: the i-th is drawn among the num_cells - i that are left, then counted past those taken.
        draws = jax.random.uniform(key, (num_objects + 1,))
        cells = []
        for i, draw in enumerate(draws):
            cell = (draw * (num_cells - i)).astype(jnp.int32)
            for taken in _sorted(cells):
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
        return state, reward, done

    def observe(state):
        cells = jnp.concatenate([state.objects, state.agent[None]])  # (O + 1,)
        with_wall = (cells // width + 1) * (width + 2) + cells % width + 1  # the same cells, the wall's counted too
        with_wall = jnp.where(cells == ABSENT, ABSENT, with_wall)
        planes = with_wall[:, None] == jnp.arange(math.prod(obs_shape[1:]))  # an absent object is on no cell
        return planes.reshape(obs_shape).astype(jnp.float32)

    return Env(reset, step, observe, obs_shape, len(MOVES), name)


def _move(cell, action, height, width):
    """The cell after an action. Blocked moves stay: also a diagonal one that only one wall blocks."""
    move = jnp.array(MOVES)[action]
    row, column = cell // width + move[0], cell % width + move[1]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside, row * width + column, cell)


def _sorted(cells):
    return jnp.sort(jnp.stack(cells)) if cells else ()


class CatchState(NamedTuple):
    ball_row: jax.Array  # [] int32
    ball_column: jax.Array  # [] int32
    paddle: jax.Array  # [] int32 column, always in the last row


def _make_catch(reward_scale):
    """Catch: 10 x 5 board; the ball falls a row a step; at the last row +1 if the paddle is under it, else -1."""
    rows, columns = 10, 5

    def reset(key):
        zero = jnp.zeros((), jnp.int32)
        return CatchState(zero, jax.random.randint(key, (), 0, columns), zero + columns // 2)

    def step(key, state, action):
        # Actions 0, 1, 2 move the paddle by -1, 0, +1; the board's edge stops it.
        paddle = jnp.clip(state.paddle + action - 1, 0, columns - 1)
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
