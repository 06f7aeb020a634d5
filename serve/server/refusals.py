"""Requests that are not served: each has its HTTP status, and one line that says why."""

from srdeploy.errors import UserError


class Refusal(UserError):
    """The answer is `status` with {"error": the one line}."""

    status = 400

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.retry_after = retry_after
        """Seconds after which another try may succeed; None: none will."""


class BadRequest(Refusal):
    """What was sent can't be used, whenever it is sent."""


class NotFound(Refusal):
    """No such model, version or sample."""

    status = 404


class TooLarge(Refusal):
    """More bytes, pixels or images than the limits allow."""

    status = 413


class Busy(Refusal):
    """The queue is full, the model is starting, or the server is stopping: at once, not later."""

    status = 503


class Expired(Refusal):
    """The deadline passed before the answer was there."""

    status = 504


class Unauthorized(Refusal):
    """The API key is absent or wrong."""

    status = 401


class Forbidden(Refusal):
    """A page of another site asks."""

    status = 403


class UnsupportedMedia(Refusal):
    """A form of body that is not read here."""

    status = 415
