"""An adapter goes to a hub and comes back: the real client of huggingface_hub against a hub on loopback.

That client reads its environment when it is imported, so whatever talks to the hub runs in a process of its own, with
an empty cache; the processes meet in one folder, where the base model lies as "tiny-llama".
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import adapted
from hub_server import Hub, serve
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig

COMMON = """
import json, torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

tokens = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(1))
batch = {"input_ids": tokens, "attention_mask": torch.arange(9) < torch.tensor([[9], [7], [5], [3]])}

def write_logits(model, name):
    with torch.no_grad(), open(name, "wb") as file:
        file.write(model.eval()(**batch).logits.numpy().tobytes())

def error_of(repo):
    try:
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("tiny-llama"), repo)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

PUSH = """
from huggingface_hub import HfApi
from peft_trex import TRexConfig, initialize_trex_prior

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).save_pretrained("tiny-llama")
config = TRexConfig(
    r_a=2, r_b=3, num_clusters=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
)
model = get_peft_model(LlamaForCausalLM.from_pretrained("tiny-llama"), config)
prompts = torch.randint(1, 64, (4, 6, 9))
initialize_trex_prior(model, [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in prompts], progress=False)
with torch.no_grad():  # these two start at zero, where losing them would not show
    for name, parameter in model.named_parameters():
        if "trex_omega" in name or "trex_gate" in name:
            parameter.fill_(0.01)
write_logits(model, "pushed.bin")
with model.disable_adapter():
    write_logits(model, "base.bin")

model.push_to_hub("me/adapter")
model.save_pretrained("folder")
HfApi().create_repo("me/from-folder")
HfApi().upload_folder(repo_id="me/from-folder", folder_path="folder")
"""

LOAD = """
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("tiny-llama"), "me/adapter")
write_logits(model, "loaded.bin")
model.save_pretrained("again")
print(json.dumps(error_of("me/absent")))
"""

PUSH_INJECTED = """
import torch, sys
from peft import LoraConfig
from peft_trex import TRexConfig, initialize_trex_prior
import transformers.integrations.peft

# transformers asks for a later PEFT than the newest one, in the methods that add adapters.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.21.0"
targets = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
configs = {
    "lora": LoraConfig(**targets, init_lora_weights=False),
    "injected": TRexConfig(**targets, r_a=2, r_b=3, num_clusters=4, init_weights=False),
}
for name, config in configs.items():
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained("tiny-llama")
    model.add_adapter(config)
    if name == "injected":
        prompts = torch.randint(1, 64, (4, 6, 9))
        data = [{"input_ids": p, "attention_mask": torch.ones_like(p)} for p in prompts]
        initialize_trex_prior(model, data, progress=False)
    write_logits(model, f"{name}.bin")
    model.push_to_hub(f"me/{name}", tags=["mine"])
    model.save_pretrained(f"{name}-folder")
"""

LOAD_INJECTED = """
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

def ways(repo):
    yield AutoModelForCausalLM.from_pretrained(repo)
    model = LlamaForCausalLM.from_pretrained("tiny-llama")
    model.load_adapter(repo)
    yield model
    yield PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("tiny-llama"), repo)

for name in ("lora", "injected"):
    for number, model in enumerate(ways(f"me/{name}")):
        write_logits(model, f"{name}-{number}.bin")
    model.save_pretrained(f"{name}-again")

# A repository whose weights are a pickle.
torch.save(load_file("injected-folder/adapter_model.safetensors"), "pickle.bin")
api, errors = HfApi(), []
api.create_repo("me/pickled")
config = "injected-folder/adapter_config.json"
for path, name in ((config, "adapter_config.json"), ("pickle.bin", "adapter_model.bin")):
    api.upload_file(repo_id="me/pickled", path_or_fileobj=path, path_in_repo=name)
model = LlamaForCausalLM.from_pretrained("tiny-llama")
try:
    model.load_adapter("me/pickled")
except ValueError as error:
    errors.append(str(error))
print(json.dumps([errors, [name for name, _ in model.named_modules() if "trex" in name]]))
"""

