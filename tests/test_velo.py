"""VeLO's adapter: against a stand-in with the package's interface, and the real package and checkpoint where they are.

The stand-in tests only what is ours: paths, errors and the optax interface. It says nothing about VeLO's rule.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import velo

PACKAGE = ("learned_optimization", "learned_optimization.learned_optimizers", "learned_optimization.research")
MODULES = {"opt_from_checkpoint": PACKAGE[1], "pretrained_optimizers": f"{PACKAGE[2]}.general_lopt"}


class StandIn:
    """An optimizer with the package's methods: steps of loss * g * (1 - t / T), so that every argument shows."""

    def init(self, params, model_state=None, num_steps=None, key=None):
        return {"params": params, "t": jnp.zeros(()), "num_steps": num_steps}

    def update(self, state, grads, loss=None, model_state=None, key=None):
        scale = loss * (1 - state["t"] / state["num_steps"])
        params = jax.tree.map(lambda p, g: p - scale * g, state["params"], grads)
        return state | {"params": params, "t": state["t"] + 1}

    get_params = lambda self, state: state["params"]
    set_params = lambda self, state, params: state | {"params": params}


@pytest.fixture
def package(monkeypatch):
    """The stand-in's two modules, installed."""
    names = (*PACKAGE, f"{PACKAGE[2]}.general_lopt", *(f"{parent}.{name}" for name, parent in MODULES.items()))
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name, parent in MODULES.items():
        modules[name] = modules[f"{parent}.{name}"]
    modules["opt_from_checkpoint"].opt_from_checkpoint = lambda path: StandIn()
    setattr(modules["pretrained_optimizers"], velo.CHECKPOINT, StandIn)
    return modules


def test_it_is_an_optax_transformation_that_takes_the_loss(package):
    optimizer = optax.chain(optax.clip(1.0), velo.velo(num_steps=4))
    params = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    grads, state, update = jax.tree.map(lambda p: p + 0.5, params), optimizer.init(params), jax.jit(optimizer.update)
    for t in range(3):
        updates, state = update(grads, state, params, value=0.1)
        expected = jax.tree.map(lambda g: -0.1 * (1 - t / 4) * np.minimum(g, 1), grads)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), updates, expected
        )  # p + u - p in float32
        params = optax.apply_updates(params, updates)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2  # the parameters are not kept twice


@pytest.mark.parametrize("missing", [dict(params=jnp.ones(2)), dict(value=1.0)])
def test_a_missing_loss_or_parameter_is_named(package, missing):
    optimizer = velo.velo(num_steps=4)
    with pytest.raises(ValueError, match="value=loss"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), **missing)


def test_a_local_checkpoint_is_used_and_a_missing_file_named(package, tmp_path):
    asked = []
    package["opt_from_checkpoint"].opt_from_checkpoint = lambda path: asked.append(path) or StandIn()
    for missing in ("params", "config.gin"):
        with pytest.raises(FileNotFoundError, match=missing) as error:
            velo.velo(10, checkpoint=tmp_path / "params")
        assert velo.BUCKET in str(error.value) and "\n" not in str(error.value)
        (tmp_path / missing).write_text("")
    velo.velo(10, checkpoint=tmp_path / "params")
    assert asked == [str(tmp_path / "params")]


def test_an_unreachable_bucket_says_what_to_copy(package):
    def unreachable():
        raise FileNotFoundError(2, "No such file\nor directory", velo.BUCKET)

    setattr(package["pretrained_optimizers"], velo.CHECKPOINT, unreachable)
    with pytest.raises(FileNotFoundError, match="copy params and config.gin from gs://") as error:
        velo.velo(10)
    assert "\n" not in str(error.value)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "learned_optimization", None)
    with pytest.raises(ImportError, match="pip install git") as error:
        velo.velo(10)
    assert "\n" not in str(error.value)


def test_a_release_without_velo_says_how_to_get_one_that_has_it(package, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("learned_optimization.research"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(package["learned_optimization"], "research")
    with pytest.raises(ImportError, match="research.*pip install git"):
        velo.velo(10)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        velo.velo(0)


def test_the_real_velo_lowers_a_loss():
    pytest.importorskip("learned_optimization.research.general_lopt.pretrained_optimizers")
    try:
        optimizer = velo.velo(num_steps=100)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    loss, params = lambda w: jnp.sum((w - 3) ** 2), jnp.zeros((4, 4))
    state = optimizer.init(params)
    for _ in range(100):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        params = params + updates
    assert loss(params) < 0.5 * loss(jnp.zeros((4, 4)))
