"""Fetches http(s) URLs, with limits on time, size, redirects and addresses."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from contextlib import closing

from .image_files_attncap import ImageError

TIMEOUT = 30.0  # seconds for all of a download, with its redirects
MAX_BYTES = 64 * 2**20
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_URL_SAFE = "%/:=&?~+!$,;'@()*[]#"  # not changed; spaces and non-ASCII letters are percent-encoded
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def fetch(url: str, *, allow_private: bool = False, timeout: float | None = None) -> bytes:
    """Downloads the content of an http(s) URL.

    Args:
        url: is percent-encoded where needed. Proxy settings are not read.
        allow_private: also connect to addresses that are not public.
        timeout: seconds for the download with all its redirects. Default: `TIMEOUT`. The time to resolve host names is not
            included; the system limits it.

    Raises:
        ImageError: the URL is refused, too slow, too large, not found or redirects too often.
    """
    timeout = TIMEOUT if timeout is None else timeout
    deadline = time.monotonic() + timeout
    target = first = urllib.parse.quote(url, _URL_SAFE, errors="surrogateescape")
    for _ in range(MAX_REDIRECTS + 1):
        name = url if target == first else f"{url} (redirected to {target})"
        response, body = _get(target, name, allow_private, timeout, deadline)
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location:
            # http.client decodes headers as Latin-1
            target = urllib.parse.urljoin(target, urllib.parse.quote(location, _URL_SAFE, "latin-1"))
        elif response.status != 200:
            raise ImageError(f"{name} answered {response.status} {response.reason}; check the address")
        elif len(body) > MAX_BYTES:
            raise ImageError(f"{name} is larger than {MAX_BYTES} bytes; download it and give its path")
        elif (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise ImageError(f"{name} was sent with the compression {encoding!r:.40}, which was not asked for; download it")
        else:
            return body
    raise ImageError(f"{url} redirects more than {MAX_REDIRECTS} times; give the final address")


def _get(url: str, name: str, allow_private: bool, timeout: float, deadline: float) -> tuple[http.client.HTTPResponse, bytes]:
    """One request, without redirects, and at most MAX_BYTES + 1 bytes of its body."""
    try:
        parts = urllib.parse.urlsplit(url)
        with closing(_connect(parts, name, allow_private, deadline)) as connection:
            # A socket's own timeout restarts with each byte: a slow server could keep the connection open for hours.
            timer = threading.Timer(_remaining(deadline), _hang_up, (connection.sock,))
            timer.start()
            try:
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
                connection.request("GET", path, headers={"User-Agent": "hf-attncap", "Accept": "image/*"})
                with connection.getresponse() as response:
                    body = response.read(MAX_BYTES + 1)
            finally:
                timer.cancel()
        _remaining(deadline)
        return response, body
    except ImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        reason = f"timed out after {timeout:g} s" if late else error
        raise ImageError(f"{name} could not be fetched ({reason}); check the address and try again") from error


def _remaining(deadline: float) -> float:
    """The seconds until a deadline; raises a TimeoutError after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _connect(parts: urllib.parse.SplitResult, name: str, allow_private: bool, deadline: float) -> http.client.HTTPConnection:
    """Resolves the host once and connects only to the addresses that were checked, so that DNS cannot change in between.

    The handshake of TLS is left to the caller, who limits its time.
    """
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageError(f"{name} cannot be fetched; give an http:// or https:// URL with a host")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host, port = _ascii_host(parts.hostname, name), parts.port or kind.default_port
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [address for address in addresses if not _is_public(address)]
    if private and not allow_private:
        raise ImageError(
            f"{name} is refused: {host} is {private[0]}, not a public address; "
            "set allow_private_urls=True (on the command line --allow-private-urls) if you trust the URL"
        )
    failure = OSError("no address")
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), timeout=_remaining(deadline))
        except OSError as error:
            failure = error
            continue
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        connection = kind(host, port)
        connection.sock = sock
        return connection
    raise failure


def _ascii_host(host: str, name: str) -> str:
    """A percent-encoded host name of any script in the ASCII form that DNS, TLS and the Host header need.

    Follows UTS 46 and IDNA 2008 as browsers do. Python's own codec implements IDNA 2003, which turns "faß.de" into another host.
    """
    letters = urllib.parse.unquote(host)
    if letters.isascii():
        return host
    try:
        import idna  # takes 10 ms and is rarely needed
    except ImportError as error:  # possible where this file is remote code on the Hub
        raise ImageError(f"{name} needs the package idna for its host name; pip install idna") from error
    return idna.encode(letters, uts46=True).decode()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the server
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket.shutdown would drop state that the reading thread needs


def _is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, including IPv4 addresses inside IPv6 ones."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST or ip in _SIX_TO_FOUR:
            return False
    return ip.is_global and not ip.is_multicast


__all__ = ["fetch"]
