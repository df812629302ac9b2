"""Canaries for the private parts of JAX that this package uses: a new version of JAX that moves them fails here first.

Each private part is used by one module, and no other module may use any.
"""

import importlib
import inspect
import re
from typing import NoReturn

import jax
import jax.numpy as jnp
import pytest
from helpers.paths import ROOT

CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
DISTRIBUTED = "jax._src.distributed"
USERS = {
    CUDNN: "tfm_jax/wan/attention/cudnn.py",
    SPLASH: "tfm_jax/wan/attention/splash_kernels.py",
    DISTRIBUTED: "tfm_jax/jax_distributed.py",
}
OPERANDS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k",
            "page_table_v")  # fmt: skip
RESIDUALS = ("activation", "fwd_output", "grad_output")


def fail(user: str, problem: str) -> NoReturn:
    pytest.fail(
        f"JAX {jax.__version__} is installed: {problem}. Compare its source with that of the JAX in requirements.txt, "
        f"then adapt {user} (the only user) and this test, or install the JAX of requirements.txt.",
        pytrace=False,
    )


def find(user: str, module: str, path: str):
    """Return `path` of a module, such as "global_state.client"."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        fail(user, f"the module {module} no longer exists")
    for name in path.split("."):
        if not hasattr(found, name):
            fail(user, f"{module}.{path} no longer exists")
        found = getattr(found, name)
    return found


def check_parameters(user: str, module: str, path: str, expected: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(find(user, module, path)).parameters)
    if found != expected:
        fail(user, f"{module}.{path} takes {', '.join(found)}; expected {', '.join(expected)}")


def cudnn_module():
    """Import cudnn.py, after a check that the private module it imports still exists."""
    find(USERS[CUDNN], CUDNN, "__name__")
    return importlib.import_module("tfm_jax.wan.attention.cudnn")


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_primitives_of_cudnn(direction):
    """A primitive has no signature, but the function that implements it takes the same operands and parameters."""
    user, primitive = USERS[CUDNN], f"_dot_product_attention_{direction}"
    if not callable(getattr(find(user, CUDNN, f"{primitive}_p_wrapper"), "bind", None)):
        fail(user, f"{CUDNN}.{primitive}_p_wrapper is no longer a primitive with a method bind")
    settings = tuple(cudnn_module().settings(jnp.zeros((1, 2, 1, 8), jnp.bfloat16)))
    operands = OPERANDS if direction == "fwd" else OPERANDS + RESIDUALS
    if "score_mod" in settings:
        operands += ("score_mod_args",)
    expected = operands + settings + (("is_training",) if direction == "fwd" else ())
    check_parameters(user, CUDNN, f"{primitive}_impl", expected)


def test_constants_of_cudnn():
    for path in ("MaskType.NO_MASK", "AttentionLayout.BTNH.value"):
        find(USERS[CUDNN], CUDNN, path)


def test_calls_to_cudnn_are_lowered():
    cudnn = cudnn_module()
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
    calls = {"__cudnn$fmhaSoftmax": (cudnn.cudnn_forward, (x, x, x)),
             "__cudnn$fmhaSoftmaxBackward": (cudnn.cudnn_backward, (x, x, x, x, lse, x))}  # fmt: skip
    for target, (function, arrays) in calls.items():
        try:
            text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        except Exception as error:
            fail(USERS[CUDNN], f"{function.__name__} cannot be lowered: {type(error).__name__}: {error}")
        if f"custom_call @{target}(" not in text:
            fail(USERS[CUDNN], f"{function.__name__} no longer lowers to a call of {target}")


def test_kernels_of_splash():
    user, module = USERS[SPLASH], f"{SPLASH}.splash_attention_kernel"
    tables = ("data_next_ref", "block_mask_ref", "mask_next_ref")
    arrays = ("q_ref", "k_ref", "v_ref", "q_segment_ids_ref", "kv_segment_ids_ref", "sinks_ref")
    gradients = ("logsumexp_ref", "do_ref", "di_ref")
    masks = ("mask_ref", "q_sequence_ref")
    layouts = ("q_layout", "k_layout", "v_layout")
    check_parameters(user, module, "flash_attention_kernel", (
        *tables, *arrays, *masks, "m_scratch_ref", "l_scratch_ref", "o_scratch_ref", "o_ref", "logsumexp_ref",
        "mask_value", "grid_width", "bq", "bkv", "bkv_compute", "head_dim_v", *layouts, "attn_logits_soft_cap",
        "mask_function",
    ))  # fmt: skip
    check_parameters(user, module, "_flash_attention_dkv_kernel", (
        *tables, *arrays, *gradients, *masks, "dq_scratch_ref", "dk_scratch_ref", "dv_scratch_ref", "dq_ref", "dk_ref",
        "dv_ref", "num_q_heads", "num_kv_heads", "mask_value", "grid_width", "bq", "bkv_compute", "is_mqa",
        "attn_logits_soft_cap", *layouts, "bkv", "mask_function",
    ))  # fmt: skip
    for name in ("QKVLayout.HEAD_DIM_MINOR", "DEFAULT_MASK_VALUE"):
        find(user, module, name)


def test_state_of_jax_distributed():
    user = USERS[DISTRIBUTED]
    for name in ("client", "service", "process_id", "num_processes", "coordinator_address"):
        find(user, DISTRIBUTED, f"global_state.{name}")
    for name in ("key_value_set", "key_value_try_get", "wait_at_barrier"):
        find(user, "jax._src.lib", f"_jax.DistributedRuntimeClient.{name}")


def test_no_other_module_uses_private_parts():
    users = [
        str(path.relative_to(ROOT))
        for folder in ("tfm_jax", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\._src\b|splash_attention", path.read_text())
    ]
    assert sorted(users) == sorted(USERS.values())
