"""The nodes. Only ComfyUI imports this file: it has the modules that are imported here.

Each node's ``execute`` has an argument for every input, by its id; ``lora_c`` and ``lora_d`` may be left unconnected.
Results have the names that ComfyUI reads in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

import fastlora as fl
from fastlora.adapters.pool import require_updates
from fastlora.dialects.families import families
from fastlora.errors import InputError
from fastlora.integrations.comfy.reports import comparison, decomposition_report, result_report
from fastlora.integrations.comfy.states import READ, State, adapter_of, state_of, state_to_read

CATEGORY = "fastlora"
LORA = io.Custom("LORA_MODEL")
LETTERS = "abcd"
AS_IT_IS = "as it is"
FORMATS = [READ, "kohya", "diffusers", "xlabs"]
DTYPES = [AS_IT_IS, "float16", "bfloat16", "float32"]
DETECTED = "detected"
FAMILIES = [DETECTED, *sorted(families())]
HIGHEST_RANK = 4096


def lora_inputs(least: int = 2, most: int = 4) -> list[Any]:
    """Inputs ``lora_a``, ``lora_b``, …; those beyond ``least`` may be left unconnected."""
    return [LORA.Input(f"lora_{letter}", optional=i >= least) for i, letter in enumerate(LETTERS[:most])]


def rank_input(default: int = 0, least: int = 0) -> Any:
    """The rank of a result; 0 leaves it to the method."""
    return io.Int.Input("rank", default=default, min=least, max=HIGHEST_RANK)


def report_output() -> Any:
    """What a node says about its result."""
    return io.String.Output(display_name="report")


def adapters_of(**states: State | None) -> list[fl.Adapter]:
    """The adapters of the inputs that are connected, called ``a``, ``b``, …"""
    named = {name.removeprefix("lora_"): state for name, state in states.items() if state is not None}
    return [adapter_of(state, name) for name, state in named.items()]


def settings_of(text: str) -> dict[str, Any]:
    """``{name: value}`` of ``density=0.3, seed=1``; the method knows what it takes."""
    parts = [part.partition("=") for part in text.replace(",", " ").split()]
    wrong = next((name for name, equals, value in parts if not (name.isidentifier() and equals and value)), None)
    if wrong is not None:
        raise InputError(f"settings {text!r}: write name=value, such as density=0.3, without blanks around =")
    return {name: value for name, _, value in parts}


def handed_on(adapter: fl.Adapter, notes: list[str], kept: object = None) -> Any:
    """A result and its report."""
    state, more = state_to_read(adapter)
    return io.NodeOutput(state, result_report(adapter, [*notes, *more], kept))


class LoadFile(io.ComfyNode):  # type: ignore[misc]
    """A file of the folder ``loras``, whatever its format, as ComfyUI reads it in full."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraLoad",
            display_name="Load LoRA file (fastlora)",
            category=CATEGORY,
            description="Of any format; names that ComfyUI would pass over become names that it reads.",
            inputs=[
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras")),
                io.Combo.Input("family", options=FAMILIES, default=DETECTED),
            ],
            outputs=[LORA.Output(display_name="lora"), report_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> Any:
        """Changes with the file, which may be replaced under its name."""
        status = Path(folder_paths.get_full_path_or_raise("loras", lora_name)).stat()
        return f"{status.st_mtime_ns}-{status.st_size}"

    @classmethod
    def execute(cls, lora_name: str, family: str = DETECTED) -> Any:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        given = require_updates(fl.load(path, family=None if family == DETECTED else family), "Load LoRA file")
        state, notes = state_to_read(given)
        return io.NodeOutput(state, "\n".join([comparison([given]), *(f"note: {note}" for note in notes)]))


class Merge(io.ComfyNode):  # type: ignore[misc]
    """One LoRA from two to four, exact on ``ΔW``."""

    @classmethod
    def define_schema(cls) -> Any:
        methods = [n for n, m in fl.methods().items() if not m.takes_data and not _required(m)]
        weights = [
            io.Float.Input(f"weight_{letter}", default=1.0, min=-10.0, max=10.0, step=0.01) for letter in LETTERS
        ]
        return io.Schema(
            node_id="FastloraMerge",
            display_name="Merge LoRAs (fastlora)",
            category=CATEGORY,
            description="svd: the best LoRA of the rank for the weighted sum. cat: the sum itself, ranks add up.",
            inputs=[
                *lora_inputs(),
                *weights,
                io.Combo.Input("method", options=["svd", *(m for m in methods if m != "svd")], default="svd"),
                rank_input(),
                io.String.Input("settings", default="", optional=True, tooltip="of the method, such as density=0.3"),
            ],
            outputs=[LORA.Output(display_name="lora"), report_output()],
        )

    @classmethod
    def execute(
        cls,
        lora_a: State,
        lora_b: State,
        lora_c: State | None = None,
        lora_d: State | None = None,
        weight_a: float = 1.0,
        weight_b: float = 1.0,
        weight_c: float = 1.0,
        weight_d: float = 1.0,
        method: str = "svd",
        rank: int = 0,
        settings: str = "",
    ) -> Any:
        pool = fl.Pool(adapters_of(lora_a=lora_a, lora_b=lora_b, lora_c=lora_c, lora_d=lora_d))
        given = dict(zip(LETTERS, (weight_a, weight_b, weight_c, weight_d), strict=True))
        cuts = rank > 0 and "rank" in fl.methods()[method].parameters
        weights = {name: given[name] for name in pool.names}
        merged = fl.merge(pool, weights, method=method, rank=rank if cuts else None, **settings_of(settings))
        if rank > 0 and not cuts:
            merged = merged.compress(rank)
        return handed_on(merged, list(pool.notices), merged.provenance.get("retained_energy"))


class Compose(io.ComfyNode):  # type: ignore[misc]
    """An expression over LoRAs."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraCompose",
            display_name="Compose LoRAs (fastlora)",
            category=CATEGORY,
            description="An expression over a, b, c, d: 0.7*a + 0.3*b - 0.5*unique(c | a). rank 0 keeps all of it.",
            inputs=[
                *lora_inputs(least=1),
                io.String.Input("expression", default="0.7*a + 0.3*b"),
                rank_input(),
            ],
            outputs=[LORA.Output(display_name="lora"), report_output()],
        )

    @classmethod
    def execute(
        cls,
        lora_a: State,
        lora_b: State | None = None,
        lora_c: State | None = None,
        lora_d: State | None = None,
        expression: str = "a",
        rank: int = 0,
    ) -> Any:
        adapters = adapters_of(lora_a=lora_a, lora_b=lora_b, lora_c=lora_c, lora_d=lora_d)
        result = require_updates(fl.compose(expression, {a.name: a for a in adapters}), "Compose")
        if rank > 0:
            result = result.compress(rank)
        return handed_on(result, [], result.provenance.get("retained_energy"))


class Decompose(io.ComfyNode):  # type: ignore[misc]
    """What two LoRAs share, and what is left of each."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraDecompose",
            display_name="Shared and unique parts of LoRAs (fastlora)",
            category=CATEGORY,
            description="Directions above the threshold are shared. Independent LoRAs share little: try 0.3 to 0.5.",
            inputs=[
                *lora_inputs(most=2),
                io.Float.Input("threshold", default=0.5, min=0.0, max=0.99, step=0.01),
            ],
            outputs=[
                *(LORA.Output(display_name=name) for name in ("shared", "unique_a", "unique_b")),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, lora_a: State, lora_b: State, threshold: float = 0.5) -> Any:
        pool = fl.Pool(adapters_of(lora_a=lora_a, lora_b=lora_b))
        parts = fl.decompose(pool, threshold)
        written = [state_to_read(part) for part in (parts.shared, parts.unique_of("a"), parts.unique_of("b"))]
        notes = [*pool.notices, *(note for _, told in written for note in told)]
        return io.NodeOutput(*(state for state, _ in written), decomposition_report(parts.report, notes))


class Resize(io.ComfyNode):  # type: ignore[misc]
    """A LoRA of a lower rank."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraResize",
            display_name="Resize LoRA (fastlora)",
            category=CATEGORY,
            description="The best LoRA of at most this rank in every module, or that keeps a share of Σσ².",
            inputs=[
                LORA.Input("lora"),
                io.Combo.Input("by", options=["rank", "energy"], default="rank"),
                rank_input(16, 1),
                io.Float.Input("energy", default=0.95, min=0.01, max=1.0, step=0.01),
            ],
            outputs=[LORA.Output(display_name="lora"), report_output()],
        )

    @classmethod
    def execute(cls, lora: State, by: str = "rank", rank: int = 16, energy: float = 0.95) -> Any:
        given = adapter_of(lora, "lora")
        result = given.compress(rank) if by == "rank" else given.compress(energy=energy)
        return handed_on(result, [], result.provenance["retained_energy"])


class Convert(io.ComfyNode):  # type: ignore[misc]
    """The same ``ΔW`` under the names of another format."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraConvert",
            display_name="Convert LoRA (fastlora)",
            category=CATEGORY,
            description="The same LoRA in the names of another program, for Save LoRA file.",
            inputs=[
                LORA.Input("lora"),
                io.Combo.Input("format", options=FORMATS, default=READ),
                io.Combo.Input("family", options=FAMILIES, default=DETECTED),
            ],
            outputs=[LORA.Output(display_name="lora"), report_output()],
        )

    @classmethod
    def execute(cls, lora: State, format: str = READ, family: str = DETECTED) -> Any:
        given = adapter_of(lora, "lora", None if family == DETECTED else family)
        state, notes = state_of(given, format)
        return io.NodeOutput(state, result_report(given, [*notes, f"{len(state)} tensors in the names of {format}"]))


