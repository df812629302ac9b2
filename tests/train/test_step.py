"""The training step: one step against PyTorch, the rules of the optimizer, and the random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from helpers.training_runs import CONFIG
from helpers.wan_reference import inputs, reference_transformer, relative

from tfm_jax.checkpoint import flatten
from tfm_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from tfm_jax.data.batches import Batch
from tfm_jax.errors import InputError
from tfm_jax.lora.adapters import attach_lora, init_lora, lora_from_checkpoint, split_lora
from tfm_jax.objective import schedule, temporal_path
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.optimizer import learning_rate, make_optimizer
from tfm_jax.train.step import _moving_average, init_state, make_step, run_keys
from tfm_jax.wan import load_transformer
from tfm_jax.wan.names import BlockLinear

LORA = LoraConfig(rank=4, alpha=6)
ALL_TARGETS = "to_q|to_k|to_v|to_out.0|ffn.net.0.proj|ffn.net.2"


# --- Against PyTorch -------------------------------------------------------------------------------------------------


def torch_tfm_loss(prediction, clean, noise, x_t, rho, beta):
    """Direction and residual loss of one video, written from the equations. Frames are rows."""
    rows = [tensor.flatten(1) for tensor in (prediction, clean, noise, x_t)]
    v, s, n, x = rows
    count = len(s)

    def unit(z):
        return z / z.norm().clamp_min(1e-12)

    def phi(y, i):
        value = rho * (y[i] - s[i]).norm()
        for j in (i - 1, i + 1):
            if 0 <= j < count:
                value = value + (y[i] - y[j]).norm()
        return value

    a = torch.stack([unit(s[i] - n[i]) for i in range(count)])
    c = torch.stack([phi(s, i) - phi(n, i) for i in range(count)])
    m = torch.zeros(count, count)
    for i in range(count):
        m[i, i] = -rho
        for j in (i - 1, i + 1):
            if 0 <= j < count:
                m[i, i] += unit(x[i] - x[j]) @ a[i]
                m[i, j] = unit(x[j] - x[i]) @ a[j]
    target = -torch.linalg.solve(m, c)[:, None] * a
    direction = 1 - torch.nn.functional.cosine_similarity(v, target, dim=1)
    residual = ((m @ v.norm(dim=1)).abs() / (c.abs() + 1e-6) - 1).abs()
    return direction.mean() + beta * residual.mean()


def to_torch(x):
    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3).contiguous()


def torch_step(model, adapters, batch, noise, index, optimizer_config, objective):
    """Loss, gradients and new factors of one step of diffusers + peft + torch's AdamW."""
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=f".*blocks.*({ALL_TARGETS})")
    model.add_adapter(config)
    factors = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            module, factor = name.replace(".default.weight", "").rsplit(".lora_", 1)
            factors[module, factor.lower()] = parameter
            parameter.data.copy_(torch.from_numpy(np.array(getattr(adapters[module], factor.lower()))))
    assert len(factors) == 2 * len(adapters)

    sigma = torch.from_numpy(schedule.sigmas(objective.shift)[index])
    weight = torch.from_numpy(schedule.bell_weights(objective.shift)[index])
    clean = to_torch(batch.latents)
    x_t = to_torch(temporal_path(batch.latents, noise, jnp.asarray(sigma.numpy()), objective.rho).x_t)
    prediction = model(x_t, 1000 * sigma, torch.from_numpy(np.array(batch.text))).sample
    by_frame = [tensor.permute(0, 2, 1, 3, 4) for tensor in (prediction, clean, to_torch(noise), x_t)]
    losses = [torch_tfm_loss(*(t[i] for t in by_frame), objective.rho, objective.beta) for i in range(len(clean))]
    loss = (weight * torch.stack(losses)).mean()

    optimizer = torch.optim.AdamW(factors.values(), optimizer_config.learning_rate, weight_decay=0.01)
    loss.backward()
    gradients = {key: parameter.grad.numpy().copy() for key, parameter in factors.items()}
    optimizer.step()
    return loss.item(), gradients, {key: parameter.detach().numpy() for key, parameter in factors.items()}


