"""Text of the model's own: drawn from its own distribution, begun as it is begun with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.calibration import own_text as own_text_module
from edgepeft.exporters.calibration.own_text import own_text
from edgepeft.exporters.sources.open import opened_source

from .. import models, task_models

TEMPLATE = "{% for m in messages %}w7 w8 {{ m.role }} {{ m.content }} w9 {% endfor %}"


def language_model() -> Any:
    model = models.llama(tied=False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    return model


def test_it_is_drawn_from_the_models_distribution() -> None:
    """What it says is on average as surprising to it as its predictions are uncertain."""
    model = language_model()
    model.generation_config.eos_token_id = [int(token) for token in range(4, 60)]
    kept = model.generation_config
    needs = [weight.requires_grad for weight in model.parameters()]
    with opened_source(model, task=None, labels=None, seed=0) as source:
        feeds = own_text(source, 0)
        again = own_text(source, 0)
        assert source.model.generation_config is not None
    assert model.generation_config is kept
    assert [weight.requires_grad for weight in model.parameters()] == needs
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(feeds, again, strict=True))
    ids = torch.cat([feed["input_ids"] for feed in feeds])
    assert len(ids) == own_text_module.TEXTS
    with torch.no_grad():
        said = model(ids).logits[:, :-1].log_softmax(-1)
    surprise = -said.gather(-1, ids[:, 1:, None])
    entropy = -(said.exp() * said).sum(-1)
    excess = surprise.squeeze(-1) - entropy
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / excess.numel() ** 0.5
    assert float(entropy.mean()) < 0.9 * torch.tensor(float(said.shape[-1])).log()
    firsts = ids[:, 0].tolist()
    assert len(set(firsts)) > len(firsts) // 2


@pytest.mark.parametrize("template", [TEMPLATE, "{{ raise_exception('no') }}", None])
def test_half_begins_as_conversations_do(tmp_path: Path, template: str | None) -> None:
    folder = task_models.save_with_words(language_model(), tmp_path / "model")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with opened_source(str(folder), task=None, labels=None, seed=0) as source:
        ids = torch.cat([feed["input_ids"] for feed in own_text(source, 0)])
        words = source.tokenizer.convert_ids_to_tokens(ids[0, :3].tolist())
    begun = sum(row[:2].tolist() == ids[0, :2].tolist() for row in ids)
    assert (begun == own_text_module.TEXTS // 2) == (template == TEMPLATE)
    if template == TEMPLATE:
        assert words[:2] == ["w7", "w8"]


def test_a_model_that_cannot_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no state")

    monkeypatch.setattr(model, "generate", fail)
    with (
        opened_source(model, task=None, labels=None, seed=0) as source,
        pytest.raises(ExportError, match=r"cannot write .*\(no state\): name texts with .*--quick"),
    ):
        own_text(source, 0)
