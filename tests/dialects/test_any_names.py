"""Names at random: what is read is said by the name itself, whatever else is in the file."""

from __future__ import annotations

import random

from fastlora.dialects.detect import identify
from fastlora.dialects.families import families
from fastlora.dialects.family import Family
from fastlora.dialects.patterns import ANY, filled

FAMILIES = families()
PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "transformer.", "unet.", "diffusion_model.", "")
LETTERS = "abqkv0129._-#{} é\n"
ROUNDS = 8000


def flat(path: str) -> str:
    return path.replace(".", "_")


def is_of(pattern: str, path: str) -> bool:
    """Whether a pattern stands for a path."""
    words, own = pattern.split("."), path.split(".")
    return len(words) == len(own) and all(w in (ANY, o) for w, o in zip(words, own, strict=True))


def of_path(family: Family, pattern: str, path: str) -> list[str]:
    """The dotted names that a family knows for a canonical path."""
    numbers = [o for w, o in zip(pattern.split("."), path.split("."), strict=True) if w == ANY]
    return spellings(family, pattern, numbers)


def spellings(family: Family, pattern: str, numbers: list[str]) -> list[str]:
    """The dotted names that a family knows for a module, one for each row of its tables."""
    texts = [pattern, family.names[pattern], *(t for t, c in family.also_read.items() if c == pattern)]
    return [filled(text, numbers) for text in texts if text]


def at_random(chance: random.Random, family: Family) -> str:
    """A dotted name of a family."""
    pattern = chance.choice(tuple(family.names))
    numbers = [str(chance.randrange(40)) for _ in range(pattern.count(ANY))]
    return chance.choice(spellings(family, pattern, numbers))


def damaged(chance: random.Random, name: str) -> str:
    """A name with one to three letters changed, lost, doubled or put in."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(name) + 1)
        kept = name[at:] if chance.random() < 0.3 else name[at + 1 :]
        name = name[:at] + chance.choice((*LETTERS, "", name[at : at + 1] * 2)) + kept
    return name


def test_a_name_is_only_read_as_what_it_says() -> None:
    """A damaged name is none, or the name of another module, letter by letter."""
    chance = random.Random(1)
    read = 0
    for _ in range(ROUNDS):
        family = FAMILIES[chance.choice(tuple(FAMILIES))]
        text = at_random(chance, family)
        is_flat = chance.random() < 0.5
        text = damaged(chance, flat(text) if is_flat else text)
        named = family.from_flat(text) if is_flat else family.canonical(text)
        if named is None:
            continue
        read += 1
        own = next(p for p in family.names if is_of(p, named.path))  # one of a single block comes first
        texts = of_path(family, own, named.path)
        assert text in ([flat(t) for t in texts] if is_flat else texts), (family.name, text, named)
    assert read > ROUNDS // 100


def test_every_stem_is_a_module_or_is_told() -> None:
    """Files of random names, sound and damaged: nothing fails, nothing is left out, and the order does not matter."""
    chance = random.Random(2)
    whole, refused = 0, 0
    for _ in range(ROUNDS // 40):
        family = FAMILIES[chance.choice(tuple(FAMILIES))]
        prefix = chance.choice(PREFIXES)
        stems: list[str] = []
        for _ in range(chance.randint(1, 12)):
            text = at_random(chance, family)
            stem = prefix + (flat(text) if prefix.endswith("_") else text)
            stems.append(damaged(chance, stem) if chance.random() < 0.05 else stem)
        shapes = {stem: chance.choice((None, (64, 64), (192, 64), (3072, 3072))) for stem in stems}
        found = identify(shapes)
        assert {*found.modules, *found.unmatched} == {*stems} and not {*found.modules} & {*found.unmatched}
        assert not found.unmatched or found.family is None
        turned = identify(dict(reversed(shapes.items())))
        assert (turned.family, set(turned.candidates)) == (found.family, set(found.candidates))
        if not found.unmatched:
            assert dict(turned.modules) == dict(found.modules)
        asked = identify(shapes, family=family.name)
        sound = {stem: named.module for stem, named in asked.modules.items()}
        if found.family == family.name:
            assert {stem: named.module for stem, named in found.modules.items()} == sound
        whole += not found.unmatched
        refused += bool(found.unmatched)
    assert whole > 50 and refused > 5


def test_any_text_is_a_stem() -> None:
    chance = random.Random(3)
    for _ in range(ROUNDS // 8):
        stems = {"".join(chance.choices(LETTERS, k=chance.randint(0, 9))) for _ in range(chance.randint(0, 3))}
        stems = {chance.choice((*PREFIXES, "lora_te1_", "text_encoders.", "base_model.model.")) + s for s in stems}
        found = identify(dict.fromkeys(stems), {"ss_base_model_version": chance.choice(("sd", "flux", "é"))})
        assert {*found.modules, *found.unmatched} == stems
