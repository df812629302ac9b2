"""A toy world of moving shapes, in which the whole pipeline runs within minutes on a CPU.

This package provides clips with captions and known positions, a tiny Wan2.1 trained on such clips, motion metrics, and
a study that compares flow matching with TFM. The rest of tfm_jax, except its command-line programs, does not import it.

    scene.py        defines the vocabulary, the constants and the types of the world
    laws.py         implements the laws of motion in closed form
    captions.py     writes and reads captions
    motion.py       draws random paths that obey a law
    rendering.py    turns positions into pixels
    world.py        makes scenes and writes folders of clips: start here
    tokenizer.py    builds a small T5 tokenizer from the captions
    numbers.py      formats numbers that may be missing
    bootstrap.py    computes confidence intervals
    pretraining/    trains the embedded model, from random weights
    wan_tiny/       holds the embedded model, in the Diffusers layout
    evaluation/     tracks the objects in clips and compares their motion with that in real clips
    demo/           draws the report and the animation of scripts/demo.py
    study/          fine-tunes with several objectives and writes docs/study.md
"""
