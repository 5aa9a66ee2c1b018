"""The enum's new member is like any other, on every Python at hand; an import is light, and changes PEFT once."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from pythons import PYTHONS

import peft_trex
from peft_trex import registration
from peft_trex.card import complete_card

REGISTRATION = Path(registration.__file__)

# Runs without torch or PEFT, on any Python: the enum is declared as PEFT declares its own.
ENUM_CHECK = f"""
import copy, enum, importlib.util, json, pickle, sys
spec = importlib.util.spec_from_file_location("registration", {str(REGISTRATION)!r})
registration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registration)

class PeftType(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"

member = registration.extend_str_enum(PeftType, "TREX", "TREX")
assert registration.extend_str_enum(PeftType, "TREX", "TREX") is member
assert PeftType("TREX") is PeftType["TREX"] is PeftType.TREX is member
assert list(PeftType) == [PeftType.LORA, PeftType.IA3, member] and len(PeftType) == 3
assert "TREX" in list(PeftType) and member in PeftType and "TREX" in PeftType.__members__
assert member.name == "TREX" and member.value == "TREX" and member == "TREX" and isinstance(member, PeftType)
assert repr(member) == "<PeftType.TREX: 'TREX'>" and hash(member) == hash(PeftType("TREX"))
assert {{member: 1}}[PeftType.TREX] == 1
assert all(pickle.loads(pickle.dumps(member, protocol)) is member for protocol in range(6))
assert copy.copy(member) is member and copy.deepcopy(member) is member
assert json.loads(json.dumps({{"peft_type": member}})) == {{"peft_type": "TREX"}}
assert PeftType.LORA != member and PeftType("LORA") is PeftType.LORA
for name, value in (("OTHER", "LORA"),):
    try:
        registration.extend_str_enum(PeftType, name, value)
    except ValueError as error:
        assert "LORA" in str(error)
    else:
        raise AssertionError("a value was taken twice")
class Number(enum.Enum):
    ONE = 1
try:
    registration.extend_str_enum(Number, "TREX", "TREX")
except TypeError as error:
    assert "Number" in str(error)
else:
    raise AssertionError("a member of another type was added")
print("ok", sys.version_info[:2])
"""


@pytest.mark.parametrize("version", sorted(PYTHONS))
def test_enum_member_on_every_python(version):
    result = subprocess.run([PYTHONS[version], "-c", ENUM_CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"ok {version}" in result.stdout


def test_member_of_pefts_enum():
    member = PeftType("TREX")
    assert member is PeftType.TREX
    assert list(PeftType).count("TREX") == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.dumps(member) == '"TREX"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_trex.TRexConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_trex.TRexModel


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_import_is_light():
    """On top of PEFT, it loads itself, the modules of transformers with its TrainerCallback, and PEFT's optimizers."""
    command = [sys.executable, "-X", "importtime", "-c", "import peft\nimport peft_trex"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.split("|")[-1] for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.strip() for line in lines[lines.index(" peft") + 1 : lines.index(" peft_trex") + 1]}
    assert {"peft_trex", "peft_trex.model"} <= imported
    packages = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages == {"peft", "peft_trex", "transformers"}
    assert all(name.startswith("peft.optimizers") for name in imported if name.partition(".")[0] == "peft")
    assert len([name for name in imported if name.startswith("transformers.")]) < 10


TRAIN_AND_SAVE = """
import os, tempfile, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(1))
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

def train_and_save(config):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**sizes)), folder)
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        saved = {}
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as file:
                saved[name] = file.read()
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    return saved, tokens.tolist(), model.merge_and_unload()(input_ids=ids).logits.tolist()
"""

IMPORT_AGAIN = """
import functools, importlib, sys
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
before = train_and_save(lora)
NAMES = ("load_adapter", "_update_offload", "create_or_update_model_card", "_upload_modified_files")
originals = {name: getattr(PeftModel, name) for name in NAMES}

def import_anew():
    for name in [name for name in sys.modules if name.startswith("peft_trex")]:
        del sys.modules[name]
    return importlib.import_module("peft_trex")

def unwrap(method):
    wrappers = 0
    while hasattr(method, "__wrapped__"):
        method, wrappers = method.__wrapped__, wrappers + 1
    return wrappers, method

peft_trex = import_anew()
first = peft_trex.TRexConfig
for _ in range(2):
    importlib.reload(peft_trex)
    peft_trex = import_anew()
assert peft_trex.TRexConfig is not first
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TREX] is peft_trex.TRexConfig and list(PeftType).count("TREX") == 1
wrapped = {name: unwrap(original)[0] for name, original in originals.items()}
for name, original in originals.items():
    assert unwrap(getattr(PeftModel, name)) == (wrapped[name] + 1, unwrap(original)[1]), name

# what somebody else wraps around it, between two imports, stays
calls = []
ours = PeftModel.load_adapter

@functools.wraps(ours)
def load_adapter(self, *args, **kwargs):
    calls.append(args)
    return ours(self, *args, **kwargs)

PeftModel.load_adapter = load_adapter
peft_trex = import_anew()
assert PeftModel.load_adapter is load_adapter
train_and_save(peft_trex.TRexConfig(target_modules=["q_proj"], use_prior=False, task_type="CAUSAL_LM"))
assert len(calls) == 1
PeftModel.load_adapter = ours
assert train_and_save(lora) == before
print("fine")
"""

WITHOUT_PRIVATE_NAMES = """
import torch.nn.modules.module
from transformers.utils.hub import PushToHubMixin

del PushToHubMixin._upload_modified_files, PeftModel._update_offload
del torch.nn.modules.module._has_any_global_hook
import peft_trex

config = peft_trex.TRexConfig(target_modules=["q_proj"], use_prior=False, task_type="CAUSAL_LM")
saved, tokens, _ = train_and_save(config)
assert "import peft_trex" in saved["README.md"].decode()
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [IMPORT_AGAIN, WITHOUT_PRIVATE_NAMES], ids=["again", "without private names"])
def test_import(script):
    """Imported again or reloaded, nothing is replaced twice, and LoRA is before and after the same to the last bit.

    Without private names of torch, transformers and PEFT that it uses here and there, the rest of it works.
    """
    result = _run(TRAIN_AND_SAVE + script)
    assert result.stdout.strip().endswith("fine"), result.stderr


@pytest.mark.slow
def test_a_method_of_pefts_own_is_left_alone():
    result = _run(
        "import warnings, importlib.util, peft\n"
        "from peft import IA3Config, IA3Model\n"
        "from peft.utils import PeftType, register_peft_method\n"
        f"spec = importlib.util.spec_from_file_location('registration', {str(REGISTRATION)!r})\n"
        "registration = importlib.util.module_from_spec(spec); spec.loader.exec_module(registration)\n"
        "registration.extend_str_enum(PeftType, 'TREX', 'TREX')\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "register_peft_method(name='trex', config_cls=IA3Config, model_cls=type('M', (), {}))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import peft_trex\n"
        "assert any('brings a method TREX of its own' in str(w.message) for w in caught), caught\n"
        "assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TREX] is IA3Config\n"
        "try:\n"
        "    peft_trex.TRexConfig()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "brings its own" in result.stdout, result.stderr


@pytest.mark.slow
def test_the_error_of_an_adapter_without_the_import_stands_beside_its_cure(tmp_path):
    peft_trex.TRexConfig().save_pretrained(tmp_path)
    result = _run(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert "TREX" in error and len(error) > 10
    (tmp_path / "README.md").write_text("A card.")
    complete_card(str(tmp_path / "README.md"), "AutoModelForCausalLM", {})
    root = REGISTRATION.parents[2]
    for page in (tmp_path / "README.md", root / "README.md", root / "docs" / "guide" / "coming-from-lora.md"):
        # The exact error stands beside its cure.
        cured = [part for part in page.read_text().split("\n## ") if error in part]
        assert any("import peft_trex" in part and "install" in part for part in cured), page
