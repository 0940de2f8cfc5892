"""Whether a detached application is still wanted: by what Serve lists, and where Serve cannot be asked, by its routers.

Pure: time and answers go in, a reason to end comes out. Single-threaded.
"""

from __future__ import annotations

from pdray.control.suspicions import Suspicions

NOT_LISTED_TIMES = 2  # in a row: a controller that has just come back might not know everything yet
UNWATCHED_LIMIT_S = 300.0


class Wanted:
    """An application that Serve lists is wanted, however silent its routers are: Serve replaces those.

    Args:
        interval_s: reason_to_end() is called at least so often.
    """

    def __init__(self, now: float, interval_s: float) -> None:
        self._num_not_listed = 0
        self._routers = Suspicions(interval_s)
        self._routers.expect(
            now, "routers", "", UNWATCHED_LIMIT_S, sign="no router and no answer of Serve", next="the application ends"
        )

    def serve_answered(self, now: float, *, is_listed: bool) -> None:
        """Serve was asked and has said whether it has the application."""
        self._num_not_listed = 0 if is_listed else self._num_not_listed + 1
        self._routers.heard(now, "routers", "")

    def router_seen(self, now: float) -> None:
        """A router has watched, or a worker has told that it holds a session with one."""
        self._routers.heard(now, "routers", "")

    def reason_to_end(self, now: float) -> str | None:
        """The reason to end the application; None while it is wanted."""
        if self._num_not_listed >= NOT_LISTED_TIMES:
            return "the application has left Serve"
        unwatched = self._routers.due(now)
        return str(unwatched[0]) if unwatched else None
