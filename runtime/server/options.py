"""What the server is told, beside the engine's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import LoadError
from runtime.server.gate import LOOPBACK, Limits


@dataclass(frozen=True)
class ServerOptions:
    """``allowed_hosts`` empty means: loopback names if the server listens on loopback, any name if not."""

    host: str = "127.0.0.1"
    port: int = 30000
    served_model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    root_path: str = ""
    log_requests: bool = False
    sampling_defaults: str = "model"
    watchdog_timeout: float = 300.0
    shutdown_timeout: float = 30.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise LoadError("https needs both --ssl-keyfile and --ssl-certfile.")
        alone = [
            name
            for name in ("ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
            if getattr(self, name)
        ]
        if alone and self.ssl_certfile is None:
            raise LoadError(
                f"--{alone[0].replace('_', '-')} is for https, which needs --ssl-keyfile and --ssl-certfile."
            )
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise LoadError("--ssl-cert-reqs asks clients for certificates: --ssl-ca-certs names who signs them.")
        for name, least in (("max_body_bytes", 1), ("watchdog_timeout", 1), ("shutdown_timeout", 0)):
            if not getattr(self, name) >= least:
                raise LoadError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}.")
        if self.root_path and not self.root_path.startswith("/"):
            raise LoadError(f"--root-path begins with a slash, not {self.root_path!r}.")

    @property
    def scheme(self) -> str:
        return "http" if self.ssl_certfile is None else "https"

    @property
    def loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")

    def limits(self) -> Limits:
        """Who may come in. Raises :class:`LoadError` for a key file that is not usable."""
        hosts = self.allowed_hosts or (LOOPBACK if self.loopback else ())
        return Limits(tuple(host.lower() for host in hosts), self._keys(), self.max_body_bytes)

    def _keys(self) -> tuple[str, ...]:
        keys = [self.api_key] if self.api_key is not None else []
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise LoadError(f"--api-key-file: {error}") from error
            keys += [line.strip() for line in lines if line.strip()]
            if not keys:
                raise LoadError(f"--api-key-file {self.api_key_file} holds no key; one a line.")
        if any(not key.strip() for key in keys):
            raise LoadError("--api-key is empty: leave it out for a server without a key.")
        return tuple(keys)
