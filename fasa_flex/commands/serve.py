"""``fasa-flex serve``: ``transformers serve --continuous-batching`` for one model under FASA.

The server, its routes and its scheduler are transformers' own. FASA is enabled on the loaded model before the server
starts, counts of dense and sparse queries are logged, and ``GET /fasa`` returns them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serve import Serve

from fasa_flex.calibration.profile import FasaProfile
from fasa_flex.core.config import FasaConfig
from fasa_flex.model.enable import enable
from fasa_flex.model.handle import Fasa

_log = logging.getLogger("fasa_flex.serve")

_PAUSE = 10.0
"""Seconds between two lines of the log."""


def serve(model: str, options: Sequence[str], config: FasaConfig, profile: FasaProfile | None = None) -> None:
    """Serve a model until the process is interrupted.

    Args:
        model: a folder, or a Hub repository.
        options: options of ``transformers serve``, such as ``["--port", "8001", "--cb-num-blocks", "512"]``.
        config: settings of FASA.
        profile: the model's profile; None: the first prompt of at least 128 tokens calibrates, and requests before it
            are dense.

    Raises:
        ValueError: the profile does not fit the model, an option is unknown, or packages for serving are missing.
    """
    import typer

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _log.setLevel(logging.INFO)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_served(config, profile))
    try:
        # a server that does not block is one whose `start_server` is called
        app(args=[model, "--continuous-batching", "--non-blocking", *options], standalone_mode=False)
    except ImportError as error:
        raise ValueError(f"transformers serve: {error}") from error
    except Exception as error:  # typer's usage errors are click's or, in later releases, of a copy of click
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(f"transformers serve: {error.format_message()}") from error


def _served(config: FasaConfig, profile: FasaProfile | None) -> Any:
    """Make the class that ``transformers serve`` would call, with FASA before the server starts."""

    class Served(Serve):
        def start_server(self) -> None:
            """Enable FASA on the model that was loaded, and run the server in this thread."""
            (loaded,) = self._model_manager.loaded_models.values()
            model: PreTrainedModel = loaded.model
            with enable(model, profile, config) as fasa, _Counting(fasa):
                self.server.config.app.add_api_route("/fasa", lambda: counts(fasa))
                _log.info("serving %s under %r", loaded.model.name_or_path, fasa)
                self.server.run()
                self._generation_state.shutdown()

    return Served


def counts(fasa: Fasa) -> dict[str, Any]:
    """Counts and settings of a handle, JSON-ready: those of `FasaStats.as_dict`, and the bytes of packed pages."""
    return {**fasa.stats.as_dict(), "packed_bytes": fasa.packed_bytes}


class _Counting:
    """Log the counts of a handle again and again, if they have changed, and at the end."""

    def __init__(self, fasa: Fasa) -> None:
        self._fasa, self._over = fasa, threading.Event()
        self._thread = threading.Thread(target=self._run, name="fasa-counts", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        former, over = (0, 0), False
        while not over:
            over = self._over.wait(_PAUSE)
            stats = self._fasa.stats
            now = stats.dense_queries, stats.sparse_queries
            if now != former:
                share = 100 * stats.kv_share
                _log.info("%d dense queries, %d sparse ones that attended to %.1f %% of their keys", *now, share)
            former = now
