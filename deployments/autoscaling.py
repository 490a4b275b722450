"""How many replicas a deployment has: as many as its requests ask for, within what the plan allows."""

from typing import Any


def autoscaling(least: int, most: int, target: int) -> dict[str, Any]:
    """Serve's `autoscaling_config` for `target` requests per replica, those that wait for one among them."""
    return {"min_replicas": least, "max_replicas": max(least, most), "target_ongoing_requests": target}
