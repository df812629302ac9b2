"""A program whose output is not read to its end, as in `| head`, ends without a message."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "program",
    [
        "from tfm_jax.cli.report import main; main()",  # its help is still in the buffer at the end
        "from tfm_jax.cli import command; command.run(lambda argv: print('x' * 10**6))",
    ],
)
def test_a_closed_pipe(program):
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
