"""provgen: image generators that can name their sources.

The names below load their modules, and with them torch, when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = ["Attribution", "ProvenanceNetwork", "ProvenancePipeline", "__version__", "load_images", "trace"]

if TYPE_CHECKING:
    from provgen.data.sources import load_images
    from provgen.models.provenance import ProvenanceNetwork
    from provgen.pipeline import ProvenancePipeline
    from provgen.tracing.attribution import Attribution
    from provgen.tracing.trace import trace

_MODULES = {
    "Attribution": "provgen.tracing.attribution",
    "ProvenanceNetwork": "provgen.models.provenance",
    "ProvenancePipeline": "provgen.pipeline",
    "load_images": "provgen.data.sources",
    "trace": "provgen.tracing.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
