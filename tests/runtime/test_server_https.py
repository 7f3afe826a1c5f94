"""https: certificates of the server and of its clients, encrypted keys, and what the log says about requests."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from runtime.cli import main
from tests.runtime.served import GREEDY, Served

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
PASSWORD = "a pass phrase"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An encrypted key and a certificate that is its own authority, for server and client alike."""
    folder = Path(tmp_path_factory.mktemp("https"))
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    secret = ["-passout", f"pass:{PASSWORD}", "-keyout", key, "-out", certificate]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", *secret, *subject], check=True, capture_output=True
    )
    return key, certificate


def test_https_with_certificates_on_both_sides(files: tuple[str, str]) -> None:
    key, certificate = files
    secret = ("--ssl-keyfile", key, "--ssl-certfile", certificate, "--ssl-keyfile-password", PASSWORD)
    demand = ("--ssl-ca-certs", certificate, "--ssl-cert-reqs", "2")
    with Served(*secret, *demand, "--log-requests", "--root-path", "/llm") as server:
        stranger = ssl.create_default_context(cafile=certificate)
        with pytest.raises(httpx.HTTPError):
            server.get("/health", verify=stranger)
        known = ssl.create_default_context(cafile=certificate)
        known.load_cert_chain(certificate, key, PASSWORD)
        answer = server.post("/v1/completions", GREEDY, verify=known)
        assert answer.json()["usage"]["completion_tokens"] == GREEDY["max_tokens"]
        assert server.get("/openapi.json", verify=known).json()["servers"] == [{"url": "/llm"}]
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health")
        assert "1 prompts of [" in server.log
        assert "max_tokens 12, temperature 0" in server.log
        assert "def main" not in server.log
        assert server.stop() == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ssl-keyfile", "K", "--ssl-certfile", "C"], "https"),
        (["--ssl-keyfile", "K", "--ssl-certfile", "C", "--ssl-keyfile-password", "wrong"], "https"),
        (["--ssl-keyfile", "K"], "needs both"),
        (["--ssl-ca-certs", "C"], "--ssl-ca-certs is for https"),
        (["--ssl-keyfile", "K", "--ssl-certfile", "C", "--ssl-cert-reqs", "2"], "names who signs them"),
        (["--ssl-keyfile", "C", "--ssl-certfile", "/nowhere"], "https"),
        (["--root-path", "llm"], "begins with a slash"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    files: tuple[str, str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = dict(zip("KC", files, strict=True))
    assert main(["serve", "demo", "--port", "0", *(real.get(flag, flag) for flag in flags)]) == 1
    assert message in capsys.readouterr().err
