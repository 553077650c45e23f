"""The encoder as one Python file that needs timm alone, for people who cannot install this package."""

import ast
import inspect
from types import ModuleType

from mixmim_ds.models import (
    attention,
    blocks,
    encoder,
    grids,
    grouped,
    groups,
    masking,
    mixmim_sizes,
    recompute,
    tables,
)
from mixmim_ds.version import __version__

# each needs only those before it
MODULES = (grouped, recompute, masking, grids, groups, tables, attention, blocks, encoder, mixmim_sizes)
HEAD = f'''"""The MixMIM encoder (arXiv 2205.13137) for timm >= 1.0.31, put together by mixmim_ds {__version__}.

    import sys
    sys.path.insert(0, "FOLDER")
    import timm, mixmim
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

Licensed under the Apache License 2.0.
"""
'''


def architecture_source() -> str:
    """Python source that defines the encoder and, when it is imported, registers its sizes with timm."""
    imports: list[str] = []
    bodies: list[str] = []
    for module in MODULES:
        taken, body = _split(module)
        imports += taken
        bodies.append(body)
    return "\n".join([HEAD, *sorted(set(imports)), "", "", "\n\n\n".join(bodies), ""])


def _split(module: ModuleType) -> tuple[list[str], str]:
    """A module's imports from elsewhere, and all that follows its imports."""
    source = inspect.getsource(module)
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    outside = [node for node in nodes if not (isinstance(node, ast.ImportFrom) and "mixmim_ds" in str(node.module))]
    end = max(node.end_lineno or 0 for node in nodes)
    return [ast.unparse(node) for node in outside], "\n".join(source.splitlines()[end:]).strip()
