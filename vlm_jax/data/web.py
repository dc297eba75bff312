"""Files from the web, within bounds on size and time.

Servers switch it off with VLM_JAX_FETCH=0 in the environment: whoever names a URL there makes the
server visit it.
"""

from __future__ import annotations

import os
import queue
import threading
import urllib.error
import urllib.request

from vlm_jax.data import image_files

SECONDS = 30.0
SWITCH = "VLM_JAX_FETCH"


def is_url(text: str) -> bool:
    """Whether it is an http(s):// URL."""
    return text.lower().startswith(("http://", "https://"))


def read(url: str, *, max_bytes: int, seconds: float = SECONDS) -> bytes:
    """The content at an http(s):// URL. Redirects are followed to such URLs only.

    Args:
      url: see above.
      max_bytes: more are refused. seconds: for all of it, from the name server to the last byte.

    Raises:
      ImageError: not reachable, an HTTP error, too large, too slow, or switched off.
    """
    if os.environ.get(SWITCH, "") == "0":
        raise image_files.ImageError(f"{url}: reading from the web is switched off ({SWITCH}=0)")
    # In a thread: a socket's timeout is for each read, and a server can send a byte at a time.
    answer: queue.Queue[bytes | Exception] = queue.Queue()
    work = threading.Thread(target=_fetch, args=(url, max_bytes, seconds, answer), daemon=True)
    work.start()
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        found = TimeoutError(f"took longer than {seconds:g} s")
    if isinstance(found, Exception):
        raise image_files.ImageError(f"{url}: cannot read: {found}") from found
    if len(found) > max_bytes:
        raise image_files.ImageError(f"{url}: more than the limit of {max_bytes} bytes")
    return found


def _fetch(url: str, max_bytes: int, seconds: float, answer: queue.Queue) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlm_jax"})
        with _opener().open(request, timeout=seconds) as stream:
            content = stream.read(max_bytes + 1)
            # Reading so many bytes at most, http.client does not mind that there are fewer.
            promised = int(stream.headers.get("Content-Length") or len(content))
            if len(content) < min(promised, max_bytes + 1):
                raise ConnectionError(f"cut off: {len(content)} of {promised} bytes came")
            answer.put(content)
    except Exception as error:  # http.client, ssl and urllib raise many kinds
        answer.put(error)


def _opener() -> urllib.request.OpenerDirector:
    # Not build_opener: its redirects may lead to ftp://, and it has a handler of local files.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
