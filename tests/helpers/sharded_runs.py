"""Runs training, attention and sampling on several meshes of up to eight devices, and prints the results as JSON.

test_sharding.py runs this program once: a process for each mesh would spend most of its time starting up.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tfm_jax.checkpoint import flatten
from tfm_jax.config import LoraConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from tfm_jax.data.batches import Batch
from tfm_jax.lora.adapters import attach_lora, init_lora, split_lora
from tfm_jax.sampling import sample_latents
from tfm_jax.sharding import MESH_AXES, batch_sharding, make_mesh, shardings
from tfm_jax.train.optimizer import make_optimizer
from tfm_jax.train.step import init_state, make_step
from tfm_jax.wan.attention import cross_attention, self_attention
from tfm_jax.wan.quantization import quantize_linears
from tfm_jax.wan.rotary import rotary_tables
from tfm_jax.wan.transformer import TransformerConfig, WanTransformer

# There are 40 tokens; no other axis has this length. A token has fewer outputs (16) than activations.
CONFIG = TransformerConfig(dim=96, ffn_dim=128, heads=6, layers=2, text_dim=16, freq_dim=32, channels=4)
LATENTS = (5, 4, 8, 4)
STEPS = 10
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(")
FORWARD_PASS = re.compile(r"reduce_max\S* = f32\S* reduce\(")  # maximum of a query's scores, once per forward pass


def mesh_of(sizes):
    return make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), jax.devices()[: int(np.prod(sizes))])


def collectives(program):
    """Map each kind of collective in a compiled program to the shapes of its results."""
    found = {"all-gather": [], "all-to-all": [], "collective-permute": []}
    for result, kind in COLLECTIVE.findall(program):
        found[kind] += [[int(n) for n in shape.split(",") if n] for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return found


def model_on(mesh, adapters, quantized=False):
    """Return a model with the same weights on every mesh. No adapter is zero, or some gradients would be zero."""
    model = jax.jit(lambda: WanTransformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    if quantized:
        quantize_linears(model.blocks)
    nnx.update(model, jax.device_put(nnx.state(model), shardings(nnx.state(model), mesh)))
    if adapters:
        attach_lora(model, LoraConfig(rank=4, alpha=4))
        init_lora(model, jax.random.key(1), mesh)
        lora = split_lora(model).lora
        placement = shardings(lora, mesh)
        perturbed = jax.jit(
            lambda t: jax.tree.map(lambda x: x + 0.05 * jnp.sin(1e4 * jnp.arange(x.size)).reshape(x.shape), t)
        )
        nnx.update(model, jax.device_put(perturbed(lora), placement))
    return model


def batch_on(mesh, latents=LATENTS, seed=0):
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal((8, *latents), np.float32), rng.standard_normal((8, 512, 16), np.float32)
    return Batch(*jax.device_put(arrays, batch_sharding(mesh)))


class Training:
    def __init__(self, sizes, remat="full", accumulate=1):
        self.mesh = mesh_of(sizes)
        graph, lora, self.frozen = split_lora(model_on(self.mesh, adapters=True))
        optimizer = make_optimizer(OptimizerConfig(), STEPS)
        self.state, placement = init_state(lora, optimizer, self.mesh)
        self.start = {name: np.asarray(x) for name, x in flatten(self.state.lora).items()}
        self.step = make_step(graph, optimizer, ObjectiveConfig(), 0, placement, remat, accumulate)

    def compile(self):
        with jax.set_mesh(self.mesh):
            self.step = self.step.lower(self.state, self.frozen, batch_on(self.mesh)).compile()
        return self

    def run(self, steps, batch):
        losses = []
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, report = self.step(self.state, self.frozen, batch)
                losses.append(float(report["loss"]))
        return losses

    def parts(self):
        """Map some arrays to the shape of one device's part and the number of distinct parts."""
        moments = self.state.optimizer[1].mu["blocks"]
        batch, blocks, lora = batch_on(self.mesh), self.frozen["blocks"], self.state.lora["blocks"]
        arrays = {
            "q": blocks["self_attn"]["q"]["kernel"][...],
            "down": blocks["ffn"]["down"]["kernel"][...],
            "q a": lora["self_attn"]["q"]["lora_a"][...],
            "q b": lora["self_attn"]["q"]["lora_b"][...],
            "q a moment": moments["self_attn"]["q"]["lora_a"][...],
            "down b moment": moments["ffn"]["down"]["lora_b"][...],
            "latents": batch.latents,
            "text": batch.text,
        }
        return {
            name: [list(x.addressable_shards[0].data.shape), len({str(shard.index) for shard in x.addressable_shards})]
            for name, x in arrays.items()
        }


def trainings(folder):
    """Train on each mesh, save the adapters in `folder`, and return losses, collectives, attention passes and parts."""
    plan = {(1, 1, 1, 1): "full", (2, 2, 2, 1): "full", (1, 4, 2, 1): "attention", (8, 1, 1, 1): "none",
            (1, 2, 2, 2): "attention_offload"}  # fmt: skip
    results = {}
    for sizes, remat in plan.items():
        training = Training(sizes, remat).compile()
        losses, program = training.run(STEPS, batch_on(training.mesh)), training.step.as_text()
        name = "x".join(map(str, sizes))
        end = {path: np.asarray(x) for path, x in flatten(training.state.lora).items()}
        np.savez(folder / f"{name}.npz", **{f"start/{path}": x for path, x in training.start.items()}, **end)
        results[name] = {
            "losses": losses,
            "remat": remat,
            "forward passes": len(FORWARD_PASS.findall(program)),
            "parts": training.parts(),
            **collectives(program),
        }
    return results


