"""Training: one step against PyTorch, resuming, many devices, and what the adapters may and may not change."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from helpers import virtual_devices
from helpers.configured import configured
from helpers.paths import ROOT
from helpers.wan_reference import SIZES, inputs, reference_transformer, relative, run_reference
from jax.experimental.compilation_cache import compilation_cache

from tfm_jax.checkpoint import Checkpoints, flatten
from tfm_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from tfm_jax.data.batches import Batch, Batches
from tfm_jax.data.records import Record, RecordWriter
from tfm_jax.errors import InputError, NonFiniteLoss, StoppedEarly, Terminated, describe
from tfm_jax.files import lock, replacing
from tfm_jax.lora.adapters import attach_lora, init_lora, load_adapters, split_lora, target_linears, to_files
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.objective import schedule, temporal_path
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.sharding import check_batch, one_device_mesh
from tfm_jax.train import loop
from tfm_jax.train.loop import TrainRun, train
from tfm_jax.train.metrics import Metrics, read_metrics
from tfm_jax.train.optimizer import learning_rate, make_optimizer
from tfm_jax.train.step import init_state, make_step, run_keys
from tfm_jax.wan import load_transformer
from tfm_jax.wan.layouts import TRANSFORMER, abstract
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

CONFIG = SIZES["many heads"]
LORA = LoraConfig(rank=4, alpha=6)
CLIP = {"frames": 9, "height": 32, "width": 48, "fps": 16.0}
ALL_TARGETS = "to_q|to_k|to_v|to_out.0|ffn.net.0.proj|ffn.net.2"
run = jax.jit(WanTransformer.__call__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer in the Diffusers layout."""
    path = tmp_path_factory.mktemp("model")
    reference_transformer(CONFIG).save_pretrained(path / "transformer")
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Twelve prepared clips."""
    return write_latents(tmp_path_factory.mktemp("data") / "latents", seed=0)


def write_latents(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with RecordWriter(path, CLIP) as writer:
        for number in range(12):
            clip = rng.standard_normal((3, 4, 6, CONFIG.channels), np.float32)
            text = rng.standard_normal((3 + number, CONFIG.text_dim), np.float32)
            writer.write(Record(clip, text, f"clip {number}", f"{number}.mp4"))
    return path


@pytest.fixture(scope="module", autouse=True)
def cached_compilations(tmp_path_factory):
    """Runs that compile the same step compile it once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def arguments(folder: Path, latents: Path, place: Path) -> list[str]:
    """Of a run of four steps in `place / "run"`."""
    values = {
        "model": {"path": str(folder), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "clip": CLIP,
        "data": {"path": str(latents)},
        "lora": {"rank": 4, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"output": str(place / "run"), "steps": 4, "batch_size": 2, "checkpoint_every": 1,
                  "keep_checkpoints": 9},
    }  # fmt: skip
    file = place / "config.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return ["--config", str(file)]


@pytest.fixture
def options(folder, latents, tmp_path):
    return arguments(folder, latents, tmp_path)


def start(options: list[str], resume: bool = False) -> Path:
    config = configured(TrainRun, options)
    train(config, resume)
    return config.train.output


@pytest.fixture(scope="module")
def two_steps(folder, latents, tmp_path_factory):
    """The run after two of its steps."""
    return start([*arguments(folder, latents, tmp_path_factory.mktemp("two_steps")), "--train.steps=2"])


@pytest.fixture
def stopped(two_steps, tmp_path):
    """A copy of the run after two steps, in the folder of `options`."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


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
    weight = torch.from_numpy(schedule.weights(objective.shift)[index])
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


def test_one_step_equals_pytorch(folder):
    objective = ObjectiveConfig(rho=5.0, beta=0.7)
    optimizer_config = OptimizerConfig(learning_rate=1e-4)
    model = load_transformer(folder, jnp.float32)
    attach_lora(model, LORA)
    init_lora(model, jax.random.key(1))
    graph, lora, frozen = split_lora(model)
    # B away from zero, or the gradient of A would be zero.
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), lora)

    given = inputs(CONFIG, 2, 3, 4, 6)
    batch = Batch(jnp.asarray(given["latents"]), jnp.asarray(given["text"]))
    seed = 7
    optimizer = make_optimizer(optimizer_config)
    state, placement = init_state(lora, optimizer, one_device_mesh())
    before = {n: np.asarray(x) for n, x in flatten(lora).items()}
    step = make_step(graph, optimizer, objective, seed, placement)
    state, report = step(state, frozen, batch)

    noise_key, level_key = jax.random.split(jax.random.fold_in(run_keys(seed).steps, 0))
    noise = jax.random.normal(noise_key, batch.latents.shape, jnp.float32)
    index = np.asarray(schedule.sample_index(level_key, 2))
    original_to_diffusers = {name: diffusers_name(name) for name in to_files(before, LORA.alpha).adapters}
    adapters = {original_to_diffusers[n]: a for n, a in to_files(before, LORA.alpha).adapters.items()}
    reference = reference_transformer(CONFIG)
    loss, gradients, after = torch_step(reference, adapters, batch, noise, index, optimizer_config, objective)

    assert float(report["loss"]) == pytest.approx(loss, rel=1e-4)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert float(report["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    # Adam's first moment after one step is the gradient times 1 - b1: every gradient, through the step itself.
    moments = {n.removeprefix("1/mu/"): x / 0.1 for n, x in flatten(state.optimizer).items() if n.startswith("1/mu/")}
    for ours, theirs in ((moments, gradients), (flatten(state.lora), after)):
        ours = {original_to_diffusers[n]: a for n, a in to_files(ours, LORA.alpha).adapters.items()}
        for (module, factor), value in theirs.items():
            assert relative(getattr(ours[module], factor), value) <= 1e-4, (module, factor)


def diffusers_name(original: str) -> str:
    block, layer, name = original.split(".", 2)
    names = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    for branch, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        names |= {f"{branch}.{x}": f"{attention}.to_{x}" for x in "qkv"} | {f"{branch}.o": f"{attention}.to_out.0"}
    return f"{block}.{layer}.{names[name]}"


# --- Adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_new_adapters_leave_every_bit_of_the_output(folder, dtype):
    batch = inputs(CONFIG, 1, 3, 4, 6)
    model = load_transformer(folder, dtype)
    before = np.asarray(run(model, **batch))
    attach_lora(model, LORA)
    init_lora(model, jax.random.key(0))
    assert float(jnp.abs(model.blocks.ffn.up.lora_a[...]).max()) > 0
    assert (np.asarray(run(model, **batch)) == before).all()


def test_a_factors_start_as_in_peft(folder):
    model = load_transformer(folder, jnp.float32)
    attach_lora(model, LoraConfig(rank=32))
    init_lora(model, jax.random.key(0))
    for linear in (model.blocks.self_attn.q, model.blocks.ffn.down):
        a = np.asarray(linear.lora_a[...])
        bound = a.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt 5
        assert np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not np.asarray(linear.lora_b[...]).any()
    assert (np.asarray(model.blocks.self_attn.q.lora_a[...]) != np.asarray(model.blocks.self_attn.k.lora_a[...])).any()


@pytest.mark.parametrize(
    ("config", "modules", "parameters"),
    [
        (TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40), 400, 153_354_240),
        (TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30), 300, 43_745_280),
    ],
)
def test_trainable_parameters_of_the_published_models(config, modules, parameters):
    model = abstract(TRANSFORMER, config, jnp.bfloat16)
    attach_lora(model, LoraConfig())
    lora = split_lora(model).lora
    leaves = jax.tree.leaves(lora)
    assert sum(leaf.shape[0] for leaf in leaves) == 2 * modules
    assert sum(leaf.size for leaf in leaves) == parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_targets_are_found_by_the_end_of_their_name():
    everything = target_linears(LoraConfig().targets)
    assert len(everything) == 10
    assert everything["ffn.0"] == "ffn.up"
    assert list(target_linears(("self_attn.q", "o"))) == ["self_attn.q", "self_attn.o", "cross_attn.o"]
    with pytest.raises(InputError, match=r"lora\.targets: 'attn' names no linear map; expected some of q, k, v, o"):
        target_linears(("q", "attn"))


def test_rank_above_the_width_is_refused(folder):
    model = abstract(TRANSFORMER, CONFIG, jnp.float32)
    with pytest.raises(InputError, match=r"lora\.rank=97 is above the width of self_attn\.q, 96"):
        attach_lora(model, LoraConfig(rank=97))


@pytest.mark.parametrize("dialect", ["comfy", "diffusers", "kohya"])
def test_exported_adapters_do_in_pytorch_what_they_do_here(folder, tmp_path, dialect):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    model = load_transformer(folder, jnp.float32)
    attach_lora(model, LORA)
    init_lora(model, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1, split_lora(model).lora)
    nnx.update(model, lora)
    batch = inputs(CONFIG, 1, 3, 4, 6)
    ours = run(model, **batch)
    file = tmp_path / "lora.safetensors"
    write_lora(file, to_files(flatten(lora), LORA.alpha), dialect, np.dtype(np.float32), {})

    reference = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    plain = run_reference(reference, batch)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(file, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, reference, metadata=metadata)
    matched = [m for m in reference.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(matched) == 10 * CONFIG.layers
    theirs = run_reference(reference, batch)
    assert relative(ours, theirs) <= 1e-5
    assert relative(plain, theirs) > 1e-2  # the adapters do something

    again = load_transformer(folder, jnp.float32)
    load_adapters(again, read_lora(file))
    assert relative(run(again, **batch), theirs) <= 1e-5


# --- Optimizer -------------------------------------------------------------------------------------------------------


def test_optimizer_rules_reach_the_factors_they_are_for():
    tree = {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3)}
    gradient = {"lora_a": jnp.full(3, 0.5), "lora_b": jnp.full(3, 0.5)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.2, lora_b_factor=8))
    updates, _ = optimizer.update(gradient, optimizer.init(tree), tree)
    # Adam's first step is the sign of the gradient; the decay adds 0.2 times the value.
    assert np.allclose(updates["lora_a"], -0.1 * 1.2, rtol=1e-5)
    assert np.allclose(updates["lora_b"], -0.8 * 1.2, rtol=1e-5)


def test_clipping_bounds_the_gradient():
    tree = {"lora_a": jnp.zeros(4)}
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0))
    _, state = optimizer.update({"lora_a": jnp.full(4, 30.0)}, optimizer.init(tree), tree)
    assert optax.tree.norm(state[1].mu) == pytest.approx(0.1, rel=1e-5)


def test_warm_up_rises_to_a_constant():
    rates = [float(learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4))(step)) for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert learning_rate(OptimizerConfig(learning_rate=1.0))(0) == 1.0


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_a_bad_step_ends_what_cannot_skip_it(tmp_path):
    """Lines of JSON, also for numbers that JSON does not have; the step after it is written on request."""
    with Metrics(tmp_path / "metrics.jsonl", 0, 4, 2, 1) as metrics:
        metrics.add(1, {"loss": jnp.float32(1)}, [3, 4])
        metrics.add(2, {"grad_norm": jnp.float32(jnp.inf), "loss": jnp.float32(jnp.nan)}, [5, 6])
        message = (
            r"step 2: the loss is nan and the grad_norm is inf; clips of this step: 5, 6 \(bad steps in a row: 1\)"
        )
        with pytest.raises(NonFiniteLoss, match=message):
            metrics.add(3, {"loss": jnp.float32(2)}, [7, 8])
        metrics.flush()
    bad = {"step": 2, "loss": None, "grad_norm": None, "skipped": True, "clips": ["5", "6"]}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1}, bad, {"step": 3, "loss": 2}]


def test_bad_steps_are_counted_by_the_step(tmp_path, capsys):
    """The loss may be finite where the update is not. Many clips are not all named on the console."""
    report = {"loss": jnp.float32(1)}
    with Metrics(tmp_path / "m", 0, 9, 2, 1, max_bad_steps=2, name_of="{}.mp4".format) as metrics:
        metrics.add(1, report | {"bad_steps": jnp.int32(1)}, range(10))
        metrics.add(2, report | {"bad_steps": jnp.int32(0)}, [1])
        metrics.add(3, report | {"bad_steps": jnp.int32(2)}, [2])
        with pytest.raises(NonFiniteLoss, match=r"step 3: the update is not finite; clips .*: 2\.mp4 .* row: 2"):
            metrics.flush()
    line = "step 1/9  skipped: the update is not finite; clips of this step: 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4, 5.mp4, "
    assert capsys.readouterr().err.startswith(line + "6.mp4, 7.mp4 and 2 more\nstep 2/9  loss 1")
    assert [line.get("skipped", False) for line in read_metrics(tmp_path / "m")] == [True, False, True]


def test_the_time_that_is_left_is_told_by_steps_after_the_first(tmp_path, capsys, monkeypatch):
    now = iter([1000.0, 1004.0])  # the end of the first step, then of the third
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Metrics(tmp_path / "metrics.jsonl", 0, 10, 3, log_every=3) as metrics:
        for step in range(1, 5):
            metrics.add(step, {"loss": jnp.float32(1)}, [])
    assert capsys.readouterr().err == "step 3/10  loss 1  1.5 clips/s  ETA 0:00:14\n"


def test_a_disk_that_takes_no_more(tmp_path):
    """As the operating system says it for `ulimit -f`: the file is named, and what replaces another is whole or not."""
    (tmp_path / "config.yaml").write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 99, 2, log_every=99)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OSError, match="File too large") as lines, metrics:
            [metrics.add(step, {"loss": jnp.float32(1)}, []) for step in range(1, 9)]
        with pytest.raises(OSError, match="File too large") as whole, replacing(tmp_path / "config.yaml") as scratch:
            scratch.write_text("new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert describe(lines.value) == (f"{tmp_path}/metrics.jsonl: File too large", 2)
    assert describe(whole.value) == (f"{tmp_path}/config.yaml: File too large", 2)
    assert (tmp_path / "config.yaml").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


# --- Runs ------------------------------------------------------------------------------------------------------------


def saved(output: Path, step: int) -> dict[str, np.ndarray]:
    restored = Checkpoints(output / "checkpoints").restore(step=step)
    return {name: np.asarray(array) for name, array in restored.arrays.items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_resuming_changes_no_bit(options, stopped, tmp_path, capsys):
    """Also after lines that were written later than the last checkpoint, the last of them cut off."""
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    with open(stopped / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "loss": 7}\n{"step": 4, "los')
    start(options, resume=True)
    assert_same(saved(whole, 4), saved(stopped, 4))
    lines = read_metrics(whole / "metrics.jsonl")
    assert lines == read_metrics(stopped / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["loss"] for line in lines}) == 4
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])

    out = capsys.readouterr().out.splitlines()
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first[:5] == [
        f"training a LoRA in {whole}: 4 steps, batches of 2",
        "devices: 1 x cpu; mesh: data=1, fsdp=1, sequence=1, tensor=1",
        f"data: 12 clips in {options_data(options)}, latents 3 x 4 x 6 x 16",
        "model: 402,904 parameters in the base, 24,000 in the adapters",
        f"started {whole}",
    ]
    assert second[4] == f"resumed {stopped} after step 2"
    for lines in first, second:
        assert lines[5] == "compiling the training step ..."
        assert re.fullmatch(r"compiled in \d+\.\d s", lines[6])
        assert len(lines) == 7


def options_data(options: list[str]) -> str:
    return str(configured(TrainRun, options).data.path)


def test_the_base_is_not_saved_and_the_adapters_change(two_steps):
    one, two = saved(two_steps, 1), saved(two_steps, 2)
    assert all(name.startswith(("lora/", "optimizer/")) or name in ("step", "bad_steps") for name in one)
    assert not any("kernel" in name or "bias" in name for name in one)
    assert all((one[name] != two[name]).any() for name in one if name.startswith("lora/"))


def test_the_keys_of_a_run_are_its_own():
    """Adapters and every step draw from different keys."""
    keys = run_keys(0)
    steps = [jax.random.fold_in(keys.steps, step) for step in range(20)]
    adapters = [jax.random.fold_in(keys.adapters, number) for number in range(20)]
    data = [jax.random.key_data(key).tolist() for key in (*steps, *adapters)]
    assert len({tuple(words) for words in data}) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lora.rank=8", "lora.rank=8: the run in .* was started with 4"),
        ("--train.seed=1", "train.seed=1"),
        ("--train.batch_size=4", "train.batch_size=4"),
        ("--objective.rho=5", "objective.rho=5"),
    ],
)
def test_resuming_as_another_run_is_refused(options, stopped, change, message):
    with pytest.raises(InputError, match=message):
        start([*options, change], resume=True)


def test_resuming_on_other_weights_is_refused(options, stopped, tmp_path):
    reference_transformer(CONFIG, seed=5).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(InputError, match="not the base weights"):
        start([*options, f"--model.path={tmp_path}/other"], resume=True)


def test_resuming_on_other_clips_is_refused(options, stopped, tmp_path):
    """Of the same number and sizes."""
    write_latents(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the clips that the run in"):
        start([*options, f"--data.path={tmp_path}/other"], resume=True)


def test_resuming_after_the_last_step_is_no_error(options, stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    start([*options, "--train.steps=2"], resume=True)
    assert capsys.readouterr().out.endswith(f"{stopped} is complete: it has 2 steps, and train.steps=2\n")
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_fields_that_a_saved_configuration_lacks_have_their_defaults(options):
    """A checkpoint of an earlier version lacks them. An unknown field is reported."""
    run = configured(TrainRun, options)
    now = {"config": loop._plain(run), "base": "b", "data": "d"}
    saved = json.loads(json.dumps(now))
    del saved["config"]["objective"]["beta"], saved["config"]["optimizer"]
    now["config"]["optimizer"] = loop._plain(dataclasses.replace(run, optimizer=OptimizerConfig()))["optimizer"]
    loop._check_same_run(saved, now, run)
    now["config"]["objective"]["beta"] = 0.5
    with pytest.raises(InputError, match=r"objective.beta=0.5: the run in .* was started with 1.0"):
        loop._check_same_run(saved, now, run)
    saved["config"]["lora"]["dropout"] = 0.1
    with pytest.raises(InputError, match=r"checkpoints: lora.dropout=0.1: expected a field of this version"):
        loop._check_same_run(saved, now, run)


# --- The folder of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_has_one_run_at_a_time(options, stopped, resume):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with lock(stopped / ".lock"), pytest.raises(InputError, match=rf"train.output={stopped}: another run is using"):
        start(options, resume)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_a_new_folder_is_taken_by_another_run_meanwhile(options, tmp_path, monkeypatch):
    with contextlib.ExitStack() as held:

        def load(*arguments):
            held.enter_context(lock(tmp_path / "run" / ".lock"))
            return load_base(*arguments)

        load_base = loop.load_base
        monkeypatch.setattr(loop, "load_base", load)
        with pytest.raises(InputError, match="another run is using"):
            start(options)


def test_a_folder_with_a_checkpoint_needs_resume(options, stopped):
    with pytest.raises(InputError, match=r"already contains a run; pass --resume to continue it"):
        start(options)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(options, tmp_path, monkeypatch, resume):
    output = tmp_path / "run"
    (output / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    for name in (".lock", "config.yaml", "metrics.jsonl"):
        (output / name).write_text("")
    started = []
    monkeypatch.setattr(loop, "_compile", lambda setup, state, first: started.append(first) or setup.step)
    monkeypatch.setattr(loop, "_train", lambda *arguments: None)
    start(options, resume)
    assert started == [0]


def test_folders_that_are_no_folder_of_a_run(options):
    for path, output, data in (
        ("", "--train.output=: expected a path", "--data.path=: expected a path"),
        (".", "train.output=.: expected the path of a folder", ".: no .* expected a folder that prepare_data.py wrote"),
        ("/", "train.output=/: expected the path of a folder", "/: no .* expected a folder that prepare_data.py wrote"),
    ):
        with pytest.raises(InputError, match=f"^{output}"):
            start([*options, f"--train.output={path}"])
        with pytest.raises(InputError, match=f"^{data}"):
            start([*options, f"--data.path={path}"])


def test_clips_that_were_prepared_otherwise(options):
    with pytest.raises(InputError, match=r"clip.frames=81: data.path=.* was prepared with 9; expected the same"):
        start([*options, "--clip.frames=81"])


def test_the_configuration_of_a_run_serves_sampling(options, two_steps, tmp_path):
    file = ["--config", str(two_steps / "config.yaml")]
    sampling = configured(SampleRun, [*file, f"--sampling.output={tmp_path}"])
    assert dataclasses.asdict(sampling.clip) == CLIP
    run = configured(TrainRun, [*options, f"--train.output={two_steps}", "--train.steps=2"])
    assert configured(TrainRun, file) == run
    assert "source" not in (two_steps / "config.yaml").read_text()


@pytest.mark.parametrize(("signal", "name"), [(KeyboardInterrupt, "SIGINT"), (Terminated, "SIGTERM")])
def test_a_signal_before_the_first_step(options, monkeypatch, signal, name):
    def load(*arguments):
        raise signal

    monkeypatch.setattr(loop, "load_base", load)
    with pytest.raises(StoppedEarly, match=f"stopped by {name} before the first step; the same command starts again"):
        start(options)


# --- Steps that are not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """Put a NaN into the latents of these steps, from 1."""

    def spoil(*steps: int) -> None:
        read = Batches.at

        def at(self, step):
            batch, clips = read(self, step)
            return batch._replace(latents=batch.latents * (np.nan if step + 1 in steps else 1)), clips

        monkeypatch.setattr(Batches, "at", at)

    return spoil


def test_a_bad_step_is_skipped(options, tmp_path, spoil, capsys):
    """It leaves everything but the count of steps, and resuming after it changes no bit."""
    spoil(2)
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    assert re.search(
        r"step 2/4  skipped: the loss is nan and .*; clips of this step: \d+\.mp4, ", capsys.readouterr().err
    )
    one, two, four = (saved(whole, step) for step in (1, 2, 4))
    assert {name for name in one if (one[name] != two[name]).any()} == {"step", "bad_steps"}
    assert (two["step"], two["bad_steps"], four["bad_steps"], four["optimizer/1/count"]) == (2, 1, 0, 3)
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert all(name.endswith(".mp4") for name in lines[1]["clips"])

    parts = start([*options, "--train.steps=2"])
    start(options, resume=True)
    assert_same(saved(parts, 4), four)
    assert read_metrics(parts / "metrics.jsonl") == lines


def test_bad_steps_in_a_row_end_the_run(options, spoil, tmp_path):
    spoil(2, 3, 5)
    message = r"step 3: the loss is nan .*row: 2\); the adapters before the bad steps are saved in .*run"
    options = [*options, "--train.steps=9", "--train.max_bad_steps=2", "--train.checkpoint_every=9"]
    with pytest.raises(NonFiniteLoss, match=message):
        start(options)
    (step,) = Checkpoints(tmp_path / "run" / "checkpoints").steps
    assert step == 4  # computed while the host read what step 3 reported
    state = saved(tmp_path / "run", step)
    assert all(np.isfinite(array).all() for array in state.values())
    assert state["optimizer/1/count"] == 2
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_of_bad_steps_alone_is_no_success(options, tmp_path):
    """An update that is not finite, after a loss and a gradient that are."""
    options = [*options, "--optimizer.learning_rate=1e37", "--optimizer.weight_decay=1e3", "--train.steps=1"]
    with pytest.raises(NonFiniteLoss, match="step 1: the update is not finite"):
        start(options)
    state = saved(tmp_path / "run", 1)
    assert all(np.isfinite(array).all() for array in state.values())
    assert not any(array.any() for name, array in state.items() if name.endswith("lora_b"))
    with pytest.raises(NonFiniteLoss, match="the run is complete, but its last 1 steps were skipped"):
        start(options, resume=True)


# --- Many devices ----------------------------------------------------------------------------------------------------


def test_eight_devices_train_as_one_does(options, tmp_path):
    """The program itself, on one device and on 2 x 4, whose parameters are really split."""
    script = ROOT / "scripts" / "train.py"
    program = """
import sys, runpy, jax
from tfm_jax.train import loop
step = loop.make_step
def watched(*arguments):
    inner = step(*arguments)
    def shards(state, frozen, batch):
        q = frozen["blocks"]["self_attn"]["q"]["kernel"].get_value()
        a = state.lora["blocks"]["self_attn"]["q"]["lora_a"].get_value()
        mu = state.optimizer[1].mu["blocks"]["ffn"]["up"]["lora_a"].get_value()
        print("shards", *(x.addressable_shards[0].data.shape for x in (q, a, mu, batch.latents)), file=sys.stdout)
    class Step:
        def lower(self, *arguments):
            lowered = inner.lower(*arguments)
            class Lowered:
                def compile(self):
                    program = lowered.compile()
                    return lambda *arguments: shards(*arguments) or program(*arguments)
            return Lowered()
    return Step()
loop.make_step = watched
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    losses = {}
    for devices, mesh, shards in (
        (1, [], "shards (3, 96, 96) (3, 96, 4) (3, 96, 4) (8, 3, 4, 6, 16)"),
        (8, ["--mesh.data=2", "--mesh.fsdp=4"], "shards (3, 24, 96) (3, 24, 4) (3, 24, 4) (1, 3, 4, 6, 16)"),
    ):
        output = tmp_path / str(devices)
        arguments = [*options, *mesh, f"--train.output={output}", "--train.steps=10", "--train.batch_size=8"]
        done = subprocess.run(
            [sys.executable, "-c", program, str(script), *arguments],
            env=virtual_devices.environment(devices),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith("shards")] == [shards] * 10
        losses[devices] = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    assert len(losses[1]) == 10
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)


def test_devices_that_cannot_share_the_batch():
    with pytest.raises(
        InputError, match=r"train\.batch_size=4: expected a multiple of mesh\.data=3 x mesh\.fsdp=1; use 6"
    ):
        check_batch(4, jax.sharding.AbstractMesh((3, 1), ("data", "fsdp")))
