"""Films of robots: one HTML file each, that opens in any browser without a network.

Brax's own viewer fetches its 3D library from the web when it is opened. Its robots are made of spheres and capsules only, and
seen from far away (an orthographic projection) these are disks and thick lines: the 2D canvas of film.html draws them exactly.

| symbol | here | shape |
|---|---|---|
| T, L, G | steps of the episode; bodies of the robot; its spheres and capsules | |
| pos, rot | where each body is, and its orientation as a quaternion (w, x, y, z) | [T, L, 3], [T, L, 4] |
| points | ends of the axis of a capsule; twice the centre of a sphere | [T, G, 2, 3] |
"""

import html
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np

import brax_env
import ppo

PLANE, SPHERE, CAPSULE = 0, 2, 3  # MuJoCo's numbers
EPISODE_LENGTH = 1000


def film(name, params, obs_stats, key, title):
    """One episode of a robot that acts without noise.

    Args:
        name: robot, one of brax_env.NAMES.
        params, obs_stats: of its ppo agent, or from kept.load_policy.
        key: draws the first state.
        title: line of text above the picture.
    Returns:
        an HTML document.
    """
    system = brax_env.load_robot(name)
    pos, rot, rewards = play(brax_env.make(name, EPISODE_LENGTH), params, obs_stats, key)
    geoms = [i for i in range(system.sys.ngeom) if system.sys.geom_type[i] in (SPHERE, CAPSULE)]
    floors = [float(system.sys.geom_pos[i][2]) for i in range(system.sys.ngeom) if system.sys.geom_type[i] == PLANE]
    points = axis_points(system.sys, geoms, pos, rot)
    moving = np.array([system.sys.geom_bodyid[i] > 0 for i in geoms])
    scene = camera(points[:, moving], points[:1]) | {
        "dt": float(system.dt),
        "floor": floors[0] if floors else None,
        "radius": [float(system.sys.geom_size[i][0]) for i in geoms],
        "color": [matplotlib.colors.to_hex(system.sys.mj_model.geom_rgba[i]) for i in geoms],
        "points": np.round(points * 1e4).astype(int).reshape(len(points), -1).tolist(),  # tenths of a millimetre
        "returns": [round(float(x), 1) for x in np.cumsum(rewards)],
    }
    data = json.dumps(scene, separators=(",", ":"))
    page = (pathlib.Path(__file__).parent / "film.html").read_text()
    return page.replace("$TITLE", html.escape(title)).replace("$DATA", data)


@partial(jax.jit, static_argnums=0)
def _play(env, params, obs_stats, key):
    def step(state, key):
        loc, _ = ppo.policy(params, ppo.normalize(env.observe(state), obs_stats))
        next_state, reward, done, _ = env.step(key, state, jnp.tanh(loc))
        return next_state, (state.physics.x.pos, state.physics.x.rot, reward, done)

    reset_key, key = jax.random.split(key)
    return jax.lax.scan(step, env.reset(reset_key), jax.random.split(key, EPISODE_LENGTH))[1]


def play(env, params, obs_stats, key):
    """One episode without noise, a = tanh(loc), until it ends: (pos [T, L, 3], rot [T, L, 4], rewards [T])."""
    pos, rot, rewards, done = map(np.asarray, _play(env, params, obs_stats, key))
    length = int(np.argmax(done)) + 1 if done.any() else len(done)
    return pos[:length], rot[:length], rewards[:length]


def axis_points(sys, geoms, pos, rot):
    """The points of the given geoms in the world's frame: [T, G, 2, 3]."""
    kind, size, at, turned, body = map(
        np.asarray, (sys.geom_type, sys.geom_size, sys.geom_pos, sys.geom_quat, sys.geom_bodyid)
    )
    half = np.where(kind[geoms] == CAPSULE, size[geoms, 1], 0.0)
    ends = half[:, None, None] * np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])  # a capsule lies along its own z axis
    ends = rotate(ends, turned[geoms, None]) + at[geoms, None]  # in its body's frame
    # Body 0 is the world, which stands still: zeros behind the others, where its index 0 - 1 finds them.
    pos, rot = (np.pad(x, ((0, 0), (0, 1), (0, 0)))[:, body[geoms] - 1, None] for x in (pos, rot))
    # A diverged policy may throw its robot out of the numbers.
    return np.clip(np.nan_to_num(rotate(ends, rot) + pos), -1e4, 1e4)


def rotate(v, q):
    """Vectors [..., 3] rotated by unit quaternions [..., 4]: v + 2 u x (u x v + w v), where q = (w, u)."""
    w, u = q[..., :1], q[..., 1:]
    return v + 2 * np.cross(u, np.cross(u, v) + w * v)


def camera(moving, first):
    """Where to look: follows a robot that walks away, looks down on one that moves in the plane of the floor.

    Args:
        moving: [T, G', 2, 3] points of the moving bodies.
        first: [1, G, 2, 3] all points of the first step.
    """
    center = moving.mean((1, 2))  # [T, 3]
    size = float(np.abs(moving - center[:, None, None]).max())
    follows = bool(np.ptp(center[:, :2], axis=0).max() > 3 * size)
    if not follows:
        everything = np.concatenate([moving.reshape(-1, 3), first.reshape(-1, 3)])
        middle = (everything.min(0) + everything.max(0)) / 2
        center, size = np.broadcast_to(middle, center.shape), float(np.ptp(everything, axis=0).max() / 2)
    flat = np.ptp(moving[..., 2]) < 0.1 * size
    return {"center": np.round(center, 3).tolist(), "size": max(size, 1e-3), "elevation": 1.2 if flat else 0.2}
