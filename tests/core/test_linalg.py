"""Inverses of stacked small matrices against LAPACK's, one matrix at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moresjax.core.linalg import inverse, inverse_cholesky


def skewed(size: int, scale: float):
    """Identity plus skew-symmetric matrices, as rotations have them."""
    x = scale * np.random.default_rng(0).standard_normal((3, size, size)).astype(np.float32)
    return jnp.asarray(np.eye(size, dtype=np.float32) + x - x.swapaxes(1, 2))


def gram(size: int):
    x = np.random.default_rng(0).standard_normal((3, 4 * size, size)).astype(np.float32)
    return jnp.asarray(x.swapaxes(1, 2) @ x / (4 * size))


def one_by_one(function):
    return lambda stacked: jnp.stack([function(x) for x in stacked])


def lapack_inverse_cholesky(x):
    return jnp.linalg.inv(jnp.linalg.cholesky(x))


CASES = {
    "1 x 1": (inverse, jnp.linalg.inv, skewed(1, 1.0)),
    "small": (inverse, jnp.linalg.inv, skewed(6, 0.1)),
    "large and far from the identity": (inverse, jnp.linalg.inv, skewed(48, 1.0)),
    "Cholesky, 1 x 1": (inverse_cholesky, lapack_inverse_cholesky, gram(1)),
    "Cholesky": (inverse_cholesky, lapack_inverse_cholesky, gram(7)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_lapacks(case):
    ours, theirs, matrices = CASES[case]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(matrices.shape), jnp.float32)

    def total(function):
        return jax.value_and_grad(lambda x: (function(x) * weights).sum())(matrices)

    np.testing.assert_allclose(ours(matrices), one_by_one(theirs)(matrices), atol=2e-6, rtol=1e-5)
    (_, got), (_, wanted) = total(ours), total(one_by_one(theirs))
    if theirs is lapack_inverse_cholesky:  # which looks at one half only
        got, wanted = (jnp.tril(x + x.mT) for x in (got, wanted))
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-4)
