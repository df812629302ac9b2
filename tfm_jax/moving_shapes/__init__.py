"""A toy world of moving shapes, in which the whole chain of the product runs within minutes on a CPU.

It provides clips with captions and known positions, a tiny Wan2.1 trained on them, metrics of motion, and a study that
compares flow matching with TFM. The product does not import it.

    scene.py        the vocabulary and constants of the world, and its types: clip spec, object, scene
    laws.py         the laws of motion in closed form
    captions.py     writes and reads captions
    motion.py       draws random paths that obey a law
    rendering.py    turns positions into pixels
    world.py        makes scenes and writes folders of clips: start here
    tokenizer.py    builds a small T5 tokenizer from the captions
    numbers.py      formats numbers that may be missing
    pretraining/    trains the embedded model, from random weights
    wan_tiny/       the embedded model, in the Diffusers layout
    evaluation/     tracks the objects of clips and compares their motion with that of real clips
    study/          fine-tunes with several objectives and writes docs/study.md
"""