def accumulation():
    """Compare two steps in four parts on two devices with the same steps at once on one: losses and moments."""
    whole, parts = Training((1, 1, 1, 1)).compile(), Training((1, 2, 1, 1), accumulate=4).compile()
    losses = [training.run(2, batch_on(training.mesh)) for training in (whole, parts)]
    moments = [flatten(training.state.optimizer[1].mu) for training in (whole, parts)]
    differences = [
        float(np.linalg.norm(np.asarray(moments[1][name]) - x) / np.linalg.norm(x))
        for name, x in ((name, np.asarray(x)) for name, x in moments[0].items())
    ]
    return {"losses": losses, "difference": max(differences), **collectives(parts.step.as_text())}


def quantized():
    """Compare loss and gradients on a base in int8, on eight devices, with those on one; list what is gathered."""
    results = []
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2)):
        mesh = mesh_of(sizes)
        graph, lora, frozen = split_lora(model_on(mesh, adapters=True, quantized=True))

        def loss(lora, frozen, batch, graph=graph):
            velocity = nnx.merge(graph, lora, frozen)
            return jnp.mean(jnp.square(velocity(batch.latents, jnp.full(8, 500.0), batch.text)))

        with jax.set_mesh(mesh):
            program = jax.jit(jax.value_and_grad(loss)).lower(lora, frozen, batch_on(mesh)).compile()
            value, gradient = program(lora, frozen, batch_on(mesh))
        results.append((float(value), {name: np.asarray(x) for name, x in flatten(gradient).items()}))
    down = frozen["blocks"]["ffn"]["down"]
    gathered = " ".join(result for result, kind in COLLECTIVE.findall(program.as_text()) if kind == "all-gather")
    (one, expected), (eight, ours) = results
    return {
        "losses": [one, eight],
        "difference": max(np.linalg.norm(ours[n] - x) / np.linalg.norm(x) for n, x in expected.items()).item(),
        "parts": [list(down[name][...].addressable_shards[0].data.shape) for name in ("kernel", "kernel_scale")],
        "gathered": sorted(set(re.findall(r"\w+\[[\d,]*\]", gathered))),
    }


def compilations():
    """Count the compilations in each of six steps with two alternating shapes, on a mesh that splits everything."""
    training = Training((1, 2, 2, 2))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    shapes = batch_on(training.mesh), batch_on(training.mesh, (3, 4, 8, 4))
    counts = []
    for batch in (*shapes, *shapes, *shapes):
        compiled.clear()
        training.run(1, batch)
        counts.append(len(compiled))
    return {"misses": training.step._cache_size(), "compiled": counts}


def attentions():
    """Compare outputs and gradients of attention on several meshes with those without a mesh; list the collectives."""
    results = {}
    for heads, sizes in ((8, (2, 1, 4, 1)), (6, (2, 1, 4, 1)), (8, (1, 2, 2, 2)), (6, (1, 2, 2, 2)), (6, (1, 1, 8, 1))):
        rng = np.random.default_rng(heads)
        arrays = [jnp.asarray(rng.standard_normal((2, 136, heads, 8)), jnp.float32) for _ in range(6)]

        def both(query, key, value, text_key, text_value, gradient):
            def attend(query, key, value, text_key, text_value):
                out = self_attention(query, key, value, rotary_tables((2, 4, 17), 8))
                return out, cross_attention(out, text_key, text_value)

            outs, pullback = jax.vjp(attend, query, key, value, text_key[:, :50], text_value[:, :50])
            return (*outs, *pullback((gradient, gradient)))

        expected = jax.jit(both)(*arrays)
        with jax.set_mesh(mesh_of(sizes)):
            compiled = jax.jit(both).lower(*arrays).compile()
            ours = compiled(*arrays)
        differences = [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(ours, expected, strict=True)]
        name = f"{heads} heads on {'x'.join(map(str, sizes))}"
        results[name] = {"difference": max(differences), **collectives(compiled.as_text())}
    return results


def samplings():
    """Sample two videos with guidance, on one device and on eight."""
    results, calls = [], []
    for sizes in ((1, 1, 1, 1), (2, 1, 2, 2)):
        mesh = mesh_of(sizes)
        rows = batch_on(mesh)
        negative = batch_on(mesh, seed=1).text
        calls.clear()
        with jax.set_mesh(mesh):
            model = model_on(mesh, adapters=False)
            arrays = [x[:2] for x in (rows.latents, rows.text, negative)]
            arrays = jax.device_put(arrays, batch_sharding(mesh))
            out = sample_latents(model, *arrays, steps=3, guidance=4.0, on_step=lambda: calls.append(1))
            results.append(np.asarray(out))
        jax.effects_barrier()
    one, eight = results
    return {"difference": float(np.abs(one - eight).max() / np.abs(one).max()), "calls": len(calls)}


if __name__ == "__main__":
    parts = {
        "attentions": attentions, "samplings": samplings, "compilations": compilations, "accumulation": accumulation,
        "quantized": quantized,
    }  # fmt: skip
    results = {name: make() for name, make in parts.items()}
    print(json.dumps({"trainings": trainings(Path(sys.argv[1])), **results}))