class Save(io.ComfyNode):  # type: ignore[misc]
    """A file in the folder of outputs."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraSave",
            display_name="Save LoRA file (fastlora)",
            category=CATEGORY,
            is_output_node=True,
            inputs=[
                LORA.Input("lora"),
                io.String.Input("filename_prefix", default="loras/fastlora"),
                io.Combo.Input("format", options=[AS_IT_IS, *FORMATS], default=AS_IT_IS),
                io.Combo.Input("dtype", options=DTYPES, default=AS_IT_IS),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def execute(cls, lora: State, filename_prefix: str, format: str = AS_IT_IS, dtype: str = AS_IT_IS) -> Any:
        output = folder_paths.get_output_directory()
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, output)
        given = adapter_of(lora, name)
        path = given.save(
            Path(folder) / f"{name}_{counter:05}_.safetensors",
            format=None if format == AS_IT_IS else format,
            dtype=None if dtype == AS_IT_IS else dtype,
        )
        return io.NodeOutput(str(path))


class Report(io.ComfyNode):  # type: ignore[misc]
    """What LoRAs hold, and how alike they are."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="FastloraReport",
            display_name="Report on LoRAs (fastlora)",
            category=CATEGORY,
            description="Sizes and norms; of several, cosines of ΔW and the overlap of the spaces they write to.",
            inputs=lora_inputs(least=1),
            outputs=[report_output()],
        )

    @classmethod
    def execute(
        cls, lora_a: State, lora_b: State | None = None, lora_c: State | None = None, lora_d: State | None = None
    ) -> Any:
        return io.NodeOutput(comparison(adapters_of(lora_a=lora_a, lora_b=lora_b, lora_c=lora_c, lora_d=lora_d)))


class FastloraExtension(ComfyExtension):  # type: ignore[misc]
    """The pack."""

    async def get_node_list(self) -> list[type]:
        """All nodes."""
        return [LoadFile, Merge, Compose, Decompose, Resize, Convert, Save, Report]


def _required(method: Any) -> bool:
    return any(parameter.required for parameter in method.parameters.values())
