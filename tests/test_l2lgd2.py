"""L2LGD2 against golden numbers of the reference, a NumPy transcription and SGD."""

import guests
import jax
import numpy as np

from learned_optimizers import l2lgd2
from learned_optimizers.l2lgd2 import L2LGD2

GOLDEN = {"rtol": 1e-5, "atol": 1e-6}  # two float32 programs that add in different order


def test_updates_and_hidden_state_are_those_of_the_reference(golden, golden_weights):
    guests.check_golden_updates(l2lgd2, L2LGD2, "L2LGD2", golden, golden_weights, GOLDEN)


def test_truncated_meta_gradient_is_that_of_the_reference(golden, golden_weights):
    guests.check_golden_meta_gradient(l2lgd2, L2LGD2, "L2LGD2", golden, golden_weights, GOLDEN)


def test_rule_is_the_equations_of_the_paper_in_numpy():
    with jax.enable_x64(True):
        meta_params = guests.random_meta_params(L2LGD2, 1, np.float64)
        grads = guests.random_grads(2, 5, 12)
        updates, _ = guests.unroll(L2LGD2.make(0.01, meta_params), grads, np.zeros(12))
    for i in range(12):
        h = np.zeros(8)
        for t in range(5):
            g = grads[t, i]
            log = np.log(abs(g) + 1e-8) / 10
            h, o = guests.numpy_gru(meta_params, h, np.array([log, np.sign(g)] if log >= -1 else [-1, np.exp(10) * g]))
            delta = -np.exp(o[0]) * g
            np.testing.assert_allclose(updates[t, i], 0.01 * delta, rtol=1e-10, atol=1e-12)  # rounding in float64


def test_the_untrained_rule_is_exactly_sgd():
    grads = guests.random_grads(3, 4, 50).astype(np.float32)
    optimizer = L2LGD2.make(0.03, L2LGD2.init(jax.random.key(1)))
    updates, _ = guests.unroll(optimizer, grads, np.zeros(50, np.float32))
    np.testing.assert_array_equal(updates, -np.float32(0.03) * grads)


def test_the_header_counts_the_meta_parameters():
    assert sum(x.size for x in L2LGD2.init(jax.random.key(0)).values()) == 281
    assert "281 numbers" in l2lgd2.__doc__
