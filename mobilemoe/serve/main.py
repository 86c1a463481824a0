"""Starts and ends the server."""

import ipaddress
import logging
import os
import socket
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ..runtime import load_language_model
from .app import Limits, Server


logger = logging.getLogger(__name__)
# After Ctrl-C, for what the model is writing.
GRACE_SECONDS = 5
API_KEY_VARIABLE = "MOBILEMOE_API_KEY"


def serve(
    model: str,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_body_bytes: int = 2**20,
    max_waiting: int = 32,
) -> None:
    """
    Serves a model until SIGINT or SIGTERM.

    Args:
        model (`str`): what [`load_language_model`] loads.
        device (`str`): of a checkpoint, as [`load_language_model`] takes it.
        host (`str`): address to listen on.
        port (`int`): 0 takes a free one.
        name (`str`, *optional*): of the model in requests. The default is the last part of the path.
        api_key (`str`, *optional*): demanded from clients. The default is that of MOBILEMOE_API_KEY.
        max_prompt_tokens (`int`, *optional*): longest prompt. The default is the context.
        max_tokens (`int`, *optional*): most new tokens of a request. The default is the context.
        max_body_bytes (`int`): longest body of a request.
        max_waiting (`int`): most requests that wait for the model.

    Raises:
        ValueError: for a limit below 1, an address that others can reach without a key, and what
            [`load_language_model`] raises.
        OSError: when the address is in use, or there is no such model.
    """
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    limits |= {"max_body_bytes": max_body_bytes, "max_waiting": max_waiting}
    for option, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}. Set it to 1 or more.")
    api_key = api_key if api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("The API key must be printable ASCII without spaces around it. Set another one.")
    # Before the model, which takes longer.
    listener = bind(host, port)
    with listener:
        address, port = listener.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(address).is_loopback:
            raise ValueError(
                f"--host {host} lets other machines in, and no API key is set. Set --api-key or {API_KEY_VARIABLE}, "
                "or leave --host out to serve this machine only."
            )
        loaded = load_language_model(model, device)
        context = loaded.max_seq_len
        server = Server(
            loaded,
            name or (Path(model).resolve().name if Path(model).exists() else model),
            Limits(
                min(max_prompt_tokens or context, context),
                min(max_tokens or context, context),
                max_body_bytes,
                max_waiting,
            ),
            api_key,
        )
        # From here on, who connects waits for the application and is not refused.
        listener.listen()
        logger.info(
            f"{server.name} at http://{f'[{address}]' if ':' in address else address}:{port}/v1; Ctrl-C ends it"
        )
        Process(configuration(server.app), server).run(sockets=[listener])


class Process(uvicorn.Server):
    """A server that a signal ends like any other command: no traceback, and exit code 0."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.server.engine.close(0 if self.should_exit else GRACE_SECONDS)
        self.force_exit = self.should_exit
        self.should_exit = True


def configuration(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        # Warnings and errors only, with the handlers of this process.
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=2 * GRACE_SECONDS,
    )


def bind(host: str, port: int) -> socket.socket:
    """
    Raises:
        OSError: when the address is in use or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except socket.gaierror as error:
        raise OSError(f"--host {host} is not known here: {error.strerror}. Set an address of this machine.") from error
    # A server that has just ended leaves its address in a waiting state.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"--host {host} --port {port} cannot be used: {error.strerror}. Set another port.") from error
    return listener
