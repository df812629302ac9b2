"""Writes what a reader of docs/study.md may conclude, and what not. The findings choose the sentences."""

from collections.abc import Iterable

from tfm_jax.moving_shapes.evaluation.set_metrics import TITLES
from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.findings import Cell, Findings, Verdict, sign
from tfm_jax.moving_shapes.study.formats import enumerate_words

TFM, FM = f"`{protocol.TREATMENT}`", f"`{protocol.BASELINE}`"

VERDICTS: dict[Verdict, str] = {
    "pending": "not decided yet; {done} of {seeds} seeds are done",
    "missing": "not decided, because a metric has no finite number in some run",
    "better": f"**{TFM} moves better than {FM}**",
    "guarded": f"{TFM} is better than {FM} on both deciding metrics, but worse on one that must not get worse, so it "
    "does not count as moving better",
    "partly better": f"{TFM} is better than {FM} on one deciding metric only ({{which}}), which the rule does not "
    "count as moving better",
    "undetected": "no difference is detected",
    "mixed": f"{TFM} is better than {FM} on one deciding metric and worse on the other",
    "partly worse": f"{TFM} is worse than {FM} on one deciding metric ({{which}}); on the other no difference is "
    "detected",
    "worse": f"**{TFM} moves worse than {FM}**: both deciding metrics are worse",
}


def conclusions(found: Findings) -> str:
    """Return the section on what a reader may conclude."""
    heading = "## What a reader may conclude"
    if protocol.TREATMENT not in found.study.size.arms:
        return f"{heading}\n\n{TFM} was not run, so the question of the study remains open."
    verdicts: dict[Cell, Verdict] = {cell: found.verdict(cell) for cell in found.cells}
    bullets = [f"- {_name(cell)}: {_verdict(found, cell, verdict)}." for cell, verdict in verdicts.items()]
    parts = [
        heading,
        f"The question is whether a model that was fine-tuned with {TFM} moves better than one that was fine-tuned "
        f"with {FM}, by the rule below.",
        "\n".join(bullets),
        _summary(verdicts),
        _bounds(found, verdicts),
        *(_finetuning(found, law) for law in found.study.size.laws),
        _chance(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _name(cell: Cell) -> str:
    return f"*{cell.law}*, {cell.steps} steps"


def _verdict(found: Findings, cell: Cell, verdict: Verdict) -> str:
    which = [m for m in protocol.PRIMARY if sign(found.difference(cell, protocol.TREATMENT, protocol.BASELINE, m), m)]
    return VERDICTS[verdict].format(
        done=found.seeds_done(cell),
        seeds=found.study.size.seeds,
        which=enumerate_words(TITLES[metric] for metric in which) if which else "",
    )


def _summary(verdicts: dict[Cell, Verdict]) -> str:
    """Answer the question in one sentence, once every cell is decided."""
    kinds = set(verdicts.values())
    if kinds & {"pending", "missing"}:
        return "The study as a whole is not decided."
    if kinds == {"better"}:
        return f"On this model, {TFM} moves better than {FM} on every law and after every length of training."
    if kinds == {"undetected"}:
        return (
            f"The study cannot tell {TFM} from {FM}: a reader may conclude neither that {TFM} helps nor that it "
            "makes no difference."
        )
    better, worse = (sum(kind == wanted for kind in verdicts.values()) for wanted in ("better", "worse"))
    if better:
        other = f", and moves worse in {worse}" if worse else ""
        return f"On this model, {TFM} moves better than {FM} in {better} of {len(verdicts)} cases{other}."
    if worse:
        return (
            f"On this model, {TFM} never moves better than {FM}, and moves worse in {worse} of {len(verdicts)} cases."
        )
    answer = f"By the rule, {TFM} moves neither better nor worse than {FM} in any of the {len(verdicts)} cases."
    counts = {word: sum(kind == f"partly {word}" for kind in verdicts.values()) for word in ("better", "worse")}
    partly = [f"{word} in {count}" for word, count in counts.items() if count]
    return f"{answer} On one of the two deciding metrics, it is {enumerate_words(partly)}." if partly else answer


def _bounds(found: Findings, verdicts: dict[Cell, Verdict]) -> str:
    """Say which differences the intervals leave possible where no difference is detected."""
    sentences = []
    for metric in protocol.PRIMARY:
        shares = []
        for cell in (cell for cell, verdict in verdicts.items() if verdict != "pending"):
            difference = found.difference(cell, protocol.TREATMENT, protocol.BASELINE, metric)
            mean = found.mean(cell, protocol.BASELINE, metric)
            if difference and mean and not difference.excludes_zero:
                shares.append(max(abs(difference.low), abs(difference.high)) / mean)
        if shares:
            sentences.append(f"{max(shares):.0%} of the value of {FM} ({TITLES[metric]})")
    if not sentences:
        return ""
    return f"Where no difference is detected, true differences may still be as large as {enumerate_words(sentences)}."


def _finetuning(found: Findings, law: str) -> str:
    """Say whether plain flow matching improved on the base model, without which a comparison of arms means little."""
    cell = Cell(law, found.last)
    signs = [sign(found.difference(cell, protocol.BASELINE, protocol.BASE, m), m) for m in protocol.PRIMARY]
    start = f"On *{law}*, fine-tuning with {FM} for {found.last} steps"
    done = found.records(cell, protocol.BASELINE).keys() & found.records(cell, protocol.BASE).keys()
    if len(done) < found.study.size.seeds:
        return f"{start} has not been compared with the base model with all seeds yet."
    if None in signs:
        return f"{start} cannot be compared with the base model, because a metric has no finite number in some run."
    if all(s == 1 for s in signs):
        return f"{start} gives a better model than the base on both deciding metrics: the arms compare useful training."
    return (
        f"{start} does not give a better model than the base on both deciding metrics, so a comparison of arms says "
        "little about useful fine-tuning."
    )


def _chance(found: Findings) -> str:
    """Compare the number of exploratory differences that are detected with the number that chance alone would give."""
    estimates = [
        found.difference(cell, arm, protocol.BASELINE, metric)
        for cell in found.cells
        for arm in found.study.arms(cell.law)
        for metric in protocol.PRIMARY
        if arm not in (protocol.BASELINE, protocol.TREATMENT)
    ]
    measured = [estimate for estimate in estimates if estimate]
    if not measured:
        return ""
    detected, expected = sum(e.excludes_zero for e in measured), (1 - protocol.CONFIDENCE) * len(measured)
    return (
        f"The comparisons of the other arms with {FM} are exploratory: they suggest explanations and establish "
        f"nothing. On the deciding metrics, {detected} of their {len(measured)} intervals exclude 0; chance alone "
        f"would give about {expected:.1f}."
    )


def limits(found: Findings) -> str:
    """Return the section on what the study cannot show, whatever its results."""
    run, size = found.study.run, found.study.size
    return f"""## What nothing here implies

- Anything about Wan2.1 at 1.3B or 14B, or about real videos: the model has {run.model.layers} layers of width
  {run.model.dim}, a clip has {run.clip.latent_size[0]} latent frames, and it shows one shape on a simple ground.
- Anything about motions other than {_names(size.laws)}, longer training, or another rank or learning rate. The
  learning rate was chosen for {FM}; {TFM} has another loss, and might prefer another.
- That there is no difference where none is detected.
- How good the samples look: the metrics measure positions, sizes, shapes, colours and changes of pixels."""


def _names(laws: Iterable[str]) -> str:
    return enumerate_words(f"*{law}*" for law in laws)
