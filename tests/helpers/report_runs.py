"""Made-up folders of training runs, for tests of the report."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tfm_jax import video

EVIL = "</script><script>alert(1)</script><b>&amp;"
"""Text that a page must show as it is."""

PROMPTS = ["一个蓝色的圆 moves", f"a disc {EVIL}"]

STEPS = 40
SKIPPED = 7
RESUMED = 21


def write_run(folder: Path) -> Path:
    """Write a run of `STEPS` steps out of 50: resumed once, one step skipped, evaluated twice, with samples."""
    bare_run(folder)
    rng = np.random.default_rng(0)
    write_lines(folder / "metrics.jsonl", (_metrics(step, rng.uniform()) for step in range(1, STEPS + 1)))
    losses = {"base": {0: 0.4}, "lora": {20: 0.3, 40: 0.2}}
    evaluations = [_evaluation(model, step, loss) for model, at in losses.items() for step, loss in at.items()]
    write_lines(folder / "validation.jsonl", evaluations)
    write_lines(folder / "events.jsonl", [
        {"time": "2030-01-01T10:00:00", "step": 0, "event": "started", "detail": EVIL, "steps": 45},
        {"time": "2030-01-01T11:00:00", "step": RESUMED, "event": "resumed", "detail": "", "steps": 50},
    ])  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"versions": {"jax": "0.0"}, "command": ["tfm-train", EVIL]}))
    for name in ("base", "step_000020", "step_000040"):
        for number in range(len(PROMPTS)):
            write_video(folder / "samples" / name / f"{number:03}.mp4")
    (folder / "samples" / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def bare_run(folder: Path) -> Path:
    """Write a run of 50 steps that has not finished a step."""
    folder.mkdir()
    write_lines(folder / "events.jsonl", [{"step": 0, "event": "started", "steps": 50}])
    (folder / "config.yaml").write_text("train:\n  epochs: 2\nmodel:\n  path: '</script>'\n")
    (folder / "metrics.jsonl").touch()
    return folder


def write_lines(file: Path, records: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_video(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    video.write_clip(file, np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8), 8)


def _metrics(step: int, noise: float) -> dict:
    if step == SKIPPED:
        return {"step": step, "loss": None, "grad_norm": None, "skipped": True, "clips": ["bad.mp4"]}
    return {
        "step": step, "loss": 1 / step + noise, "direction": noise, EVIL: 1.0, "grad_norm": noise + 1,
        "learning_rate": 1e-3, "seconds": 2.0, "clips_per_second": 4.0, "memory_bytes": 2**31, "mfu": 0.5,
        "loss_by_level": [0.5, None, float(step)],
    }  # fmt: skip


def _evaluation(model: str, step: int, loss: float) -> dict:
    by_level = [loss * (bin + 1) for bin in range(10)]
    return {"step": step, "model": model, "loss": {"fm": loss, "tfm": 2 * loss},
            "by_level": {"fm": by_level, "tfm": by_level}, "clips": 32}  # fmt: skip
