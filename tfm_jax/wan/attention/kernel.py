"""The interface of an attention kernel, and the array layout that all kernels share.

A kernel is a pair of functions that take the arrays of one device:

    forward(query, key, value) -> (out, lse)
    backward(query, key, value, out, lse, out_gradient) -> (query gradient, key gradient, value gradient)

`lse` is the log-sum-exp of the scaled scores of each query. Neither scores nor softmax weights are saved: the backward
pass recomputes the scores block by block, and the weights from scores and `lse` (Dao 2023, arXiv:2307.08691, sections
2.3 and 3.1). `out` and `lse` may come from a softmax over more keys than those passed to `backward`, which then returns
the gradients of these keys and values, and their contribution to the gradient of the queries.

The axes are b: videos, s: queries, t: keys, n: heads, k: head width.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Float32

Queries = Float[Array, "b s n k"]
Keys = Float[Array, "b t n k"]
LogSumExp = Float32[Array, "b n s"]


class Kernel(NamedTuple):
    """An implementation of attention. The docstring of this module gives the signatures of both functions."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]
