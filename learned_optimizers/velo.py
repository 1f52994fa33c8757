"""VeLO (Metz et al. 2022): a learned optimizer pre-trained for 4,000 TPU-months, as an optax transformation.

Nothing of VeLO is reimplemented here: rule and weights come from the public package learned_optimization, of which the
release on PyPI (0.0.1) holds no VeLO. Install it, and TensorFlow, from its repository (INSTALL below);
the checkpoint is read from Google Cloud Storage, or from a copy: the files params and config.gin in a folder.

| symbol | here | shape |
|---|---|---|
| T | num_steps: updates of the whole training; VeLO plans its step sizes for them | |
| loss | value, an extra argument of update: VeLO watches the loss | [] |

Example:
    import jax, optax, velo
    try:
        optimizer = velo.velo(num_steps=1000)
    except (ImportError, FileNotFoundError) as error:
        print(error)                                                                   # how to get it
    else:
        params = {"w": jax.numpy.ones((2, 3))}
        updates, opt_state = optimizer.update(params, optimizer.init(params), params, value=1.0)

Deviations: the agents of a2c.py and ppo.py do not hand their loss to the optimizer, so evaluate.py cannot run VeLO.
Copy this file: needs jax, optax; when called, learned_optimization.
"""

import pathlib

import jax
import optax

INSTALL = "pip install git+https://github.com/google/learned_optimization"
CHECKPOINT = "aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620"
BUCKET = f"gs://gresearch/learned_optimization/pretrained_lopts/{CHECKPOINT}"


def velo(num_steps, checkpoint=None):
    """VeLO as an optax transformation of any pytree.

    Args:
        num_steps: updates of the whole training.
        checkpoint: path of a local copy of the file params, with config.gin beside it; None: the published one.
    Returns:
        optax.GradientTransformationExtraArgs: update(grads, opt_state, params, value=loss).
    Raises:
        ImportError: no learned_optimization with VeLO here.
        FileNotFoundError: no such checkpoint.
        ValueError: num_steps below 1; from update: params or value missing.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    opt = _load(checkpoint)

    def init_fn(params):
        # The state holds the parameters; optax hands them to every update, so they are left out between updates.
        return opt.set_params(opt.init(params, num_steps=num_steps, key=jax.random.PRNGKey(0)), ())

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        if params is None or value is None:
            raise ValueError("VeLO sees parameters and loss: call update(grads, opt_state, params, value=loss)")
        state = opt.set_params(state, params)
        state = opt.update(state, updates, loss=value, key=jax.random.PRNGKey(0))  # its rule draws nothing
        updates = jax.tree.map(lambda new, old: new - old, opt.get_params(state), params)
        return updates, opt.set_params(state, ())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _load(checkpoint):
    """The pre-trained optimizer of learned_optimization."""
    if checkpoint is not None:
        for path in (pathlib.Path(checkpoint), pathlib.Path(checkpoint).parent / "config.gin"):
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}; copy params and config.gin from {BUCKET}/")
    try:
        from learned_optimization.learned_optimizers import opt_from_checkpoint
        from learned_optimization.research.general_lopt import pretrained_optimizers
    except (ImportError, AttributeError) as error:  # AttributeError: a release of jax that the package does not know
        raise ImportError(f"no VeLO here ({_one_line(error)}); to get it: {INSTALL}") from None
    try:
        if checkpoint is not None:
            return opt_from_checkpoint.opt_from_checkpoint(str(checkpoint))
        return getattr(pretrained_optimizers, CHECKPOINT)()
    except OSError as error:  # also the errors of a file system that is not there
        remedy = f"copy params and config.gin from {BUCKET}/ and pass checkpoint"
        raise FileNotFoundError(f"cannot read VeLO's checkpoint ({_one_line(error)}); {remedy}") from None


def _one_line(error):
    return " ".join(str(error).split())
