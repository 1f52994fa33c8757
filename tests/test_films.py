"""films.py against Brax's own transforms, and its page without a network."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brax import math
from brax.base import Transform

import brax_env
import ppo
from harness import films


@pytest.fixture(scope="module")
def agent():
    config = ppo.Config(num_envs=2, batch_size=2, num_minibatches=1)
    learner = ppo.make(brax_env.make("inverted_pendulum"), config)
    return jax.jit(lambda key: learner.init(key, optax.sgd(0.0)))(jax.random.key(0))


@pytest.fixture(scope="module")
def page(agent):
    return films.film("inverted_pendulum", agent.params, agent.obs_stats, jax.random.key(1), "a <title>")


def scene_of(page):
    return json.loads(re.search(r"^const scene = (.*)$", page, re.M)[1])


def test_rotations_agree_with_braxs():
    v, q = jax.random.normal(jax.random.key(0), (20, 3)), jax.random.normal(jax.random.key(1), (20, 4))
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    theirs = jax.vmap(math.rotate)(v, q)
    np.testing.assert_allclose(films.rotate(np.asarray(v), np.asarray(q)), theirs, rtol=1e-5, atol=1e-5)


def test_points_of_every_robot_are_those_of_braxs_transforms():
    for name in set(brax_env.NAMES) - {"humanoidstandup"}:  # the same robot as humanoid
        sys = brax_env.load_robot(name, "spring").sys
        assert set(np.asarray(sys.geom_type).tolist()) <= {films.PLANE, films.SPHERE, films.CAPSULE}
        keys = jax.random.split(jax.random.key(0))
        links = len(sys.link_names)
        pos, rot = jax.random.normal(keys[0], (1, links, 3)), jax.random.normal(keys[1], (1, links, 4))
        rot = rot / jnp.linalg.norm(rot, axis=-1, keepdims=True)
        geoms = [i for i in range(sys.ngeom) if sys.geom_type[i] != films.PLANE]
        ours = films.axis_points(sys, geoms, np.asarray(pos), np.asarray(rot))
        for i, ends in zip(geoms, ours[0]):
            body, half = sys.geom_bodyid[i] - 1, sys.geom_size[i][1] * (sys.geom_type[i] == films.CAPSULE)
            frame = Transform(jnp.asarray(sys.geom_pos[i]), jnp.asarray(sys.geom_quat[i]))
            frame = frame if body < 0 else Transform(pos[0, body], rot[0, body]).do(frame)
            for end, z in zip(ends, (-half, half)):
                theirs = frame.do(Transform.create(pos=jnp.array([0.0, 0.0, z]))).pos
                np.testing.assert_allclose(end, theirs, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_film_is_one_episode_without_noise(agent, page):
    scene, env, key = scene_of(page), brax_env.make("inverted_pendulum"), jax.random.key(1)
    reset_key, _ = jax.random.split(key)
    state, step, returns, done = env.reset(reset_key), jax.jit(env.step), 0.0, False
    while not done:
        loc, _ = ppo.policy(agent.params, ppo.normalize(env.observe(state), agent.obs_stats))
        state, reward, done, _ = step(key, state, jnp.tanh(loc))
        returns += float(reward)
    assert len(scene["points"]) == len(scene["returns"]) == len(scene["center"]) == round(returns)  # one per step
    assert scene["returns"][-1] == returns and len(scene["points"][0]) == 6 * len(scene["radius"])
    assert scene["dt"] == 0.02 and scene["floor"] is None


def test_a_diverged_policy_can_be_filmed(agent):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), agent.params)
    page = films.film("inverted_pendulum", params, agent.obs_stats, jax.random.key(1), "diverged")
    assert np.isfinite(scene_of(page)["points"]).all()


def test_the_page_needs_no_network_and_its_title_is_text(page):
    assert not re.search(r"https?:|//cdn|<link|<script[^>]+src|import\s|fetch\(|url\(", page)
    assert "a &lt;title&gt;" in page and "<title>a <title>" not in page


def test_the_camera_follows_who_walks_away_and_looks_down_on_who_stays_flat():
    body = np.random.default_rng(0).uniform(size=(1, 4, 2, 3))
    walk = np.linspace(0, 30, 50)[:, None, None, None] * np.array([1.0, 0.0, 0.0])
    walking = films.camera(body + walk, body)
    np.testing.assert_allclose(np.diff(np.array(walking["center"])[:, 0]).sum(), 30, atol=0.01)
    standing = films.camera(np.repeat(body, 50, axis=0), body)
    assert len(set(map(tuple, standing["center"]))) == 1
    flat = films.camera(np.repeat(body, 50, axis=0) * [1.0, 1.0, 0.01], body)
    assert flat["elevation"] > 1 > standing["elevation"]
