"""The laws of motion in closed form: the position of an object at any time.

Positions are in pixels, x to the right and y downwards; times are in frames. Arguments of type `Numbers` broadcast.
"""

import numpy as np
from jaxtyping import Float

Numbers = Float[np.ndarray, "..."]
Paths = Float[np.ndarray, "n t 2"]


def uniform(start: Numbers | float, velocity: Numbers | float, times: Numbers) -> Numbers:
    """Return the position in uniform motion: start + velocity * times."""
    return start + velocity * times


def accelerated(
    start: Numbers | float, velocity: Numbers | float, acceleration: Numbers | float, times: Numbers
) -> Numbers:
    """Return the position under constant acceleration: start + velocity * times + acceleration * times^2 / 2."""
    return start + velocity * times + acceleration * times**2 / 2


def reflect(position: Numbers, extent: Numbers | float) -> Numbers:
    """Fold free motion along an axis into 0..extent, as two walls do with a ball (a triangle wave)."""
    return extent - abs(position % (2 * extent) - extent)


def bounce_height(apex_height: Numbers | float, apex_time: Numbers | float, times: Numbers, gravity: float) -> Numbers:
    """Return the height of a ball that bounces off the floor without losing energy.

    The height is h - g s^2 / 2, where h is the height of the apex and s the time since the nearest apex. One apex is at
    `apex_time`; the time from one apex to the next is 2 sqrt(2 h / g).
    """
    period = np.sqrt(8 * apex_height / gravity)
    since = (times - apex_time + period / 2) % period - period / 2
    return apex_height - gravity * since**2 / 2


def orbit(
    centre: Float[np.ndarray, "2"], arm: Float[np.ndarray, "2"], angular_speed: float, times: Float[np.ndarray, "t"]
) -> Float[np.ndarray, "t 2"]:
    """Return positions in circular motion: centre + rotation(angular_speed t) arm.

    The angular speed is in radians per frame, and positive if the motion is clockwise on screen.
    """
    cos, sin = np.cos(angular_speed * times), np.sin(angular_speed * times)
    return centre + np.stack([cos * arm[0] - sin * arm[1], sin * arm[0] + cos * arm[1]], -1)


def collide(
    starts: Float[np.ndarray, "2 2"],
    velocities: Float[np.ndarray, "2 2"],
    times: Float[np.ndarray, "t"],
    distance: float,
) -> Paths:
    """Return the paths of two free bodies of equal mass that collide elastically with their centres `distance` apart.

    On contact they exchange the components of their velocities along the line n through their centres:
    v1' = v1 + ((v2 - v1) . n) n and v2' = v2 - ((v2 - v1) . n) n, which conserves momentum and energy.
    """
    apart, closing = starts[1] - starts[0], velocities[1] - velocities[0]
    contact = _contact_time(apart, closing, distance)
    if not np.isfinite(contact):
        return starts[:, None] + velocities[:, None] * times[:, None]
    normal = (apart + closing * contact) / distance
    impulse = (closing @ normal) * normal
    after = velocities + np.stack([impulse, -impulse])
    free, bounced = np.minimum(times, contact)[:, None], np.maximum(times - contact, 0)[:, None]
    return starts[:, None] + velocities[:, None] * free + after[:, None] * bounced


def _contact_time(apart: Float[np.ndarray, "2"], closing: Float[np.ndarray, "2"], distance: float) -> float:
    """Return the first t >= 0 with |apart + closing t| = distance; infinite if the bodies miss or already overlap."""
    a, b, c = closing @ closing, apart @ closing, apart @ apart - distance**2
    if b >= 0 or c < 0 or b**2 < a * c:
        return np.inf
    return float((-b - np.sqrt(b**2 - a * c)) / a)
