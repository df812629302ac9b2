"""Temporal-aware flow matching (TFM): a path on which neighbouring frames keep their distances in step, and its loss.

Per video, with clean frames s_i, noise n_i and noise level sigma (1 is noise, 0 is clean):

    D_i = |s_i - n_i|,  a_i = (s_i - n_i) / D_i       frame i travels on a straight line of length D_i
    x_i = s_i - q_i a_i                               q_i in 0..D_i is the distance that remains
    phi_i = rho q_i + |x_i - x_{i-1}| + |x_i - x_{i+1}|

On the path every phi_i is linear in sigma. Its speeds h_i = dq_i / dsigma solve the tridiagonal system M h = c. The
paper integrates them by Euler steps over the latents; here the F linear laws are solved for the F numbers q directly.
Everything is float32 inside, whatever the inputs are. Frames closer than EPS count as equal, with no direction.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tfm_jax.arrays import Latents, PerFrame, PerVideo, Scalar

EPS = 1e-12
# Latents reach float32 accuracy in 3, as the residual is squared by every step; frames of 2 numbers whose lengths
# differ ten-thousandfold, the slowest found, take 6. A step costs F numbers, nothing beside the pass over the latents.
NEWTON_STEPS = 6

Frames = Float[Array, "f h w c"]
FrameScalars = Float[Array, "f"]
PairScalars = Float[Array, "pairs"]  # pair i is frames i and i + 1
Matrix = Float[Array, "f f"]


class TemporalPath(NamedTuple):
    """A point on the TFM path and the velocity there, float32."""

    x_t: Latents
    velocity: Latents  # u_i = -h_i a_i, the sign of noise - clean
    remaining: PerFrame  # q_i
    speed: PerFrame  # h_i


def temporal_path(clean: Latents, noise: Latents, sigma: PerVideo, rho: float = 4.0) -> TemporalPath:
    """Where the TFM path of each video is at noise level sigma in 0..1, and the velocity the network should give there.

    Plain flow matching is the limit of large rho, and the case of one frame. With rho >= 4 the system has a
    solution for any frames; with less, that depends on the frames.
    """
    clean, noise, sigma = _float32(clean, noise, sigma)
    return jax.vmap(partial(_path, rho=rho))(clean, noise, sigma)


def temporal_loss(
    prediction: Latents, clean: Latents, noise: Latents, x_t: Latents, rho: float = 4.0
) -> tuple[PerVideo, PerVideo]:
    """The two terms of the TFM loss of a predicted velocity at x_t, each a mean over frames, float32.

    direction: 1 - cos(v_i, u_i), blind to magnitudes.
    residual: | |(M w)_i| / (|c_i| + 1e-6) - 1 | with w_i = |v_i|, blind to directions.

    Only the prediction is differentiated; where it is zero, so is its gradient.
    """
    clean, noise, x_t = jax.lax.stop_gradient((clean, noise, x_t))
    prediction, clean, noise, x_t = _float32(prediction, clean, noise, x_t)
    return jax.vmap(partial(_loss, rho=rho))(prediction, clean, noise, x_t)


def _path(clean: Frames, noise: Frames, sigma: Scalar, rho: float) -> TemporalPath:
    back = noise - clean  # b_i = -D_i a_i
    distance = norm(back)  # D_i
    # With p = q / D and m_i = (p_i + p_{i+1}) / 2, no term of this cancels at either end of the path:
    # x_{i+1} - x_i = (1 - m_i) (s_{i+1} - s_i) + m_i (n_{i+1} - n_i) + (p_{i+1} - p_i) (b_i + b_{i+1}) / 2
    basis = jnp.diff(clean, axis=0), jnp.diff(noise, axis=0), (back[:-1] + back[1:]) / 2
    gram = jnp.stack([jnp.stack([dot(x, y) for y in basis], axis=-1) for x in basis], axis=-1)
    clean_gap, noise_gap = jnp.sqrt(gram[:, 0, 0]), jnp.sqrt(gram[:, 1, 1])
    change = phi(0.0 * distance, clean_gap, rho) - phi(distance, noise_gap, rho)  # c_i

    def neighbours(q: FrameScalars) -> tuple[PairScalars, Matrix]:
        p = safe_divide(q, distance)
        middle, lag = (p[:-1] + p[1:]) / 2, p[1:] - p[:-1]
        moved = jnp.stack([-middle, middle, lag], axis=-1)  # coefficients of x_{i+1} - x_i, less those at q = 0
        weight = moved + jnp.array([1.0, 0.0, 0.0], jnp.float32)
        inner = jnp.sum(gram * weight[:, None, :], axis=-1)  # (x_{i+1} - x_i) . basis
        gap = jnp.sqrt(jnp.maximum(jnp.sum(weight * inner, axis=-1), 0.0))  # |x_{i+1} - x_i|
        # |x|^2 - |y|^2 = (x - y).(x + y): the growth of the gap, accurate when it is tiny beside the gap
        growth = safe_divide(jnp.sum(moved * (inner + gram[:, 0]), axis=-1), gap + clean_gap)
        half = (inner[:, 1] - inner[:, 0]) / 2  # b_{i+1} - b_i is the difference of the first two
        along_left = -safe_divide(safe_divide(inner[:, 2] - half, distance[:-1]), gap)  # unit(x_{i+1} - x_i) . a_i
        along_right = -safe_divide(safe_divide(inner[:, 2] + half, distance[1:]), gap)  # unit(x_{i+1} - x_i) . a_{i+1}
        return growth, tridiagonal(along_left, along_right, rho)

    def newton(q: FrameScalars) -> FrameScalars:
        growth, matrix = neighbours(q)
        excess = phi(q, growth, rho) + sigma * change  # phi_i(q) - sigma phi_i(noise) - (1 - sigma) phi_i(clean)
        return q + jnp.linalg.solve(matrix, excess)  # the Jacobian of phi in q is -M

    q = jax.lax.fori_loop(0, NEWTON_STEPS, lambda _, q: newton(q), sigma * distance)
    speed = jnp.linalg.solve(neighbours(q)[1], change)  # M h = c
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
    """M and c of one video at any point x_t, on the path or off it: the speeds h there solve M h = c."""
    direction = unit(clean - noise)  # a_i
    between = unit(jnp.diff(x_t, axis=0))
    along_left, along_right = dot(between, direction[:-1]), dot(between, direction[1:])
    clean_gap, noise_gap = norm(jnp.diff(clean, axis=0)), norm(jnp.diff(noise, axis=0))
    distance = norm(clean - noise)
    change = phi(0.0 * distance, clean_gap, rho) - phi(distance, noise_gap, rho)
    return tridiagonal(along_left, along_right, rho), change


def phi(remaining: FrameScalars, gap: PairScalars, rho: float) -> FrameScalars:
    """phi_i from the distances: to the clean frame and to the two neighbours, of which the ends have one."""
    return rho * remaining + jnp.pad(gap, (1, 0)) + jnp.pad(gap, (0, 1))


def tridiagonal(along_left: PairScalars, along_right: PairScalars, rho: float) -> Matrix:
    """M from unit(x_{i+1} - x_i).a_i and unit(x_{i+1} - x_i).a_{i+1}: change of each phi_i by a step of each frame."""
    diagonal = jnp.pad(along_right, (1, 0)) - jnp.pad(along_left, (0, 1)) - rho
    return jnp.diag(diagonal) + jnp.diag(along_right, 1) - jnp.diag(along_left, -1)


def dot(x: Float[Array, "n h w c"], y: Float[Array, "n h w c"]) -> Float[Array, "n"]:
    """Inner products of frames, as sums of products: float32 on every platform without a matrix product to round it."""
    return jnp.sum(x * y, axis=(1, 2, 3))


def norm(x: Float[Array, "n h w c"]) -> Float[Array, "n"]:
    """Lengths of frames, with gradient zero where the length is. NaN stays NaN, so that a diverged run is noticed."""
    square = dot(x, x)
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def safe_divide(x: Float[Array, "..."], length: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / length, but 0 where the length is at most EPS, with finite gradients in both branches. NaN stays NaN."""
    return jnp.where(length <= EPS, 0.0, x / jnp.where(length <= EPS, 1.0, length))


def unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """x / |x|, and 0 for frames shorter than EPS: x / max(|x|, EPS) without its slope of 1 / EPS at zero."""
    return safe_divide(x, per_frame(norm(x)))


def per_frame(scalars: Float[Array, "n"]) -> Float[Array, "n 1 1 1"]:
    """One number per frame, shaped to scale the frames."""
    return scalars[:, None, None, None]


def _float32(*arrays: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    return [array.astype(jnp.float32) for array in arrays]
