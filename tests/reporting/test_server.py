"""tfm-report --serve: the page in a browser on the same machine, which follows the run."""

import http.client
import json
import socket
import threading

import pytest
from helpers.report_runs import bare_run

from tfm_jax.errors import InputError
from tfm_jax.reporting.server import make_server


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path / "run")


@pytest.fixture
def server(run):
    with make_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path: str, **headers: str) -> tuple[int, str, str | None]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    content = reply.read().decode()
    connection.close()
    return reply.status, content, reply.getheader("ETag")


def test_only_this_machine_can_connect(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_the_page_and_nothing_else(server):
    code, page, _ = get(server, "/")
    assert code == 200
    assert '<html lang="en" data-live="true">' in page
    assert "connect-src 'self'" in page
    assert [get(server, path)[0] for path in ("/config.yaml", "/../config.yaml", "/curves")] == [404] * 3


def test_a_website_with_the_address_of_this_machine_is_refused(server):
    assert get(server, "/", Host="evil.example")[0] == 403
    assert get(server, "/curves.json", Host=f"evil.example:{server.server_port}")[0] == 403
    assert get(server, "/curves.json", Host=f"localhost:{server.server_port}")[0] == 200


def test_blocks_are_sent_again_only_after_a_change(server, run):
    code, content, tag = get(server, "/curves.json")
    assert (code, json.loads(content)["summary"]) == (200, ["step 0 of 50"])
    assert get(server, "/curves.json", If_None_Match=tag) == (304, "", tag)
    _, _, samples_tag = get(server, "/samples.json")

    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code, content, new_tag = get(server, "/curves.json", If_None_Match=tag)
    assert (code, json.loads(content)["summary"][0]) == (200, "step 1 of 50")
    assert new_tag != tag
    assert get(server, "/samples.json", If_None_Match=samples_tag)[0] == 304


def test_a_run_that_cannot_be_read_for_a_while(server, run):
    assert get(server, "/curves.json")[0] == 200
    (run / "config.yaml").rename(run / "away")
    code, content, _ = get(server, "/curves.json")
    assert (code, content) == (
        503, f"{run}: contains no config.yaml; expected the folder of a training run (its train.output)"
    )  # fmt: skip
    (run / "away").rename(run / "config.yaml")
    assert get(server, "/curves.json")[0] == 200


def test_a_port_in_use(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--serve={port}: Address already in use; expected a free port"):
            make_server(run, port)
