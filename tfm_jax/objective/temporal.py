"""Temporal-aware flow matching (TFM): a path that couples the motion of neighbouring frames, and its loss.

Each video is treated on its own. Its F frames are vectors: s_i is clean frame i, and n_i is the noise of frame i. The
noise level sigma is 1 for pure noise and 0 for the clean video, and unit(z) is z / |z|.

    D_i = |s_i - n_i|             length of the straight line on which frame i moves from n_i to s_i
    a_i = unit(s_i - n_i)         its direction
    q_i in 0..D_i                 distance that frame i still has to move
    x_i = s_i - q_i a_i           position of frame i
    phi_i(x) = rho q_i + |x_i - x_{i-1}| + |x_i - x_{i+1}|

rho weights the distance to the clean frame against the distances to the neighbours. The first and the last frame have
only one neighbour; terms of missing neighbours are left out everywhere. On the path, every phi_i is linear in sigma:

    phi_i(x) = sigma phi_i(n) + (1 - sigma) phi_i(s)

Differentiating with respect to sigma gives a tridiagonal system M h = c for the speeds h_i = dq_i / dsigma:

    c_i       = phi_i(s) - phi_i(n)
    M_{i,i}   = unit(x_i - x_{i-1}).a_i + unit(x_i - x_{i+1}).a_i - rho
    M_{i,i+1} = unit(x_{i+1} - x_i).a_{i+1}
    M_{i,i-1} = unit(x_{i-1} - x_i).a_{i-1}

The network learns the velocity u_i = -h_i a_i, which points from clean to noise. The paper integrates the speeds with
Euler steps over the latents. Here, Newton's method solves the F equations of the path directly for the F numbers q_i.

All computation is in float32, whatever the dtype of the inputs. Frames at most EPS apart count as equal, and the unit
vector between them is 0.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfm_jax.arrays import Latents, PerFrame, PerVideo, Scalar

EPS = 1e-12
# For latents, 3 steps reach float32 accuracy, since each step squares the error. The slowest case found takes 6 steps:
# frames of 2 numbers, with lengths that differ by a factor of 10,000. The cost is negligible, as q has only F numbers.
NEWTON_STEPS = 6

Frames = Float[Array, "f h w c"]
FrameScalars = Float[Array, "f"]
PairScalars = Float[Array, "pairs"]  # one number for each pair of neighbouring frames (i, i + 1)
Matrix = Float[Array, "f f"]


class TemporalPath(NamedTuple):
    """A point on the TFM path of each video, and the velocity at that point, in float32."""

    x_t: Latents
    velocity: Latents  # u_i = -h_i a_i, with the sign of noise - clean
    remaining: PerFrame  # q_i
    speed: PerFrame  # h_i


def temporal_path(clean: Latents, noise: Latents, sigma: PerVideo, rho: float = 4.0) -> TemporalPath:
    """Return the point on the TFM path of each video at noise level sigma in 0..1, and the target velocity there.

    This approaches plain flow matching as rho grows, and equals it for a single frame. With rho >= 4, the system has a
    solution for any frames; below 4, that depends on the frames.
    """
    clean, noise, sigma = _float32(clean, noise, sigma)
    return jax.vmap(partial(_path, rho=rho))(clean, noise, sigma)


def temporal_loss(
    prediction: Latents, clean: Latents, noise: Latents, x_t: Latents, rho: float = 4.0
) -> tuple[PerVideo, PerVideo]:
    """Return the two terms of the TFM loss for a predicted velocity v at x_t, averaged over the frames, in float32.

    direction: 1 - cos(v_i, u_i), which ignores lengths.
    residual: | |(M w)_i| / (|c_i| + 1e-6) - 1 | with w_i = |v_i|, which ignores directions.

    Gradients flow only through the prediction. If the predicted velocity of a frame is zero, its gradient is zero.
    """
    clean, noise, x_t = jax.lax.stop_gradient((clean, noise, x_t))
    prediction, clean, noise, x_t = _float32(prediction, clean, noise, x_t)
    return jax.vmap(partial(_loss, rho=rho))(prediction, clean, noise, x_t)


def _path(clean: Frames, noise: Frames, sigma: Scalar, rho: float) -> TemporalPath:
    back = noise - clean  # b_i = -D_i a_i
    distance = norm(back)  # D_i
    # Neighbours differ by a combination of three vectors. With p_i = q_i / D_i and m_i = (p_i + p_{i+1}) / 2,
    #     x_{i+1} - x_i = (1 - m_i) (s_{i+1} - s_i) + m_i (n_{i+1} - n_i) + (p_{i+1} - p_i) (b_i + b_{i+1}) / 2
    # No terms cancel at either end of the path. To find q, only the inner products of the three vectors are needed.
    basis = jnp.diff(clean, axis=0), jnp.diff(noise, axis=0), (back[:-1] + back[1:]) / 2
    gram = jnp.stack([jnp.stack([dot(x, y) for y in basis], axis=-1) for x in basis], axis=-1)
    clean_gap, noise_gap = jnp.sqrt(gram[:, 0, 0]), jnp.sqrt(gram[:, 1, 1])
    change = phi(0.0 * distance, clean_gap, rho) - phi(distance, noise_gap, rho)  # c_i

    def growth_and_matrix(q: FrameScalars) -> tuple[PairScalars, Matrix]:
        """Return how much farther apart neighbours are at q than at q = 0, and M at q."""
        p = safe_divide(q, distance)
        middle, lag = (p[:-1] + p[1:]) / 2, p[1:] - p[:-1]
        moved = jnp.stack([-middle, middle, lag], axis=-1)  # coefficients of x_{i+1} - x_i minus their values at q = 0
        coefficients = moved + jnp.array([1.0, 0.0, 0.0], jnp.float32)
        inner = jnp.sum(gram * coefficients[:, None, :], axis=-1)  # (x_{i+1} - x_i) . basis
        gap = jnp.sqrt(jnp.maximum(jnp.sum(coefficients * inner, axis=-1), 0.0))  # |x_{i+1} - x_i|
        # |x| - |y| = (x - y).(x + y) / (|x| + |y|) stays accurate if the growth is much smaller than the gap.
        growth = safe_divide(jnp.sum(moved * (inner + gram[:, 0]), axis=-1), gap + clean_gap)
        half = (inner[:, 1] - inner[:, 0]) / 2  # (x_{i+1} - x_i) . (b_{i+1} - b_i) / 2
        along_left = -safe_divide(safe_divide(inner[:, 2] - half, distance[:-1]), gap)  # unit(x_{i+1} - x_i) . a_i
        along_right = -safe_divide(safe_divide(inner[:, 2] + half, distance[1:]), gap)  # unit(x_{i+1} - x_i) . a_{i+1}
        return growth, tridiagonal(along_left, along_right, rho)

    def newton(q: FrameScalars) -> FrameScalars:
        growth, matrix = growth_and_matrix(q)
        excess = phi(q, growth, rho) + sigma * change  # phi_i(x) - sigma phi_i(n) - (1 - sigma) phi_i(s)
        return q + jnp.linalg.solve(matrix, excess)  # the Jacobian of phi with respect to q is -M

    q = jax.lax.fori_loop(0, NEWTON_STEPS, lambda _, q: newton(q), sigma * distance)
    speed = jnp.linalg.solve(growth_and_matrix(q)[1], change)  # M h = c
    p, u = safe_divide(q, distance), safe_divide(speed, distance)
    return TemporalPath(clean + per_frame(p) * back, per_frame(u) * back, p * distance, speed)


def _loss(prediction: Frames, clean: Frames, noise: Frames, x_t: Frames, rho: float) -> tuple[Scalar, Scalar]:
    matrix, change = system(clean, noise, x_t, rho)
    back, length = noise - clean, norm(prediction)
    cosine = safe_divide(safe_divide(dot(prediction, back), length), norm(back))  # u_i is h_i back_i / D_i
    direction = 1 - jnp.sign(jnp.linalg.solve(matrix, change)) * cosine
    residual = jnp.abs(jnp.abs(jnp.sum(matrix * length, axis=-1)) / (jnp.abs(change) + 1e-6) - 1)
    return jnp.mean(direction), jnp.mean(residual)


def system(clean: Frames, noise: Frames, x_t: Frames, rho: float) -> tuple[Matrix, FrameScalars]:
    """Return M and c of one video at any point x_t, whether or not x_t is on the path."""
    direction = unit(clean - noise)  # a_i
    to_next = unit(jnp.diff(x_t, axis=0))  # unit(x_{i+1} - x_i)
    along_left, along_right = dot(to_next, direction[:-1]), dot(to_next, direction[1:])
    clean_gap, noise_gap = norm(jnp.diff(clean, axis=0)), norm(jnp.diff(noise, axis=0))
    distance = norm(clean - noise)
    change = phi(0.0 * distance, clean_gap, rho) - phi(distance, noise_gap, rho)
    return tridiagonal(along_left, along_right, rho), change


def phi(remaining: FrameScalars, gap: PairScalars, rho: float) -> FrameScalars:
    """Return phi_i, given the remaining distances q_i and the gaps |x_{i+1} - x_i|."""
    return rho * remaining + jnp.pad(gap, (1, 0)) + jnp.pad(gap, (0, 1))


def tridiagonal(along_left: PairScalars, along_right: PairScalars, rho: float) -> Matrix:
    """Return M, given along_left_i = unit(x_{i+1} - x_i).a_i and along_right_i = unit(x_{i+1} - x_i).a_{i+1}."""
    diagonal = jnp.pad(along_right, (1, 0)) - jnp.pad(along_left, (0, 1)) - rho
    return jnp.diag(diagonal) + jnp.diag(along_right, 1) - jnp.diag(along_left, -1)


def dot(x: Float[Array, "n h w c"], y: Float[Array, "n h w c"]) -> Float[Array, "n"]:
    """Return the inner products of frames, elementwise because matrix products may round float32 on accelerators."""
    return jnp.sum(x * y, axis=(1, 2, 3))


def norm(x: Float[Array, "n h w c"]) -> Float[Array, "n"]:
    """Return the lengths of frames. The gradient at 0 is 0. NaN stays NaN, so that divergence is noticed."""
    square = dot(x, x)
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def safe_divide(x: Float[Array, "..."], length: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x / length, or 0 if the length is at most EPS; gradients are finite in both cases. NaN stays NaN."""
    return jnp.where(length <= EPS, 0.0, x / jnp.where(length <= EPS, 1.0, length))


def unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Return x / |x|, or 0 if |x| is at most EPS. The slope at 0 is 0, whereas that of x / max(|x|, EPS) is 1 / EPS."""
    return safe_divide(x, per_frame(norm(x)))


def per_frame(scalars: Float[Array, "n"]) -> Float[Array, "n 1 1 1"]:
    """Reshape one number per frame to broadcast over the frames."""
    return scalars[:, None, None, None]


def _float32(*arrays: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    return [array.astype(jnp.float32) for array in arrays]
