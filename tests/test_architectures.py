"""Every causal LM class of transformers: converted, saved, loaded and equal, or refused before anything is written."""

import copy
import re
from pathlib import Path

import architectures
import pytest
import torch
import transformers
from architectures import KINDS, V, expected_outcomes, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels.conversion import DotMoeConfig, DotMoeForCausalLM
from dotmoe_kernels.models.block import all_experts

FORMERLY_BROKEN = [
    "exaone",  # names that transformers rewrites
    "gemma3",  # that, and images
    "got_ocr2",
    "hrm_text",
    "olmo_hybrid",
    "falcon_h1",  # a buffer that is in no file
    "gemma4_unified_text",  # values that differ by layer
    "moshi",  # a config that does not say the width
    "xlstm",
]
WHY = {  # the message's words -> the table's
    "already sparse": "already sparse",
    "no FFN was recognised": "no gated FFN of three linear layers",
    "has biases": "biases",
    "an FFN of its own": "one FFN for several layers",
    "that transformers itself provides": "its text config has no causal LM class",
    "has the name of an attribute": "a child with the name of an attribute of ours",
}


class Refused(Exception):
    pass


def tokens():
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def generated(model):
    return model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)


def names_in(folder):
    return {name for file in Path(folder).glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def assert_same(model, again):
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(again, kind)())
        assert ours.keys() == theirs.keys()
        different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
        assert not different, f"{kind}: {different}"


def attempt(what, *arguments):
    """What a dense model gives, or None where it fails by itself: no matter of ours."""
    try:
        return what(*arguments)
    except Exception as error:
        print(f"{what.__name__}: {type(error).__name__}: {error}")
        return None


def convert(dense):
    """Refusals are ValueErrors; any other error is a fault."""
    try:
        return dk.convert(dense, DotMoeConfig(num_experts=4, top_k=2))
    except ValueError as error:
        message = str(error)
        assert "allowed:" in message or "looked for:" in message
        assert "\n" not in message
        raise Refused(next((why for words, why in WHY.items() if words in message), message)) from error


def outcome(kind, folder):
    """ "equal", "not made" or "refused: why"; anything else is an AssertionError."""
    dense = attempt(tiny_model, kind)
    if dense is None:
        return "not made"
    try:
        sparse = convert(copy.deepcopy(dense))
    except Refused as refused:
        return f"refused: {refused}"
    reference, text = attempt(logits, dense), attempt(generated, dense)
    dense.save_pretrained(folder / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert_same(dense, loaded)  # the oracle
    dk.save(sparse, folder / "sparse")
    again = dk.load(folder / "sparse")
    assert_same(sparse, again)
    ours = {n for n in names_in(folder / "sparse") if not re.search(r"\.(gate\.weight|experts\.\w+|neuron_order)$", n)}
    assert ours <= names_in(folder / "dense")
    for model, name in ((convert(loaded), "of a file"), (again, "shards")):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        assert_same(sparse, DotMoeForCausalLM.from_pretrained(folder / name))
    if reference is None:
        return "not made"
    with all_experts(sparse):
        torch.testing.assert_close(logits(sparse), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert torch.equal(logits(sparse), logits(again))
    if text is not None:
        with all_experts(sparse):
            assert torch.equal(generated(sparse), text)
        assert torch.equal(generated(sparse), generated(again))
    return "equal"


def check(kind, folder):
    found = outcome(kind, folder)
    version, expected = expected_outcomes()
    if transformers.__version__.startswith(version):
        assert found == expected.get(kind), "a change: if it is right, write it into architectures.toml"


@pytest.mark.parametrize("kind", FORMERLY_BROKEN)
def test_formerly_broken(kind, tmp_path):
    if kind not in KINDS:
        pytest.skip(f"this transformers has no {kind}")
    check(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FORMERLY_BROKEN])
def test_every_architecture(kind, tmp_path):
    check(kind, tmp_path)


def test_the_table_is_of_one_mind():
    """Each kind once, and those that are not made with a reason."""
    text = Path(architectures.__file__).with_suffix(".toml").read_text(encoding="utf-8")
    _, expected = expected_outcomes()
    kinds = re.findall(r'"([\w-]+)",', text) + re.findall(r'^"?([\w-]+)"? = "\D', text, flags=re.M)
    assert sorted(kinds) == sorted(expected)
