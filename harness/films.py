"""Films of robots: one HTML file each, that opens in any browser without a network.

Brax's own viewer fetches its 3D library from the web when it is opened. Its robots are made of spheres and capsules only, and
seen from far away (an orthographic projection) these are disks and thick lines: a 2D canvas draws them exactly.

| symbol | here | shape |
|---|---|---|
| T, L, G | steps of the episode; bodies of the robot; its spheres and capsules | |
| pos, rot | where each body is, and its orientation as a quaternion (w, x, y, z) | [T, L, 3], [T, L, 4] |
| points | ends of the axis of a capsule; twice the centre of a sphere | [T, G, 2, 3] |
"""

import html
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import brax_env
import ppo

PLANE, SPHERE, CAPSULE = 0, 2, 3  # MuJoCo's numbers
EPISODE_LENGTH = 1000


def film(name, params, obs_stats, key, title, backend="spring"):
    """One episode of a robot that acts without noise.

    Args:
        name: robot, one of brax_env.NAMES.
        params, obs_stats: of its ppo agent, or from kept.load_policy.
        key: draws the first state.
        title: line of text above the picture.
        backend: physics, as in brax_env.make.
    Returns:
        an HTML document.
    """
    system = brax_env.load_robot(name, backend)
    pos, rot, rewards = play(brax_env.make(name, EPISODE_LENGTH, backend=backend), params, obs_stats, key)
    geoms = [i for i in range(system.sys.ngeom) if system.sys.geom_type[i] in (SPHERE, CAPSULE)]
    floors = [float(system.sys.geom_pos[i][2]) for i in range(system.sys.ngeom) if system.sys.geom_type[i] == PLANE]
    points = axis_points(system.sys, geoms, pos, rot)
    moving = np.array([system.sys.geom_bodyid[i] > 0 for i in geoms])
    scene = camera(points[:, moving], points[:1]) | {
        "dt": float(system.dt),
        "floor": floors[0] if floors else None,
        "radius": [float(system.sys.geom_size[i][0]) for i in geoms],
        "color": [color(system.sys.mj_model.geom_rgba[i]) for i in geoms],
        "points": np.round(points * 1e4).astype(int).reshape(len(points), -1).tolist(),  # tenths of a millimetre
        "returns": [round(float(x), 1) for x in np.cumsum(rewards)],
    }
    data = json.dumps(scene, separators=(",", ":"))
    return _PAGE.replace("$TITLE", html.escape(title)).replace("$DATA", data)


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
    points = []
    for i in geoms:
        half = float(sys.geom_size[i][1]) if sys.geom_type[i] == CAPSULE else 0.0
        ends = np.array([[0.0, 0.0, -half], [0.0, 0.0, half]])  # a capsule lies along its own z axis
        ends = rotate(ends, np.asarray(sys.geom_quat[i])) + np.asarray(sys.geom_pos[i])  # in its body's frame
        body = sys.geom_bodyid[i] - 1  # body 0 is the world, which stands still
        if body >= 0:
            points.append(rotate(ends[None], rot[:, None, body]) + pos[:, None, body])
        else:
            points.append(np.broadcast_to(ends, (len(pos), 2, 3)))
    # A diverged policy may throw its robot out of the numbers.
    return np.clip(np.nan_to_num(np.stack(points, axis=1)), -1e4, 1e4)


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


def color(rgba):
    return f"rgb({','.join(str(round(255 * float(x))) for x in rgba[:3])})"


