"""What a worker process starts with."""

import os

from starlette.types import ASGIApp

from srdeploy.pillow_remarks import ignore_remarks
from srdeploy.serve.server.app import make_app, make_desk
from srdeploy.serve.server.config import ServerConfig
from srdeploy.serve.server.journal import start_log

CONFIG_VARIABLE = "SRDEPLOY_SERVER_CONFIG"
"""The environment's name of the configuration, which the parent hands down."""


def make_worker() -> ASGIApp:
    """The application of one worker, as its parent configured it."""
    config = ServerConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    start_log(config.log, config.quiet)
    ignore_remarks()
    return make_app(config, make_desk(config))
