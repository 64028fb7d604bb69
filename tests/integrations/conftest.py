"""Single files and tiny pipelines of diffusers are those of ``tests/dialects``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "dialects"))
