"""Laws of motion in closed form: where an object is at any time.

Positions are in pixels, x to the right and y downwards; times are in frames. Numbers broadcast against each other.
"""

import numpy as np
from jaxtyping import Float

Numbers = Float[np.ndarray, "..."]
Paths = Float[np.ndarray, "n t 2"]


def line(start: Numbers | float, velocity: Numbers | float, times: Numbers) -> Numbers:
    """Uniform motion along an axis: p + v t."""
    return start + velocity * times


def fold(position: Numbers, room: Numbers | float) -> Numbers:
    """Free motion along an axis reflected into 0..room, as a ball between two walls: a wave of triangles."""
    return room - abs(position % (2 * room) - room)


def hop(height: Numbers | float, apex: Numbers | float, times: Numbers, gravity: float) -> Numbers:
    """Height over a floor off which a ball bounces without loss: h - g s^2 / 2, s the time since the nearest apex.

    One apex of height `height` is at the time `apex`; from one to the next it takes 2 sqrt(2 h / g).
    """
    period = np.sqrt(8 * height / gravity)
    since = (times - apex + period / 2) % period - period / 2
    return height - gravity * since**2 / 2


def circle(
    centre: Float[np.ndarray, "2"], arm: Float[np.ndarray, "2"], turn: float, times: Float[np.ndarray, "t"]
) -> Float[np.ndarray, "t 2"]:
    """Orbit: centre + rotation(turn t) arm, `turn` in radians a frame, clockwise on the screen where it is positive."""
    cos, sin = np.cos(turn * times), np.sin(turn * times)
    return centre + np.stack([cos * arm[0] - sin * arm[1], sin * arm[0] + cos * arm[1]], -1)


def collide(
    starts: Float[np.ndarray, "2 2"], velocities: Float[np.ndarray, "2 2"], times: Float[np.ndarray, "t"], reach: float
) -> Paths:
    """Two free bodies of the same mass that collide elastically where their centres are `reach` apart.

    At the contact they exchange the components of their velocities along the line n of their centres:
    v1' = v1 + ((v2 - v1) . n) n and v2' = v2 - ((v2 - v1) . n) n, which keeps momentum and energy.
    """
    apart, closing = starts[1] - starts[0], velocities[1] - velocities[0]
    contact = _contact(apart, closing, reach)
    if not np.isfinite(contact):
        return starts[:, None] + velocities[:, None] * times[:, None]
    normal = (apart + closing * contact) / reach
    impulse = (closing @ normal) * normal
    after = velocities + np.stack([impulse, -impulse])
    free, bounced = np.minimum(times, contact)[:, None], np.maximum(times - contact, 0)[:, None]
    return starts[:, None] + velocities[:, None] * free + after[:, None] * bounced


def _contact(apart: Float[np.ndarray, "2"], closing: Float[np.ndarray, "2"], reach: float) -> float:
    """The first time t >= 0 at which |apart + closing t| = reach; infinite where the bodies miss each other."""
    a, b, c = closing @ closing, apart @ closing, apart @ apart - reach**2
    if b >= 0 or c < 0 or b**2 < a * c:
        return np.inf
    return float((-b - np.sqrt(b**2 - a * c)) / a)