ASK = """
import json
from huggingface_hub import HfApi, hf_hub_download

api = HfApi()
info = api.model_info("me/adapter")
with open(hf_hub_download("me/adapter", "adapter_config.json", revision=info.sha)) as file:
    peft_type = json.load(file)["peft_type"]
print(json.dumps({
    "siblings": [file.rfilename for file in api.model_info("me/adapter", revision=info.sha).siblings],
    "tree": {file.path: file.size for file in api.list_repo_tree("me/adapter")},
    "exists": [api.file_exists("me/adapter", name) for name in ("README.md", "absent.json")],
    "peft_type": peft_type,
}))
"""


class Pushed(NamedTuple):
    hub: Hub
    folder: Path

    def run(self, name: str, script: str) -> str:
        """Run a script as a fresh process that knows only this hub; its standard output."""
        package = find_spec("peft_trex")
        assert package is not None and package.origin is not None
        foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        environment = {
            "PYTHONPATH": os.pathsep.join([str(Path(package.origin).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / f"home-{name}"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "any",
            "NO_PROXY": "127.0.0.1",
            # with one thread, the order of sums cannot differ between two processes
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.folder,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            pytest.fail(f"{name} failed:\n{done.stderr[-4000:]}\n{self.traffic()}", pytrace=False)
        return done.stdout

    def traffic(self) -> str:
        return "\n  ".join(["requests:", *self.hub.seen, "of these without a route:", *self.hub.unknown])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    with serve() as hub:
        pushed = Pushed(hub, tmp_path_factory.mktemp("hub"))
        pushed.run("push", COMMON + PUSH)
        yield pushed
        assert not hub.unknown, pushed.traffic()


class Loaded(NamedTuple):
    logits: bytes
    weights: bytes
    error_of_missing_repo: str


@pytest.fixture(scope="module")
def loaded(pushed: Pushed) -> Loaded:
    """What one process of a user gets who loads the adapter, and then another that is not there."""
    error = json.loads(pushed.run("load", "import peft_trex\n" + COMMON + LOAD))
    logits, weights = (pushed.folder / name for name in ("loaded.bin", "again/adapter_model.safetensors"))
    return Loaded(logits.read_bytes(), weights.read_bytes(), error)


def test_push_sends_the_adapter(pushed: Pushed) -> None:
    files = pushed.hub.repos["me/adapter"].files
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("TREX", "tiny-llama")


def test_loaded_adapter_computes_the_same_bits(pushed: Pushed, loaded: Loaded) -> None:
    before, base = ((pushed.folder / name).read_bytes() for name in ("pushed.bin", "base.bin"))
    assert len(before) == 4 * 9 * 64 * 4
    assert before != base
    assert loaded.logits == before


def test_loaded_adapter_holds_the_same_bits(pushed: Pushed, loaded: Loaded) -> None:
    # not every tensor shows in the logits: the prior's mean scores serve merging alone
    assert loaded.weights == pushed.hub.repos["me/adapter"].files["adapter_model.safetensors"]


def test_missing_repository_is_named(loaded: Loaded) -> None:
    assert loaded.error_of_missing_repo == "ValueError: Can't find 'adapter_config.json' at 'me/absent'"


def test_without_the_import_the_method_is_unknown(pushed: Pushed) -> None:
    printed = pushed.run("without-import", COMMON + 'print(json.dumps(error_of("me/adapter")))')
    assert json.loads(printed) == "KeyError: 'TREX'"


@pytest.mark.parametrize(
    "repo",
    [
        "me/from-folder",
        "me/adapter",
    ],
)
def test_model_card(pushed: Pushed, repo: str) -> None:
    card = ModelCard(pushed.hub.repos[repo].files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert card.data.base_model == "tiny-llama"
    assert "trex" in card.data.tags
    assert "import peft_trex" in card.text
    assert "\nfrom transformers import AutoModelForCausalLM\n" in card.text
    assert '\nbase = AutoModelForCausalLM.from_pretrained("tiny-llama")\n' in card.text


def test_the_card_of_a_model_for_which_transformers_has_no_class(tmp_path: Path) -> None:
    config = TRexConfig(target_modules=["0"], use_prior=False, task_type="FEATURE_EXTRACTION")
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config).save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert '\nbase = AutoModel.from_pretrained("the base model")\n' in text


@pytest.fixture(scope="module")
def injected(pushed: Pushed) -> tuple[Pushed, str]:
    """LoRA and T-REX that transformers' own methods have put into a model and pushed, and what others then load."""
    pushed.run("push-injected", COMMON + PUSH_INJECTED)
    return pushed, pushed.run("load-injected", "import peft_trex\n" + COMMON + LOAD_INJECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "injected"])
def test_what_transformers_pushes_comes_back(injected: tuple[Pushed, str], name: str) -> None:
    pushed, _ = injected
    folder, files = pushed.folder, pushed.hub.repos[f"me/{name}"].files
    before = (folder / f"{name}.bin").read_bytes()
    assert before != (folder / "base.bin").read_bytes()
    assert [(folder / f"{name}-{number}.bin").read_bytes() == before for number in range(3)] == [True] * 3
    weights = files["adapter_model.safetensors"]
    assert (folder / f"{name}-folder" / "adapter_model.safetensors").read_bytes() == weights
    # The last of them is a PeftModel, whose file has the same tensors.
    again = load((folder / f"{name}-again" / "adapter_model.safetensors").read_bytes())
    expected = load(weights)
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in again)
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny-llama"


@pytest.mark.slow
def test_the_card_of_what_transformers_pushes(injected: tuple[Pushed, str]) -> None:
    pushed, _ = injected
    card = ModelCard(pushed.hub.repos["me/injected"].files["README.md"].decode())
    assert {"trex", "mine"} <= set(card.data.tags)
    assert card.data.base_model == "tiny-llama"
    assert card.text.count("import peft_trex  # registers the method with PEFT") == 1
    assert '\nbase = LlamaForCausalLM.from_pretrained("tiny-llama")\n' in card.text
    # Its save_pretrained writes no card into a folder, of whatever method the adapter is.
    assert not list(pushed.folder.glob("*-folder/README.md"))
    assert "trex" not in pushed.hub.repos["me/lora"].files["README.md"].decode().lower()


@pytest.mark.slow
def test_a_pickle_on_a_hub_is_refused_by_transformers_too(injected: tuple[Pushed, str]) -> None:
    [error], left = json.loads(injected[1])
    assert "Pickles can run code and are not read" in error and not left


def test_client_reads_the_repository(pushed: Pushed) -> None:
    answer = json.loads(pushed.run("ask", ASK))
    files = pushed.hub.repos["me/adapter"].files
    assert answer["siblings"] == sorted(files)
    assert answer["tree"] == {path: len(content) for path, content in files.items()}
    assert answer["exists"] == [True, False]
    assert answer["peft_type"] == "TREX"


def test_unknown_route_is_recorded() -> None:
    with serve() as hub:
        connection = HTTPConnection("127.0.0.1", hub.server_port, timeout=10)
        connection.request("GET", "/api/nothing")
        assert connection.getresponse().status == 404
        connection.close()
    assert hub.unknown == ["GET /api/nothing"]


def test_a_trainers_card_keeps_what_loading_needs(tmp_path: Path) -> None:
    model = adapted()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    model.save_pretrained(tmp_path)
    Trainer(model=model, args=arguments).create_model_card(model_name="tuned")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert "trex" in card.data.tags
    assert card.text.count("import peft_trex  # registers the method with PEFT") == 1
    assert "# tuned" in card.text
    assert re.search(r"\S\n\n## Loading this adapter\n\n", card.text)
