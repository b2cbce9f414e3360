"""A linear whose weight is read past its call takes no LoRA: PEFT's would do nothing there."""

from pathlib import Path

import pytest

import edgepeft
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.model_info import default_targets

from .. import models, zoo

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def test_default_targets_leave_out_what_is_never_called() -> None:
    targets = default_targets(load_source(zoo.build("wavlm")))
    assert not [name for name in targets if name.endswith(ATTENTION)]
    assert [name for name in targets if name.endswith("intermediate_dense")]
    hubert = default_targets(load_source(zoo.build("hubert")))
    assert {name.rpartition(".")[2] for name in hubert} >= set(ATTENTION)


def test_an_adapter_on_what_is_never_called_is_refused(tmp_path: Path) -> None:
    folder = models.save_adapter(zoo.build("wavlm"), tmp_path / "adapter", 0, r=2, target_modules=["v_proj"])
    with pytest.raises(edgepeft.AdapterError, match=r"never calls its module wavlm\..*v_proj"):
        edgepeft.export(zoo.build("wavlm"), tmp_path / "bundle", adapters={"deaf": folder})
    with pytest.raises(edgepeft.AdapterError, match=r"never calls its module wavlm\..*q_proj"):
        edgepeft.export(zoo.build("wavlm"), tmp_path / "bundle", rank=2, targets=["q_proj"])
