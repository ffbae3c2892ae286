"""A site's context, for filters without a federation around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext


class Site:
    """A site's context: an engine with components, and a folder."""

    def __init__(self, folder: Path, **components: Any) -> None:
        self.components = components
        self.context = FLContext()
        self.context.set_prop(FLContextKey.APP_ROOT, str(folder), private=True)
        self.context.get_engine = lambda *_, **__: self
        self.context.get_identity_name = lambda *_, **__: "site-9"

    def get_component(self, name: str) -> Any:
        return self.components.get(name)

    def get_all_components(self) -> dict[str, Any]:
        return self.components

    def new_context(self) -> FLContext:
        return self.context

    def fire_event(self, event: str, context: FLContext) -> None:
        """Nobody listens here to what is logged."""
