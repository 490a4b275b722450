"""Athena's own web server: Streamlit behind the door, with the settings that it always has."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from deployments.athena.door import Door, Guard, Settings

SCRIPT = Path(__file__).parent / "shell.py"
THEME = {
    "base": "light", "primaryColor": "#1e6658", "backgroundColor": "#ffffff", "secondaryBackgroundColor": "#f3f5f3",
    "textColor": "#1f2a30", "linkColor": "#1e6658", "borderColor": "#dfe4e1", "codeBackgroundColor": "#f3f5f3",
    "baseRadius": "8px", "baseFontSize": 15, "showWidgetBorder": True, "showSidebarBorder": True,
    "headingFontWeights": [650, 600, 600], "headingFontSizes": ["1.7rem", "1.25rem", "1.05rem"],
    "sidebar.backgroundColor": "#f6f7f5", "sidebar.secondaryBackgroundColor": "#e9edea",
    "greenColor": "#1e6658", "redColor": "#b4411f", "orangeColor": "#b4771f", "grayColor": "#5b6970",
    "chartCategoricalColors": ["#1e6658", "#d08a3c", "#5b7f95", "#9a6a8e", "#8aa05a"],
}  # fmt: skip

_doors: list[Door] = []


def door() -> Door | None:
    """That of this process, once it serves."""
    return _doors[0] if _doors else None


def build(settings: Settings) -> uvicorn.Server:
    """A server that does not run yet. One in each process."""
    os.environ["STREAMLIT_BROWSER_GATHER_USAGE_STATS"] = "false"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import streamlit as st
        from starlette.middleware import Middleware
        from streamlit.web import bootstrap

    bootstrap.load_config_options(options(settings))
    opened = Door(settings)
    _doors[:] = [opened]
    app = st.App(SCRIPT, middleware=[Middleware(Guard, door=opened)])
    return uvicorn.Server(uvicorn.Config(
        app, host=settings.host, port=settings.port, log_level="warning", access_log=False, use_colors=False,
        ws="websockets-sansio", server_header=False, timeout_graceful_shutdown=2,
    ))  # fmt: skip


def options(settings: Settings) -> dict[str, object]:
    """Streamlit's settings, by its own names."""
    megabytes = max(1, settings.most_upload_bytes // 2**20)
    return {
        "browser.gatherUsageStats": False, "client.toolbarMode": "minimal", "client.showErrorDetails": "none",
        "client.showErrorLinks": False, "client.disableDataExport": True, "global.developmentMode": False,
        "server.headless": True, "server.fileWatcherType": "none", "server.runOnSave": False,
        "server.enableCORS": True, "server.enableXsrfProtection": True, "server.enableStaticServing": False,
        "server.enableAgentApi": False, "server.maxUploadSize": megabytes, "server.address": settings.host,
        "server.port": settings.port, "runner.magicEnabled": False, "secrets.files": [], "logger.level": "warning",
        **{f"theme.{name}": value for name, value in THEME.items()},
    }  # fmt: skip


def main() -> None:
    """Serve as a process of its own, with the settings of its environment, which none but its owner can read."""
    build(settings_from(json.loads(os.environ.pop("ATHENA_SETTINGS")))).run()


def settings_from(told: Mapping[str, Any]) -> Settings:
    """Settings that were told as JSON."""
    return Settings(**{**told, "hosts": tuple(told["hosts"])})


if __name__ == "__main__":
    from deployments.athena import server  # this module runs as __main__, and the pages import it by its name

    server.main()