def test_one_step_equals_pytorch(model_folder):
    objective = ObjectiveConfig(rho=5.0, beta=0.7)
    optimizer_config = OptimizerConfig(learning_rate=1e-4)
    model = load_transformer(model_folder, jnp.float32)
    attach_lora(model, LORA)
    init_lora(model, jax.random.key(1))
    graph, lora, frozen = split_lora(model)
    # B away from zero, or the gradient of A would be zero.
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), lora)

    given = inputs(CONFIG, 2, 3, 4, 6)
    batch = Batch(jnp.asarray(given["latents"]), jnp.asarray(given["text"]))
    seed = 7
    optimizer = make_optimizer(optimizer_config, 1)
    state, placement = init_state(lora, optimizer, one_device_mesh())
    before = {n: np.asarray(x) for n, x in flatten(lora).items()}
    step = make_step(graph, optimizer, objective, seed, placement)
    state, report = step(state, frozen, batch)

    noise_key, level_key = jax.random.split(jax.random.fold_in(run_keys(seed).steps, 0))
    noise = jax.random.normal(noise_key, batch.latents.shape, jnp.float32)
    index = np.asarray(schedule.sample_index(level_key, 2, objective))
    adapters = {diffusers_name(n): a for n, a in lora_from_checkpoint(before, LORA).adapters.items()}
    reference = reference_transformer(CONFIG)
    loss, gradients, after = torch_step(reference, adapters, batch, noise, index, optimizer_config, objective)

    assert float(report["loss"]) == pytest.approx(loss, rel=1e-4)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert float(report["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    # Adam's first moment after one step is the gradient times 1 - b1: every gradient, through the step itself.
    moments = {n.removeprefix("1/mu/"): x / 0.1 for n, x in flatten(state.optimizer).items() if n.startswith("1/mu/")}
    for ours, theirs in ((moments, gradients), (flatten(state.lora), after)):
        ours = {diffusers_name(n): a for n, a in lora_from_checkpoint(ours, LORA).adapters.items()}
        for (module, factor), value in theirs.items():
            assert relative(getattr(ours[module], factor), value) <= 1e-4, (module, factor)


def diffusers_name(linear: BlockLinear) -> str:
    names = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for branch, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        names |= {f"{branch}.{x}": f"{attention}.to_{x}" for x in "qkv"} | {f"{branch}.o": f"{attention}.to_out.0"}
    return f"blocks.{linear.layer}.{names[linear.name]}"


# --- Optimizer -------------------------------------------------------------------------------------------------------


def test_optimizer_rules_reach_the_factors_they_are_for():
    tree = {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3)}
    gradient = {"lora_a": jnp.full(3, 0.5), "lora_b": jnp.full(3, 0.5)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.2, lora_b_factor=8), 1)
    updates, _ = optimizer.update(gradient, optimizer.init(tree), tree)
    # Adam's first step is the sign of the gradient; the decay adds 0.2 times the value.
    assert np.allclose(updates["lora_a"], -0.1 * 1.2, rtol=1e-5)
    assert np.allclose(updates["lora_b"], -0.8 * 1.2, rtol=1e-5)


def test_clipping_bounds_the_gradient():
    tree = {"lora_a": jnp.zeros(4)}
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0), 1)
    _, state = optimizer.update({"lora_a": jnp.full(4, 30.0)}, optimizer.init(tree), tree)
    assert optax.tree.norm(state[1].mu) == pytest.approx(0.1, rel=1e-5)


def rates(steps, **settings):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, **settings), steps)
    return [float(rate(step)) for step in range(steps)]


def test_warm_up_rises_to_a_constant():
    assert rates(7, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert rates(2) == [1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_falls_as_in_transformers(schedule):
    """After the warm-up. Without a final factor, both would reach 0 in the step after the last one."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    theirs, reference = [], transformers.get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10)
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(10, schedule=schedule) == pytest.approx(theirs, abs=1e-6)
    assert rates(13, schedule=schedule, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, *theirs], abs=1e-6)
    above = [0.2 + 0.8 * rate for rate in theirs]
    assert rates(10, schedule=schedule, final_factor=0.2) == pytest.approx(above, abs=1e-6)


def test_a_warm_up_as_long_as_the_run_leaves_no_step_to_fall():
    message = r"optimizer.warmup_steps=5: expected less than the 5 steps of the run, for optimizer.schedule=linear"
    with pytest.raises(InputError, match=message):
        make_optimizer(OptimizerConfig(warmup_steps=5, schedule="linear"), 5)


# --- Accumulation ----------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch(model_folder):
    """Four clips at once, in two parts and in four parts: the report, the gradient and the new adapters."""
    given = inputs(CONFIG, 4, 3, 4, 6)
    batch = Batch(jnp.asarray(given["latents"]), jnp.asarray(given["text"]))
    results = {}
    for accumulate in (1, 2, 4):
        model = load_transformer(model_folder, jnp.float32)
        attach_lora(model, LORA)
        init_lora(model, jax.random.key(1))
        graph, lora, frozen = split_lora(model)
        lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), lora)
        optimizer = make_optimizer(OptimizerConfig(), 1)
        state, placement = init_state(lora, optimizer, one_device_mesh())
        step = make_step(graph, optimizer, ObjectiveConfig(), 3, placement, accumulate=accumulate)
        results[accumulate] = step(state, frozen, batch)
    state, report = results[1]
    assert len({float(report[name]) for name in ("loss", "direction", "residual", "grad_norm")}) == 4
    for accumulate in (2, 4):
        other, other_report = results[accumulate]
        assert other_report.keys() == report.keys()
        for name, value in report.items():
            np.testing.assert_allclose(other_report[name], value, rtol=1e-5, err_msg=name)
        for name, value in flatten(state.optimizer[1].mu).items():  # the gradient times 1 - b1
            assert relative(flatten(other.optimizer[1].mu)[name], value) <= 1e-4, name


# --- Moving average --------------------------------------------------------------------------------------------------


def test_the_moving_average_follows_the_adapters():
    """Against NumPy: the decay is n / (n + 9) until it reaches its final value."""
    values = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    average = expected = values[0]
    for number, value in enumerate(values[1:], 1):
        average = _moving_average(average, value, 0.75, jnp.int32(number - 1))
        decay = min(0.75, number / (number + 9))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)


# --- Random keys -----------------------------------------------------------------------------------------------------


def test_the_keys_of_a_run_are_its_own():
    """Adapters and every step draw from different keys."""
    keys = run_keys(0)
    steps = [jax.random.fold_in(keys.steps, step) for step in range(20)]
    adapters = [jax.random.fold_in(keys.adapters, number) for number in range(20)]
    data = [jax.random.key_data(key).tolist() for key in (*steps, *adapters)]
    assert len({tuple(words) for words in data}) == 40
