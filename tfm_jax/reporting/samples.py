"""The sample videos of a run: for every prompt that of the base model, and that of the LoRA at every saved step."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tfm_jax.prompts import read_prompts
from tfm_jax.video import find_clips

MAX_BYTES = 48 * 2**20
"""Limit on the videos in a page, in bytes of their files. In the page they take a third more. Browsers become slow on
pages of hundreds of megabytes, and e-mail and issue trackers refuse them."""

Videos = Mapping[str, Path]
"""Name of a video, such as 003 -> its file. Videos with the same name have the same prompt and noise."""


class _Chosen(NamedTuple):
    """The videos that fit on the page."""

    names: list[str]
    base: Videos
    steps: dict[int, Videos]
    note: str
    """What was left out; empty if nothing was."""


def sample_files(folder: Path) -> list[Path]:
    """Return the paths that `build_samples` reads."""
    base, steps = _find(folder)
    return [_prompt_file(folder), *base.values(), *(file for videos in steps.values() for file in videos.values())]


def build_samples(folder: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the samples of a run as data URIs.

    The result contains `steps`, `note` and `rows`: for each prompt its `caption`, the video of the base model (`base`)
    and those of the LoRA (`lora`, at `steps`), with None for a video that does not exist.

    Args:
        limit: maximum of the bytes of all videos. Beyond it, every second step is left out, again and again; if the
            newest step alone is too large, the last prompts are. The note says so.
    """
    chosen = _choose(*_find(folder), limit)
    prompts = read_prompts(_prompt_file(folder)) if _prompt_file(folder).is_file() else []
    return {
        "steps": list(chosen.steps),
        "note": chosen.note,
        "rows": [
            {
                "caption": _caption(name, prompts),
                "base": _data_uri(chosen.base.get(name)),
                "lora": [_data_uri(videos.get(name)) for videos in chosen.steps.values()],
            }
            for name in chosen.names
        ],
    }


def _prompt_file(folder: Path) -> Path:
    return folder / "samples" / "prompts.txt"


def _find(folder: Path) -> tuple[Videos, dict[int, Videos]]:
    """Return the videos of the base model, and step -> videos of the LoRA, in ascending order of steps."""
    found = {
        int(match[1]): _videos(path)
        for path in (folder / "samples").glob("step_*")
        if (match := re.fullmatch(r"step_([0-9]+)", path.name))
    }
    return _videos(folder / "samples" / "base"), {step: found[step] for step in sorted(found) if found[step]}


def _videos(folder: Path) -> Videos:
    return {file.stem: file for file in find_clips(folder)}


def _choose(base: Videos, steps: dict[int, Videos], limit: int) -> _Chosen:
    names = list(dict.fromkeys(name for videos in (base, *steps.values()) for name in videos))
    kept_names, kept_steps = names, list(steps)

    def size() -> int:
        shown = [base, *(steps[step] for step in kept_steps)]
        return sum(videos[name].stat().st_size for videos in shown for name in kept_names if name in videos)

    everything = size()
    while size() > limit and len(kept_steps) > 1:
        kept_steps = kept_steps[::-1][::2][::-1]  # the newest step stays
    while size() > limit:
        kept_names = kept_names[:-1]
    note = ""
    if len(kept_names) < len(names) or len(kept_steps) < len(steps):
        note = (
            f"All videos together have {everything / 2**20:.0f} MiB, and a page holds at most {limit / 2**20:.0f} MiB. "
            f"So it shows {len(kept_steps)} of {len(steps)} saved steps and {len(kept_names)} of {len(names)} prompts; "
            "the others are in the folder samples/ of the run."
        )
    return _Chosen(kept_names, base, {step: steps[step] for step in kept_steps}, note)


def _caption(name: str, prompts: Sequence[str]) -> str:
    """Return the prompt of a video: video 003 has the fourth prompt. Without a prompt, return the name."""
    return prompts[int(name)] if name.isdecimal() and int(name) < len(prompts) else f"sample {name}"


def _data_uri(file: Path | None) -> str | None:
    return file and f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
