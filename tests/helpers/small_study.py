"""Small studies for tests: the options of one that runs in a minute, and invented results for the report."""

import json
from pathlib import Path

import numpy as np
from helpers.random_model import write_model

from tfm_jax.cli.study import Options, make_study
from tfm_jax.config import load
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.findings import GUARDED, Findings
from tfm_jax.moving_shapes.study.plan import Run, Study, StudyRun, pilot_runs, pilot_settings, planned_runs
from tfm_jax.moving_shapes.study.plan import settings as study_settings
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.world import make_scene

METRICS = (*GUARDED, *protocol.SECONDARY)


def write_config(folder: Path) -> Path:
    """Write a model with random weights that knows the captions, and a configuration for it."""
    captions = [make_scene(np.random.default_rng((0, n)), 5, (32, 48)).caption for n in range(8)]
    write_model(folder / "model", captions)
    values = {
        "model": {"path": folder / "model", "dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4, "dtype": "float32"},
        "clip": {"frames": 5, "height": 32, "width": 48},
        "data": {"path": "none"},
        "lora": {"rank": 2},
        "train": {"output": "none", "steps": 1},
        "sampling": {"output": "none", "steps": 2},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    return file


def small_options(folder: Path) -> list[str]:
    """Write a configuration, and return the options of a study with 2 laws, 2 arms, 2 seeds and 2 lengths."""
    return [
        f"--config={write_config(folder)}", f"--output={folder / 'runs'}", f"--docs={folder / 'docs'}",
        "--arms=[fm, tfm]", "--seeds=2", "--lengths=[2, 3]", "--batch_size=2", "--clips=6", "--prompts=3",
        "--reference=6", "--rounds=8",
    ]  # fmt: skip


def make_small_study(folder: Path, config: Path, **size: object) -> Study:
    """Return a study of 2 laws and 5 seeds, with folders below `folder`."""
    run = load(StudyRun, config)
    full = {"config": config, "output": folder / "runs", "docs": folder / "docs", "run": run}
    arms = ("fm", "tfm", "tfm_mse", "tfm_rho2")
    return make_study(Options(**full, **{"arms": arms, "seeds": 5, "lengths": (10, 30), "learning_rate": 1e-3, **size}))


def invent_metrics(run: Run, **effects: float | None) -> dict[str, float | None]:
    """Invent the metrics of a run. `effects` is metric -> what TFM adds to it, or None for an infinite number."""
    scatter = 0.01 * (-1) ** run.seed * (run.arm != protocol.BASELINE)  # differences on both sides of zero
    metrics: dict[str, float | None] = dict.fromkeys(METRICS, 1.0 + run.seed + scatter)
    for metric, effect in effects.items() if run.arm == protocol.TREATMENT else ():
        metrics[metric] = None if effect is None else 1.0 + run.seed + scatter + effect
    return metrics


def invent_findings(study: Study, runs: int | None = None, pilot: bool = True, **effects: float | None) -> Findings:
    """Return findings with invented results, of the first `runs` runs only if given."""
    results = Results(study.results, study_settings(study))
    tried = Results(study.pilot_results, pilot_settings(study))
    column = dict.fromkeys(METRICS, 1.0)
    for law in study.size.laws:
        results.add("real", law=law, compared=3, prompts=["a"], generated=column, reference=column, floor=column)
    results.add("cost", seconds={arm: [0.1, 0.2, 0.1] for arm in study.size.arms})
    for run in list(planned_runs(study))[:runs]:
        for steps in run.lengths:
            record = {"metrics": invent_metrics(run, **effects), "sensitivity": invent_sensitivity(run)}
            results.add("run", **run.keys, steps=steps, **record)
    for run in pilot_runs(study) if pilot else ():
        for steps in run.lengths:
            better = 0.1 * (run.arm != protocol.BASE)
            metrics = dict.fromkeys(METRICS, 1.0 + 0.01 * (run.seed % 10) - better)
            tried.add("run", **run.keys, steps=steps, metrics=metrics)
    return Findings(study, results, tried)


def invent_sensitivity(run: Run) -> dict[str, list[float]]:
    """Invent losses with which the treatment is less sensitive than the baseline, at all levels but the first."""
    ratios = [1.5 + 0.01 * run.seed] * len(protocol.SIGMAS)
    if run.arm == protocol.TREATMENT:
        ratios = [ratios[0] + 0.1 * (-1) ** run.seed] + [ratio - 0.2 - 0.01 * run.seed for ratio in ratios[1:]]
    return {"ordered": [1.0] * len(protocol.SIGMAS), "permuted": ratios}
