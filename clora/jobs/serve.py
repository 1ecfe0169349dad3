"""`clora serve`: a collection behind HTTP, for browsers and for OpenAI's clients.

Settings, keys and files are checked before a model is loaded.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from rich.console import Console

from clora.errors import InputError
from clora.serve.app import create_app
from clora.serve.engine import Engine
from clora.serve.keys import new_key, read_keys
from clora.serve.logs import log_json
from clora.serve.process import ProcessEngine
from clora.serve.server import bind, check_binding, run_server
from clora.serve.service import Service
from clora.serve.settings import Settings

ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a browser on this machine finds a server bound to all


def find_model(path: Path) -> dict[str, Path]:
    """The setting that a path on the command line is: an artefact's folder, a collection's file, or a groups.json."""
    if path.is_dir():
        return {"artefact": path}
    if not path.is_file():
        raise InputError(f"{path}: is not there; give an artefact's folder or a collection's file")
    return {"groups" if path.suffix == ".json" else "collection": path}


def add_key(path: Path, name: str) -> str:
    """A new key in the file `path`; see `keys.new_key`."""
    return new_key(path, name)


def start_engine(settings: Settings) -> Engine:
    """The engine that the settings ask for, its models open; raises as `load.open_models` does."""
    if settings.engine == "process":
        return ProcessEngine(settings)
    from clora.serve.load import open_models
    from clora.serve.threads import ThreadEngine

    return ThreadEngine(open_models(settings), settings)


def serve(settings: Settings, console: Console | None = None) -> None:
    """Serve until SIGTERM or SIGINT; see `server.run_server`.

    Raises `InputErrors` for settings, keys, an address, an artefact or a collection that are not right.
    """
    check_binding(settings)
    keys = None if settings.keys is None else read_keys(settings.keys)
    console = console or Console(stderr=True)
    with bind(settings) as socket, ExitStack() as opened:
        with console.status("loading the model") if console.is_terminal else nullcontext():
            engine = start_engine(settings)
        opened.callback(engine.close)  # a process of its own would outlive whatever fails from here on
        service = Service(settings, engine, keys)
        log_json()

        def tell(port: int) -> None:
            host = ANY_HOST.get(settings.host, settings.host)
            shown = f"[{host}]" if ":" in host else host
            effects = sum(len(offer.collection.effects) for offer in engine.offers.values())
            with suppress(OSError):  # a log that cannot be written is no reason to refuse edits
                where = f"http://{shown}:{port}/"
                console.print(f"{settings.name}: {effects} effects at {where}", markup=False, soft_wrap=True)

        app = create_app(service)
        opened.pop_all()  # to the server, which closes the service
        run_server(app, service, socket, tell)
