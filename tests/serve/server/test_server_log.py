"""The log of untrusted input."""

import json
import logging

import pytest

from srdeploy.serve.server.server_log import LOG, log, start_log


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_path_with_line_ends_stays_on_one_line(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start_log("json" if form == "json" else "text")
    try:
        log("request", path="/a\n12:00:00 ready\x1b[31m", status=404)
    finally:
        LOG.handlers = []
        logging.getLogger("uvicorn").handlers = []
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    if form == "json":
        assert json.loads(line)["status"] == 404
    else:
        assert line.endswith(" status=404")
