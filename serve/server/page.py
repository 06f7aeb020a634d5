"""The page at `/`: photos in, labels shown in the browser; one file that loads nothing else."""

import base64
import functools
import hashlib
import re

from srdeploy.serve import report


@functools.cache
def render_page() -> tuple[str, str]:
    """The page as HTML text, and the Content-Security-Policy that it must be sent with.

    The policy lets the browser run this very script and style, speak with this very server, and
    nothing else: what a class or a file is named can't become code, nor can a photo leave.
    """
    page = report.render_page("srdeploy.serve.server", "page.html")
    rules = (
        "default-src 'none'",
        f"script-src {_digest(page, 'script')}",
        f"style-src {_digest(page, 'style')}",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return page, "; ".join(rules)


def _digest(page: str, tag: str) -> str:
    """The policy's name for the text of the page's one `tag`."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
