"""Checkpoints of a run: written whole or not at all, checked when read, usable on any number of devices.

A checkpoint is a folder named after its meta-step, written beside its final name and renamed when complete, so that a process
killed at any moment leaves the one before. With the state it keeps a fingerprint, a number for each array, which a truncated
or edited file does not match. On several hosts every process writes its own units into one shared folder.
"""

import contextlib
import logging
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from harness import runs

KEPT = 3
for name in ("absl", "asyncio"):  # orbax logs the errors that it raises, at length, and asyncio those of dropped writes
    logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def manager(folder, how_to_resume=""):
    """Within it, the orbax manager of a folder's checkpoints; the folder is made if there is none.

    A full disk, or another process that is lost, ends the program in one line that says how to continue.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
        try:
            yield manager
            return
        except OSError as error:
            what = f"cannot write to {folder.parent} ({error})"
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            what = f"another process of this run was lost ({_first_line(error)})"
        last = manager.latest_step()
        saved = "nothing was saved before" if last is None else f"meta-step {last} is saved; {how_to_resume}"
        print(f"{what}; {saved}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # at once: an ordinary end would wait for the lost process, and for writes that cannot be done


def save(manager, step, state):
    """Writes the state as the checkpoint of a meta-step, unless it is there already. Raises OSError: it could not be written."""
    if step in manager.all_steps():
        return
    checksums = ocp.args.JsonSave(fingerprint(state).tolist())
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), fingerprint=checksums)
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None  # each write dropped in a failure would complain
    try:
        manager.save(step, args=items)
        sys.unraisablehook = before
    except jax.errors.JaxRuntimeError:  # another process is lost
        raise
    except Exception as error:  # a full disk is a ValueError to orbax, deep in whose message stands the reason
        reason = re.search(r": ([^:]+) \[os_error_code", str(error))
        raise OSError(reason[1] if reason else _first_line(error)) from None


def restore(manager, start, finished=False):
    """The state of the newest checkpoint, or `start` where none was ever written.

    Args:
        manager: of the function manager.
        start: a state of the same shapes, and of the shardings that the restored arrays shall have.
        finished: whether the run has written its weights, which it does together with a checkpoint.
    Raises:
        runs.UsageError: the newest checkpoint is not what was written, or is gone; the message names the newest whole one.
    """
    items = ocp.args.Composite(state=ocp.args.StandardRestore(start), fingerprint=ocp.args.JsonRestore())
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        folder = manager.directory / str(step)
        try:
            saved = manager.restore(step, args=items)
            if fingerprint(saved.state).tolist() != saved.fingerprint:
                raise ValueError("its content is not what was saved")
        except Exception as error:  # whatever a broken file makes its reader raise
            damaged.append(f"{folder} ({_first_line(error)})")
            continue
        if not damaged:
            return saved.state
        raise runs.UsageError(f"damaged: {', '.join(damaged)}; remove it to go on from {folder}, which is whole")
    if damaged:
        raise runs.UsageError(f"damaged: {', '.join(damaged)}; no checkpoint is whole, so the run cannot go on")
    if finished:
        raise runs.UsageError(
            f"{manager.directory} has no checkpoint, but its run has weights; start another one with --out"
        )
    return start


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def fingerprint(tree):
    """A checksum of every leaf, [L] uint32: the sum of bits_i (2 i + 1) modulo 2^32, equal on any number of devices.

    Any change to a single number changes it, since odd factors have inverses modulo 2^32.
    """
    leaves = jax.tree.leaves(tree)
    everywhere = getattr(leaves[0].sharding, "mesh", None) and jax.NamedSharding(leaves[0].sharding.mesh, jax.P())
    return np.asarray(jax.jit(lambda xs: jnp.stack([_checksum(x) for x in xs]), out_shardings=everywhere)(leaves))


def _checksum(x):
    if x.dtype.itemsize == 8:  # 64 bits as two times 32, in a last axis
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    factors = 2 * jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) + 1
    return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)
