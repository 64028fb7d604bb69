has_cuda: bool
cuda_archs: str

# Arguments are addresses and sizes in the order of csrc/bind/cpu.cpp.
def isa() -> str: ...
def gram(*arguments: int) -> None: ...
def combine(*arguments: int) -> tuple[int, int, int]: ...
def finite(data: int, rows: int, cols: int, stride: int, dtype: int) -> bool: ...
def chain(*arguments: float) -> None: ...
def eigh(a: int, values: int, vectors: int, info: int, batch: int, n: int, is_double: bool, threads: int) -> None: ...
def svd(
    a: int, ut: int, s: int, vt: int, info: int, batch: int, p: int, q: int, is_double: bool, threads: int
) -> None: ...
def cuda_device_count() -> tuple[int, str]: ...
def cuda_error_message(error: int) -> str: ...
def cuda_self_test(out: int, count: int, stream: int) -> int: ...
def cuda_eigh(
    a: int, values: int, vectors: int, info: int, batch: int, n: int, is_double: bool, stream: int
) -> int: ...
def cuda_svd(
    a: int, ut: int, s: int, vt: int, info: int, batch: int, p: int, q: int, is_double: bool, stream: int
) -> int: ...
def cuda_coefficients(
    projected: int,
    other: int,
    basis: int,
    scaling: int,
    strength: int,
    H: int,
    norms: int,
    shared: int,
    removal: int,
    mixing: int,
    groups: int,
    k: int,
    r: int,
    w: int,
    movers: int,
    removal_row: int,
    removal_column: int,
    mixing_row: int,
    mixing_column: int,
    stream: int,
) -> int: ...
def cuda_chain_workspace(groups: int, k: int, r: int, width: int, kind: int) -> tuple[int, int]: ...
def cuda_chain(
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
    workspace: int,
    stream: int,
) -> int: ...