_PAGE = """<!DOCTYPE html>
<meta charset="utf-8"><title>$TITLE</title>
<style>
body { font: 15px sans-serif; margin: 1em auto; max-width: 960px; color: #333 }
canvas { width: 100%; background: #f4f6f8; border-radius: 6px; touch-action: none; cursor: grab }
#bar { display: flex; gap: 1em; align-items: center } #time { flex: 1 } button { width: 5em }
</style>
<p>$TITLE</p>
<canvas id="canvas" width="1920" height="1080"></canvas>
<div id="bar"><button id="play">pause</button><input id="time" type="range" min="0" value="0">
<select id="speed"><option value="0.25">0.25 x</option><option value="1" selected>1 x</option><option value="4">4 x</option></select>
<span id="text"></span></div>
<p>Drag to turn, wheel to zoom.</p>
<script>
const scene = $DATA
const byId = id => document.getElementById(id), canvas = byId("canvas"), context = canvas.getContext("2d")
const steps = scene.points.length, slider = byId("time")
let time = 0, playing = true, before = null, azimuth = 0.3, elevation = scene.elevation, zoom = 1
slider.max = steps - 1

function view(center) {  // orthographic: world [x, y, z] -> [right, down, depth] in pixels
  const [ca, sa, ce, se] = [Math.cos(azimuth), Math.sin(azimuth), Math.cos(elevation), Math.sin(elevation)]
  const scale = zoom * 0.42 * canvas.height / scene.size
  const project = ([x, y, z]) => {
    x -= center[0]; y -= center[1]; z -= center[2]
    return [canvas.width / 2 + scale * (ca * x + sa * y), canvas.height / 2 - scale * (-sa * se * x + ca * se * y + ce * z),
            scale * (-sa * ce * x + ca * ce * y - se * z)]
  }
  return [project, scale]
}

function line(a, b, width, style) {
  context.strokeStyle = style; context.lineWidth = width; context.lineCap = "round"
  context.beginPath(); context.moveTo(a[0], a[1]); context.lineTo(b[0] + 1e-3, b[1]); context.stroke()
}

function drawFloor(project, center) {
  const cell = Math.pow(2, Math.round(Math.log2(scene.size / zoom / 2))), n = 14
  const [x0, y0] = [Math.round(center[0] / cell) * cell, Math.round(center[1] / cell) * cell]
  for (let i = -n; i <= n; i++) {
    line(project([x0 + i * cell, y0 - n * cell, scene.floor]), project([x0 + i * cell, y0 + n * cell, scene.floor]), 2, "#dde3e8")
    line(project([x0 - n * cell, y0 + i * cell, scene.floor]), project([x0 + n * cell, y0 + i * cell, scene.floor]), 2, "#dde3e8")
  }
}

function draw() {
  const step = Math.min(steps - 1, Math.floor(time / scene.dt)), center = scene.center[step], numbers = scene.points[step]
  const [project, scale] = view(center), point = k => [0, 1, 2].map(i => numbers[3 * k + i] / 1e4)
  context.clearRect(0, 0, canvas.width, canvas.height)
  const shapes = scene.radius.map((radius, g) => [point(2 * g), point(2 * g + 1), 2 * radius * scale, scene.color[g]])
  if (scene.floor !== null) {
    drawFloor(project, center)
    const shadow = p => project([p[0], p[1], scene.floor])
    for (const [a, b, width] of shapes) line(shadow(a), shadow(b), 0.8 * width, "#ccd3d9")
  }
  const seen = shapes.map(([a, b, ...rest]) => [project(a), project(b), ...rest])
  seen.sort((s, t) => t[0][2] + t[1][2] - s[0][2] - s[1][2])  // the farthest first
  for (const [a, b, width, color] of seen) {
    line(a, b, width + 3, "rgba(0,0,0,0.45)"); line(a, b, width, color)
    const up = ([x, y]) => [x - 0.12 * width, y - 0.18 * width]
    line(up(a), up(b), 0.3 * width, "rgba(255,255,255,0.25)")
  }
  slider.value = step
  byId("text").textContent = `${(step * scene.dt).toFixed(1)} s, step ${step + 1} of ${steps}, return ${scene.returns[step]}`
}

function frame(now) {
  if (playing && before !== null) time = (time + (now - before) / 1000 * byId("speed").value) % (steps * scene.dt)
  before = now; draw(); requestAnimationFrame(frame)
}
byId("play").onclick = () => { playing = !playing; byId("play").textContent = playing ? "pause" : "play" }
slider.oninput = () => { time = (+slider.value + 0.5) * scene.dt; if (playing) byId("play").onclick() }
canvas.onpointermove = event => {
  if (event.buttons) { azimuth -= event.movementX / 200; elevation = Math.max(0, Math.min(1.57, elevation + event.movementY / 200)) }
}
canvas.onwheel = event => { event.preventDefault(); zoom *= Math.exp(-event.deltaY / 500) }
requestAnimationFrame(frame)
</script>
"""
