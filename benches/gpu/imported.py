"""``python -m benches.gpu.imported PACKAGE``: imports a package and says in one line of JSON what it took and found."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def main(package: str) -> None:
    start = time.perf_counter()
    module: Any = importlib.import_module(package)
    found: dict[str, Any] = {f"import of {package}": round(time.perf_counter() - start, 1)}
    if package == "torch":
        found |= {"cuda": module.version.cuda, "device": None}
        if module.cuda.is_available():
            p = module.cuda.get_device_properties(0)
            found |= {"device": p.name, "arch": f"{p.major}{p.minor}", "multiprocessors": p.multi_processor_count}
            found |= {"bytes": p.total_memory, "l2": getattr(p, "L2_cache_size", None)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
