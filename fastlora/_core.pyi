has_cuda: bool
cuda_archs: str

def isa() -> str: ...
def gram(factors: int, tasks: int, blocks: int, n_tasks: int, threads: int) -> None: ...
def combine(
    factors: int, tasks: int, outputs: int, matrices: int, terms: int, n_tasks: int, threads: int
) -> None: ...
def chain(
    left: int,
    right: int,
    floor: int,
    basis: int,
    values: int,
    shared: int,
    kept: int,
    sigma: int,
    info: int,
    groups: int,
    k: int,
    r: int,
    width: int,
    kind: int,
    threshold: float,
    rtol: float,
    rank: int,
    energy: float,
    threads: int,
) -> None: ...
def eigh(
    a: int, values: int, vectors: int, info: int, batch: int, n: int, is_double: bool, threads: int
) -> None: ...
def svd(
    a: int, ut: int, s: int, vt: int, info: int, batch: int, p: int, q: int, is_double: bool, threads: int
) -> None: ...
def cuda_device_count() -> tuple[int, str]: ...
def cuda_self_test(out: int, count: int, stream: int) -> int: ...
