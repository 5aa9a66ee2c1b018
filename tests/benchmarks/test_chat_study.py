"""The study of chats: what is asked, how it is scored, and the command from its first line to its last."""

import pytest
import torch
from conftest import adapted
from small_model import load_model
from studies import chat
from tasks import TASKS
from texts import save_tiny_model

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[answer] "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    _, tokenizer = load_model(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_what_is_asked_was_not_trained_on():
    train, test = chat.held_out(8)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len(test) > len(chat.held_out(0)[1]) == 192 and {row["task"] for row in test} == set(TASKS)
    asked = chat.conversations(train, test)
    task_of = {row["prompt"]: (row["task"], row["answer"]) for row in train}
    for row, single, system, later in zip(test, *asked.values(), strict=True):
        assert single == system[1:] == later[2:] == [{"role": "user", "content": row["prompt"]}]
        assert system[0] == {"role": "system", "content": chat.SYSTEM}
        task, answer = task_of[later[0]["content"]]
        assert task != row["task"] and later[1] == {"role": "assistant", "content": answer}


def test_an_answer_is_that_of_its_own_row(base):
    model, tokenizer = load_model(str(base))
    _, rows = chat.held_out(0)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows[:9]]
    wanted = []
    for one in chats:
        text = tokenizer.apply_chat_template(one, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        new = model.generate(**ids, max_new_tokens=14, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        wanted.append({"answer": text.strip().split("\n")[0].rstrip(".")})
    assert len({row["answer"] for row in wanted}) > 6
    assert chat.right(model, tokenizer, chats, wanted, batch_size=4).tolist() == [1.0] * 9
    wanted[2], wanted[5] = {"answer": "no"}, {"answer": "no"}
    assert chat.right(model, tokenizer, chats, wanted, batch_size=4).tolist() == [
        float(i not in (2, 5)) for i in range(9)
    ]


def test_the_table():
    rows = [{"task": "a"}, {"task": "b"}, {"task": "a"}, {"task": "b"}]
    table = chat.compare({"single": torch.tensor([1.0, 1, 0, 1]), "later": torch.tensor([1.0, 0, 0, 1])}, rows)
    assert "| single | 75.0 % | +0.0 (+0.0 to +0.0) | 0.50 | 1.00 |" in table
    # Changes of 0, -1, 0 and 0 have the standard deviation 0.5, and their mean half of that.
    assert "| later | 50.0 % | -25.0 (-74.0 to +24.0) | 0.50 | 0.50 |" in table


@pytest.mark.slow
def test_the_command(base, tmp_path, capsys):
    model, _ = load_model(str(base))
    adapted(base=model).save_pretrained(tmp_path)
    assert chat.main([str(tmp_path), "--model", str(base), "--test", "0"]) == 0
    lines = capsys.readouterr().out
    for name in ("single turn", "another system prompt", "after another task"):
        assert f"{name}: " in lines and f"| {name} | " in lines
    assert "% of 192 prompts" in lines
