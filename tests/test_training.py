"""Training: one step against PyTorch, resuming, many devices, and what the adapters may and may not change."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import virtual_devices
from diffusers import WanTransformer3DModel
from flax import nnx
from wan_reference import SIZES, inputs, reference_transformer, relative, run_reference

from tfm_jax.checkpoint import Checkpoints, flatten
from tfm_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig, parse
from tfm_jax.data.batches import Batch
from tfm_jax.data.records import Record, RecordWriter
from tfm_jax.errors import InputError, NonFiniteLoss
from tfm_jax.lora.adapters import attach_lora, init_lora, load_adapters, split_lora, target_linears, to_files
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.objective import schedule, temporal_path
from tfm_jax.sharding import one_device_mesh
from tfm_jax.train.loop import TrainRun, check_batch, train
from tfm_jax.train.metrics import Metrics, read_metrics
from tfm_jax.train.optimizer import learning_rate, make_optimizer
from tfm_jax.train.step import init_state, make_step
from tfm_jax.wan import load_transformer
from tfm_jax.wan.layouts import TRANSFORMER, abstract
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

CONFIG = SIZES["many heads"]
LORA = LoraConfig(rank=4, alpha=6)
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
    path = tmp_path_factory.mktemp("data") / "latents"
    rng = np.random.default_rng(0)
    with RecordWriter(path, {}) as writer:
        for number in range(12):
            clip = rng.standard_normal((3, 4, 6, CONFIG.channels), np.float32)
            text = rng.standard_normal((3 + number, CONFIG.text_dim), np.float32)
            writer.write(Record(clip, text, f"clip {number}", f"{number}.mp4"))
    return path


@pytest.fixture
def options(folder, latents, tmp_path):
    """Arguments of a run of four steps."""
    file = tmp_path / "config.yaml"
    values = {
        "model": {"path": str(folder), "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim, "heads": CONFIG.heads,
                  "layers": CONFIG.layers, "dtype": "float32"},
        "data": {"path": str(latents)},
        "lora": {"rank": 4, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output": str(tmp_path / "run"), "steps": 4, "batch_size": 2, "checkpoint_every": 2},
    }  # fmt: skip
    file.write_text(json.dumps(values))  # JSON is YAML
    return ["--config", str(file)]


def start(options: list[str], resume: bool = False) -> Path:
    config = parse(TrainRun, options, "train.py", "")
    train(config, resume)
    return config.train.output


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

    noise_key, level_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
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


# --- Runs ------------------------------------------------------------------------------------------------------------


def saved(output: Path, step: int) -> dict[str, np.ndarray]:
    with Checkpoints(output / "checkpoints") as checkpoints:
        return {name: np.asarray(array) for name, array in checkpoints.restore(step=step).arrays.items()}


def test_resuming_changes_no_bit(options, tmp_path):
    whole = start([*options, f"--train.output={tmp_path}/whole"])
    first = start([*options, f"--train.output={tmp_path}/parts", "--train.steps=2"])
    parts = start([*options, f"--train.output={tmp_path}/parts"], resume=True)
    assert first == parts
    a, b = saved(whole, 4), saved(parts, 4)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    losses = read_metrics(whole / "metrics.jsonl")
    assert losses == read_metrics(parts / "metrics.jsonl")
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    assert len({line["loss"] for line in losses}) == 4


def test_lines_after_the_last_checkpoint_are_written_again(options, tmp_path):
    output = start([*options, "--train.steps=3", "--train.checkpoint_every=2", "--train.keep_checkpoints=9"])
    expected = read_metrics(output / "metrics.jsonl")
    shutil.rmtree(output / "checkpoints" / "3")  # as if the run had been killed between the checkpoint and the end
    with open(output / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "los')
    start([*options, "--train.steps=3"], resume=True)
    assert read_metrics(output / "metrics.jsonl") == expected


def test_the_base_never_changes_and_the_adapters_do(options, folder):
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    output = start([*options, "--train.checkpoint_every=1", "--train.keep_checkpoints=9"])
    assert files == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    one, four = saved(output, 1), saved(output, 4)
    assert all(name.startswith(("lora/", "optimizer/", "step")) for name in one)
    assert not any("kernel" in name or "bias" in name for name in one)
    assert all((one[name] != four[name]).any() for name in one if name.startswith("lora/"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lora.rank=8", "lora.rank=8: the run in .* was started with 4"),
        ("--train.seed=1", "train.seed=1"),
        ("--train.batch_size=4", "train.batch_size=4"),
        ("--objective.rho=5", "objective.rho=5"),
        ("--train.steps=2", "train.steps=2: .* has 2 already"),
    ],
)
def test_resuming_as_another_run_is_refused(options, change, message):
    start([*options, "--train.steps=2"])
    with pytest.raises(InputError, match=message):
        start([*options, change], resume=True)


def test_resuming_on_other_weights_is_refused(options, tmp_path):
    start([*options, "--train.steps=2"])
    reference_transformer(CONFIG, seed=5).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(InputError, match="not the base weights"):
        start([*options, f"--model.path={tmp_path}/other"], resume=True)


def test_a_diverged_run_stops_and_names_the_clips(options, tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", 0, 4, 2, 1) as metrics:
        metrics.add(1, {"loss": jnp.float32(1)}, [3, 4])
        metrics.add(2, {"loss": jnp.float32(jnp.nan)}, [5, 6])
        with pytest.raises(NonFiniteLoss, match=r"step 2: the loss is nan; clips of this step: \[5, 6\]"):
            metrics.add(3, {"loss": jnp.float32(1)}, [7, 8])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", 0, 4, 2, 1) as metrics:
        metrics.add(1, {"loss": jnp.float32(1), "grad_norm": jnp.float32(jnp.inf)}, [3, 4])
        with pytest.raises(NonFiniteLoss, match=r"step 1: the grad_norm is inf; clips of this step: \[3, 4\]"):
            metrics.flush()


def test_eight_devices_train_as_one_does(options, tmp_path):
    """The program itself, on one device and on 2 x 4, whose parameters are really split."""
    script = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
    program = """
import sys, runpy, jax
from tfm_jax.train import loop
step = loop.make_step
def watched(*arguments):
    inner = step(*arguments)
    def call(state, frozen, batch):
        q = frozen["blocks"]["self_attn"]["q"]["kernel"].get_value()
        a = state.lora["blocks"]["self_attn"]["q"]["lora_a"].get_value()
        mu = state.optimizer[1].mu["blocks"]["ffn"]["up"]["lora_a"].get_value()
        print("shards", *(x.addressable_shards[0].data.shape for x in (q, a, mu, batch.latents)), file=sys.stdout)
        return inner(state, frozen, batch)
    return call
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
        assert done.stdout.splitlines() == [shards] * 10
        losses[devices] = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    assert len(losses[1]) == 10
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)


def test_devices_that_cannot_share_the_batch():
    with pytest.raises(
        InputError, match=r"train\.batch_size=4: expected a multiple of mesh\.data=3 x mesh\.fsdp=1; use 6"
    ):
        check_batch(4, jax.sharding.AbstractMesh((3, 1), ("data", "fsdp")))
