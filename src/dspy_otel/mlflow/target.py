"""Where to write: the tracking URI and the experiment, as the user named them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from dspy_otel.content import redaction
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.version import __version__

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds for one request to a server."""
DEFAULT_STORE: Final = "sqlite:///mlflow.db"
"""MLflow's own default."""
_DATABRICKS: Final = frozenset({"databricks", "databricks-uc", "uc"})
_SQL_SCHEMES: Final = frozenset({"sqlite", "postgresql", "mysql", "mssql"})


def ui_command(store: str) -> str:
    """The command that opens MLflow's pages of a store.

    It has its whole path where a shell would not find it: the virtual environment is not activated.

    Args:
        store: its URI, without a password.
    """
    program = "dspy-otel"
    with contextlib.suppress(OSError):  # a working directory that is gone
        here = None if shutil.which(program) else shutil.which(program, path=os.path.dirname(sys.executable))
        if here is not None:
            near = os.path.relpath(here)
            program = shlex.quote(here if near.startswith(os.pardir) or os.sep not in near else near)
    return f"{program} ui --tracking-uri {store}"


@dataclass(frozen=True, slots=True)
class Target:
    """One experiment of one MLflow.

    Attributes:
        given: the tracking URI as given, or None for ``MLFLOW_TRACKING_URI``, which is read when it is used.
        experiment: name or id, or None for what the environment names.
        experiment_is_id: None when it may be either.
        directory: where a relative sqlite path starts.
        timeout: seconds for one request to a server.
        create: create a missing experiment or sqlite database. False for readers.
    """

    given: str | None = None
    experiment: str | None = None
    experiment_is_id: bool | None = None
    directory: str = ""
    timeout: float = DEFAULT_TIMEOUT
    create: bool = True

    @property
    def raw_uri(self) -> str:
        """The tracking URI as it is set, unchecked."""
        return self.given or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE

    @property
    def is_default(self) -> bool:
        """Whether no tracking URI is set."""
        return not (self.given or os.environ.get("MLFLOW_TRACKING_URI"))

    @property
    def is_server(self) -> bool:
        """Whether it is a server."""
        return _scheme(self.raw_uri) in ("http", "https")

    @property
    def uri(self) -> str:
        """The tracking URI, a relative sqlite path made absolute.

        Raises:
            ExportError: it is of a kind that cannot be used.
        """
        uri = self.raw_uri
        if self.is_server:
            return uri.rstrip("/")
        scheme = _scheme(uri)
        if scheme in _SQL_SCHEMES:
            return absolute(uri, self.directory or working_directory())
        if uri.partition(":")[0] in _DATABRICKS:
            raise ExportError(
                "databricks",
                f"Databricks ({public_uri(uri)}) takes traces by OTLP, into tables of Unity Catalog: use "
                "OTEL_TRACES_EXPORTER=otlp with an endpoint and headers as in docs/backends.md, under 'Databricks'.",
                unavailable=True,
                permanent=True,
            )
        if scheme in ("", "file"):
            raise ExportError(
                "file store",
                f"MLflow's file store ({public_uri(uri)}) cannot take OpenTelemetry traces. Use a SQL store, "
                "for example MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or a server.",
                unavailable=True,
                permanent=True,
            )
        raise ExportError(
            "uri",
            f"The MLflow tracking URI {public_uri(uri)} is not supported: use http(s):// of an MLflow server, "
            "or a SQL store such as sqlite:///mlflow.db.",
            unavailable=True,
            permanent=True,
        )

    @property
    def named_experiment(self) -> tuple[str, bool | None]:
        """The experiment, and whether that is an id: None when it may be either."""
        if self.experiment is not None:
            return self.experiment, self.experiment_is_id
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return experiment_id, True
        if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            return name, False
        return "0", True

    def is_at(self, tracking_uri: str) -> bool:
        """Whether another tracking URI is this one."""
        return absolute(tracking_uri, self.directory or working_directory()).rstrip("/") == self.uri

    def about(self) -> dict[str, Any]:
        """The part that is stored in the journal: no credentials."""
        try:
            uri = self.uri
        except ExportError:
            uri = self.raw_uri
        experiment, is_id = self.named_experiment
        return {
            "tracking_uri": public_uri(uri),
            "experiment": experiment,
            "experiment_is_id": is_id,
            "made_by": f"dspy-otel {__version__}",
        }

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> Target:
        """The target of a journal. ``MLFLOW_TRACKING_URI`` gives the credentials if it is the same target.

        Raises:
            ValueError: the target is not in it.
        """
        uri, experiment, is_id = about.get("tracking_uri"), about.get("experiment"), about.get("experiment_is_id")
        if not isinstance(uri, str) or not isinstance(experiment, str) or is_id not in (None, True, False):
            raise ValueError("about.json does not say where its spans were to go")
        ours = os.environ.get("MLFLOW_TRACKING_URI", "")
        return cls(ours if ours and public_uri(ours).rstrip("/") == uri.rstrip("/") else uri, experiment, is_id)


def working_directory() -> str:
    """The working directory; empty if it was removed, as under a notebook: absolute paths do not need it."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def public_uri(uri: str) -> str:
    """A URI without a user name or password, also in its query, fit for a log line."""
    parts = urlsplit(uri)
    pairs = [pair for pair in parts.query.split("&") if not _is_credential(pair.partition("=")[0])]
    query = "&".join(pairs)
    if "@" not in parts.netloc and query == parts.query:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}"


def _is_credential(name: str) -> bool:
    return name.lower() in ("user", "username") or redaction.is_secret_name(unquote(name))


def absolute(uri: str, directory: str) -> str:
    """A ``sqlite:///`` URI with its relative path, if it has one, taken from ``directory``."""
    prefix, separator, path = uri.partition(":///")
    if prefix.split("+", 1)[0] != "sqlite" or not separator or not path or path.startswith((":memory:", "file:")):
        return uri
    return f"{prefix}:///{os.path.join(directory, path)}"


def sqlite_path(uri: str) -> str | None:
    """The file of a sqlite store; None for another store, or one in memory."""
    path = uri.partition(":///")[2].partition("?")[0] if _scheme(uri) == "sqlite" else ""
    return path if path and not path.startswith((":memory:", "file:")) else None


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.split("+", 1)[0].lower()
