"""``python first_launch.py LIBRARY INPUT P Q float32|float64``: one svd on the emulator, the first launch of its
process; writes ut, s and vt behind each other beside the input. Without torch, so that a process takes a tenth of a
second."""

import importlib.util
import sys
from array import array
from pathlib import Path

library, source, p, q, dtype = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
spec = importlib.util.spec_from_file_location("_emulated", library)
assert spec is not None and spec.loader is not None
emulated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulated)

code, m = {"float32": "f", "float64": "d"}[dtype], min(p, q)
a = array(code, source.read_bytes())
outputs = [array(code, bytes(size * a.itemsize)) for size in (m * p, m, m * q)]
info = array("i", [-1])
addresses = [x.buffer_info()[0] for x in (a, *outputs, info)]
error = emulated.cuda_svd(*addresses, batch=1, p=p, q=q, is_double=code == "d", stream=0)
if error or info[0]:
    sys.exit(f"error {error}, info {info[0]}: {emulated.cuda_error_message(error)}")
source.with_suffix(".out").write_bytes(b"".join(x.tobytes() for x in outputs))
