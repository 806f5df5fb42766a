"""Finished runs, in one table that only the coordinator writes.

The table is a SQLite file in the run folder, or any database by URL. A run is written once, whole, when it has ended;
what was killed is not in it and is run again.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ..errors import ConfigurationError, DamagedFileError, MainstemError
from ..files import replacing
from .runner import Finished, Key, Outcome

FILE = "runs.sqlite"

_schema = sql.MetaData()
_studies = sql.Table(
    "studies",
    _schema,
    sql.Column("study", sql.String(255), primary_key=True),
    sql.Column("created", sql.String(40), nullable=False),
    sql.Column("fingerprint", sql.JSON, nullable=False),
)
_runs = sql.Table(
    "runs",
    _schema,
    sql.Column("study", sql.String(255), primary_key=True),
    sql.Column("arm", sql.String(255), primary_key=True),
    sql.Column("kind", sql.String(8), primary_key=True),
    sql.Column("number", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("setting", sql.JSON, nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("reason", sql.Text),
    sql.Column("value", sql.Double),
    sql.Column("loss", sql.Double),
    sql.Column("steps", sql.BigInteger, nullable=False),
    sql.Column("seconds", sql.Double, nullable=False),
    sql.Column("curve", sql.JSON, nullable=False),
    sql.Column("scores", sql.LargeBinary),
    sql.Column("cost", sql.JSON),
)


class Store:
    """The finished runs of one study.

    Attributes:
        created: when the study began, ISO 8601 in UTC.
        runs: every finished run, by key.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], url: str | None = None):
        """Open the study of `folder`, or begin it.

        Raises:
            ConfigurationError: the folder holds another experiment (the error says in which fields), or no database
                answers at `url`.
            DamagedFileError: the SQLite file is empty, truncated or not one.
        """
        self.study = folder.resolve().name
        if url is None:
            _check(folder / FILE, fingerprint, self.study)
        try:
            self._engine = sql.create_engine(url or f"sqlite:///{folder / FILE}", json_serializer=_json)
        except (SQLAlchemyError, ImportError) as error:  # not a URL, or its driver is not installed
            raise ConfigurationError(f"store: {error}") from None
        self.where = self._engine.url.render_as_string(hide_password=True) if url else str(folder / FILE)
        try:
            _schema.create_all(self._engine)
            self.created = self._begin(fingerprint)
            self.runs = self._read()
        except SQLAlchemyError as error:
            raise self._failed(error, "cannot be read") from None

    def add(self, key: Key, setting: dict[str, Any], outcome: Outcome) -> None:
        """Record a finished run, durably. Raises MainstemError if it cannot be written; what was there stays."""
        row = {"study": self.study, **key._asdict(), "setting": setting, **vars(outcome)}
        row |= {column: json.loads(_json(row[column])) for column in ("setting", "curve", "cost")}
        row |= {column: _finite(row[column]) for column in ("value", "loss", "seconds")}
        try:
            with self._engine.begin() as connection:
                connection.execute(_runs.insert(), row)
        except IntegrityError:
            raise MainstemError(
                f"{self.where}: {key.kind} {key.number} of arm {key.arm} is recorded already; "
                f"another process is writing to the study {self.study!r}"
            ) from None
        except SQLAlchemyError as error:
            raise self._failed(error, "cannot be written") from None
        self.runs[key] = _finished(row)

    def close(self) -> None:
        self._engine.dispose()

    def _begin(self, fingerprint: dict[str, Any]) -> str:
        with self._engine.begin() as connection:
            found = connection.execute(sql.select(_studies).where(_studies.c.study == self.study)).first()
            if found is None:
                row = _first_row(self.study, fingerprint)
                connection.execute(_studies.insert(), row)
                return row["created"]
        differing = sorted(_differences(found.fingerprint, json.loads(_json(fingerprint))))
        if differing:
            raise ConfigurationError(
                f"{self.where} holds another experiment; it differs in "
                + "; ".join(differing)
                + ". Choose another folder, or give the same experiment to go on with it."
            )
        return found.created

    def _read(self) -> dict[Key, Finished]:
        with self._engine.connect() as connection:
            rows = connection.execute(sql.select(_runs).where(_runs.c.study == self.study)).mappings()
            return {Key(row["arm"], row["kind"], row["number"]): _finished(row) for row in rows}

    def _failed(self, error: SQLAlchemyError, what: str) -> MainstemError:
        cause = error.orig if isinstance(error, DBAPIError) else error
        return MainstemError(
            f"{self.where} {what}: {cause}. The runs recorded before are kept; "
            f"once this is mended, the same command goes on from there."
        )


def _check(path: Path, fingerprint: dict[str, Any], study: str) -> None:
    """Make a new SQLite file whole under its name, or see that the one there is whole."""
    if not path.exists():
        try:
            with replacing(path) as temporary:
                engine = sql.create_engine(f"sqlite:///{temporary}", json_serializer=_json)
                _schema.create_all(engine)
                with engine.begin() as connection:
                    connection.execute(_studies.insert(), _first_row(study, fingerprint))
                engine.dispose()
        except (OSError, SQLAlchemyError) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise MainstemError(f"{path} cannot be made: {cause}") from None
        return
    remedy = "restore a copy, or remove it to begin again"
    if path.stat().st_size == 0:
        raise DamagedFileError(f"{path} is empty (0 bytes), where finished runs were kept; {remedy}")
    engine = sql.create_engine(f"sqlite:///{path}")
    try:
        with engine.connect() as connection:
            report = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
            tables = set(sql.inspect(connection).get_table_names())
    except DBAPIError as error:
        if "malformed" in str(error.orig) or "not a database" in str(error.orig):
            raise DamagedFileError(f"{path} is not a whole SQLite file ({error.orig}); {remedy}") from None
        raise MainstemError(f"{path} cannot be read: {error.orig}") from None
    finally:
        engine.dispose()
    if report != ["ok"] or not tables >= set(_schema.tables):
        raise DamagedFileError(f"{path} is not a whole SQLite file of runs ({report[0]}); {remedy}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; another one that tries is told who has it. Ends with the process, whatever
    ends it."""
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (kept open for as long as the lock is held)
    except OSError as error:
        raise ConfigurationError(f"out: {folder} cannot be written to ({error.strerror})") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise MainstemError(f"{folder} is in use by {holder}; wait for it, or choose another folder") from None
        try:
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
            handle.flush()
        except OSError as error:
            raise MainstemError(f"{path} cannot be written: {error.strerror}") from None
        yield


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _finished(row: Mapping[Any, Any]) -> Finished:
    return Finished(row["setting"], Outcome(**{name: row[name] for name in Outcome.__dataclass_fields__}))


def _first_row(study: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {"study": study, "created": now(), "fingerprint": fingerprint}


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """The leaves in which two JSON values differ, each with both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {*then, *now}:
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{where}.{i}")
    elif then != now:
        yield f"{where}: {_short(then)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and Inf, which JSON and some databases lack."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False)
