"""The product with a kernel: its gradients are those of einsum, and none is taken transposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.models.product import product


def gradients(multiply, x, kernel):
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(multiply(x, kernel))), (0, 1))(x, kernel)


@pytest.mark.parametrize(
    ("contracted", "sizes", "einsum"),
    [(1, ((2, 3, 4), (4, 5, 6)), "bsd,dhn->bshn"), (2, ((2, 3, 5, 6), (5, 6, 4)), "bshn,hnd->bsd")],
)
def test_gradients_are_those_of_einsum(contracted, sizes, einsum):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(np.float32) for size in sizes]
    ours = gradients(lambda *arrays: product(contracted, *arrays), *arrays)
    theirs = gradients(lambda *arrays: jnp.einsum(einsum, *arrays), *arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_the_gradient_of_the_kernel_is_not_transposed():
    def program(multiply):
        x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
        return str(jax.make_jaxpr(lambda x, kernel: gradients(multiply, x, kernel)[1])(x, kernel))

    assert "transpose" in program(lambda x, kernel: jnp.tensordot(x, kernel, 1))
    assert "transpose" not in program(lambda x, kernel: product(1, x, kernel))
