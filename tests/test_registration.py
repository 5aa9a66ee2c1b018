"""The enum's new member behaves like any other, on every Python at hand, and the package registers once."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_trex
from peft_trex import registration

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


def _pythons():
    """Interpreters beside this one, those of pyenv included: versions that are named but not there are left out."""
    found = {}
    candidates = [sys.executable] + [shutil.which(f"python3.{minor}") for minor in range(10, 15)]
    home = Path.home() / ".pyenv" / "versions"
    candidates += sorted(str(path) for path in home.glob("3.1[0-4]*/bin/python"))
    for path in filter(None, candidates):
        probe = subprocess.run([path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
        if probe.returncode == 0:
            found.setdefault(probe.stdout.strip(), path)
    return found


PYTHONS = _pythons()


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
def test_importing_again_registers_the_new_classes():
    result = _run(
        "import sys, peft_trex\n"
        "first = peft_trex.TRexConfig\n"
        "for name in [name for name in sys.modules if name.startswith('peft_trex')]:\n"
        "    del sys.modules[name]\n"
        "import peft_trex\n"
        "from peft import PeftType\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "assert list(PeftType).count('TREX') == 1\n"
        "assert peft_trex.TRexConfig is not first\n"
        "assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TREX] is peft_trex.TRexConfig\n"
        "peft_trex.TRexConfig()\n"
        "print('fine')\n"
    )
    assert result.stdout.strip() == "fine", result.stderr


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
def test_an_adapter_without_the_import_names_the_method(tmp_path):
    peft_trex.TRexConfig().save_pretrained(tmp_path)
    result = _run(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert result.returncode != 0
    assert "KeyError" in result.stderr and "TREX" in result.stderr
