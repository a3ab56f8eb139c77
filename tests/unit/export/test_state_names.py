"""Names in a state dict: what wrappers put before them is left off, and config.json translates the rest."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beamline_export.families.registry import detect
from beamline_export.spec import Checkpoint as Read
from beamline_export.spec import ExportError, check_weights
from beamline_export.state_names import name_state, unknown_targets


def read(folder: Path) -> Read:
    checkpoint = detect(folder).read(folder)
    check_weights(checkpoint)
    return checkpoint


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[change(name)] = state.pop(name)

    return rename


def same_weights(a: Read, b: Read) -> bool:
    return set(a.weights) == set(b.weights) and all((a.weights[n] == b.weights[n]).all() for n in a.weights)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "a.b."]
)
def test_what_all_names_begin_with_is_left_off_and_told(prefix: str, checkpoint: Any) -> None:
    """As DataParallel, torch.compile, Lightning, or a module around the model name tensors."""
    plain = read(checkpoint.folder)
    wrapped = read(checkpoint.tensors(renamed(lambda name: prefix + name)))
    assert same_weights(wrapped, plain)
    assert any("it is left off" in notice for notice in wrapped.notices)
    for part in prefix.rstrip(".").split("."):
        assert any(f"{part}." in notice for notice in wrapped.notices)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_compiled_part_is_read(wrapper: str, checkpoint: Any) -> None:
    """The names of torch.compile, FSDP and activation checkpointing stand wherever the wrapped part is."""
    plain = read(checkpoint.folder)
    rename = renamed(lambda name: name.replace("transformer.encoder.", f"transformer.encoder.{wrapper}."))
    wrapped = read(checkpoint.tensors(rename))
    assert same_weights(wrapped, plain)
    assert wrapped.notices == (f"names in the file contain '{wrapper}.'; it is left off",)


def test_an_averaged_model_is_read_without_its_counter(checkpoint: Any) -> None:
    plain = read(checkpoint.folder)
    checkpoint.tensors(renamed(lambda name: f"module.{name}"))
    averaged = read(checkpoint.tensors(lambda state: state.update({"n_averaged": torch.tensor(7)})))
    assert same_weights(averaged, plain)


def test_messages_speak_of_names_as_they_are_in_the_file(checkpoint: Any) -> None:
    checkpoint.tensors(renamed(lambda name: f"module.{name}"))
    checkpoint.tensors(lambda state: state.update({"module.extra": torch.ones(3)}))
    with pytest.raises(ExportError, match=r"model: module\.extra \[3\]; module\.src_embed\.weight has shape"):
        read(checkpoint.config(source_vocab_size=80))


def test_a_prefix_that_not_all_names_have_is_left(checkpoint: Any) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        renamed(lambda name: f"model.{name}")(state)
        state["criterion.weight"] = torch.ones(120)

    checkpoint.tensors(rename)
    with pytest.raises(ExportError, match=r"not part of the model: criterion\.weight \[120\], model\.generator"):
        read(checkpoint.folder)
    read(checkpoint.config(names={"model.": "", "criterion.weight": None}))


def test_names_and_beginnings_of_names_are_translated(checkpoint: Any) -> None:
    plain = read(checkpoint.folder)

    def foreign(name: str) -> str:
        name = name.replace("src_embed.weight", "embed_in").replace("tgt_embed.weight", "embed_out")
        name = name.replace("transformer.decoder.layers.0.", "dec.first.").replace("transformer.", "core.")
        return f"module.{name}".replace("generator.", "to_words.out.")

    names = {
        "embed_in": "src_embed.weight",
        "module.embed_out": "tgt_embed.weight",  # with or without what is left off
        "core.": "transformer.",
        "dec.": "nowhere.",
        "dec.first.": "transformer.decoder.layers.0.",  # the longest counts
        "to_words.out.": "generator.",
    }
    checkpoint.tensors(renamed(foreign))
    with pytest.raises(ExportError, match=r"names: no name in the file begins with 'dec\.'"):
        read(checkpoint.config(names=names))
    names.pop("dec.")
    translated = read(checkpoint.config(names=names))
    assert same_weights(translated, plain)
    assert translated.weight_names["source_embedding"] == "module.embed_in"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"src_embed": "src_embed.weight"}, r"no name in the file is 'src_embed' \(did you mean src_embed\.weight\?\)"),
        ({"encoder.": "transformer.encoder."}, r"no name in the file begins with 'encoder\.'"),
        (
            {"src_embed.weight": "src_embed.wieght"},
            r"becomes 'src_embed\.wieght', which is not known \(did you mean src",
        ),
        ({"transformer.": "transfomer."}, r"'transformer\.' becomes 'transfomer\.', which no known name begins with"),
        ({"generator.bias": "generator.weight"}, r"are both called generator\.weight"),
        ({"generator.": "generator"}, "both must end with a dot, or neither"),
        ({"generator.bias": "generator."}, "both must end with a dot, or neither"),
        ({"generator.bias": ""}, "both must end with a dot, or neither"),
        ({"generator.bias": 3}, "must become a name, or null"),
        (["generator.bias"], "names must be an object"),
    ],
)
def test_a_translation_that_makes_no_sense_is_named(names: Any, problem: str, checkpoint: Any) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: (names: )?.*{problem}"):
        read(checkpoint.config(names=names))


def test_one_tensor_alone_keeps_its_name() -> None:
    assert set(name_state({"a.b": np.ones(1, np.float32)}, {}).tensors) == {"a.b"}
    assert set(name_state({}, {}).tensors) == set()


def test_all_wrong_entries_are_told_at_once() -> None:
    state = {"a.x": np.ones(1, np.float32), "b.x": np.ones(1, np.float32)}
    with pytest.raises(ExportError, match=r"no name in the file is 'c'; no name in the file begins with 'd\.'"):
        name_state(state, {"d.": "e.", "c": "f"})


@pytest.mark.parametrize("second", [None, "generator.bias"])
@pytest.mark.parametrize(
    "other", ["module.generator.bias", "module._orig_mod.generator.bias", "_orig_mod.generator.bias"]
)
def test_two_entries_for_one_name_are_both_named(other: str, second: str | None, checkpoint: Any) -> None:
    """With and without what is left off, one name; neither entry may win unseen."""
    checkpoint.tensors(renamed(lambda name: f"module.{name}"))
    names = {"generator.bias": "generator.bias", other: second}
    with pytest.raises(ExportError, match=rf"names: 'generator\.bias' and '{re.escape(other)}' are one name; keep one"):
        read(checkpoint.config(names=names))


BIAS = "is left out, as names in config.json says; the model has zeros there"


@pytest.mark.parametrize("bias", ["generator.bias", "transformer.encoder.layers.0.self_attn.in_proj_bias"])
def test_a_bias_that_is_left_out_is_zero_and_told(bias: str, checkpoint: Any) -> None:
    whole = read(checkpoint.folder)
    without = read(checkpoint.config(names={bias: None}))
    assert without.notices == (f"{bias} {BIAS}",)
    changed = {name for name, weight in whole.weights.items() if (weight != without.weights[name]).any()}
    assert changed
    assert not any(without.weights[name].any() for name in changed)


def test_a_bias_that_is_left_out_by_a_longer_entry_is_told_too(checkpoint: Any) -> None:
    checkpoint.tensors(renamed(lambda name: name.replace("generator.", "out.")))
    without = read(checkpoint.config(names={"out.": "generator.", "out.bias": None}))
    assert without.notices == (f"out.bias {BIAS}",)


def test_what_the_model_does_without_is_left_out_and_told(checkpoint: Any) -> None:
    plain = read(checkpoint.folder)
    checkpoint.tensors(lambda state: state.update({f"criterion.{i}.bias": torch.ones(3) for i in range(7)}))
    read_so = read(checkpoint.config(names={"criterion.": None}))
    assert same_weights(read_so, plain)
    (notice,) = read_so.notices
    assert notice.startswith("criterion.0.bias, criterion.1.bias, ")
    assert notice.endswith("criterion.4.bias and 2 more are left out, as names in config.json says")


def test_another_tensor_may_stand_for_one_that_is_left_out(checkpoint: Any) -> None:
    checkpoint.tensors(lambda state: state.update({"averaged": torch.full((120,), 0.5)}))
    averaged = read(checkpoint.config(names={"generator.bias": None, "averaged": "generator.bias"}))
    assert (averaged.weights["head.bias"] == 0.5).all()
    assert averaged.notices == ("generator.bias is left out, as names in config.json says",)


@pytest.mark.parametrize("beginning", ["model.", "model.model."])
def test_an_inner_name_that_is_the_prefix_as_well_is_translated(beginning: str, checkpoint: Any) -> None:
    """As Lightning's `self.model` around a module that has a `self.model` itself."""
    plain = read(checkpoint.folder)
    checkpoint.tensors(renamed(lambda name: f"model.{name.replace('transformer.', 'model.', 1)}"))
    assert same_weights(read(checkpoint.config(names={beginning: "transformer."})), plain)


def test_many_names_and_many_entries_take_no_longer_for_being_both() -> None:
    """Each name asks for the entries that it may have, not each entry for its names: in pairs, this would be hours."""
    state = {f"old.{i}.weight": np.ones(1, np.float32) for i in range(20_000)}
    names = {f"old.{i}.": f"new.{i}." for i in range(20_000)}
    assert name_state(state, names).origins["new.777.weight"] == "old.777.weight"
    assert len(list(unknown_targets({**names, "old.x.": "b."}, {f"new.{i}.bias" for i in range(20_000)}))) == 1


def test_entries_that_fit_nothing_are_told_in_bounds() -> None:
    state = {f"{i}.weight": np.ones(1, np.float32) for i in range(9)}
    with pytest.raises(ExportError) as caught:
        name_state(state, {f"x{i}.": "y." for i in range(10_000)})
    problems = str(caught.value).split("; ")
    assert len(problems) == 9
    assert problems[-1] == "9992 more fit no name"
