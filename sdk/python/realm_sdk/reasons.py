"""Why a connection could not be made, or why it ended, as the error that callers get."""

from __future__ import annotations

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI

from realm_sdk.errors import AuthenticationError, ConnectionLost, ProtocolError, RealmError, Unavailable


def closed(error: ConnectionClosed) -> RealmError:
    """Why the server (or the network) ended the connection."""
    close = error.rcvd
    if close is None:
        return ConnectionLost("connection_lost", "the connection broke off")
    details = {"close_code": close.code}
    reason = close.reason or "no reason given"
    match close.code:
        case 4401:
            return AuthenticationError("auth_failed", close.reason or "the server refused the key", details=details)
        case 1013:
            return Unavailable("busy", f"the server has no place for this: {reason}", details=details, retry_after=1)
        case 1001:
            return ConnectionLost("connection_lost", f"the server shuts down: {reason}", details=details, retry_after=1)
        case 1002 | 1008 | 1009 | 4400:
            return ProtocolError("protocol_error", f"the server refused a frame: {reason}", details=details)
        case code:
            return ConnectionLost("connection_lost", f"the server closed ({code}): {reason}", details=details)


def not_connected(url: str, error: Exception) -> RealmError:
    """Why no connection came about."""
    if isinstance(error, InvalidStatus):
        response = error.response
        if response.status_code == 503:
            wait = response.headers.get("Retry-After", "1")
            retry_after = float(wait) if wait.isdecimal() else 1.0
            return Unavailable("busy", f"{url} takes no more connections at the moment", retry_after=retry_after)
        text = f"{url} answered with HTTP status {response.status_code}: is it a Realm server?"
    elif isinstance(error, InvalidURI):
        text = f"{url!r} is not a WebSocket URL: it should look like ws://127.0.0.1:8765"
    else:
        text = f"no connection to {url}: {error}"
    return ConnectionLost("connect_failed", text)
