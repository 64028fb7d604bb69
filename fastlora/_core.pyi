has_cuda: bool
cuda_archs: str

# Numbers of csrc/include/fastlora/kernels.h.
DTYPES: dict[str, int]  # by torch's name
CHAIN_KINDS: dict[str, int]
TRIM_KINDS: dict[str, int]
ELECT_KINDS: dict[str, int]
INFO: dict[str, int]
SYSTEM_ERROR: int  # first of what combine returns: the third is an errno
LEAST_MEAN: float

# The largest matrices that the CUDA kernels take: csrc/include/fastlora/cuda.h.
CUDA_LARGEST_EIGH: int
CUDA_LARGEST_SVD: int
CUDA_LONGEST_SVD: int
CUDA_LARGEST_RANK: int
CUDA_LARGEST_MEAN: int

# Rows: the name of every field, and its code in struct.
CHAIN_FIELDS: tuple[tuple[str, str], ...]
COEFFICIENT_FIELDS: tuple[tuple[str, str], ...]
MERGE_FIELDS: tuple[tuple[str, str], ...]

# Arguments are addresses, sizes, and rows as fastlora.backends.rows packs them.
def isa() -> str: ...
def gram(factors: int, tasks: int, blocks: int, n_tasks: int, threads: int) -> None: ...
def combine(
    factors: int,
    tasks: int,
    outputs: int,
    matrices: int,
    terms: int,
    n_tasks: int,
    to_files: bool,
    threads: int,
) -> tuple[int, int, int]: ...
def finite(data: int, rows: int, cols: int, stride: int, dtype: int) -> bool: ...
def chain(row: bytes) -> None: ...
def merge_select(row: bytes) -> None: ...
def merge_row_masks(row: bytes) -> None: ...
def merge_tiles(row: bytes) -> None: ...
def eigh(a: int, values: int, vectors: int, info: int, batch: int, n: int, is_double: bool, threads: int) -> None: ...
def svd(
    a: int, ut: int, s: int, vt: int, info: int, batch: int, p: int, q: int, is_double: bool, threads: int
) -> None: ...
def cuda_device_count() -> tuple[int, str]: ...
def cuda_error_message(error: int) -> str: ...
def cuda_eigh(
    a: int, values: int, vectors: int, info: int, batch: int, n: int, is_double: bool, stream: int
) -> int: ...
def cuda_svd(
    a: int, ut: int, s: int, vt: int, info: int, batch: int, p: int, q: int, is_double: bool, stream: int
) -> int: ...
def cuda_coefficients(row: bytes, stream: int) -> int: ...
def cuda_chain_workspace(groups: int, k: int, r: int, width: int, kind: int) -> tuple[int, int]: ...
def cuda_chain(row: bytes, workspace: int, stream: int) -> int: ...
