"""Ctrl-C and SIGTERM, sent to small programs that run as subprocesses."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tfm_jax import interrupts

PROGRAM = """
import sys, time
from tfm_jax import interrupts
from tfm_jax.cli import command
from tfm_jax.errors import StoppedEarly

def work(argv):
    try:
        if argv == ["saves"]:
            with interrupts.postponed("saving after this step"):
                print("ready", flush=True)
                while not interrupts.requested():
                    time.sleep(0.01)
                print("saved", flush=True)
                raise StoppedEarly(f"stopped by {interrupts.requested()}; the same command continues")
        if argv == ["hangs"]:
            with interrupts.postponed("saving after this step"):
                print("ready", flush=True)
                time.sleep(60)
                time.sleep(60)
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)

command.run(work)
"""


def start(*arguments: str) -> subprocess.Popen:
    program = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "error: ended by SIGTERM\n")],
)
def test_a_program_that_saves_nothing_cleans_up_and_ends(number, code, line):
    process = start()
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("cleaned\n", line)
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_saves_its_work_stops_with_code_75(number):
    process = start("saves")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == "saved\ncleaned\n"
    name = number.name
    assert err == (
        f"{name}: saving after this step; send it again to end the program at once\n"
        f"stopped by {name}; the same command continues\n"
    )
    assert process.returncode == 75


def test_a_second_signal_ends_a_program_that_does_not_respond():
    process = start("hangs")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving after this step")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_ctrl_c_during_imports_is_one_line():
    code = "from tfm_jax import cli\nraise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "error: interrupted\n"
    assert done.returncode in (130, -signal.SIGINT)


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.handled():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_program_in_the_background_keeps_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_handled():
    entered = []

    def work():
        with interrupts.handled():
            entered.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered
